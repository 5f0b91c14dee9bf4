"""LoRA for a mixed batch with our CPU kernel: every row reads its own adapter's weights where they lie.

    y[n] += (x[n] A_n^T) B_n        A_n [r, in], B_n [r, out]; nothing is stacked, masked or padded

A batch holds, for each module, the addresses of every row's A and B and its rank. They change only when rows change
hands, so the last batch is kept.
"""

import weakref
from collections.abc import Sequence

import torch

from adapters.adapter import Adapter, ModuleKey
from kernels.native import MAX_RANK, Native


class NativeLoraBatch:
    """One forward's adapters, as addresses."""

    def __init__(self, native: Native, modules: dict[ModuleKey, int], table: torch.Tensor) -> None:
        """modules: place of each in the table; table [modules, 3, N] int64: address of A, address of B, rank."""
        self._native, self._modules, self._table = native, modules, table

    def add(self, y: torch.Tensor, x: torch.Tensor, key: ModuleKey) -> None:
        """y [N, out] += each row's adapter applied to x [N, in], for module `key`; in place."""
        place = self._modules.get(key)
        if place is not None:
            a, b, ranks = self._table[place]
            self._native.lora(x, y, a, b, ranks)


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
        modules = {key: place for place, key in enumerate(sorted({key for a in distinct for key in a.pairs}))}
        none = (0, 0, 0)
        lines = [[found.get(key, none) for key in modules] for found in map(self._look_up, distinct)]
        of_adapter = torch.tensor([*lines, [none] * len(modules)])  # [adapters + 1, modules, 3]; the base is last
        index = {id(adapter): i for i, adapter in enumerate(distinct)}
        rows = torch.tensor([len(distinct) if a is None else index[id(a)] for a in row_adapters])
        return NativeLoraBatch(self._native, modules, of_adapter[rows].permute(1, 2, 0).contiguous())

    def _look_up(self, adapter: Adapter) -> dict[ModuleKey, tuple[int, int, int]]:
        held = self._addresses.get(id(adapter))
        if held is None or held[0]() is not adapter:
            found = {key: (p.a.data_ptr(), p.b.data_ptr(), p.a.shape[0]) for key, p in adapter.pairs.items()}
            if any(rank > MAX_RANK for _, _, rank in found.values()):
                raise ValueError(f"adapter {adapter.digest[:12]} has a rank above {MAX_RANK}")
            number = id(adapter)
            self._addresses[number] = weakref.ref(adapter, lambda _: self._addresses.pop(number, None)), found
            return found
        return held[1]


def _same(before: Sequence[Adapter | None], now: Sequence[Adapter | None]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))
