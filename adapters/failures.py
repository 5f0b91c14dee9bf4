"""Adapters that could not be loaded: why, and when one may be tried again."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

from adapters.adapter import AdapterRef
from adapters.errors import AdapterError, AdapterRefused, AdapterUnavailable

RETRY_SECONDS, LONGEST_RETRY_SECONDS = 5.0, 300.0
"""The wait after the first failure, doubled by each that follows it, and the longest."""
REMEMBERED = 4096
"""Failures that are remembered; the oldest are forgotten, and tried again when they are asked for."""


@dataclass
class _Failure:
    error: AdapterError
    path: str  # whence it was read
    when: float  # time.monotonic()
    times: int  # in a row
    retried: bool = False  # being tried again: what it was is no answer any more

    @property
    def wait(self) -> float:
        """Seconds until it may be tried again."""
        return min(RETRY_SECONDS * 2.0 ** min(self.times - 1, 60), LONGEST_RETRY_SECONDS)


class Failures:
    """By digest. Content that is wrong stays refused; what failed is tried again, after 5, 10, 20 ... 300 seconds."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, _Failure] = OrderedDict()  # oldest first

    def __contains__(self, digest: str) -> bool:
        return self.get(digest) is not None

    def get(self, digest: str) -> AdapterError | None:
        """Why it was refused, or failed and can't be tried again yet."""
        failure = self._failures.get(digest)
        return None if failure is None or failure.retried else failure.error

    def add(self, ref: AdapterRef, error: BaseException) -> list[str]:
        """Remember a failure; whatever is no AdapterError is one that may pass. Says whose are forgotten for it."""
        if not isinstance(error, AdapterError):
            error = AdapterUnavailable(f"loading failed: {type(error).__name__}: {error}")
        before = self._failures.pop(ref.digest, None)
        times = 1 + (before.times if before is not None else 0)
        self._failures[ref.digest] = _Failure(error, ref.path, time.monotonic(), times)
        return [self._failures.popitem(last=False)[0] for _ in range(len(self._failures) - REMEMBERED)]

    def retry(self, ref: AdapterRef) -> bool:
        """Let `ref` be tried again if it failed long enough ago, or elsewhere: another folder of the same content.
        Whether it is one that from now on may be."""
        failure = self._failures.get(ref.digest)
        if failure is None or failure.retried:
            return False
        due = time.monotonic() - failure.when >= failure.wait
        if not isinstance(failure.error, AdapterRefused) and (due or failure.path != ref.path):
            failure.retried = True
        return failure.retried

    def forget(self, digest: str) -> None:
        """It was loaded, or is to be judged afresh."""
        self._failures.pop(digest, None)
