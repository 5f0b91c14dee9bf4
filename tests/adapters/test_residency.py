"""Loading, pinning, evicting and failing of adapters, with a loader that the test controls."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

import adapters.failures as failures_module
import adapters.residency as residency_module
from adapters.adapter import Adapter, AdapterRef, LoraPair, ModuleKey
from adapters.arena import Arena
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.residency import LOADS_AHEAD, Residency
from adapters.status import AdapterStatus
from tests.engine.toy import ADAPTER_BYTES, CPU, toy_adapter


class Loader:
    """Loads nothing; waits while `gate` is closed, raises what `errors` holds."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.errors: dict[str, Exception] = {}
        self.loaded: list[str] = []
        self.threads: set[int] = set()

    def __call__(self, ref: AdapterRef) -> Adapter:
        assert self.gate.wait(10)
        self.threads.add(threading.get_ident())
        self.loaded.append(ref.digest)
        if ref.digest in self.errors:
            raise self.errors[ref.digest]
        return toy_adapter(ref.digest)


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def residency(loader: Loader) -> Iterator[Residency]:
    made = Residency(loader, Arena(2 * ADAPTER_BYTES, CPU, torch.float32))
    yield made
    loader.gate.set()
    made.close()


def ref(digest: str) -> AdapterRef:
    return AdapterRef(digest, digest, digest)


def large_adapter(digest: str) -> Adapter:
    """As large as three toy adapters."""
    pair = LoraPair(torch.ones(3, 32), torch.ones(3, 32))
    return Adapter(digest, {ModuleKey(0, "attn.c_attn"): pair})


def settle(residency: Residency) -> None:
    deadline = time.monotonic() + 10
    while residency.loading:
        assert time.monotonic() < deadline, "a load never ended"
        residency.poll()
        time.sleep(0.001)


def ready(residency: Residency, *digests: str) -> None:
    for digest in digests:
        residency.prefetch(ref(digest))
        settle(residency)
        assert residency.status(digest) is AdapterStatus.READY


def test_an_adapter_goes_from_absent_over_loading_to_ready(residency: Residency, loader: Loader) -> None:
    assert residency.status("a") is AdapterStatus.ABSENT
    loader.gate.clear()
    assert residency.prefetch(ref("a")) is AdapterStatus.LOADING
    residency.poll()
    assert residency.status("a") is AdapterStatus.LOADING
    with pytest.raises(KeyError):
        residency.adapter("a")
    loader.gate.set()
    settle(residency)
    assert residency.prefetch(ref("a")) is AdapterStatus.READY
    assert residency.adapter("a").digest == "a"
    assert (residency.resident, residency.stats.loads, residency.stats.failures) == (1, 1, 0)
    assert residency.stats.load_seconds >= 0


def test_a_load_runs_once_and_off_the_callers_thread(residency: Residency, loader: Loader) -> None:
    loader.gate.clear()
    for _ in range(5):
        assert residency.prefetch(ref("a")) is AdapterStatus.LOADING
    loader.gate.set()
    settle(residency)
    residency.prefetch(ref("a"))
    assert loader.loaded == ["a"]
    assert threading.get_ident() not in loader.threads


def test_ready_means_published_by_poll(residency: Residency, loader: Loader) -> None:
    """The engine sees one state throughout a step, whenever the thread finishes."""
    residency.prefetch(ref("a"))
    deadline = time.monotonic() + 10
    while not loader.loaded and time.monotonic() < deadline:
        time.sleep(0.001)
    assert residency.status("a") is AdapterStatus.LOADING
    settle(residency)
    assert residency.status("a") is AdapterStatus.READY


def test_the_least_recently_used_one_makes_room(residency: Residency) -> None:
    ready(residency, "a", "b")
    residency.prefetch(ref("a"))
    ready(residency, "c")
    assert residency.status("b") is AdapterStatus.ABSENT, "a was used later than b"
    assert residency.status("a") is AdapterStatus.READY
    assert (residency.resident, residency.stats.evictions) == (2, 1)
    ready(residency, "b")
    assert residency.stats.loads == 4, "b came back"


