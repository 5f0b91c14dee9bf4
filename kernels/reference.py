"""The kernels' operations in plain torch, the truth they are tested against; LoRA's is adapters/lora/reference.py."""

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y [M, N] = x [M, K] W + b, with W [K, N] and b [N]."""
    return x @ weight if bias is None else torch.addmm(bias.to(x.dtype), x, weight)


def norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """x [N, d] += delta in place, if there is one; the layer norm of x. weight, bias [d] fp32."""
    if delta is not None:
        x += delta
    return F.layer_norm(x.float(), weight.shape, weight, bias, eps).to(x.dtype)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, elementwise."""
    return F.gelu(x, approximate="tanh")


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One token of each of D sequences over its own cache row; its key and value are written there first.

    qkv [D, 3, H, Dh]; keys, values [rows, H, max_len, Dh]; rows, positions [D] int64. Returns [D, H Dh].
    """
    q, k, v = qkv.unbind(1)
    keys[rows, :, positions] = k
    values[rows, :, positions] = v
    longest = int(positions.max()) + 1
    mask = torch.arange(longest, device=qkv.device) <= positions[:, None]  # [D, T]
    k, v = keys[rows, :, :longest], values[rows, :, :longest]
    out = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask[:, None, None], scale=scale)
    return out[:, :, 0].flatten(1)


def kept_probabilities(scores: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """What temperature, top-k and top-p leave of a row of scores [V]: probabilities [V], 0 where left out."""
    scores = scores / temperature
    best = scores.topk(min(top_k, len(scores))).values[-1]
    probs = scores.masked_fill(scores < best, -torch.inf).softmax(0)
    ordered, ids = probs.sort(descending=True, stable=True)
    kept = ordered.masked_fill(ordered.cumsum(0) - ordered >= top_p, 0.0)
    return torch.zeros_like(probs).scatter(0, ids, kept / kept.sum())
