"""Brings adapters onto the device, off the decode thread: ABSENT -> LOADING -> READY | REFUSED | FAILED."""

import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

import torch

from adapters.adapter import Adapter, AdapterRef
from adapters.arena import Arena, Place
from adapters.errors import AdapterError, AdapterRefused, AdapterUnavailable
from adapters.slots import SlotTable

RETRY_SECONDS = 5.0
PATIENCE = 16
"""Polls that an adapter waits for room before those asked for may be evicted for it, and others wait their turn."""
LOADS_AHEAD = 8
"""Adapters that are read into host memory, or wait there for room, at once."""
SLOTS = 4096
"""Adapters on a device at once, however small they are, and the base."""


class AdapterStatus(Enum):
    """Where an adapter stands on this device."""

    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    REFUSED = "refused"  # for good: the same digest is the same bytes
    FAILED = "failed"  # I/O; asking for it tries again once RETRY_SECONDS have passed


@dataclass
class ResidencyStats:
    """Totals since the start."""

    loads: int = 0
    failures: int = 0
    evictions: int = 0
    load_seconds: float = 0.0


@dataclass
class _Resident:
    """An adapter that has a slot and a place."""

    slot: int
    place: Place
    adapter: Adapter | None = None  # once its copy is published


@dataclass
class _Staged:
    """An adapter in host memory that waits for room on the device."""

    adapter: Adapter
    seconds: float  # that reading it took
    polls: int = 0  # that it has waited


