"""Adapters kept in host memory: what had to leave the device comes back without the disk and without hashing."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapters.adapter import Adapter


class HostCache:
    """As many adapters as fit into a budget of bytes; the least recently used makes room. For one thread."""

    def __init__(self, budget: int) -> None:
        """`budget`: bytes of weights; 0 keeps nothing."""
        self.budget = budget
        self.used_bytes = self.hits = self.misses = 0
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # oldest use first

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def get(self, digest: str) -> Adapter | None:
        """The adapter, as used now, if it is here; counts a hit or a miss."""
        adapter = self._adapters.get(digest)
        if adapter is None:
            self.misses += 1
            return None
        self.hits += 1
        self._adapters.move_to_end(digest)
        return adapter

    def put(self, adapter: Adapter) -> None:
        """Keep an adapter, as used now; one larger than the whole budget isn't kept."""
        self.remove(adapter.digest)
        if adapter.nbytes > self.budget:
            return
        while self.used_bytes + adapter.nbytes > self.budget:
            self.remove(next(iter(self._adapters)))
        self._adapters[adapter.digest] = adapter
        self.used_bytes += adapter.nbytes

    def touch(self, digest: str) -> None:
        """Mark an adapter as used now, if it is here."""
        if digest in self._adapters:
            self._adapters.move_to_end(digest)

    def remove(self, digest: str) -> None:
        """Drop an adapter, if it is here."""
        if (adapter := self._adapters.pop(digest, None)) is not None:
            self.used_bytes -= adapter.nbytes
