"""How much one caller may ask for: requests under way at once, and requests a second or minute.

The counts lie in shared memory, so that API processes forked later count together: make the object before they are
forked. When one of those dies, its requests stay counted; main ends then anyway.
"""

import ctypes
import math
import multiprocessing
import time
from multiprocessing.sharedctypes import RawArray

from server.api.errors import ApiError

SLOTS = 4096
PROBES = 64  # slots that a caller may have, from where its hash points
_PERIODS = {"second": 1.0, "minute": 60.0}


class _Slot(ctypes.Structure):
    """One caller's counts; all zero is free."""

    _fields_ = (
        ("caller", ctypes.c_uint64),
        ("running", ctypes.c_int64),
        ("next_at", ctypes.c_double),  # time.monotonic() at which all that was asked for would be due, evenly spread
    )
    caller: int
    running: int
    next_at: float


class CallerLimits:
    """Counts callers, who are known by any number but 0.

    The rate N/period lets N requests through at once and then one each period/N (GCRA, the leaky bucket as a meter).
    """

    def __init__(self, concurrency: int | None, rate: str | None) -> None:
        """`rate`: `N/second` or `N/minute`. None is no limit."""
        self._concurrency, self._rate = concurrency, rate
        count, _, period = (rate or "1/second").partition("/")
        self._period = _PERIODS[period]
        self._interval = self._period / int(count)
        self._slots = RawArray(_Slot, SLOTS)
        self._lock = multiprocessing.Lock()

    @property
    def on(self) -> bool:
        """Whether anything is limited."""
        return self._concurrency is not None or self._rate is not None

    def take(self, caller: int) -> None:
        """Count a request, which `give_back` ends. Raises 429 ApiError, and counts nothing, for one too many."""
        now = time.monotonic()
        with self._lock:
            slot = self._slot(caller, now)
            if slot is None:
                raise _too_many("too many callers at once", 1)
            if self._concurrency is not None and slot.running >= self._concurrency:
                raise _too_many(
                    f"{slot.running} requests of this caller are under way, as many as may (--key-concurrency)", 1
                )
            if self._rate is not None:
                due = max(slot.next_at, now) + self._interval
                wait = due - self._period - now
                if wait > self._interval / 1000:  # less is rounding
                    raise _too_many(f"this caller has sent {self._rate}, as much as it may (--key-rate)", wait)
                slot.next_at = due
            slot.caller = caller
            slot.running += 1

    def give_back(self, caller: int) -> None:
        """The request has ended, or its client is gone."""
        with self._lock:
            slot = self._slot(caller, time.monotonic())
            if slot is not None:
                slot.running -= 1

    def _slot(self, caller: int, now: float) -> _Slot | None:
        """The caller's slot, or one that it may have: never used, or as good as that by now."""
        free: _Slot | None = None
        for probe in range(PROBES):
            slot = self._slots[(caller + probe) % SLOTS]
            if slot.caller == caller:
                return slot
            if slot.running == 0 and slot.next_at <= now:
                if free is None:
                    free = slot
                if slot.caller == 0:
                    break  # no slot is ever given up, so it can't lie behind this one
        return free


def _too_many(message: str, seconds: float) -> ApiError:
    return ApiError(429, "rate_limited", message, {"Retry-After": str(max(1, math.ceil(seconds)))})
