"""What each adapter is promised of the rows and the steps, whatever the others ask for."""

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.fairness import DECODE_WEIGHT, PROMPT_WEIGHT
from tests.engine.toy import Toy, Toys


def cost(prompt: int, max_tokens: int) -> int:
    """Weighted tokens of a whole request: the first token comes with the prompt, the last one is never computed."""
    return PROMPT_WEIGHT * prompt + DECODE_WEIGHT * (max_tokens - 1)


def step(toy: Toy) -> Counter[str]:
    """One step, loads settled first: bounds count steps, and a load takes none. Weighted tokens by adapter."""
    toy.settle()
    batches = len(toy.runner.batches)
    toy.engine.step()
    served: Counter[str] = Counter()
    for batch in toy.runner.batches[batches:]:
        for item in batch.items:
            weight = PROMPT_WEIGHT if item.prefill else DECODE_WEIGHT
            served[item.sequence.group or "base"] += weight * item.num_new_tokens
    return served


@pytest.mark.parametrize("head_start", [0, 50])
def test_a_hot_adapter_with_a_full_queue_does_not_starve_two_hundred_cold_ones(toys: Toys, head_start: int) -> None:
    rows, hot, cold = 8, 400, 200
    toy = toys(max_batch_size=rows, resident=2 * rows, max_batch_tokens=rows)
    for i in range(hot):
        toy.add(f"hot{i}", "hot", prompt=3, max_tokens=24)
    for _ in range(head_start):
        step(toy)
    for i in range(cold):
        toy.add(f"cold{i}", f"cold{i}", prompt=3, max_tokens=4)
    began: dict[str, int] = {}
    for steps in range(1, 1000):
        step(toy)
        for sequence in toy.runner.batches[-1].sequences if toy.runner.batches else ():
            if sequence.request_id.startswith("cold"):
                began.setdefault(sequence.request_id, steps)
        if len(began) == cold:
            break
    # Someone waits, so all rows are taken and each step computes at least `rows` tokens. Before the last cold request
    # begins, these are computed at most: what holds the rows when the cold ones come, one hot request (the cold ones
    # begin at the hot adapter's level at most, after its next turn it is above them) and the other cold requests. A
    # request computes prompt + max_tokens - 1 tokens: 26 of a hot one, 6 of a cold one. One step more: the first loads.
    bound = (rows * 26 + 26 + (cold - 1) * 6) / rows + 1
    assert len(began) == cold, f"{cold - len(began)} cold requests never began"
    assert max(began.values()) <= bound, f"a cold request began after {max(began.values())} steps"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 4),
    budget=st.integers(4, 40),
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=2, max_size=4),
)
def test_adapters_that_always_have_work_get_the_same_service_whatever_their_requests_are(
    rows: int, budget: int, shapes: list[tuple[int, int]]
) -> None:
    toy = Toy(max_batch_size=rows, max_batch_tokens=budget)
    toy.preload(*(f"a{i}" for i in range(len(shapes))))
    served = Counter({f"a{i}": 0 for i in range(len(shapes))})
    added = 0
    try:
        for _ in range(200):
            waiting = Counter(s.group for s in toy.engine._scheduler.waiting)
            for i, (prompt, max_tokens) in enumerate(shapes):
                for _ in range(rows + 1 - waiting[f"a{i}"]):
                    toy.add(f"{added}", f"a{i}", prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
                    added += 1
            served += step(toy)
            # U is what all rows can cost. A turn goes to the least served, and then costs U at most before the next;
            # all began equal, so that they stay within U. (From any step on: within 2 U.)
            bound = rows * max(cost(*shape) for shape in shapes)
            gap = max(served[f"a{i}"] for i in range(len(shapes))) - min(served[f"a{i}"] for i in range(len(shapes)))
            assert gap <= bound, served
    finally:
        toy.engine.close()


def test_an_adapter_that_comes_back_from_idle_gets_its_share_and_no_more(toys: Toys) -> None:
    rows, shape = 4, {"prompt": 4, "max_tokens": 8}
    toy = toys(max_batch_size=rows)
    toy.preload("busy", "back")
    toy.add("early", "back", prompt=4, max_tokens=2)
    for i in range(400):
        toy.add(f"busy{i}", "busy", **shape)
    for _ in range(200):
        step(toy)  # all busy's
    for i in range(400):
        toy.add(f"back{i}", "back", **shape)
    served: Counter[str] = Counter()
    for _ in range(200):
        served += step(toy)
        ahead = served["back"] - served["busy"]
        assert abs(ahead) <= rows * cost(4, 8), f"{served}: what it didn't use before is not saved up"


def test_a_new_adapter_begins_no_higher_than_the_others_that_wait(toys: Toys) -> None:
    """Each of the many that leave took more than the clock gave it, so the clock runs ahead of who stays."""
    toy = toys(max_batch_size=1, resident=64)
    names = [f"once{i}" for i in range(60)]
    toy.preload("stays", "new", *names)
    for i in range(50):
        toy.add(f"stays{i}", "stays", prompt=4, max_tokens=8)
    for name in names:
        toy.add(name, name, prompt=4, max_tokens=8)
    while {s.group for s in toy.engine._scheduler.waiting} != {"stays"}:
        step(toy)
    for i in range(50):
        toy.add(f"new{i}", "new", prompt=4, max_tokens=8)
    served: Counter[str] = Counter()
    for _ in range(200):
        served += step(toy)
        assert abs(served["stays"] - served["new"]) <= cost(4, 8), served


def test_a_new_adapter_begins_with_an_equal_share_not_with_that_of_the_greediest(toys: Toys) -> None:
    toy = toys(max_batch_size=2)
    toy.preload("greedy", "patient", "new")
    for i in range(4):
        toy.add(f"greedy{i}", "greedy", prompt=2, max_tokens=30)
    step(toy)
    for i in range(40):
        toy.add(f"patient{i}", "patient", prompt=4, max_tokens=4)
    had = sum((step(toy) for _ in range(24)), Counter[str]())["greedy"]
    toy.add("new", "new", prompt=4, max_tokens=4)
    before: set[str] = set()
    while "new" not in toy.admitted():
        before = {name for name in toy.admitted() if name.startswith("patient")}
        step(toy)
    # Half of greedy's tokens were patient's due: of those it gets back what makes it equal to `new`. Two requests more,
    # one for each row, are let in below that level and end above it.
    assert len(before) <= had / 2 / cost(4, 4) + 2
    assert "greedy2" not in toy.admitted()


def test_an_adapter_that_loads_slowly_keeps_its_place_but_saves_nothing_up(toys: Toys) -> None:
    rows, shape = 4, {"prompt": 4, "max_tokens": 8}
    toy = toys(max_batch_size=rows)
    toy.preload("busy")
    for i in range(400):
        toy.add(f"slow{i}", "slow", **shape)
        toy.add(f"busy{i}", "busy", **shape)
    load, toy.residency.poll = toy.residency.poll, lambda: None  # the load does not end
    for _ in range(200):
        toy.engine.step()
    toy.residency.poll = load
    served: Counter[str] = Counter()
    began = None
    for steps in range(200):
        served += step(toy)
        began = steps if began is None and served["slow"] else began
        assert abs(served["slow"] - served["busy"]) <= rows * cost(4, 8), served
    assert began is not None
    assert began <= 4 + 8, "the next row is its own"


def test_new_adapters_without_end_starve_no_old_one_and_are_forgotten(toys: Toys) -> None:
    """Were a new adapter's counter lifted to the lowest one only, an adapter above it would wait for ever."""
    rows, fresh = 2, 6
    toy = toys(max_batch_size=rows)
    for i in range(100):
        toy.add(f"old{i}", "old", prompt=12, max_tokens=20)
    step(toy)
    toy.settle()
    step(toy)
    old_began, added, most, since = 0, 0, 0, 0
    # `old` is at most U = rows * cost(12, 20) above the new ones' start, which rises in a step by the step's weighted
    # tokens (rows at least) over the number of adapters; once it has caught up, `old` waits for one turn of each.
    count = fresh + rows + 1
    bound = rows * cost(12, 20) * count / rows + count * (3 + 4)
    for _ in range(1500):
        waiting = {s.group for s in toy.engine._scheduler.waiting} - {"old"}
        for _ in range(fresh - len(waiting)):
            toy.add(f"new{added}", f"new{added}", prompt=3, max_tokens=4)
            added += 1
        step(toy)
        began = len({i for i in toy.admitted_in_last_step() if i.startswith("old")})
        old_began += began
        since = 0 if began else since + 1
        assert since <= bound, "new adapters starve an old one"
        most = max(most, len(toy.engine._scheduler._queue._accounts))
    assert added > 500
    assert old_began > 5
    assert most <= 4 * count, "adapters that are gone are still counted"


def test_the_prompts_of_one_adapter_do_not_hold_up_those_of_another(toys: Toys) -> None:
    toy = toys(max_batch_size=8, max_batch_tokens=8)
    toy.preload("hot", "cold")
    for i in range(5):
        toy.add(f"hot{i}", "hot", prompt=28, max_tokens=1)
    step(toy)
    toy.add("cold", "cold", prompt=4, max_tokens=1)
    order: list[str] = []
    while toy.engine.has_work:
        order += [o.request_id for o in toy.engine.step().outputs]
    assert order == ["hot0", "cold", "hot1", "hot2", "hot3", "hot4"], "after the prompt that was begun"


def test_what_an_abort_leaves_uncomputed_is_not_charged(toys: Toys) -> None:
    toy = toys(max_batch_size=1, max_batch_tokens=1)
    toy.preload("a", "b")
    for i in range(3):
        toy.add(f"a{i}", "a", prompt=20, max_tokens=2)
        toy.add(f"b{i}", "b", prompt=3, max_tokens=2)
    step(toy)
    toy.engine.abort("a0")  # one token of twenty was computed
    for _ in range(4):
        step(toy)
    step(toy)
    assert toy.admitted() == ["a0", "b0", "a1"], "a has had 1, b 5"


def test_a_hot_adapter_that_fills_the_arena_does_not_keep_others_out(toys: Toys) -> None:
    """Room for one adapter: the hot one is always pinned or about to be, until it is held back for the other."""
    toy = toys(max_batch_size=2, resident=1)
    toy.preload("hot")
    for i in range(200):
        toy.add(f"hot{i}", "hot", max_tokens=4)
    toy.add("base", max_tokens=300 // 16)
    toy.add("cold", "cold", max_tokens=2)
    steps = 0
    while "cold" not in toy.admitted():
        toy.engine.step()
        time.sleep(0.0005)  # a load takes time, not steps
        steps += 1
        assert steps < 200, "the cold adapter never got room"
    assert len(toy.run()) > 100, "and everyone else is served"
    toy.engine.check_integrity()
