"""Brings adapters onto the device, off the decode thread: ABSENT -> LOADING -> READY | REFUSED | FAILED."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

from adapters.adapter import Adapter, AdapterRef
from adapters.arena import Arena, Place
from adapters.errors import AdapterError, AdapterRefused
from adapters.failures import Failures
from adapters.golden import Golden
from adapters.host_cache import HostCache
from adapters.reading import Reader
from adapters.residents import Resident, Residents
from adapters.status import WORST_FIRST, AdapterStatus, Change, ResidencyStats

PATIENCE = 16
"""Polls that an adapter waits for room before those asked for may be evicted for it, and others wait their turn."""
LOADS_AHEAD = 8
"""Adapters that are read into host memory, or wait there for room, at once."""
SLOTS = 4096
"""Adapters on a device at once, however small they are, and the base."""
PROVED = 1 << 14
"""Adapters that are remembered to have said their golden prompts; older ones say them again when they come back."""


@dataclass
class _Staged:
    """An adapter in host memory that waits for room on the device."""

    ref: AdapterRef
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

    An adapter that brought golden prompts is LOADING, and pinned, until the engine has asked `take_unproved` for them
    and said by `end_proof` how they went.
    """

    def __init__(
        self, load: Callable[[AdapterRef], Adapter], arena: Arena, slots: int = SLOTS, host_cache: int = 0
    ) -> None:
        """`load` reads one adapter into host memory; `slots`: how many adapters may be there at most, plus one;
        `host_cache`: bytes of adapters that are kept in host memory."""
        self.arena, self.cache = arena, HostCache(host_cache)
        self._reader = Reader(load, self.cache)
        self._staged: OrderedDict[str, _Staged] = OrderedDict()  # first come first served
        self._residents = Residents(arena, slots)
        self._failures = Failures()
        self._proved: OrderedDict[str, None] = OrderedDict()  # oldest first
        self._golden: dict[str, Golden] = {}  # of those being copied that have to be proved
        self._unproved: list[tuple[AdapterRef, Golden]] = []  # copied and pinned, but their proof hasn't begun
        self._changed: dict[str, None] = {}  # whose status may differ since `changes` was called
        self._wanted: dict[frozenset[str], None] = {}  # groups asked for since the last poll, in order
        self._claim: frozenset[str] = frozenset()  # the group that has waited for too long
        self.stats = ResidencyStats()

    @property
    def slots(self) -> int:
        """How many slots there are, the base's included."""
        return self._residents.slots

    @property
    def loading(self) -> bool:
        """Whether a load is under way."""
        return bool(self._reader or self._staged or self._residents.loading)

    @property
    def changed(self) -> bool:
        """Whether `changes` has something to tell."""
        return bool(self._changed)

    @property
    def resident(self) -> int:
        """How many adapters are READY."""
        return self._residents.num_ready

    def prefetch(self, *refs: AdapterRef) -> AdapterStatus:
        """Mark `refs`, a group, as wanted soon, start loading what is absent of it, and say where it stands.

        READY if all are, REFUSED or FAILED if one is, REFUSED if they don't fit into the arena together. Still ABSENT:
        so many others are being loaded that the group has to be asked for again.
        """
        group = frozenset(ref.digest for ref in refs)
        self._wanted[group] = None
        for ref in refs:
            if self._failures.retry(ref):
                self._changed[ref.digest] = None
            self._residents.touch(ref.digest)
        if not any(digest in self._failures for digest in group):
            for ref in refs:
                # A claimed group's are read however many others wait in host memory: those wait for it.
                ahead = 0 if group == self._claim else len(self._reader) + len(self._staged)
                if self.status(ref.digest) is AdapterStatus.ABSENT and ahead < LOADS_AHEAD:
                    self._reader.start(ref)
                    self._changed[ref.digest] = None
        worst = min((self.status(digest) for digest in group), key=WORST_FIRST.index)
        return AdapterStatus.REFUSED if self._misfit(group) else worst

    def starving(self, *digests: str) -> bool:
        """Whether one of a group has been read, and waited for room for more than PATIENCE polls: others keep the arena
        full."""
        return self._claim == frozenset(digests) and any(digest in self._staged for digest in digests)

    def pin(self, *digests: str) -> None:
        """Keep a group of READY adapters on the device until `unpin`."""
        for digest in digests:
            self._residents.pin(digest)
        if self._claim == frozenset(digests):
            self._claim = frozenset()

    def unpin(self, *digests: str) -> None:
        """Undo one `pin`. The adapters stay until their room is needed."""
        for digest in digests:
            if self._residents.unpin(digest):
                self._changed[digest] = None

    def take_unproved(self) -> list[tuple[AdapterRef, Golden]]:
        """Adapters on the device that may not serve yet, each once: what they have to say is to be replayed."""
        unproved, self._unproved = self._unproved, []
        return unproved

    def end_proof(self, ref: AdapterRef, error: AdapterError | None) -> None:
        """An adapter has said its golden prompts, and is READY; or it hasn't, and leaves the device."""
        resident = self._residents[ref.digest]
        resident.proving = False
        self._residents.update(resident)
        self._changed[ref.digest] = None
        if self._residents.unpin(ref.digest) or resident.leaving:
            return
        if error is not None:
            self._residents.discard(ref.digest)
            self._fail(ref, error)
            return
        self._proved[ref.digest] = None
        while len(self._proved) > PROVED:
            self._proved.popitem(last=False)
        self._publish(resident)

    def forget(self, digest: str) -> None:
        """Take an adapter off the device, as soon as nothing uses it, and out of host memory, and judge it afresh when
        it is asked for again: its failure and its proof are forgotten, too."""
        self._reader.drop(digest)
        self._staged.pop(digest, None)
        self._failures.forget(digest)
        self._proved.pop(digest, None)
        self._changed[digest] = None
        if digest in self._residents:
            self._residents.leave(digest)

    def changes(self, limit: int = 256) -> tuple[Change, ...]:
        """Where adapters stand whose status has changed since the last call; what is beyond `limit` comes next time."""
        digests = list(self._changed)[:limit]
        found: list[Change] = []
        for digest in digests:
            del self._changed[digest]
            status = self.status(digest)
            failed = status in (AdapterStatus.REFUSED, AdapterStatus.FAILED)
            found.append(Change(digest, status, str(self.error(digest)) if failed else None))
        return tuple(found)

    def status(self, digest: str) -> AdapterStatus:
        """Where the adapter of this digest stands now."""
        resident = self._residents.get(digest)
        if resident is not None and resident.ready:
            return AdapterStatus.READY
        if resident is not None or digest in self._reader or digest in self._staged:
            return AdapterStatus.LOADING
        error = self._failures.get(digest)
        if error is not None:
            return AdapterStatus.REFUSED if isinstance(error, AdapterRefused) else AdapterStatus.FAILED
        return AdapterStatus.ABSENT

    def poll(self) -> None:
        """Publish what has ended since the last call, and start copying what has room now."""
        for read in self._reader.ended():
            if isinstance(read.result, BaseException):
                self._fail(read.ref, read.result)
            else:
                nbytes = self.arena.nbytes_for(read.result)
                self._staged[read.ref.digest] = _Staged(read.ref, read.result, read.seconds, nbytes)
        for resident, error in self._residents.end_copies():
            self._end_copy(resident, error)
        wanted, self._wanted = self._wanted, {}
        if self._claim not in wanted:
            self._claim = frozenset()
        self._place_staged(wanted)

    def adapter(self, digest: str) -> Adapter:
        """The weights of an adapter that is READY, or being proved, in the arena."""
        resident = self._residents[digest]
        if resident.adapter is None:
            raise KeyError(digest)
        return resident.adapter

    def slot(self, digest: str) -> int:
        """The slot of an adapter that is READY, or being proved."""
        return self._residents[digest].slot

    def error(self, *digests: str) -> AdapterError:
        """Why a group is REFUSED or FAILED. Raises KeyError if it is neither."""
        failed = [error for digest in digests if (error := self._failures.get(digest))]
        refused = [error for error in failed if isinstance(error, AdapterRefused)]
        if error := next(iter(refused + failed), None) or self._misfit(digests):
            return error
        raise KeyError(*digests)

    def check_integrity(self) -> None:
        """Raises AssertionError when slots, pins or places are lost while nothing runs."""
        self._residents.check_integrity()

    def close(self) -> None:
        """Stop the loading threads."""
        self._reader.close()
        self._residents.close()

    def _end_copy(self, resident: Resident, error: BaseException | None) -> None:
        digest = resident.ref.digest
        golden = self._golden.pop(digest, None)
        self._changed[digest] = None
        if resident.leaving:
            if error is None:
                self._residents.leave(digest)
        elif error is not None:
            self._fail(resident.ref, error)
        elif golden is None:
            self._publish(resident)
        else:
            self._residents.pin(digest)
            self._unproved.append((resident.ref, golden))

    def _publish(self, resident: Resident) -> None:
        self.stats.loads += 1
        self.stats.load_seconds += resident.seconds
        self._failures.forget(resident.ref.digest)
        self._changed[resident.ref.digest] = None

    def _place_staged(self, wanted: dict[frozenset[str], None]) -> None:
        """In order of arrival: the first that finds no room holds up the others, or larger ones would never get any."""
        asked = frozenset[str]().union(*wanted)
        while (digest := self._next_staged()) is not None:
            staged = self._staged[digest]
            try:
                place = self._make_room(staged.adapter, self._claim if digest in self._claim else asked)
            except AdapterRefused as error:
                del self._staged[digest]
                self._fail(staged.ref, error)
                continue
            if place is None and digest in asked:
                staged.polls += 1
                if staged.polls > PATIENCE and not self._claim:
                    self._claim = next(group for group in wanted if digest in group)
                return
            del self._staged[digest]  # placed, or nobody waits for it any more
            self._changed[digest] = None
            if place is not None:
                golden = staged.adapter.golden if digest not in self._proved else None
                if golden is not None:
                    self._golden[digest] = golden
                self._residents.start_copy(
                    staged.ref, staged.adapter, place, staged.seconds, proving=golden is not None
                )

    def _next_staged(self) -> str | None:
        """The next one to get a place: the first, but of the claimed group if that isn't complete."""
        complete = all(digest in self._residents for digest in self._claim)
        return next((digest for digest in self._staged if complete or digest in self._claim), None)

    def _make_room(self, adapter: Adapter, keep: frozenset[str]) -> Place | None:
        """A place for `adapter`, evicting others but those in `keep`; None, and nobody evicted, if it gets none so.

        Where only its own claimed group is in the way, all of it goes and comes again, side by side.
        """
        place = self._residents.reserve(adapter)
        if place is not None:
            return place
        victims = self._residents.victims(adapter, keep, anew=adapter.digest in self._claim)
        if victims is None:
            return None
        for victim in victims:
            self._evict(victim)
        return self._residents.reserve(adapter)

    def _misfit(self, digests: Collection[str]) -> AdapterRefused | None:
        """Why adapters can't be on the device together; None if they can, or if one of them has not been read."""
        if len(digests) < 2:
            return None
        if len(digests) >= self._residents.slots:
            return AdapterRefused(
                f"{len(digests)} adapters composed, the device has slots for {self._residents.slots - 1}"
            )
        needed = 0
        for digest in digests:
            if digest in self._staged:
                needed += self._staged[digest].nbytes
            elif digest in self._residents:
                needed += self._residents.nbytes(digest)
            else:
                return None
        if needed <= self.arena.nbytes:
            return None
        return AdapterRefused(
            f"the {len(digests)} adapters composed take {needed:,} bytes on the device together, the arena holds "
            f"{self.arena.nbytes:,}: raise --adapter-memory, or compose fewer"
        )

    def _evict(self, digest: str) -> None:
        self.stats.evictions += 1
        self.cache.touch(digest)
        self._changed[digest] = None
        self._residents.discard(digest)

    def _fail(self, ref: AdapterRef, error: BaseException) -> None:
        self.stats.failures += 1
        self._changed |= dict.fromkeys((ref.digest, *self._failures.add(ref, error)))
        if isinstance(error, AdapterRefused):
            self.cache.remove(ref.digest)