def test_a_pinned_one_stays(residency: Residency) -> None:
    ready(residency, "a", "b")
    residency.pin("a")
    residency.pin("a")
    ready(residency, "c")
    assert residency.status("b") is AdapterStatus.ABSENT
    residency.unpin("a")
    ready(residency, "d")
    assert residency.status("a") is AdapterStatus.READY, "one pin is left"
    residency.unpin("a")
    residency.check_integrity()
    ready(residency, "e")
    assert residency.status("a") is AdapterStatus.READY, "used until just now"
    ready(residency, "f")
    assert residency.status("a") is AdapterStatus.ABSENT


def test_one_too_large_for_what_may_go_evicts_nobody(loader: Loader) -> None:
    """`large` needs all three places: while one of them is pinned the others keep theirs."""
    residency = Residency(
        lambda ref: large_adapter(ref.digest) if ref.digest == "large" else loader(ref),
        Arena(3 * ADAPTER_BYTES, CPU, torch.float32),
    )
    ready(residency, "a", "b", "c")
    residency.pin("b")
    for _ in range(50):
        residency.prefetch(ref("large"))
        residency.poll()
        time.sleep(0.0005)
    assert residency.starving("large")
    assert (residency.resident, residency.stats.evictions) == (3, 0)
    residency.unpin("b")
    ready(residency, "large")
    assert (residency.resident, residency.stats.evictions) == (1, 3)
    residency.check_integrity()
    residency.close()


def test_copies_do_not_wait_for_reads(residency: Residency, loader: Loader) -> None:
    residency.prefetch(ref("a"))
    deadline = time.monotonic() + 10
    while not loader.loaded and time.monotonic() < deadline:
        time.sleep(0.001)
    loader.gate.clear()
    residency.prefetch(ref("b"))
    while residency.status("a") is not AdapterStatus.READY:
        assert time.monotonic() < deadline, "a is read: its copy needn't wait for b"
        residency.prefetch(ref("a"))
        residency.poll()
    assert residency.status("b") is AdapterStatus.LOADING


def test_bytes_that_nobody_holds_are_noticed(residency: Residency) -> None:
    ready(residency, "a")
    residency.arena.reserve(toy_adapter("lost"))
    with pytest.raises(AssertionError, match="adapters hold 256 bytes, the arena counts 512"):
        residency.check_integrity()


def test_with_everything_pinned_a_load_waits_and_nothing_is_lost(residency: Residency, loader: Loader) -> None:
    ready(residency, "a", "b")
    residency.pin("a")
    residency.pin("b")
    for _ in range(200):
        assert residency.prefetch(ref("c")) is AdapterStatus.LOADING
        residency.poll()
        time.sleep(0.0005)
    assert residency.resident == 2
    assert residency.starving("c")
    with pytest.raises(AssertionError, match="pinned while idle"):
        residency.check_integrity()
    residency.unpin("b")
    ready(residency, "c")
    assert not residency.starving("c")
    assert loader.loaded == ["a", "b", "c"], "read once, however long it waited"
    residency.unpin("a")
    residency.check_integrity()


def test_only_so_many_are_in_host_memory_at_once(loader: Loader) -> None:
    residency = Residency(loader, Arena(99 * ADAPTER_BYTES, CPU, torch.float32))
    loader.gate.clear()
    digests = [f"d{i}" for i in range(LOADS_AHEAD + 3)]
    statuses = [residency.prefetch(ref(digest)) for digest in digests]
    assert statuses == [AdapterStatus.LOADING] * LOADS_AHEAD + [AdapterStatus.ABSENT] * 3
    loader.gate.set()
    settle(residency)
    assert residency.resident == LOADS_AHEAD
    ready(residency, *digests[-3:])
    residency.close()


def test_a_load_that_nobody_waits_for_any_more_is_dropped(residency: Residency) -> None:
    ready(residency, "a", "b")
    residency.pin("a")
    residency.pin("b")
    residency.prefetch(ref("c"))
    settle(residency)
    assert residency.status("c") is AdapterStatus.ABSENT


def test_what_is_asked_for_stays_while_others_load(residency: Residency) -> None:
    """What was asked for since the last poll is about to run: only one that starves may take its room."""
    ready(residency, "a", "b")
    residency.prefetch(ref("c"))
    deadline = time.monotonic() + 10
    while not residency.starving("c"):
        assert time.monotonic() < deadline, "c should wait for room"
        assert residency.resident == 2
        for digest in "abc":
            residency.prefetch(ref(digest))
        residency.poll()
    for digest in "abc":
        residency.prefetch(ref(digest))
    settle(residency)
    assert residency.status("c") is AdapterStatus.READY
    assert residency.status("a") is AdapterStatus.ABSENT


