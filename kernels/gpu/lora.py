"""LoRA per row, y[n] += w_n (x[n] A_s^T) B_s with s the row's slot, over one arena of weights. Knows no adapters.

Shrink makes xa = x A^T, expand adds xa B to y. Rows of one slot share tiles of up to TILE rows, so that an adapter's
weights are read once a tile. Each tile goes over its own rank: nothing is padded to the largest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

TILE = 16
"""Rows of a tile: the least that the matrix units take."""
MAX_SPLIT = 8
"""The most parts that a shrink's sum is split into."""
_SPLIT_FEATURES = 256  # input features that are worth a program of their own
_BLOCK_K, _BLOCK_N = 128, 128


@dataclass(frozen=True)
class LoraMeta:
    """Which rows go together, and their weights. All [N] int32, `weight` fp32; `order` lists the rows by slot.

    Tile t is the rows order[start : start + count] of one slot. Base rows get no tile; unused tiles have count 0.

    Example: rows of slots [2, 0, 1, 2, 2] in tiles of two:

        order       1  2  0  3  4      the base's row, slot 1's, slot 2's
        tile_start  1  2  4  0  0      tile 0 is row 2; tile 1 rows 0 and 3; tile 2 row 4
        tile_count  1  2  1  0  0
        tile_slot   1  2  2  0  0
    """

    order: torch.Tensor
    tile_start: torch.Tensor
    tile_count: torch.Tensor
    tile_slot: torch.Tensor
    weight: torch.Tensor  # by row

    @classmethod
    def of(cls, buffer: torch.Tensor) -> "LoraMeta":
        """The parts of a [5, N] int32 buffer, or of its copy on the device, as views."""
        order, tile_start, tile_count, tile_slot, weight = buffer.unbind(0)
        return cls(order, tile_start, tile_count, tile_slot, weight.view(torch.float32))


