"""The memory of the adapters on a device: one flat tensor, from which each matrix takes as much as its rank needs.

A of rank r takes r rows of the input's width, B r rows of the output's; nothing is padded to another adapter's rank. An
adapter may lie in several pieces, but never a matrix: what others leave free is used, however it is scattered.
"""

import mmap
from bisect import bisect
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass

import torch

from adapters.adapter import Adapter, LoraPair, ModuleKey
from adapters.errors import AdapterRefused

ALIGN = 32  # elements: a cache line of bf16, two of fp32
_HUGE_PAGE = 2 << 20


class Extents:
    """Which parts of [0, capacity) are free. Sizes are rounded up to ALIGN; knows no tensors."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGN * ALIGN
        self._free = [(0, self.capacity)] if self.capacity else []  # (start, size), by start; neighbours are joined
        self.used = 0

    def take(self, sizes: Sequence[int]) -> list[int] | None:
        """A start for each size: side by side where all fit, else each where it fits first.

        None, and nothing taken, if one fits nowhere.
        """
        rounded = [_rounded(size) for size in sizes]
        total = sum(rounded)
        if self.used + total > self.capacity:
            return None
        free = [list(extent) for extent in self._free]
        whole = next((extent for extent in free if extent[1] >= total), None)
        starts = list[int]()
        seen: dict[int, int] = {}  # by size: no extent before this one has room for it
        for size in rounded:
            extent = whole
            if extent is None:
                i = next((i for i in range(seen.get(size, 0), len(free)) if free[i][1] >= size), None)
                if i is None:
                    return None
                seen[size], extent = i, free[i]
            starts.append(extent[0])
            extent[0] += size
            extent[1] -= size
        self._free = [(start, room) for start, room in free if room]
        self.used += total
        return starts

    def give_back(self, starts: Sequence[int], sizes: Sequence[int]) -> None:
        """Undo a `take`."""
        for start, size in zip(starts, map(_rounded, sizes), strict=True):
            i = bisect(self._free, (start, 0))
            if i < len(self._free) and self._free[i][0] == start + size:
                size += self._free.pop(i)[1]
            if i and sum(self._free[i - 1]) == start:
                start, before = self._free.pop(i - 1)
                size, i = size + before, i - 1
            self._free.insert(i, (start, size))
        self.used -= sum(map(_rounded, sizes))

    def __copy__(self) -> "Extents":
        copied = Extents(self.capacity)
        copied._free, copied.used = self._free.copy(), self.used
        return copied

    def check_integrity(self) -> None:
        """Raises AssertionError when free parts overlap, touch, or don't add up with what is used."""
        ends = [start + size for start, size in self._free]
        assert all(end < start for end, (start, _) in zip(ends, self._free[1:], strict=False)), f"{self._free}"
        assert sum(size for _, size in self._free) + self.used == self.capacity, f"{self.used} used, {self._free} free"


@dataclass(frozen=True)
class Place:
    """Where an adapter's matrices lie: for each module, in order, A then B."""

    keys: tuple[ModuleKey, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    nbytes: int  # of the arena


class Arena:
    """The flat tensor and who lies where. `reserve` and `free` on the engine's thread, `fill` on any."""

    def __init__(self, nbytes: int, device: torch.device, dtype: torch.dtype) -> None:
        """`nbytes`: the budget; on a CPU memory is taken from the system only as it is used.

        Raises ValueError when the device refuses so much.
        """
        self._extents = Extents(nbytes // dtype.itemsize)
        try:
            self.memory = _memory(self._extents.capacity, device, dtype)  # [elements]
        except (OSError, torch.OutOfMemoryError) as error:
            raise ValueError(
                f"--adapter-memory: {device} has no {nbytes:,} bytes for adapters, give it less: {error}"
            ) from error
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def nbytes(self) -> int:
        """The budget."""
        return self._extents.capacity * self.memory.itemsize

    @property
    def used_bytes(self) -> int:
        """What adapters take of it."""
        return self._extents.used * self.memory.itemsize

    def nbytes_for(self, adapter: Adapter) -> int:
        """What `adapter` would take of it."""
        return sum(map(_rounded, _sizes(adapter))) * self.memory.itemsize

    def reserve(self, adapter: Adapter) -> Place | None:
        """Room for `adapter`; None while others take it. Raises AdapterRefused if it is larger than the whole arena."""
        sizes, needed = _sizes(adapter), self.nbytes_for(adapter)
        starts = self._extents.take(sizes)
        if starts is not None:
            return Place(tuple(adapter.pairs), tuple(starts), sizes, needed)
        if needed > self.nbytes:
            raise AdapterRefused(
                f"the adapter takes {needed:,} bytes on the device, the arena holds {self.nbytes:,}: "
                "raise --adapter-memory"
            )
        return None

    def evictions_for(self, adapter: Adapter, places: Iterable[Place]) -> int | None:
        """How many of `places`, one at least, are to be freed in their order until `adapter` has room; None if there is
        none even then. Frees nothing."""
        extents, sizes, lacking = copy(self._extents), _sizes(adapter), self.nbytes_for(adapter)
        lacking -= self.nbytes - self.used_bytes
        freed: list[Place] = []
        for count, place in enumerate(places, 1):
            freed.append(place)
            lacking -= place.nbytes
            if lacking > 0:  # no need to look where they lie
                continue
            for each in freed:
                extents.give_back(each.starts, each.sizes)
            freed.clear()
            if extents.take(sizes) is not None:
                return count
        return None

    def fill(self, adapter: Adapter, place: Place) -> Adapter:
        """Copy `adapter` (on the host) to its place; the same adapter, its tensors views of the arena.

        On a GPU the copies run on a stream of their own, from pinned memory, and have ended when this returns.
        """
        if self._stream is None:
            return self._copy(adapter, place)
        with torch.cuda.stream(self._stream):
            resident = self._copy(adapter, place)
        self._stream.synchronize()
        return resident

    def free(self, place: Place) -> None:
        """Give a place back; nothing may compute with it any more."""
        self._extents.give_back(place.starts, place.sizes)

    def check_integrity(self) -> None:
        """Raises AssertionError when places were lost or given back twice."""
        self._extents.check_integrity()

    def _copy(self, adapter: Adapter, place: Place) -> Adapter:
        starts, pairs = iter(place.starts), dict[ModuleKey, LoraPair]()
        for key in place.keys:
            pair = adapter.pairs[key]
            pairs[key] = LoraPair(self._put(pair.a, next(starts)), self._put(pair.b, next(starts)))
        return Adapter(adapter.digest, pairs)

    def _put(self, source: torch.Tensor, start: int) -> torch.Tensor:
        if self._stream is not None:
            source = source.pin_memory()
        view = self.memory[start : start + source.numel()].view(source.shape)
        return view.copy_(source, non_blocking=True)


def _sizes(adapter: Adapter) -> tuple[int, ...]:
    return tuple(t.numel() for pair in adapter.pairs.values() for t in (pair.a, pair.b))


def _rounded(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _memory(count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[count]. On a CPU in huge pages where the system has them: adapters are read once a step, all over the arena."""
    if device.type != "cpu":
        return torch.zeros(count, device=device, dtype=dtype)
    size = max(1, count * dtype.itemsize)
    mapping = mmap.mmap(-1, -(-size // _HUGE_PAGE) * _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=dtype, count=max(1, count))[:count]
