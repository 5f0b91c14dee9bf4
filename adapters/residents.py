"""The adapters that have a slot and a place on the device: their copies, their pins, their leaving."""

from collections.abc import Container, Iterator, Set
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice

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


@dataclass(frozen=True)
class _NoRoom:
    """A search for room that found none: the same one finds none until something is freed, or fewer have to stay."""

    digest: str
    anew: bool
    freed: int
    keep: frozenset[str]

    def holds(self, now: "_NoRoom") -> bool:
        """Whether `now` would find none, either."""
        same = (self.digest, self.anew, self.freed) == (now.digest, now.anew, now.freed)
        return same and self.keep <= now.keep


class Residents:
    """By digest, from the beginning of their copy on. Every method is called from the engine's thread."""

    def __init__(self, arena: Arena, slots: int) -> None:
        self.arena = arena
        self._slots = SlotTable(slots)
        self._copier = one_thread("adapter-copy")
        self._copying: dict[str, Future[tuple[Adapter, float]]] = {}
        self._residents: dict[str, Resident] = {}
        self._unready: set[str] = set()  # those that aren't ready: few, so that nobody has to count the others
        self._freed = 0  # counts what may make room: copies that ended, and those that were unpinned or went
        self._no_room: _NoRoom | None = None

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

    def victims(self, adapter: Adapter, keep: Set[str], *, anew: bool) -> list[str] | None:
        """Who has to go, the least recently used first, so that `adapter`, for which there is no room, gets some; None
        if it gets none even when all have gone that may: pinned ones, those being copied and those in `keep` stay.

        `anew`: where only those in `keep` are in the way, and would fit beside it, all may go, to be laid out anew.
        """
        keep = frozenset(digest for digest in keep | self.copying if digest in self._residents)
        search = _NoRoom(adapter.digest, anew, self._freed, keep)
        if self._no_room is not None and self._no_room.holds(search):
            return None
        count = self.arena.evictions_for(adapter, (self._residents[digest].place for digest in self.idle(keep)))
        if count is not None:
            return list(islice(self.idle(keep), count))
        everybody = list(self.idle(self.copying))
        fits = sum(map(self.nbytes, keep)) + self.arena.nbytes_for(adapter) <= self.arena.nbytes
        if anew and fits and len(everybody) == len(self._residents):
            return everybody
        self._no_room = search
        return None

    def start_copy(self, ref: AdapterRef, adapter: Adapter, place: Place, seconds: float, *, proving: bool) -> None:
        """Begin to copy `adapter` (on the host) to its place; `seconds`: what it took until now."""
        self._residents[ref.digest] = Resident(ref, self._slots.add(ref.digest), place, seconds, proving=proving)
        self._unready.add(ref.digest)
        self._copying[ref.digest] = self._copier.submit(timed, self.arena.fill, adapter, place)

    def end_copies(self) -> list[tuple[Resident, BaseException | None]]:
        """The copies that have ended since the last call, and why one failed; such an adapter is gone."""
        ended: list[tuple[Resident, BaseException | None]] = []
        for digest in [d for d, future in self._copying.items() if future.done()]:
            self._freed += 1
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
        self._freed += 1
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
        self._freed += 1
        self._unready.discard(digest)

    def idle(self, keep: Container[str]) -> Iterator[str]:
        """Those that are neither pinned nor in `keep`, the least recently used first."""
        return self._slots.idle(keep)

    def nbytes(self, digest: str) -> int:
        """What one that is here takes of the arena."""
        return self._residents[digest].place.nbytes

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
