"""Groups of adapters of different sizes in one arena: what fits alone gets in, however the rest lies."""

import threading
from collections.abc import Callable, Iterator
from copy import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import Adapter, AdapterRef, LoraPair, ModuleKey
from adapters.arena import Arena, Place, _sizes
from adapters.errors import AdapterRefused
from adapters.residency import LOADS_AHEAD, PATIENCE, AdapterStatus, Residency
from tests.engine.toy import ADAPTER_BYTES, CPU

Make = Callable[..., Residency]


def ref(digest: str) -> AdapterRef:
    return AdapterRef(digest, digest, digest)


def load(of: AdapterRef) -> Adapter:
    """`x3`: as large as three toy adapters, in two pieces."""
    rank = int(of.digest[1:])
    pair = LoraPair(torch.ones(rank, 32), torch.ones(rank, 32))
    return Adapter(of.digest, {ModuleKey(0, "attn.c_attn"): pair})


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Residency] = []
    yield (
        lambda size, **kw: (
            made.append(Residency(load, Arena(size * ADAPTER_BYTES, CPU, torch.float32), **kw)) or made[-1]
        )
    )
    for residency in made:
        residency.close()


def settle(residency: Residency) -> None:
    """Let the threads end what they have."""
    residency._reader._executor.submit(int).result()
    residency._residents._copier.submit(int).result()


def until_known(residency: Residency, *digests: str, others: tuple[str, ...] = ()) -> AdapterStatus:
    """Ask for a group, and for single others after it, until it is READY or REFUSED."""
    for _ in range(200):
        status = residency.prefetch(*map(ref, digests))
        if status in (AdapterStatus.READY, AdapterStatus.REFUSED):
            return status
        for other in others:
            residency.prefetch(ref(other))
        settle(residency)
        residency.poll()
    raise AssertionError(f"{digests} never got in")


def test_a_group_is_as_ready_as_its_worst(make: Make) -> None:
    residency = make(4)
    assert until_known(residency, "a1") is AdapterStatus.READY
    assert residency.prefetch(ref("a1"), ref("b1")) is AdapterStatus.LOADING
    assert until_known(residency, "a1", "b1") is AdapterStatus.READY
    with pytest.raises(KeyError):
        residency.error("a1", "b1")
    residency.pin("a1", "b1")
    residency.unpin("a1", "b1")
    residency.check_integrity()


def test_a_group_too_large_for_the_arena_is_refused_when_it_has_been_read(make: Make) -> None:
    residency = make(4)
    assert until_known(residency, "a2", "b3") is AdapterStatus.REFUSED
    assert str(residency.error("a2", "b3")) == (
        "the 2 adapters composed take 1,280 bytes on the device together, the arena holds 1,024: "
        "raise --adapter-memory, or compose fewer"
    )
    assert until_known(residency, "a2", "c2") is AdapterStatus.READY


def test_a_group_larger_than_the_slots_is_refused(make: Make) -> None:
    residency = make(4, slots=3)
    assert until_known(residency, "a1", "b1", "c1") is AdapterStatus.REFUSED
    assert str(residency.error("a1", "b1", "c1")) == "3 adapters composed, the device has slots for 2"


def test_an_adapter_too_large_on_its_own_says_so(make: Make) -> None:
    residency = make(4)
    assert until_known(residency, "a1", "b5") is AdapterStatus.REFUSED
    assert isinstance(residency.error("a1", "b5"), AdapterRefused)
    assert "the adapter takes 1,280 bytes" in str(residency.error("a1", "b5"))


def test_a_group_whose_first_half_lies_in_the_way_is_laid_out_anew(make: Make) -> None:
    """b's matrices are as large as what is free on either side of a, together: a has to move."""
    residency = make(6)
    for digest in ("x2", "a1"):
        assert until_known(residency, digest) is AdapterStatus.READY
    residency._evict("x2")  # a lies in the middle: four places' worth is free before it, more behind it
    assert until_known(residency, "a1", "b5") is AdapterStatus.READY
    residency.check_integrity()


def test_a_half_in_the_way_that_is_still_being_copied_moves_when_it_has_been(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    residency, gate = make(6), threading.Event()
    assert until_known(residency, "x2") is AdapterStatus.READY
    fill = residency.arena.fill
    monkeypatch.setattr(residency.arena, "fill", lambda *args: gate.wait(10) and fill(*args))
    for _ in range(PATIENCE + 5):
        assert residency.prefetch(ref("a1"), ref("b5")) is AdapterStatus.LOADING
        residency._reader._executor.submit(int).result()
        residency.poll()
    assert residency.starving("a1", "b5")
    assert residency.stats.evictions == 0, "x alone would go in vain"
    gate.set()
    assert until_known(residency, "a1", "b5") is AdapterStatus.READY
    residency.check_integrity()


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    before=st.lists(st.integers(1, 4), max_size=6),
    group=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    others=st.lists(st.integers(1, 5), max_size=10),
)
def test_whatever_lies_there_a_group_that_fits_gets_in(before: list[int], group: list[int], others: list[int]) -> None:
    residency = Residency(load, Arena(9 * ADAPTER_BYTES, CPU, torch.float32))
    try:
        for i, size in enumerate(before):
            residency.prefetch(ref(f"{'mnopqr'[i]}{size}"))
            settle(residency)
            residency.poll()
        names = [f"{'abcde'[i]}{size}" for i, size in enumerate(group)]
        rest = tuple(f"{'fghijkstuv'[i]}{size}" for i, size in enumerate(others))
        status = until_known(residency, *names, others=rest)
        assert status is (AdapterStatus.READY if sum(group) <= 9 else AdapterStatus.REFUSED)
    finally:
        residency.close()