class Residency:
    """Adapters on the device, as many as the arena holds. Every method is called from the engine's thread.

    A load reads the adapter into host memory, waits until the arena has room, and is copied there; reading and copying
    run on a thread each, and `poll` publishes what has ended. The least recently used adapter makes room, but none that
    a running sequence uses, and none that was asked for since the last poll: it is about to run.
    """

    def __init__(self, load: Callable[[AdapterRef], Adapter], arena: Arena, slots: int = SLOTS) -> None:
        """`load` reads one adapter into host memory; `slots`: how many adapters may be there at most, plus one."""
        self._load, self.arena = load, arena
        self._slots = SlotTable(slots)
        self._reader, self._copier = _thread("adapter-read"), _thread("adapter-copy")
        self._reading: dict[str, tuple[Future[tuple[Adapter, float]], str]] = {}  # digest -> (load, path)
        self._staged: OrderedDict[str, _Staged] = OrderedDict()  # first come first served
        self._copying: dict[
            str, tuple[Future[tuple[Adapter, float]], float]
        ] = {}  # digest -> (copy, reading's seconds)
        self._residents: dict[str, _Resident] = {}
        self._errors: dict[str, tuple[AdapterError, float, str]] = {}  # digest -> (why, when, path)
        self._wanted: set[str] = set()  # asked for since the last poll
        self.stats = ResidencyStats()

    @property
    def slots(self) -> int:
        """How many slots there are, the base's included."""
        return self._slots.count

    @property
    def loading(self) -> bool:
        """Whether a load is under way."""
        return bool(self._reading or self._staged or self._copying)

    @property
    def resident(self) -> int:
        """How many adapters are READY."""
        return len(self._residents) - len(self._copying)

    def prefetch(self, ref: AdapterRef) -> AdapterStatus:
        """Mark `ref` as wanted soon, start loading it if it is absent, and say where it stands.

        Still ABSENT: so many others are being loaded that it has to be asked for again.
        """
        self._forget_failure(ref)
        self._wanted.add(ref.digest)
        self._slots.touch(ref.digest)
        ahead = len(self._reading) + len(self._staged)
        if self.status(ref.digest) is AdapterStatus.ABSENT and ahead < LOADS_AHEAD:
            self._reading[ref.digest] = self._reader.submit(_timed, self._load, ref), ref.path
        return self.status(ref.digest)

    def starving(self, digest: str) -> bool:
        """Whether a loaded adapter has waited for room for more than PATIENCE polls: others keep the arena full."""
        return digest in self._staged and self._staged[digest].polls > PATIENCE

    def pin(self, digest: str) -> None:
        """Keep a READY adapter on the device until `unpin`."""
        self._slots.pin(digest)

    def unpin(self, digest: str) -> None:
        """Undo one `pin`. The adapter stays until its room is needed."""
        self._slots.unpin(digest)

    def status(self, digest: str) -> AdapterStatus:
        """Where the adapter of this digest stands now."""
        resident = self._residents.get(digest)
        if resident is not None and resident.adapter is not None:
            return AdapterStatus.READY
        if resident is not None or digest in self._reading or digest in self._staged:
            return AdapterStatus.LOADING
        if digest in self._errors:
            refused = isinstance(self._errors[digest][0], AdapterRefused)
            return AdapterStatus.REFUSED if refused else AdapterStatus.FAILED
        return AdapterStatus.ABSENT

    def poll(self) -> None:
        """Publish what has ended since the last call, and start copying what has room now."""
        for digest in [d for d, (future, _) in self._reading.items() if future.done()]:
            future, path = self._reading.pop(digest)
            error = future.exception()
            if error is None:
                self._staged[digest] = _Staged(*future.result())
            else:
                self._fail(digest, error, path)
        for digest in [d for d, (future, _) in self._copying.items() if future.done()]:
            future, seconds = self._copying.pop(digest)
            error = future.exception()
            if error is None:
                self._residents[digest].adapter, more = future.result()
                self.stats.loads += 1
                self.stats.load_seconds += seconds + more
            else:
                self._evict(digest)
                self._fail(digest, error, "")
        wanted, self._wanted = self._wanted, set()
        self._place_staged(wanted)

    def adapter(self, digest: str) -> Adapter:
        """The weights of a READY adapter, in the arena."""
        resident = self._residents[digest]
        if resident.adapter is None:
            raise KeyError(digest)
        return resident.adapter

    def slot(self, digest: str) -> int:
        """The slot of a READY adapter."""
        return self._residents[digest].slot

    def error(self, digest: str) -> AdapterError:
        """Why a REFUSED or FAILED adapter isn't READY."""
        return self._errors[digest][0]

    def check_integrity(self) -> None:
        """Raises AssertionError when slots, pins or places are lost while nothing runs."""
        self._slots.check_integrity()
        self.arena.check_integrity()
        assert len(self._slots) == len(self._residents), "a slot without its adapter"
        held = sum(self.arena.nbytes_of(resident.place) for resident in self._residents.values())
        assert held == self.arena.used_bytes, f"adapters hold {held} bytes, the arena counts {self.arena.used_bytes}"

    def close(self) -> None:
        """Stop the loading threads."""
        for executor in (self._reader, self._copier):
            executor.shutdown(wait=True, cancel_futures=True)

    def _place_staged(self, wanted: set[str]) -> None:
        """In order of arrival: the first that finds no room holds up the others, or larger ones would never get any."""
        while self._staged:
            digest, staged = next(iter(self._staged.items()))
            try:
                place = self._make_room(staged.adapter, set() if self.starving(digest) else wanted)
            except AdapterRefused as error:
                del self._staged[digest]
                self._fail(digest, error, "")
                continue
            if place is None and digest in wanted:
                staged.polls += 1
                return
            del self._staged[digest]  # placed, or nobody waits for it any more
            if place is not None:
                self._residents[digest] = _Resident(self._slots.add(digest), place)
                copy = self._copier.submit(_timed, self.arena.fill, staged.adapter, place)
                self._copying[digest] = copy, staged.seconds

    def _make_room(self, adapter: Adapter, keep: set[str]) -> Place | None:
        """A place for `adapter`, evicting others; None, and nobody evicted, while what may go would not suffice.

        Pinned ones, those being copied and those in `keep` stay.
        """
        place = self._reserve(adapter)
        if place is not None:
            return place
        keep = keep | self._copying.keys()
        idle = sum(self.arena.nbytes_of(self._residents[digest].place) for digest in self._slots.idle(keep))
        if self.arena.nbytes - self.arena.used_bytes + idle < self.arena.nbytes_for(adapter):
            return None
        while place is None:
            victim = next(self._slots.idle(keep), None)
            if victim is None:
                return None
            self._evict(victim)
            self.stats.evictions += 1
            place = self._reserve(adapter)
        return place

    def _reserve(self, adapter: Adapter) -> Place | None:
        return None if self._slots.full else self.arena.reserve(adapter)

    def _evict(self, digest: str) -> None:
        self.arena.free(self._residents.pop(digest).place)
        self._slots.remove(digest)

    def _fail(self, digest: str, error: BaseException, path: str) -> None:
        if not isinstance(error, AdapterError):
            error = AdapterUnavailable(f"loading failed: {type(error).__name__}: {error}")
        self.stats.failures += 1
        self._errors[digest] = (error, time.monotonic(), path)

    def _forget_failure(self, ref: AdapterRef) -> None:
        """Forget an I/O error that is old, or of another folder with the same content."""
        error, when, path = self._errors.get(ref.digest, (None, 0.0, ""))
        if isinstance(error, AdapterUnavailable) and (
            (path and path != ref.path) or time.monotonic() - when >= RETRY_SECONDS
        ):
            del self._errors[ref.digest]


def _thread(name: str) -> ThreadPoolExecutor:
    """One thread that leaves the step its cores."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(1,))


def _timed(work: Callable[..., Adapter], *arguments: object) -> tuple[Adapter, float]:
    start = time.perf_counter()
    return work(*arguments), time.perf_counter() - start
