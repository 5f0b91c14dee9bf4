"""Slot table: which adapter holds which slot on the device, who is in use, who goes first. Knows no tensors.

Slot 0 is the base's and is never handed out.
"""

import heapq
from collections import OrderedDict
from collections.abc import Container, Iterator
from dataclasses import dataclass


@dataclass
class Slot:
    """An adapter's place on the device."""

    index: int
    pins: int = 0  # running sequences that use it


class SlotTable:
    """A bounded table of digests in order of last use."""

    def __init__(self, count: int) -> None:
        """`count`: slots in all, the base's included."""
        if count < 2:
            raise ValueError(f"{count} slots: the base takes one, and an adapter needs one")
        self.count = count
        self._free = list(range(1, count))
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # oldest use first

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def full(self) -> bool:
        """Whether no slot is free."""
        return not self._free

    def add(self, digest: str) -> int:
        """Take the lowest free slot for `digest`, as used now; its index. Raises IndexError when none is free."""
        self._slots[digest] = Slot(heapq.heappop(self._free))
        return self._slots[digest].index

    def touch(self, digest: str) -> None:
        """Mark a digest as used now, if it has a slot."""
        if digest in self._slots:
            self._slots.move_to_end(digest)

    def remove(self, digest: str) -> None:
        """Give an unpinned digest's slot back."""
        slot = self._slots.pop(digest)
        assert not slot.pins, f"{digest} is pinned"
        heapq.heappush(self._free, slot.index)

    def idle(self, keep: Container[str]) -> Iterator[str]:
        """Those that are neither pinned nor in `keep`, the least recently used first."""
        return (digest for digest, slot in self._slots.items() if not slot.pins and digest not in keep)

    def pinned(self, digest: str) -> bool:
        """Whether a digest has a slot that is in use."""
        slot = self._slots.get(digest)
        return slot is not None and slot.pins > 0

    def pin(self, digest: str) -> None:
        """Keep a digest that has a slot. Raises KeyError when it has none."""
        self._slots[digest].pins += 1

    def unpin(self, digest: str) -> None:
        """Release one pin: it was used until now. The adapter stays until its slot is needed."""
        slot = self._slots.get(digest)
        if slot is None or not slot.pins:
            raise ValueError(f"{digest} is not pinned")
        slot.pins -= 1
        self._slots.move_to_end(digest)

    def check_integrity(self) -> None:
        """Raises AssertionError when the table contradicts itself; called when the engine is idle."""
        taken = sorted([*self._free, *(slot.index for slot in self._slots.values())])
        assert taken == list(range(1, self.count)), "slots were lost or given twice"
        pinned = {digest: slot.pins for digest, slot in self._slots.items() if slot.pins}
        assert not pinned, f"pinned while idle: {pinned}"