def write_meta(slots: Sequence[int], weights: Sequence[float], buffer: torch.Tensor, tile: int = TILE) -> None:
    """Write the grouping of rows with these slots, and their weights, into `buffer` [5, N] int32 on the host, in
    LoraMeta's order.

    Fewer slots than N: the rows that are left count as the base's.
    """
    out = buffer.numpy()
    padded = np.zeros(out.shape[1], dtype=np.int32)
    padded[: len(slots)] = slots
    order = np.argsort(padded, kind="stable")
    used, first, counts = np.unique(padded[order], return_index=True, return_counts=True)
    tiles = np.where(used > 0, -(-counts // tile), 0)  # of each slot
    total = int(tiles.sum())
    of_slot = np.repeat(np.arange(len(used)), tiles)
    offset = (np.arange(total) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * tile  # of a tile within its slot
    out[0], out[1:] = order, 0
    out[1, :total] = first[of_slot] + offset
    out[2, :total] = np.minimum(counts[of_slot] - offset, tile)
    out[3, :total] = used[of_slot]
    out[4].view(np.float32)[: len(slots)] = weights


def max_tiles(rows: int, slots: int) -> int:
    """The most tiles that so many rows of so many slots, the base's among them, can take."""
    return min(rows, (rows + (TILE - 1) * (slots - 1)) // TILE)  # each slot leaves at most one tile unfilled


def splits(in_features: int) -> int:
    """Parts of a shrink's sum. By the width alone, so that a row's sums don't depend on the batch."""
    return min(MAX_SPLIT, triton.cdiv(in_features, _SPLIT_FEATURES))


def add_lora(
    y: torch.Tensor, x: torch.Tensor, arena: torch.Tensor, table: torch.Tensor, meta: LoraMeta, xa: torch.Tensor
) -> None:
    """y[n] += w_n (x[n] A_s^T) B_s for each row n, s its slot; in place. Sums in fp32.

    y [N, out] and x [N, in], rows contiguous; arena [elements]; all of one type: fp32, bf16 or fp16.
    table [slots, 3] int64: element offsets of A [r, in] and B [r, out] in the arena, multiples of 16 bytes, and the
    rank r, 0 where the slot has nothing for this module (slot 0 never has).
    xa: scratch [splits(in) or more, N, largest rank or more] fp32; needs no clearing.
    """
    n, k = x.shape
    out = y.shape[1]
    slots, max_rank = table.shape[0], xa.shape[2]
    parts = splits(k)
    tiles = max_tiles(n, slots)
    if tiles == 0:
        return
    chunk = triton.cdiv(triton.cdiv(k, parts), _BLOCK_K) * _BLOCK_K
    block_r = min(32, max(16, triton.next_power_of_2(max_rank)))
    align = 16 // arena.element_size()
    exact = arena.dtype == torch.float32
    where = (arena, table, meta.order, meta.tile_start, meta.tile_count, meta.tile_slot, xa)
    strides = xa.stride(0), xa.stride(1)
    _shrink[tiles, parts, triton.cdiv(max_rank, block_r)](
        x, *where, x.stride(0), *strides, IN=k, CHUNK=chunk, ALIGN=align, TILE=TILE, BLOCK_R=block_r, BLOCK_K=_BLOCK_K,
        PRECISION="ieee" if exact else "tf32", WIDEN=arena.device.type == "cpu",
    )  # fmt: skip
    _expand[tiles, triton.cdiv(out, _BLOCK_N)](
        y, *where, meta.weight, y.stride(0), *strides, OUT=out, PARTS=parts, ALIGN=align, TILE=TILE, BLOCK_R=block_r,
        BLOCK_N=_BLOCK_N, PRECISION="ieee" if exact else "tf32",
    )  # fmt: skip


@triton.jit
def _shrink(
    x: tl.tensor, arena: tl.tensor, table: tl.tensor, order: tl.tensor, tile_start: tl.tensor, tile_count: tl.tensor,
    tile_slot: tl.tensor, xa: tl.tensor, x_stride: tl.tensor, part_stride: tl.tensor, row_stride: tl.tensor,
    IN: tl.constexpr, CHUNK: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """xa [part, start + i, r] = sum over the part's k of x[order[start + i], k] A[r, k].

    A program each for a tile, a part and a block of r.
    """
    tile, part, r0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_R
    count = tl.load(tile_count + tile)
    if count == 0:
        return
    entry = table + tl.load(tile_slot + tile) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    if r0 >= rank:
        return
    a = arena + tl.multiple_of(tl.load(entry), ALIGN)
    start = tl.load(tile_start + tile)
    i = tl.arange(0, TILE)
    r = r0 + tl.arange(0, BLOCK_R)
    rows = tl.load(order + start + i, mask=i < count, other=0).to(tl.int64)
    acc = tl.zeros((TILE, BLOCK_R), dtype=tl.float32)
    for k0 in range(0, CHUNK, BLOCK_K):
        k = part * CHUNK + k0 + tl.arange(0, BLOCK_K)
        mine = (i < count)[:, None] & (k < IN)[None, :]
        xs = tl.load(x + rows[:, None] * x_stride + k[None, :], mask=mine, other=0.0)
        w = tl.load(a + r[None, :] * IN + k[:, None], mask=(r < rank)[None, :] & (k < IN)[:, None], other=0.0)
        if WIDEN:  # the interpreter has no products of bf16
            xs, w = xs.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(xs, w, acc, input_precision=PRECISION)
    at = xa + part.to(tl.int64) * part_stride + (start + i).to(tl.int64)[:, None] * row_stride + r[None, :]
    tl.store(at, acc, mask=(i < count)[:, None] & (r < rank)[None, :])


@triton.jit
def _expand(
    y: tl.tensor, arena: tl.tensor, table: tl.tensor, order: tl.tensor, tile_start: tl.tensor, tile_count: tl.tensor,
    tile_slot: tl.tensor, xa: tl.tensor, weight: tl.tensor, y_stride: tl.tensor, part_stride: tl.tensor,
    row_stride: tl.tensor, OUT: tl.constexpr, PARTS: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[m, n] += sum over r of weight[m] (sum over parts of xa[part, start + i, r]) B[r, n], m being order[start + i].

    A program each for a tile and a block of n.
    """
    tile = tl.program_id(0)
    count = tl.load(tile_count + tile)
    if count == 0:
        return
    entry = table + tl.load(tile_slot + tile) * 3
    rank = tl.load(entry + 2).to(tl.int32)
    if rank == 0:
        return
    b = arena + tl.multiple_of(tl.load(entry + 1), ALIGN)
    start = tl.load(tile_start + tile)
    i = tl.arange(0, TILE)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(order + start + i, mask=i < count, other=0).to(tl.int64)
    weights = tl.load(weight + rows, mask=i < count, other=0.0)
    acc = tl.zeros((TILE, BLOCK_N), dtype=tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        mine = (i < count)[:, None] & (r < rank)[None, :]
        at = xa + (start + i).to(tl.int64)[:, None] * row_stride + r[None, :]
        sums = tl.load(at, mask=mine, other=0.0)
        for _ in tl.static_range(1, PARTS):
            at += part_stride
            sums += tl.load(at, mask=mine, other=0.0)
        w = tl.load(b + r[:, None] * OUT + n[None, :], mask=(r < rank)[:, None] & (n < OUT)[None, :], other=0.0)
        sums *= weights[:, None]
        # B is exact in tf32 if it has 16 bits, and the sums keep the range of fp32, and more bits than in bf16.
        acc = tl.dot(sums, w.to(tl.float32), acc, input_precision=PRECISION)
    at = y + rows[:, None] * y_stride + n[None, :]
    mine = (i < count)[:, None] & (n < OUT)[None, :]
    tl.store(at, (tl.load(at, mask=mine, other=0.0).to(tl.float32) + acc).to(y.dtype.element_ty), mask=mine)
