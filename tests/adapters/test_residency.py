"""Loading, pinning, evicting and failing of adapters, with a loader that the test controls."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adapters.residency as residency_module
from adapters.adapter import Adapter, AdapterRef
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.residency import AdapterStatus, Residency
from adapters.slots import SlotTable


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
        return Adapter(ref.digest, {})


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def residency(loader: Loader) -> Iterator[Residency]:
    made = Residency(loader, capacity=2)
    yield made
    loader.gate.set()
    made.close()


def ref(digest: str) -> AdapterRef:
    return AdapterRef(digest, digest, digest)


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
    assert residency.status("a") is AdapterStatus.ABSENT


def test_with_every_slot_pinned_nothing_is_loaded_or_lost(residency: Residency, loader: Loader) -> None:
    ready(residency, "a", "b")
    residency.pin("a")
    residency.pin("b")
    assert residency.prefetch(ref("c")) is AdapterStatus.ABSENT
    assert not residency.loading
    assert residency.resident == 2
    with pytest.raises(AssertionError, match="pinned while idle"):
        residency.check_integrity()
    residency.unpin("b")
    ready(residency, "c")
    assert loader.loaded == ["a", "b", "c"]


def test_pins_that_were_never_taken_are_an_error(residency: Residency) -> None:
    ready(residency, "a")
    with pytest.raises(ValueError, match="a is not pinned"):
        residency.unpin("a")
    with pytest.raises(KeyError):
        residency.pin("never seen")


def test_a_load_evicted_before_it_ended_is_not_published(residency: Residency, loader: Loader) -> None:
    loader.gate.clear()
    for digest in ("a", "b", "c"):
        residency.prefetch(ref(digest))
    loader.gate.set()
    settle(residency)
    assert residency.status("a") is AdapterStatus.ABSENT
    assert residency.resident == 2
    ready(residency, "a")
    assert loader.loaded == ["a", "b", "c", "a"]


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
    monkeypatch.setattr(residency_module, "RETRY_SECONDS", 0.0)
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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("tpu"), st.sampled_from("abcdef")), max_size=60))
def test_the_slot_table_keeps_its_promises(capacity: int, actions: list[tuple[str, str]]) -> None:
    """Against a plain model: a list in order of use, and a count of pins."""
    table, order, pins = SlotTable(capacity), list[str](), dict[str, int]()
    for action, digest in actions:
        if action == "t":
            free = next((d for d in order if not pins[d]), None)
            evicted = free if digest not in order and len(order) == capacity else None
            has_slot = digest in order or len(order) < capacity or evicted is not None
            assert table.touch(digest) == (has_slot, evicted)
            if has_slot:
                order = [d for d in order if d not in (digest, evicted)] + [digest]
                pins.setdefault(digest, 0)
        elif action == "p" and digest in order:
            table.pin(digest)
            pins[digest] += 1
        elif action == "u" and pins.get(digest):
            table.unpin(digest)
            pins[digest] -= 1
        assert {d for d in "abcdef" if d in table} == set(order)
        assert len(table) == len(order)


def test_a_table_without_places_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        SlotTable(0)
