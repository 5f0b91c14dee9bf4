"""Requests that compose adapters, with the toy model: when they start, what they pin, that none waits for ever."""

import threading

import pytest

from adapters.adapter import MAX_COMPOSED, WeightedAdapter
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.residency import AdapterStatus
from server.engine.types import ErrorKind, FinishReason
from tests.engine.toy import Toy, Toys, ref
from tests.oracle import request


def steps(toy: Toy, count: int) -> set[str]:
    """Request ids that ended within so many steps."""
    ended: set[str] = set()
    for _ in range(count):
        ended |= {o.request_id for o in toy.engine.step().outputs if o.finish_reason}
    return ended


def test_it_starts_when_all_its_adapters_are_ready_and_pins_them_all(toys: Toys) -> None:
    toy = toys(resident=2)
    toy.gates["b"] = threading.Event()
    toy.add("r", "a+b", max_tokens=3)
    toy.add("single", "a", max_tokens=1)  # ends in the step that it starts in
    assert toy.engine.step().stats.waiting_adapters == ("a", "b"), "separate entries"
    toy.gates["b"].set()
    toy.settle()
    stats = toy.engine.step().stats
    assert stats.running_adapters == ("a", "b")
    assert {digest: slot.pins for digest, slot in toy.residency._residents._slots._slots.items()} == {"a": 1, "b": 1}
    toy.add("other", "c", max_tokens=1)
    for _ in range(2):
        toy.engine.step()
        assert toy.residency.status("b") is AdapterStatus.READY, "it runs: c has to wait"
    finished = toy.run()
    assert {o.finish_reason for o in finished.values()} == {FinishReason.LENGTH}


@pytest.mark.parametrize(
    ("error", "kind"),
    [(AdapterRefused("NaN"), ErrorKind.ADAPTER_REFUSED), (AdapterUnavailable("disk"), ErrorKind.ADAPTER_UNAVAILABLE)],
)
def test_one_that_fails_ends_the_request_with_its_error(toys: Toys, error: Exception, kind: ErrorKind) -> None:
    toy = toys()
    toy.errors["bad"] = error
    toy.add("r", "a+bad+c")
    toy.add("fine", "a+c", max_tokens=2)
    finished = toy.run()
    assert (finished["r"].error_kind, finished["r"].error) == (kind, str(error))
    assert finished["fine"].finish_reason is FinishReason.LENGTH


def test_adapters_that_never_fit_together_are_refused_and_hold_up_nobody(toys: Toys) -> None:
    toy = toys(resident=2)
    toy.add("much", "a+b+c")
    toy.add("pair", "a+b", max_tokens=2)
    toy.add("one", "c", max_tokens=2)
    finished = toy.run()
    assert finished["much"].error_kind is ErrorKind.ADAPTER_REFUSED
    assert finished["much"].error == (
        "the 3 adapters composed take 768 bytes on the device together, the arena holds 512: "
        "raise --adapter-memory, or compose fewer"
    )
    assert {finished[name].finish_reason for name in ("pair", "one")} == {FinishReason.LENGTH}


def test_groups_that_want_the_same_room_all_run(toys: Toys) -> None:
    """Two adapters fit at once, and each group needs both places: none may wait for what another half holds."""
    toy = toys(resident=2, max_batch_size=4)
    groups = ["a+b", "c+d", "b+c", "d+a", "b+d", "a+c"]
    for i in range(18):
        toy.add(f"r{i}", groups[i % 6], max_tokens=2)
        toy.add(f"s{i}", "abcd"[i % 4], max_tokens=2)
    finished = toy.run()
    assert len(finished) == 36
    assert {o.finish_reason for o in finished.values()} == {FinishReason.LENGTH}


def test_a_group_gets_in_although_singles_never_stop(toys: Toys) -> None:
    """Each of the singles keeps one half's place filled; more come as long as the group waits."""
    toy = toys(resident=2, max_batch_size=2)
    toy.preload("c", "d")
    toy.add("pair", "a+b", max_tokens=1)
    for i in range(2000):
        for name in "abcd":
            if sum(s.group == name for s in toy.engine._scheduler.waiting) < 2:
                toy.add(f"{name}{i}", name, max_tokens=4)
        if "pair" in steps(toy, 1):
            break
        toy.residency._reader._executor.submit(int).result()  # what is read now is read
        toy.residency._residents._copier.submit(int).result()
    else:
        pytest.fail("the group starves")
    toy.run()


def test_an_aborted_group_gives_everything_back(toys: Toys) -> None:
    toy = toys(resident=2, max_batch_size=2)
    toy.preload("c")
    toy.add("holder", "c", max_tokens=20, ignore_eos=True)
    toy.add("pair", "a+b", max_tokens=1)
    for _ in range(500):
        toy.engine.step()
        if toy.residency.starving("a", "b"):
            break
        if not toy.engine._scheduler.running:
            toy.add(f"holder{_}", "c", max_tokens=20, ignore_eos=True)
    toy.engine.abort("pair")
    toy.add("next", "a", max_tokens=1)
    finished = toy.run()
    assert "pair" not in finished
    assert finished["next"].finish_reason is FinishReason.LENGTH


def test_a_composition_has_turns_of_its_own(toys: Toys) -> None:
    toy = toys(max_batch_size=1)
    toy.preload("a", "b")
    for i in range(3):
        toy.add(f"flood{i}", "a", max_tokens=2)
    for i in range(2):
        toy.add(f"mix{i}", ("a+b", "b+a")[i], max_tokens=2)
    toy.run()
    assert toy.admitted() == ["flood0", "mix0", "flood1", "mix1", "flood2"]


def test_what_can_t_be_composed_is_refused_at_once(toys: Toys) -> None:
    toy = toys()
    with pytest.raises(ValueError, match="9 adapters in one request, at most 8 can be composed"):
        toy.add("r", "+".join("abcdefghi"[: MAX_COMPOSED + 1]))
    with pytest.raises(ValueError, match="'a' and 'a' are the same adapter"):
        toy.add("r", "a+a")
    for weight in (0.0, float("nan"), float("inf"), -1e7):
        with pytest.raises(ValueError, match=f"adapter 'a' has weight {weight}, expected 1e-06 to 1e"):
            toy.engine.add_request(request("r", [1], (WeightedAdapter(ref("a"), weight),)))
    assert not toy.engine.has_work
