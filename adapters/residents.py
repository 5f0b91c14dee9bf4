"""The adapters that have a slot and a place on the device: their copies, their pins, their leaving."""

from collections.abc import Container, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from adapters.adapter import Adapter, AdapterRef
from adapters.arena import Arena, Place
from adapters.reading import one_thread, timed
from adapters.slots import SlotTable


@dataclass
class Resident:
    """An adapter on the device."""

    ref: AdapterRef
    slot: int
    place: Place
    seconds: float  # that loading it took
    adapter: Adapter | None = None  # once its copy has ended
    proving: bool = False  # whether it still has to say its golden prompts
    leaving: bool = False  # whether it goes as soon as nothing uses it

    @property
    def ready(self) -> bool:
        """Whether a sequence may begin with it."""
        return self.adapter is not None and not self.proving and not self.leaving


class Residents:
    """By digest, from the beginning of their copy on. Every method is called from the engine's thread."""

    def __init__(self, arena: Arena, slots: int) -> None:
        self.arena = arena
        self._slots = SlotTable(slots)
        self._copier = one_thread("adapter-copy")
        self._copying: dict[str, Future[tuple[Adapter, float]]] = {}
        self._residents: dict[str, Resident] = {}
        self._unready: set[str] = set()  # those that aren't ready: few, so that nobody has to count the others

    def __contains__(self, digest: str) -> bool:
        return digest in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def __getitem__(self, digest: str) -> Resident:
        return self._residents[digest]

    @property
    def slots(self) -> int:
        """How many slots there are, the base's included."""
        return self._slots.count

    @property
    def num_ready(self) -> int:
        """How many a sequence may begin with."""
        return len(self._residents) - len(self._unready)

    @property
    def loading(self) -> bool:
        """Whether one is being copied or proved."""
        return any(not self._residents[digest].leaving for digest in self._unready) or bool(self._copying)

    @property
    def copying(self) -> frozenset[str]:
        """Those whose copy is under way: they can't go."""
        return frozenset(self._copying)

    def get(self, digest: str) -> Resident | None:
        """The adapter of this digest, if it is here."""
        return self._residents.get(digest)

    def reserve(self, adapter: Adapter) -> Place | None:
        """Room for one more; None while there is none. Raises AdapterRefused if there never will be."""
        return None if self._slots.full else self.arena.reserve(adapter)

    def start_copy(self, ref: AdapterRef, adapter: Adapter, place: Place, seconds: float, *, proving: bool) -> None:
        """Begin to copy `adapter` (on the host) to its place; `seconds`: what it took until now."""
        self._residents[ref.digest] = Resident(ref, self._slots.add(ref.digest), place, seconds, proving=proving)
        self._unready.add(ref.digest)
        self._copying[ref.digest] = self._copier.submit(timed, self.arena.fill, adapter, place)

    def end_copies(self) -> list[tuple[Resident, BaseException | None]]:
        """The copies that have ended since the last call, and why one failed; such an adapter is gone."""
        ended: list[tuple[Resident, BaseException | None]] = []
        for digest in [d for d, future in self._copying.items() if future.done()]:
            copy, resident = self._copying.pop(digest), self._residents[digest]
            error = copy.exception()
            ended.append((resident, error))
            if error is not None:
                self.discard(digest)
                continue
            resident.adapter, seconds = copy.result()
            resident.seconds += seconds
            self.update(resident)
        return ended

    def update(self, resident: Resident) -> None:
        """Take note of whether it is ready now."""
        (self._unready.discard if resident.ready else self._unready.add)(resident.ref.digest)

    def touch(self, digest: str) -> None:
        """Mark one as used now, if it is here."""
        self._slots.touch(digest)

    def pin(self, digest: str) -> None:
        """Keep one that is here until `unpin`."""
        self._slots.pin(digest)

    def unpin(self, digest: str) -> bool:
        """Undo one `pin`; whether it was the last of one that was leaving, and it is gone."""
        self._slots.unpin(digest)
        return self._go(digest)

    def leave(self, digest: str) -> bool:
        """Let one go that is here as soon as nothing uses it; whether it is gone."""
        resident = self._residents[digest]
        resident.leaving = True
        self.update(resident)
        return self._go(digest)

    def discard(self, digest: str) -> None:
        """Take one that isn't pinned off the device."""
        self.arena.free(self._residents.pop(digest).place)
        self._slots.remove(digest)
        self._unready.discard(digest)

    def idle(self, keep: Container[str]) -> Iterator[str]:
        """Those that are neither pinned nor in `keep`, the least recently used first."""
        return self._slots.idle(keep)

    def nbytes(self, digest: str) -> int:
        """What one that is here takes of the arena."""
        return self.arena.nbytes_of(self._residents[digest].place)

    def check_integrity(self) -> None:
        """Raises AssertionError when slots, pins or places are lost while nothing runs."""
        self._slots.check_integrity()
        self.arena.check_integrity()
        assert len(self._slots) == len(self._residents), "a slot without its adapter"
        held = sum(map(self.nbytes, self._residents))
        assert held == self.arena.used_bytes, f"adapters hold {held} bytes, the arena counts {self.arena.used_bytes}"
        unready = {digest for digest, resident in self._residents.items() if not resident.ready}
        assert unready == self._unready, f"{unready} are not ready, {self._unready} were counted"

    def close(self) -> None:
        """Stop the copying thread."""
        self._copier.shutdown(wait=True, cancel_futures=True)

    def _go(self, digest: str) -> bool:
        gone = self._residents[digest].leaving and digest not in self._copying and not self._slots.pinned(digest)
        if gone:
            self.discard(digest)
        return gone