def test_a_claimed_group_keeps_its_half_and_takes_the_others_place(make: Make) -> None:
    """d is asked for just as often, and was used later than a."""
    residency = make(2)
    for digest in ("a1", "d1"):
        assert until_known(residency, digest) is AdapterStatus.READY
    assert until_known(residency, "a1", "b1", others=("d1",)) is AdapterStatus.READY
    assert (residency.stats.evictions, residency.stats.loads) == (1, 3)


def test_a_claimed_group_is_read_and_placed_before_those_who_came_earlier(make: Make) -> None:
    """More single ones than are read ahead, asked for first each time: b isn't read until its group is claimed."""
    residency = make(2)
    others = [f"{name}1" for name in "mnopqrstuvwx"]
    for other in others[: LOADS_AHEAD - 1]:
        residency.prefetch(ref(other))
    group = ref("a1"), ref("b1")
    assert residency.prefetch(*group) is AdapterStatus.ABSENT, "a is the last to be read ahead"
    for _ in range(1000):
        for other in others:
            if residency.prefetch(ref(other)) is AdapterStatus.READY:  # it runs for a step
                residency.pin(other)
                residency.unpin(other)
        if residency.prefetch(*group) is AdapterStatus.READY:
            return
        settle(residency)
        residency.poll()
    pytest.fail("the group never got in")


def test_a_fragmented_arena_evicts_nobody_for_one_that_it_cannot_hold(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three holes of 64 numbers between pinned ones are as many as x takes, but its matrices have 96 each."""
    residency, searches = make(5), list[int | None]()
    search = residency.arena.evictions_for
    monkeypatch.setattr(residency.arena, "evictions_for", lambda *args: searches.append(search(*args)) or searches[-1])
    for digest in ("a1", "p1", "b1", "q1", "c1"):
        assert until_known(residency, digest) is AdapterStatus.READY
    residency.pin("p1")
    residency.pin("q1")
    residency.poll()  # nobody is asked for any more
    for _ in range(50):
        assert residency.prefetch(ref("x3")) is AdapterStatus.LOADING
        settle(residency)
        residency.poll()
    assert residency.starving("x3")
    assert (residency.resident, residency.stats.evictions) == (5, 0)
    assert searches == [None, None], "once, and once more when it was claimed: nothing else has changed"
    residency.unpin("p1")
    assert until_known(residency, "x3") is AdapterStatus.READY
    assert searches == [None, None, 4]
    assert residency.status("q1") is AdapterStatus.READY
    residency.unpin("q1")
    residency.check_integrity()


def test_what_one_victim_gives_is_all_that_is_looked_at(make: Make) -> None:
    residency = make(6)
    for digest in ("a1", "b2", "c3"):
        assert until_known(residency, digest) is AdapterStatus.READY
    residency.poll()
    assert until_known(residency, "x1") is AdapterStatus.READY
    assert [residency.status(digest).value for digest in ("a1", "b2", "c3")] == ["absent", "ready", "ready"]


names = st.sampled_from([f"{name}{size}" for name in "abc" for size in (1, 2, 3, 4)])


@pytest.mark.timeout(120)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(["ask", "pin", "unpin", "forget", "nothing"]), names), min_size=10, max_size=80)
)
def test_nobody_goes_unless_another_gets_in_who_stays_out_only_while_there_is_no_room(
    actions: list[tuple[str, str]],
) -> None:
    residency = Residency(load, Arena(7 * ADAPTER_BYTES, CPU, torch.float32), slots=6)
    residents, make_room = residency._residents, residency._make_room

    def watched(adapter: Adapter, keep: frozenset[str]) -> Place | None:
        before = residency.stats.evictions
        place = make_room(adapter, keep)
        if place is None:
            assert residency.stats.evictions == before, f"somebody went, but {adapter.digest} didn't get in"
            rest, idle = copy(residency.arena._extents), list(residents.idle(keep | residents.copying))
            for digest in idle:
                rest.give_back(residents[digest].place.starts, residents[digest].place.sizes)
            lost = len(residents) - len(idle) < residents.slots - 1 and rest.take(_sizes(adapter)) is not None
            assert not lost, f"{adapter.digest} was kept out, though there was room"
        return place

    residency._make_room = watched
    pins, asked = list[str](), dict[str, None]()
    try:
        for action, digest in actions:
            if action == "ask":
                asked[digest] = None
            elif action == "pin" and residency.status(digest) is AdapterStatus.READY:
                residency.pin(digest)
                pins.append(digest)
            elif action == "unpin" and pins:
                residency.unpin(pins.pop(0))
            elif action == "forget":
                residency.forget(digest)
            for each in list(asked):
                if residency.prefetch(ref(each)) is AdapterStatus.READY:
                    del asked[each]
            settle(residency)
            residency.poll()
    finally:
        residency.close()
