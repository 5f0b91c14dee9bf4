"""Slot table: which adapter holds which place on the device. Knows no tensors.

An adapter that a running sequence uses is pinned; the least recently used unpinned one makes room.
"""

from collections import OrderedDict


class SlotTable:
    """A bounded table of digests with pin counts, in order of last use."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}, expected at least 1")
        self.capacity = capacity
        self._pins: OrderedDict[str, int] = OrderedDict()  # oldest use first

    def __contains__(self, digest: str) -> bool:
        return digest in self._pins

    def __len__(self) -> int:
        return len(self._pins)

    def touch(self, digest: str) -> tuple[bool, str | None]:
        """Mark `digest` as used now, taking a slot for it if it has none.

        Returns (whether it has a slot, the digest evicted for it or None). Every slot pinned: (False, None).
        """
        evicted = None
        if digest not in self._pins:
            if len(self._pins) >= self.capacity:
                evicted = next((d for d, pins in self._pins.items() if pins == 0), None)
                if evicted is None:
                    return False, None
                del self._pins[evicted]
            self._pins[digest] = 0
        self._pins.move_to_end(digest)
        return True, evicted

    def pin(self, digest: str) -> None:
        """Keep a digest that has a slot. Raises KeyError when it has none."""
        self._pins[digest] += 1

    def unpin(self, digest: str) -> None:
        """Release one pin. The adapter stays until its slot is needed."""
        if self._pins.get(digest, 0) < 1:
            raise ValueError(f"{digest} is not pinned")
        self._pins[digest] -= 1

    def check_integrity(self) -> None:
        """Raises AssertionError when the table contradicts itself; called when the engine is idle."""
        assert len(self._pins) <= self.capacity, f"{len(self._pins)} slots used of {self.capacity}"
        assert all(pins == 0 for pins in self._pins.values()), f"pinned while idle: {self._pins}"
