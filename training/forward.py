"""A frozen GPT-2 over packed tokens, in which each voice's tokens pass through its own LoRA:

    y = x W + b + s dropout(x) A_v^T B_v^T,      x [N, in], W [in, out], A_v [r, in], B_v [out, r], s = alpha / r

Transformers and PEFT hold the weights; this computes with them. It differs from their forward in two ways: no padding
is multiplied, and one pass serves several voices. Tested against both. Only LoRA's matrices ever get a gradient.

The base's own dropout (0.1 in gpt2-medium's configuration) is left out: what is frozen has nothing to be kept from.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from training.loss import frozen_head_losses
from training.packing import Packed

PLAIN_ATTENTION = (
    192  # places of a row up to which torch's fused attention in bf16 is the slower on a CPU (decision 12)
)


@dataclass(frozen=True)
class Lane:
    """One voice in a pass: its adapter's name in the PEFT model (None: the base alone), the seed of its dropout."""

    adapter: str | None
    dropout: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class _Pass:
    """What one pass's layers have in common."""

    packed: Packed
    lanes: Sequence[Lane]
    dtype: torch.dtype


def token_losses(
    model: Any, packed: Packed, lanes: Sequence[Lane], dtype: torch.dtype = torch.float32, checkpointing: bool = False
) -> list[torch.Tensor]:
    """Of each voice: the cross-entropy in nats of its kept tokens, in order, with a graph for the backward pass."""
    base = model.get_base_model()
    hidden = _hidden(base, packed, lanes, dtype, checkpointing)  # [N, C]
    kept = packed.kept
    losses = frozen_head_losses(hidden[kept], base.lm_head.weight.to(dtype), packed.targets[kept])
    return list(losses.split([int(part.sum()) for part in kept.split(packed.sizes)]))


def _hidden(base: Any, packed: Packed, lanes: Sequence[Lane], dtype: torch.dtype, checkpointing: bool) -> torch.Tensor:
    """The hidden states before the head: [N, C] in `dtype`. The sum over layers is kept in fp32."""
    transformer = base.transformer
    this = _Pass(packed, lanes, dtype)
    x = transformer.wte(packed.ids) + transformer.wpe(packed.positions)  # [N, C]
    for number, block in enumerate(transformer.h):
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(_block, this, number, block, x, base.config, use_reentrant=False, preserve_rng_state=False)
        else:
            x = _block(this, number, block, x, base.config)
    return transformer.ln_f(x).to(dtype)


def _block(this: _Pass, number: int, block: Any, x: torch.Tensor, config: Any) -> torch.Tensor:
    attention, mlp = block.attn, block.mlp
    qkv = _linear(this, 4 * number, attention.c_attn, block.ln_1(x))  # [N, 3 C]
    mixed = _attention(this.packed, qkv, number, config)  # [N, C]
    x = x + _linear(this, 4 * number + 1, attention.c_proj, mixed)
    inner = mlp.act(_linear(this, 4 * number + 2, mlp.c_fc, block.ln_2(x)))  # [N, 4 C]
    return x + _linear(this, 4 * number + 3, mlp.c_proj, inner)


def _attention(packed: Packed, qkv: torch.Tensor, number: int, config: Any) -> torch.Tensor:
    """Causal attention within each row: the grid's empty places come after a row's own, so that none is seen."""
    heads, width = config.n_head, qkv.shape[1] // 3
    scale = 1 / math.sqrt(width // heads) if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= number + 1
    grid = qkv.new_zeros(packed.rows * packed.longest, 3 * width).index_copy(0, packed.places, qkv)
    grid = grid.view(packed.rows, packed.longest, 3, heads, -1).permute(2, 0, 3, 1, 4)  # [3, R, H, T, Dh]
    plain = qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and packed.longest <= PLAIN_ATTENTION
    with sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        mixed = functional.scaled_dot_product_attention(grid[0], grid[1], grid[2], is_causal=True, scale=scale)
    return mixed.transpose(1, 2).reshape(-1, width).index_select(0, packed.places)  # [N, C]


def _linear(this: _Pass, place: int, layer: Any, x: torch.Tensor) -> torch.Tensor:
    """One projection of all tokens, [N, in] -> [N, out]. `place` tells the model's projections apart."""
    frozen = getattr(layer, "base_layer", layer)
    x = x.to(this.dtype)
    y = torch.addmm(frozen.bias.to(this.dtype), x, frozen.weight.to(this.dtype))
    if frozen is layer:
        return y  # no adapter on it
    deltas = []
    for lane, part, share in zip(this.lanes, x.split(this.packed.sizes), this.packed.shares, strict=True):
        if lane.adapter is None:
            deltas.append(torch.zeros_like(y[: len(part)]))
            continue
        down, up = (m[lane.adapter].weight.to(this.dtype) for m in (layer.lora_A, layer.lora_B))  # [r, in], [out, r]
        if lane.dropout:
            part = part * _mask(lane, place, share.whole, share.mine, part)
        deltas.append((part @ down.T) @ (layer.scaling[lane.adapter] * up.T))
    return y + torch.cat(deltas)


def _mask(lane: Lane, place: int, whole: int, mine: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Dropout's factors, [n, in]. They depend on the voice's seed and the place alone: not on the other voices, the
    number of processes, or whether this is the first time or a checkpointed layer's second."""
    generator = torch.Generator(x.device).manual_seed(lane.seed * 4096 + place)
    mask = torch.empty(whole, x.shape[1], dtype=x.dtype, device=x.device)
    mask.bernoulli_(1 - lane.dropout, generator=generator).div_(1 - lane.dropout)
    return mask if mine is None else mask.index_select(0, mine)
