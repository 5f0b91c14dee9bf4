"""LoRA for a mixed batch with our CPU kernel: every row reads its own adapters' weights where they lie.

    y[n] += w_a (x[n] A_a^T) B_a        for each adapter a of the row, A_a [r, in], B_a [r, out]; nothing is stacked,
                                        masked or padded

A batch holds, for each module, a line for every row and adapter that changes it: the row, the addresses of A and B, the
rank, the weight; sorted by digest, so that a row's adapters are added in the same order whoever else is in the batch.
Lines change only when rows change hands, so the last batch is kept.
"""

import weakref
from collections.abc import Sequence

import torch

from adapters.adapter import Adapter, Mix, ModuleKey
from kernels.native import MAX_RANK, Native


class NativeLoraBatch:
    """One forward's adapters, as addresses."""

    def __init__(self, native: Native, lines: dict[ModuleKey, torch.Tensor]) -> None:
        """lines: for each module, int64 [5, lines]: row, address of A, address of B, rank, weight (bits of fp64)."""
        self._native, self._kept = native, lines
        self._lines = {key: (table.data_ptr(), table.shape[1]) for key, table in lines.items()}

    def add(self, y: torch.Tensor, x: torch.Tensor, key: ModuleKey) -> None:
        """y [N, out] += each row's adapters applied to x [N, in], for module `key`; in place."""
        if (line := self._lines.get(key)) is not None:
            self._native.lora(x, y, *line)


class NativeLora:
    """Makes batches; keeps the addresses of adapters that are still held elsewhere."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self._addresses: dict[int, tuple[weakref.ref[Adapter], dict[ModuleKey, tuple[int, int, int]]]] = {}
        self._last: tuple[list[Mix], NativeLoraBatch | None] | None = None

    def batch(self, mixes: Sequence[Mix], device: torch.device) -> NativeLoraBatch | None:
        """The batch for rows with these adapters; None when every row is the base's."""
        del device  # the CPU
        if self._last is not None and self._last[0] == list(mixes):
            return self._last[1]
        distinct = sorted({adapter for mix in mixes for adapter, _ in mix}, key=lambda adapter: adapter.digest)
        batch = self._build(mixes, distinct) if distinct else None
        self._last = list(mixes), batch
        return batch

    def _build(self, mixes: Sequence[Mix], distinct: list[Adapter]) -> NativeLoraBatch:
        index = {adapter: i for i, adapter in enumerate(distinct)}
        order = sorted((index[adapter], row, weight) for row, mix in enumerate(mixes) for adapter, weight in mix)
        owner, rows = (torch.tensor([line[i] for line in order]) for i in (0, 1))  # [lines]
        weights = torch.tensor([weight for _, _, weight in order], dtype=torch.float64).view(torch.int64)
        modules = sorted({key for adapter in distinct for key in adapter.pairs})
        none = (0, 0, 0)
        found = [[held.get(key, none) for key in modules] for held in map(self._look_up, distinct)]
        table = torch.tensor(found).permute(1, 2, 0)[:, :, owner]  # [modules, 3, lines]
        first, last = (part.expand(len(modules), 1, -1) for part in (rows, weights))
        lines = torch.cat([first, table, last], 1)  # [modules, 5, lines]
        return NativeLoraBatch(
            self._native,
            {key: line[:, line[3] > 0].contiguous() for key, line in zip(modules, lines, strict=True)},
        )

    def _look_up(self, adapter: Adapter) -> dict[ModuleKey, tuple[int, int, int]]:
        held = self._addresses.get(id(adapter))
        if held is None or held[0]() is not adapter:
            found = {key: (p.a.data_ptr(), p.b.data_ptr(), p.a.shape[0]) for key, p in adapter.pairs.items()}
            assert adapter.max_rank <= MAX_RANK, "the kernel's scratch has so many columns; validation refuses more"
            number = id(adapter)
            self._addresses[number] = weakref.ref(adapter, lambda _: self._addresses.pop(number, None)), found
            return found
        return held[1]
