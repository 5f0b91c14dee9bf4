"""Groups of adapters of different sizes in one arena: what fits alone gets in, however the rest lies."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import Adapter, AdapterRef, LoraPair, ModuleKey
from adapters.arena import Arena
from adapters.errors import AdapterRefused
from adapters.residency import LOADS_AHEAD, AdapterStatus, Residency
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
