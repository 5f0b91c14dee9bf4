"""Brings adapters onto the device, off the decode thread: ABSENT -> LOADING -> READY | REFUSED | FAILED."""

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
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


_WORST_FIRST = (
    AdapterStatus.REFUSED, AdapterStatus.FAILED, AdapterStatus.ABSENT, AdapterStatus.LOADING, AdapterStatus.READY
)  # fmt: skip


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
    nbytes: int  # that it will take on the device
    polls: int = 0  # that it has waited


class Residency:
    """Adapters on the device, as many as the arena holds. Every method is called from the engine's thread.

    A load reads the adapter into host memory, waits until the arena has room, and is copied there; reading and copying
    run on a thread each, and `poll` publishes what has ended. The least recently used adapter makes room, but none that
    a running sequence uses, and none that was asked for since the last poll: it is about to run.

    Adapters are asked for in groups, those that one request composes; a group runs when all of it is READY. When one of
    them has waited for room for too long, its group is claimed: until it runs or is given up, nothing of it is evicted,
    and until all of it has its place, nothing else gets one. Two groups can't take turns at evicting each other's
    halves, and what fits into the arena is sure to run.
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
        self._wanted: dict[frozenset[str], None] = {}  # groups asked for since the last poll, in order
        self._claim: frozenset[str] = frozenset()  # the group that has waited for too long
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

    def prefetch(self, *refs: AdapterRef) -> AdapterStatus:
        """Mark `refs`, a group, as wanted soon, start loading what is absent of it, and say where it stands.

        READY if all are, REFUSED or FAILED if one is, REFUSED if they don't fit into the arena together. Still ABSENT:
        so many others are being loaded that the group has to be asked for again.
        """
        group = frozenset(ref.digest for ref in refs)
        self._wanted[group] = None
        for ref in refs:
            self._forget_failure(ref)
            self._slots.touch(ref.digest)
        if not group & self._errors.keys():
            for ref in refs:
                # A claimed group's are read however many others wait in host memory: those wait for it.
                ahead = 0 if group == self._claim else len(self._reading) + len(self._staged)
                if self.status(ref.digest) is AdapterStatus.ABSENT and ahead < LOADS_AHEAD:
                    self._reading[ref.digest] = self._reader.submit(_timed, self._load, ref), ref.path
        worst = min((self.status(digest) for digest in group), key=_WORST_FIRST.index)
        return AdapterStatus.REFUSED if self._misfit(group) else worst

    def starving(self, *digests: str) -> bool:
        """Whether one of a group has been read, and waited for room for more than PATIENCE polls: others keep the arena
        full."""
        return self._claim == frozenset(digests) and any(digest in self._staged for digest in digests)

    def pin(self, *digests: str) -> None:
        """Keep a group of READY adapters on the device until `unpin`."""
        for digest in digests:
            self._slots.pin(digest)
        if self._claim == frozenset(digests):
            self._claim = frozenset()

    def unpin(self, *digests: str) -> None:
        """Undo one `pin`. The adapters stay until their room is needed."""
        for digest in digests:
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
                adapter, seconds = future.result()
                self._staged[digest] = _Staged(adapter, seconds, self.arena.nbytes_for(adapter))
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
                self._discard(digest)
                self._fail(digest, error, "")
        wanted, self._wanted = self._wanted, {}
        if self._claim not in wanted:
            self._claim = frozenset()
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

    def error(self, *digests: str) -> AdapterError:
        """Why a group is REFUSED or FAILED. Raises KeyError if it is neither."""
        failed = [self._errors[digest][0] for digest in digests if digest in self._errors]
        refused = [error for error in failed if isinstance(error, AdapterRefused)]
        if error := next(iter(refused + failed), None) or self._misfit(digests):
            return error
        raise KeyError(*digests)

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

    def _place_staged(self, wanted: dict[frozenset[str], None]) -> None:
        """In order of arrival: the first that finds no room holds up the others, or larger ones would never get any."""
        asked = frozenset[str]().union(*wanted)
        while (digest := self._next_staged()) is not None:
            staged = self._staged[digest]
            try:
                place = self._make_room(staged.adapter, self._claim if digest in self._claim else asked)
            except AdapterRefused as error:
                del self._staged[digest]
                self._fail(digest, error, "")
                continue
            if place is None and digest in asked:
                staged.polls += 1
                if staged.polls > PATIENCE and not self._claim:
                    self._claim = next(group for group in wanted if digest in group)
                return
            del self._staged[digest]  # placed, or nobody waits for it any more
            if place is not None:
                self._residents[digest] = _Resident(self._slots.add(digest), place)
                copy = self._copier.submit(_timed, self.arena.fill, staged.adapter, place)
                self._copying[digest] = copy, staged.seconds

    def _next_staged(self) -> str | None:
        """The next one to get a place: the first, but of the claimed group if that isn't complete."""
        complete = self._claim <= self._residents.keys()
        return next((digest for digest in self._staged if complete or digest in self._claim), None)

    def _make_room(self, adapter: Adapter, keep: frozenset[str]) -> Place | None:
        """A place for `adapter`, evicting others; None, and nobody evicted, while what may go would not suffice.

        Pinned ones, those being copied and those in `keep` stay; but where only its own group is left, and lies so that
        there is no room in one piece, all of it goes and comes again, side by side.
        """
        place = self._reserve(adapter)
        if place is not None:
            return place
        keep |= self._copying.keys()
        idle = sum(self.arena.nbytes_of(self._residents[digest].place) for digest in self._slots.idle(keep))
        if self.arena.nbytes - self.arena.used_bytes + idle < self.arena.nbytes_for(adapter):
            return None
        while place is None and (victim := next(self._slots.idle(keep), None)):
            self._evict(victim)
            place = self._reserve(adapter)
        rest = list(self._slots.idle(self._copying))
        if place is None and adapter.digest in self._claim and len(rest) == len(self._residents):
            for victim in rest:
                self._evict(victim)
            place = self._reserve(adapter)
        return place

    def _misfit(self, digests: Collection[str]) -> AdapterRefused | None:
        """Why adapters can't be on the device together; None if they can, or if one of them has not been read."""
        if len(digests) < 2:
            return None
        if len(digests) >= self._slots.count:
            return AdapterRefused(f"{len(digests)} adapters composed, the device has slots for {self._slots.count - 1}")
        needed = 0
        for digest in digests:
            if digest in self._staged:
                needed += self._staged[digest].nbytes
            elif digest in self._residents:
                needed += self.arena.nbytes_of(self._residents[digest].place)
            else:
                return None
        if needed <= self.arena.nbytes:
            return None
        return AdapterRefused(
            f"the {len(digests)} adapters composed take {needed:,} bytes on the device together, the arena holds "
            f"{self.arena.nbytes:,}: raise --adapter-memory, or compose fewer"
        )

    def _reserve(self, adapter: Adapter) -> Place | None:
        return None if self._slots.full else self.arena.reserve(adapter)

    def _evict(self, digest: str) -> None:
        self.stats.evictions += 1
        self._discard(digest)

    def _discard(self, digest: str) -> None:
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
