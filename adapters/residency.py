"""Brings adapters onto the device, off the decode thread: ABSENT -> LOADING -> READY | REFUSED | FAILED."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

from adapters.adapter import Adapter, AdapterRef
from adapters.errors import AdapterError, AdapterRefused, AdapterUnavailable
from adapters.slots import SlotTable

RETRY_SECONDS = 5.0


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


class Residency:
    """Adapters on the device, at most `capacity`. Every method is called from the engine's thread."""

    def __init__(self, load: Callable[[AdapterRef], Adapter], capacity: int) -> None:
        """`load` reads one adapter onto the device; it runs on this object's own thread."""
        self._load = load
        self._slots = SlotTable(capacity)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="adapter-load")
        self._loading: dict[str, tuple[Future[tuple[Adapter, float]], str]] = {}  # digest -> (load, path)
        self._ready: dict[str, Adapter] = {}
        self._errors: dict[str, tuple[AdapterError, float, str]] = {}  # digest -> (why, when, path)
        self.stats = ResidencyStats()

    @property
    def loading(self) -> bool:
        """Whether a load is under way."""
        return bool(self._loading)

    @property
    def resident(self) -> int:
        """How many adapters are READY."""
        return len(self._ready)

    def prefetch(self, ref: AdapterRef) -> AdapterStatus:
        """Mark `ref` as wanted soon, start loading it if it is absent, and say where it stands.

        ABSENT: every slot is pinned just now.
        """
        self._forget_failure(ref)
        has_slot, evicted = self._slots.touch(ref.digest)
        if evicted is not None:
            self._ready.pop(evicted, None)
            self.stats.evictions += 1
        if has_slot and self.status(ref.digest) is AdapterStatus.ABSENT:
            self._loading[ref.digest] = self._executor.submit(self._timed_load, ref), ref.path
        return self.status(ref.digest)

    def pin(self, digest: str) -> None:
        """Keep a READY adapter on the device until `unpin`."""
        self._slots.pin(digest)

    def unpin(self, digest: str) -> None:
        """Undo one `pin`. The adapter stays until its slot is needed."""
        self._slots.unpin(digest)

    def status(self, digest: str) -> AdapterStatus:
        """Where the adapter of this digest stands now."""
        if digest in self._ready:
            return AdapterStatus.READY
        if digest in self._loading:
            return AdapterStatus.LOADING
        if digest in self._errors:
            refused = isinstance(self._errors[digest][0], AdapterRefused)
            return AdapterStatus.REFUSED if refused else AdapterStatus.FAILED
        return AdapterStatus.ABSENT

    def poll(self) -> None:
        """Publish the loads that have finished since the last call."""
        for digest in [d for d, (future, _) in self._loading.items() if future.done()]:
            future, path = self._loading.pop(digest)
            error = future.exception()
            if error is None:
                adapter, seconds = future.result()
                self.stats.loads += 1
                self.stats.load_seconds += seconds
                if digest in self._slots:
                    self._ready[digest] = adapter
                continue
            if not isinstance(error, AdapterError):
                error = AdapterUnavailable(f"loading failed: {type(error).__name__}: {error}")
            self.stats.failures += 1
            self._errors[digest] = (error, time.monotonic(), path)

    def adapter(self, digest: str) -> Adapter:
        """The weights of a READY adapter."""
        return self._ready[digest]

    def error(self, digest: str) -> AdapterError:
        """Why a REFUSED or FAILED adapter isn't READY."""
        return self._errors[digest][0]

    def check_integrity(self) -> None:
        """Raises AssertionError when pins are left while nothing runs."""
        self._slots.check_integrity()

    def close(self) -> None:
        """Stop the loading thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _forget_failure(self, ref: AdapterRef) -> None:
        """Forget an I/O error that is old, or of another folder with the same content."""
        error, when, path = self._errors.get(ref.digest, (None, 0.0, ""))
        if isinstance(error, AdapterUnavailable) and (path != ref.path or time.monotonic() - when >= RETRY_SECONDS):
            del self._errors[ref.digest]

    def _timed_load(self, ref: AdapterRef) -> tuple[Adapter, float]:
        start = time.perf_counter()
        return self._load(ref), time.perf_counter() - start
