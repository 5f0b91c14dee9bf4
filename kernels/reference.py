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


def typical_probabilities(scores: torch.Tensor, typical_p: float) -> torch.Tensor:
    """What typical-p leaves of a row of scores [V]: probabilities [V], 0 where left out (Meister et al. 2022)."""
    probs = scores.double().softmax(0)
    surprise = -probs.log()
    far = (surprise - (probs * surprise).sum()).abs()
    ordered, ids = far.sort(stable=True)
    last = ordered[(probs[ids].cumsum(0) < typical_p).sum().clamp(max=len(ids) - 1)]
    kept = probs.masked_fill(far > last, 0.0)
    return kept / kept.sum()


def choose(
    logits: torch.Tensor, seen: torch.Tensor, rows: torch.Tensor, penalty: torch.Tensor, temperature: torch.Tensor,
    top_k: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor, wanted: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Tokens [S] int64 and logprobs [S] fp32; arguments and meaning as in kernels/gpu/sampling.py."""
    tokens = torch.full((len(logits),), -1, dtype=torch.int64)
    logprobs = torch.zeros(len(logits))
    for s, raw in enumerate(logits.float()):
        if raw.isnan().any() or raw.max().isinf():
            continue
        marks = seen[rows[s]]
        scores = torch.where(marks > 0, torch.where(raw > 0, raw / penalty[s], raw * penalty[s]), raw)
        if temperature[s] == 0:
            token = int((scores == scores.max()).int().argmax())
        else:
            k = min(int(top_k[s]), len(raw))
            heat, p = float(temperature[s]), float(top_p[s])
            running = kept_probabilities(scores.double(), heat, k, p if p < 1 else torch.inf).cumsum(0)
            past = running > uniform[s] * running[-1]
            token = int(past.int().argmax()) if past.any() else int((running < running[-1]).sum())
        tokens[s] = token
        if wanted[s]:
            logprobs[s] = raw[token] - raw.logsumexp(0)
    return tokens, logprobs