def test_an_adapter_larger_than_the_arena_is_refused_with_both_numbers(loader: Loader) -> None:
    residency = Residency(loader, Arena(ADAPTER_BYTES - 128, CPU, torch.float32))
    residency.prefetch(ref("a"))
    settle(residency)
    assert residency.status("a") is AdapterStatus.REFUSED
    assert str(residency.error("a")) == (
        "the adapter takes 256 bytes on the device, the arena holds 128: raise --adapter-memory"
    )
    residency.close()


def test_slots_run_out_before_memory(loader: Loader) -> None:
    residency = Residency(loader, Arena(8 * ADAPTER_BYTES, CPU, torch.float32), slots=3)
    ready(residency, "a", "b", "c")
    assert residency.resident == 2
    assert residency.status("a") is AdapterStatus.ABSENT
    assert {residency.slot("b"), residency.slot("c")} == {1, 2}, "slot 0 is the base's"
    residency.check_integrity()
    residency.close()


def test_a_copy_that_fails_gives_its_room_back(residency: Residency, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(adapter: Adapter, place: object) -> Adapter:
        raise RuntimeError("copy engine")

    with monkeypatch.context() as patch:
        patch.setattr(residency.arena, "fill", broken)
        residency.prefetch(ref("a"))
        settle(residency)
    assert str(residency.error("a")) == "loading failed: RuntimeError: copy engine"
    assert residency.prefetch(ref("a")) is AdapterStatus.FAILED, "told, not tried again at once"
    assert residency.arena.used_bytes == 0
    ready(residency, "b", "c")
    residency.check_integrity()


def test_pins_that_were_never_taken_are_an_error(residency: Residency) -> None:
    ready(residency, "a")
    with pytest.raises(ValueError, match="a is not pinned"):
        residency.unpin("a")
    with pytest.raises(KeyError):
        residency.pin("never seen")


def test_a_refused_one_fails_alone_and_for_good(residency: Residency, loader: Loader) -> None:
    loader.errors["bad"] = AdapterRefused("tensor 'x' holds values that are not finite")
    residency.prefetch(ref("bad"))
    ready(residency, "good")
    assert residency.status("bad") is AdapterStatus.REFUSED
    assert "not finite" in str(residency.error("bad"))
    assert residency.prefetch(ref("bad")) is AdapterStatus.REFUSED
    assert loader.loaded == ["bad", "good"], "the same bytes are not read again"
    assert residency.stats.failures == 1


def test_a_failed_one_is_tried_again_after_a_while(
    residency: Residency, loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader.errors["a"] = AdapterUnavailable("disk")
    residency.prefetch(ref("a"))
    settle(residency)
    assert residency.prefetch(ref("a")) is AdapterStatus.FAILED
    assert loader.loaded == ["a"], "not at once"
    monkeypatch.setattr(failures_module, "RETRY_SECONDS", 0.0)
    residency.changes()
    monkeypatch.setattr(residency_module, "LOADS_AHEAD", 0)
    assert residency.prefetch(ref("a")) is AdapterStatus.ABSENT
    assert [change.status for change in residency.changes()] == [AdapterStatus.ABSENT], "told, though it has to wait"
    monkeypatch.setattr(residency_module, "LOADS_AHEAD", LOADS_AHEAD)
    del loader.errors["a"]
    ready(residency, "a")
    assert loader.loaded == ["a", "a"]


def test_a_surprise_while_loading_is_a_failure_of_that_load_only(residency: Residency, loader: Loader) -> None:
    loader.errors["a"] = MemoryError("no room")
    residency.prefetch(ref("a"))
    ready(residency, "b")
    assert residency.status("a") is AdapterStatus.FAILED
    assert str(residency.error("a")) == "loading failed: MemoryError: no room"


def test_failures_leave_room_for_others(residency: Residency, loader: Loader) -> None:
    for i in range(6):
        loader.errors[f"bad{i}"] = AdapterRefused("no")
        residency.prefetch(ref(f"bad{i}"))
        settle(residency)
    ready(residency, "a", "b")
    assert residency.status("a") is AdapterStatus.READY, "refused adapters hold no slot that others need"
