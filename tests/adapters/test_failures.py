"""When a load that failed is tried again, and what is forgotten when it is told to."""

import pytest
import torch

from adapters import failures as failures_module
from adapters.arena import Arena
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.failures import Failures
from adapters.residency import Residency
from adapters.status import AdapterStatus
from tests.adapters.test_residency import Loader, ready, ref, settle
from tests.engine.toy import ADAPTER_BYTES, CPU


class Clock:
    """time.monotonic, as the test sets it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(failures_module, "time", clock)
    return clock


def test_the_wait_doubles_up_to_five_minutes_and_starts_anew_after_success(clock: Clock) -> None:
    failures = Failures()
    waits = list[float]()
    for _ in range(9):
        failures.add(ref("a"), AdapterUnavailable("disk"))
        start = clock.now
        while "a" in failures:
            clock.now += 1
            failures.retry(ref("a"))
        waits.append(clock.now - start)
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    failures.forget("a")
    failures.add(ref("a"), AdapterUnavailable("disk"))
    clock.now += 5
    failures.retry(ref("a"))
    assert "a" not in failures


def test_a_refusal_is_for_good(clock: Clock) -> None:
    failures = Failures()
    failures.add(ref("a"), AdapterRefused("rank"))
    clock.now += 1e6
    failures.retry(ref("a"))
    assert str(failures.get("a")) == "rank"


def test_so_many_are_remembered(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures_module, "REMEMBERED", 2)
    failures = Failures()
    forgotten = [failures.add(ref(digest), AdapterUnavailable("disk")) for digest in "abc"]
    assert forgotten == [[], [], ["a"]]
    assert [digest in failures for digest in "abc"] == [False, True, True]


def test_success_resets_the_wait(clock: Clock) -> None:
    loader = Loader()
    residency = Residency(loader, Arena(ADAPTER_BYTES, CPU, torch.float32))
    for wait in (5, 10):
        loader.errors["a"] = AdapterUnavailable("disk")
        residency.prefetch(ref("a"))
        settle(residency)
        clock.now += wait - 1
        assert residency.prefetch(ref("a")) is AdapterStatus.FAILED
        clock.now += 1
    loader.errors.clear()
    ready(residency, "a", "b")
    loader.errors["a"] = AdapterUnavailable("disk")
    residency.prefetch(ref("a"))
    settle(residency)
    clock.now += 5
    assert residency.prefetch(ref("a")) is AdapterStatus.LOADING
    residency.close()


@pytest.fixture
def cached() -> Residency:
    return Residency(Loader(), Arena(2 * ADAPTER_BYTES, CPU, torch.float32), host_cache=1 << 20)


def test_forgetting_takes_it_off_the_device_and_out_of_host_memory(cached: Residency) -> None:
    ready(cached, "a", "b")
    cached.forget("a")
    assert cached.status("a") is AdapterStatus.ABSENT
    assert "a" not in cached.cache
    assert cached.arena.used_bytes == ADAPTER_BYTES
    cached.check_integrity()
    ready(cached, "a")
    assert (cached.cache.hits, cached.cache.misses, cached.stats.evictions) == (0, 3, 0)
    cached.forget("never seen")
    cached.close()


def test_what_runs_ends_with_it_and_newcomers_wait_for_a_fresh_one(cached: Residency) -> None:
    ready(cached, "a")
    cached.pin("a")
    cached.forget("a")
    assert cached.adapter("a").digest == "a"
    assert cached.prefetch(ref("a")) is AdapterStatus.LOADING
    assert cached.resident == 0
    cached.unpin("a")
    assert cached.status("a") is AdapterStatus.ABSENT
    ready(cached, "a")
    assert cached.cache.misses == 2
    cached.check_integrity()
    cached.close()


def test_forgetting_while_it_is_read_or_copied(cached: Residency, monkeypatch: pytest.MonkeyPatch) -> None:
    cached.prefetch(ref("a"))
    cached.forget("a")
    settle(cached)
    assert cached.status("a") is AdapterStatus.ABSENT
    cached.prefetch(ref("a"))
    while "a" not in cached._residents:
        cached.prefetch(ref("a"))
        cached.poll()
    cached.forget("a")
    settle(cached)
    assert cached.status("a") is AdapterStatus.ABSENT
    assert cached.arena.used_bytes == 0
    cached.check_integrity()
    cached.close()


def test_a_refusal_is_forgotten_when_told(cached: Residency) -> None:
    cached._failures.add(ref("a"), AdapterRefused("golden"))
    assert cached.status("a") is AdapterStatus.REFUSED
    cached.forget("a")
    ready(cached, "a")
    cached.close()


def test_changes_are_told_once_with_the_reason(cached: Residency) -> None:
    ready(cached, "a")
    assert [(c.digest, c.status, c.reason) for c in cached.changes()] == [("a", AdapterStatus.READY, None)]
    assert cached.changes() == ()
    cached._fail(ref("b"), AdapterRefused("rank 0"))
    cached.forget("a")
    told = {c.digest: (c.status, c.reason) for c in cached.changes()}
    assert told == {"a": (AdapterStatus.ABSENT, None), "b": (AdapterStatus.REFUSED, "rank 0")}
    for i in range(5):
        cached.forget(f"d{i}")
    assert [len(cached.changes(limit=3)) for _ in range(3)] == [3, 2, 0]
    cached.close()
