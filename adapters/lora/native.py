"""LoRA for a mixed batch with our CPU kernel: every row reads its own adapter's weights where they lie.

    y[n] += (x[n] A_n^T) B_n        A_n [r, in], B_n [r, out]; nothing is stacked, masked or padded

A batch holds, for each module, a line for every row that it changes: the row, the addresses of A and B, the rank;
sorted by adapter. They change only when rows change hands, so the last batch is kept.
"""

import weakref
from collections.abc import Sequence

import torch

from adapters.adapter import Adapter, ModuleKey
from kernels.native import MAX_RANK, Native


class NativeLoraBatch:
    """One forward's adapters, as addresses."""

    def __init__(self, native: Native, lines: dict[ModuleKey, torch.Tensor]) -> None:
        """lines: for each module, int64 [4, rows that it changes]: row, address of A, address of B, rank."""
        self._native, self._kept = native, lines
        self._lines = {key: (table.data_ptr(), table.shape[1]) for key, table in lines.items()}

    def add(self, y: torch.Tensor, x: torch.Tensor, key: ModuleKey) -> None:
        """y [N, out] += each row's adapter applied to x [N, in], for module `key`; in place."""
        if (line := self._lines.get(key)) is not None:
            self._native.lora(x, y, *line)


class NativeLora:
    """Makes batches; keeps the addresses of adapters that are still held elsewhere."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self._addresses: dict[int, tuple[weakref.ref[Adapter], dict[ModuleKey, tuple[int, int, int]]]] = {}
        self._last: tuple[list[Adapter | None], NativeLoraBatch | None] | None = None

    def batch(self, row_adapters: Sequence[Adapter | None], device: torch.device) -> NativeLoraBatch | None:
        """The batch for rows with these adapters (None: the base); None when every row is the base's."""
        del device  # the CPU
        if self._last is not None and _same(self._last[0], row_adapters):
            return self._last[1]
        distinct = list({id(adapter): adapter for adapter in row_adapters if adapter is not None}.values())
        batch = self._build(row_adapters, distinct) if distinct else None
        self._last = list(row_adapters), batch
        return batch

    def _build(self, row_adapters: Sequence[Adapter | None], distinct: list[Adapter]) -> NativeLoraBatch:
        index = {id(adapter): i for i, adapter in enumerate(distinct)}
        owner = torch.tensor([-1 if a is None else index[id(a)] for a in row_adapters])  # [N]
        rows = owner.argsort(stable=True)[int((owner < 0).sum()) :]  # of adapters, those of one together
        modules = sorted({key for adapter in distinct for key in adapter.pairs})
        none = (0, 0, 0)
        found = [[held.get(key, none) for key in modules] for held in map(self._look_up, distinct)]
        table = torch.tensor(found).permute(1, 2, 0)[:, :, owner[rows]]  # [modules, 3, rows]
        lines = torch.cat([rows.expand(len(modules), 1, -1), table], 1)  # [modules, 4, rows]
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


def _same(before: Sequence[Adapter | None], now: Sequence[Adapter | None]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
