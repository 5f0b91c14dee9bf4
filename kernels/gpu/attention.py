"""Decode attention: one token of each of D sequences over its own cache row, split over the length (flash-decoding).

Source: Dao et al. 2023, "Flash-Decoding for long-context inference". Knows nothing of batching.
"""

import torch
import triton
import triton.language as tl

_MAX_SPLITS = 16
_BLOCK_T = 64  # cached tokens that a program looks at at a time
_LOG2_E = 1.4426950408889634


def split_length(max_len: int) -> int:
    """Cached tokens of one program. By the cache's size alone, so that a token's sums don't depend on the batch."""
    least = triton.cdiv(max_len, _MAX_SPLITS)
    return max(2 * _BLOCK_T, triton.cdiv(least, _BLOCK_T) * _BLOCK_T)


def attention_scratch(tokens: int, keys: torch.Tensor) -> torch.Tensor:
    """What `attend` of up to so many tokens over caches like `keys` [rows, H, max_len, Dh] needs beside its output."""
    _, heads, max_len, head_dim = keys.shape
    parts = triton.cdiv(max_len, split_length(max_len))
    return torch.empty(tokens, heads, parts, head_dim + 2, dtype=torch.float32, device=keys.device)


def attend(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor,
    scale: float, out: torch.Tensor, scratch: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """out [D, H Dh] = softmax(scale q K^T) V over 0..position of each token's row, softmax in fp32.

    qkv [D, 3 H Dh]; keys, values [rows, H, max_len, Dh] contiguous, all of one type; rows, positions [D] int64;
    Dh up to 256; scratch of `attention_scratch` for D tokens or more. The token's key and value are written into the
    caches at its position; nothing beyond it is read. Two tokens of one call must not share a row, unless nobody
    reads what comes of them.
    """
    tokens = qkv.shape[0]
    _, heads, max_len, head_dim = keys.shape
    if tokens == 0:
        return out
    length = split_length(max_len)
    parts = triton.cdiv(max_len, length)
    block_d = max(16, triton.next_power_of_2(head_dim))
    _attend_part[tokens, heads, parts](
        qkv, keys, values, rows, positions, scratch, qkv.stride(0), max_len, scale * _LOG2_E, HEADS=heads, DH=head_dim,
        PARTS=parts, LENGTH=length, BLOCK_T=_BLOCK_T, BLOCK_D=block_d,
    )  # fmt: skip
    _combine[tokens, heads](
        scratch, positions, out, out.stride(0), HEADS=heads, DH=head_dim, PARTS=parts, LENGTH=length,
        BLOCK_P=triton.next_power_of_2(parts), BLOCK_D=block_d,
    )  # fmt: skip
    return out


@triton.jit
def _attend_part(
    qkv: tl.tensor, keys: tl.tensor, values: tl.tensor, rows: tl.tensor, positions: tl.tensor, scratch: tl.tensor,
    qkv_stride: tl.tensor, max_len: tl.tensor, scale: tl.tensor, HEADS: tl.constexpr, DH: tl.constexpr,
    PARTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scratch [D, H, part] = (sum of 2^(s - top) v, top, sum of 2^(s - top)) over the part's tokens, s = scale q k.

    A program each for a token, a head and a part. The part that the token lies in takes its key and value from qkv
    and writes them into the caches; from there only earlier tokens are read, so that no program waits for another.
    """
    d, h, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + d).to(tl.int32)
    begin = part * LENGTH
    if begin > position:
        return
    c = tl.arange(0, BLOCK_D)
    in_head = c < DH
    own = qkv + d * qkv_stride + h * DH + c
    q = tl.load(own, mask=in_head, other=0.0).to(tl.float32) * scale
    base = (tl.load(rows + d) * HEADS + h) * max_len * DH
    top = -float("inf")
    total = 0.0
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if position < begin + LENGTH:
        k = tl.load(own + HEADS * DH, mask=in_head, other=0.0)
        v = tl.load(own + 2 * HEADS * DH, mask=in_head, other=0.0)
        tl.store(keys + base + position * DH + c, k, mask=in_head)
        tl.store(values + base + position * DH + c, v, mask=in_head)
        top = tl.sum(q * k.to(tl.float32))
        total = 1.0
        acc = v.to(tl.float32)
    for t0 in range(begin, tl.minimum(position, begin + LENGTH), BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        earlier = t < position  # the part ends where a block does
        mine = earlier[:, None] & in_head[None, :]
        at = base + t[:, None] * DH + c[None, :]
        k = tl.load(keys + at, mask=mine, other=0.0).to(tl.float32)
        v = tl.load(values + at, mask=mine, other=0.0).to(tl.float32)
        s = tl.where(earlier, tl.sum(q[None, :] * k, axis=1), -float("inf"))
        new_top = tl.maximum(top, tl.max(s, axis=0))
        p = tl.exp2(s - new_top)
        kept = tl.exp2(top - new_top)
        total = total * kept + tl.sum(p, axis=0)
        acc = acc * kept + tl.sum(p[:, None] * v, axis=0)
        top = new_top
    result = scratch + ((d * HEADS + h) * PARTS + part) * (DH + 2)
    tl.store(result + c, acc, mask=in_head)
    tl.store(result + DH, top)
    tl.store(result + DH + 1, total)


@triton.jit
def _combine(
    scratch: tl.tensor, positions: tl.tensor, out: tl.tensor, out_stride: tl.tensor, HEADS: tl.constexpr,
    DH: tl.constexpr, PARTS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [d, h] = sum over parts of 2^(top - best) acc / sum over parts of 2^(top - best) total.

    A program each for a token and a head.
    """
    d, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = tl.arange(0, BLOCK_P)
    c = tl.arange(0, BLOCK_D)
    filled = part <= tl.load(positions + d).to(tl.int32) // LENGTH
    at = scratch + ((d * HEADS + h) * PARTS + part) * (DH + 2)  # [BLOCK_P]
    top = tl.load(at + DH, mask=filled, other=-float("inf"))
    total = tl.load(at + DH + 1, mask=filled, other=0.0)
    weight = tl.exp2(top - tl.max(top, axis=0))
    acc = tl.load(at[:, None] + c[None, :], mask=filled[:, None] & (c < DH)[None, :], other=0.0)
    result = tl.sum(weight[:, None] * acc, axis=0) / tl.sum(weight * total, axis=0)
    tl.store(out + d * out_stride + h * DH + c, result.to(out.dtype.element_ty), mask=c < DH)
