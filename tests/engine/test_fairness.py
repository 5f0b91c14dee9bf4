"""One hot adapter and many cold ones; and random lives of requests that lose no row and no pin."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.toy import Toy, Toys

BATCH, TOKENS, COLD = 8, 4, 200


def test_a_hot_adapter_with_a_full_queue_does_not_starve_two_hundred_cold_ones(toys: Toys) -> None:
    """Turns go round, so a cold request waits for at most one turn of each other adapter, not for the hot queue."""
    toy = toys(max_batch_size=BATCH, resident=2 * BATCH)
    for i in range(1000):
        toy.add(f"hot{i}", "hot", max_tokens=TOKENS)
    for i in range(COLD):
        toy.add(f"cold{i}", f"cold{i}", max_tokens=TOKENS)
    waits: dict[str, int] = {}
    while len(waits) < COLD:
        if toy.residency.loading:
            toy.settle()  # counted in steps, a load takes none
        toy.engine.step()
        for item in toy.runner.batches[-1].items if toy.runner.batches else ():
            waits.setdefault(item.sequence.request_id, len(toy.runner.batches))
            if item.sequence.request_id.startswith("hot"):
                waits.pop(item.sequence.request_id)
    assert max(waits.values()) <= (COLD + 1) * TOKENS / BATCH * 2, "steps until the last cold request began"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 4), abort=st.sampled_from([0.0, 0.1, 0.5]))
def test_no_life_of_a_request_loses_a_row_or_a_pin(seed: int, batch: int, abort: float) -> None:
    rng = random.Random(seed)
    toy = Toy(max_batch_size=batch, resident=2 * batch)
    ended: set[str] = set()
    added: list[str] = []
    aborted: set[str] = set()
    for step in range(60):
        for _ in range(rng.randrange(3)):
            name = f"r{len(added)}"
            adapter = rng.choice([None, *(f"a{i}" for i in range(9))])
            toy.add(
                name, adapter, prompt=rng.randrange(1, 20), max_tokens=rng.randrange(1, 9), stream=rng.random() < 0.5
            )
            added.append(name)
        if added and rng.random() < abort:
            victim = rng.choice(added)
            toy.engine.abort(victim)
            if victim not in ended:
                aborted.add(victim)
        if step % 7 == 0:
            toy.settle()
        for output in toy.engine.step().outputs:
            if output.finish_reason is not None:
                assert output.request_id not in ended | aborted
                ended.add(output.request_id)
    ended |= set(toy.run())
    assert ended | aborted == set(added)
    assert not ended & aborted
    toy.engine.check_integrity()
    toy.engine.close()
