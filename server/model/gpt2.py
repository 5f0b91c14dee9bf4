"""GPT-2, the whole model in one file.

One forward takes a flat run of tokens from any number of sequences: one token of each that is decoding, then chunks of
prompts. Knows nothing of requests, sampling or where adapters come from. Source: Radford et al. 2019; the arithmetic
follows `transformers.GPT2LMHeadModel`, which the tests hold it to.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from adapters.adapter import TARGETS, ModuleKey
from server.model.backend import Backend, Embedding, Linear, Norm
from server.model.config import GPT2Config


class Lora(Protocol):
    """What the forward needs of a batch's adapters."""

    def add(self, y: torch.Tensor, x: torch.Tensor, key: ModuleKey) -> None:
        """y [N, out] += each row's adapter applied to x [N, in]; in place."""
        ...


@dataclass(frozen=True)
class Layer:
    """One block: its two norms and four projections."""

    ln_1: Norm
    attn_c_attn: Linear
    attn_c_proj: Linear
    ln_2: Norm
    mlp_c_fc: Linear
    mlp_c_proj: Linear


@dataclass(frozen=True)
class PromptChunk:
    """A run of one sequence's prompt tokens inside the flat batch."""

    start: int  # first index in the flat batch
    length: int  # tokens in this chunk
    row: int  # KV row
    context: int  # tokens of the sequence that are in the row already


@dataclass(frozen=True)
class ForwardBatch:
    """One forward's tokens, N in all: D decoding tokens first, then the prompt chunks. Set by the model runner."""

    token_ids: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    rows: torch.Tensor  # [N] int64, each token's KV row; the first D ascend
    num_decode: int  # D
    decode_rows: tuple[int, int] | None  # [first, last) when the first D rows are consecutive, else None
    max_decode_len: int  # the longest decoding sequence, this token included
    chunks: tuple[PromptChunk, ...]
    output_index: torch.Tensor  # [S] int64, the tokens after which one is chosen


class GPT2:
    """Frozen weights and the forward pass."""

    def __init__(
        self,
        config: GPT2Config,
        backend: Backend,
        wte: Embedding,
        wpe: torch.Tensor,  # [positions, d]
        layers: list[Layer],
        ln_f: Norm,
    ) -> None:
        self.config, self.backend = config, backend
        self.wte, self.wpe, self.layers = wte, wpe, layers
        self.ln_f = ln_f
        self._keys = [[ModuleKey(i, target) for target in TARGETS] for i in range(len(layers))]
        self._activation = backend.activation(config.activation_function)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        parts = [self.wte, self.wpe, self.ln_f]
        return sum(part.nbytes for part in [*parts, *(part for layer in self.layers for part in vars(layer).values())])

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.wpe.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and caches."""
        return self.wpe.dtype

    def forward(
        self, batch: ForwardBatch, k_cache: torch.Tensor, v_cache: torch.Tensor, lora: Lora | None
    ) -> torch.Tensor:
        """Logits [S, V] of `batch.output_index`, of the backend's type; writes the batch's keys and values too.

        As `hidden`, and `logits` of its result.
        """
        return self.logits(self.hidden(batch, k_cache, v_cache, lora)[batch.output_index])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, V] of hidden states [S, d], of the backend's type."""
        return self.wte.logits(self.ln_f(hidden))

    def hidden(
        self, batch: ForwardBatch, k_cache: torch.Tensor, v_cache: torch.Tensor, lora: Lora | None
    ) -> torch.Tensor:
        """Every token's state after the last layer [N, d]; writes the batch's keys and values.

        k_cache, v_cache [layers, rows, H, max_len, Dh]; `lora` None when every row is the base's.
        """
        x = self.wte.rows(batch.token_ids) + self.wpe[batch.positions]  # [N, d]
        delta = None  # what the last projection adds to x [N, d]
        for i, (w, (c_attn, c_proj, c_fc, mlp_c_proj)) in enumerate(zip(self.layers, self._keys, strict=True)):
            h = w.ln_1(x, delta)
            qkv = _project(h, w.attn_c_attn, c_attn, lora)
            h = self._attend(i, qkv, batch, k_cache[i], v_cache[i])  # [N, d]
            delta = _project(h, w.attn_c_proj, c_proj, lora)
            h = w.ln_2(x, delta)
            h = _project(h, w.mlp_c_fc, c_fc, lora)
            h = self._activation(h)  # [N, inner]
            delta = _project(h, w.mlp_c_proj, mlp_c_proj, lora)
        if delta is not None:
            x += delta
        return x

    def _attend(
        self, layer: int, qkv: torch.Tensor, batch: ForwardBatch, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Causal attention of every token over its own row. qkv [N, 3d]; keys, values [rows, H, max_len, Dh]."""
        heads, head_dim = self.config.n_head, self.config.head_dim
        scale = 1.0 / math.sqrt(head_dim) if self.config.scale_attn_weights else 1.0
        if self.config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        total, n, attend = qkv.shape[0], batch.num_decode, self.backend.attend
        out = qkv.new_empty(total, heads, head_dim)
        if attend and n == total:
            attend(qkv, keys, values, batch.rows, batch.positions, scale, out)
            return out.view(total, heads * head_dim)
        first = n if attend else 0  # the kernel writes its tokens' keys and values itself
        q, k, v = qkv.view(-1, 3, heads, head_dim).unbind(1)  # [N, H, Dh] each
        keys[batch.rows[first:], :, batch.positions[first:]] = k[first:]
        values[batch.rows[first:], :, batch.positions[first:]] = v[first:]
        if n and attend:
            attend(qkv[:n], keys, values, batch.rows, batch.positions, scale, out[:n])
        elif n:
            out[:n] = self._attend_decode(q[:n], batch, keys, values, scale)
        for chunk in batch.chunks:
            part = slice(chunk.start, chunk.start + chunk.length)
            length = chunk.context + chunk.length
            mask = None
            if chunk.context:
                mask = torch.ones(chunk.length, length, dtype=torch.bool, device=q.device).tril(chunk.context)
            attended = self._sdpa(
                q[part].transpose(0, 1)[None],  # [1, H, n, Dh]
                keys[chunk.row, :, :length][None],  # [1, H, T, Dh]
                values[chunk.row, :, :length][None],
                mask,
                scale,
                causal=mask is None,
            )
            out[part] = attended[0].transpose(0, 1)
        return out.view(total, heads * head_dim)

    def _attend_decode(
        self,
        q: torch.Tensor,
        batch: ForwardBatch,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """One token per sequence: q [D, H, Dh] over the filled part of its row."""
        n, longest = batch.num_decode, batch.max_decode_len
        if batch.decode_rows is not None:
            first, last = batch.decode_rows
            k, v = keys[first:last, :, :longest], values[first:last, :, :longest]  # views [D, H, T, Dh]
        else:
            k, v = keys[batch.rows[:n], :, :longest], values[batch.rows[:n], :, :longest]
        mask = torch.arange(longest, device=q.device) <= batch.positions[:n, None]  # [D, T]
        return self._sdpa(q[:, :, None], k, v, mask[:, None, None], scale)[:, :, 0]

    def _sdpa(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        *,
        causal: bool = False,
    ) -> torch.Tensor:
        if self.config.reorder_and_upcast_attn:
            out = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal, scale=scale
            )
            return out.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def _project(x: torch.Tensor, linear: Linear, key: ModuleKey, lora: Lora | None) -> torch.Tensor:
    """y [N, out] = x [N, in] W + b, plus each row's adapter."""
    y = linear(x)
    if lora is not None:
        lora.add(y, x, key)
    return y
