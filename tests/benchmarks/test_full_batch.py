"""Steps of a full batch: as many are timed as were asked for, whatever the batch."""

import pytest
import torch

from adapters.adapter import AdapterRef
from benchmarks import decode
from benchmarks.common import STEP_TOKENS, make_adapter, make_engine, make_model, warm
from benchmarks.full_batch import full_steps, max_tokens, prefill_steps
from server.model.gpt2 import GPT2
from server.model.source import DEMO_MODEL


@pytest.fixture(scope="module")
def model() -> GPT2:
    return make_model(DEMO_MODEL, torch.float32)


@pytest.mark.parametrize(
    ("batch", "prompt", "step_tokens", "steps"),
    [
        (1, 32, 128, 1),
        (1, 129, 128, 2),
        (4, 32, 128, 1),
        (5, 32, 128, 2),
        (3, 2, 3, 3),  # 3 of 6 tokens; 2 beside the first sequence, which decodes; the last one beside two
        (2, 3, 2, 4),  # 2 of 6 tokens; 2; one at a time beside the first sequence
    ],
)
def test_prompts_share_each_step_with_those_that_decode(batch: int, prompt: int, step_tokens: int, steps: int) -> None:
    assert prefill_steps(batch, prompt, step_tokens) == steps


@pytest.mark.parametrize(("batch", "distinct", "steps"), [(1, 0, 1), (32, 8, 2), (64, 0, 3)])
def test_as_many_full_steps_are_timed_as_asked(model: GPT2, batch: int, distinct: int, steps: int) -> None:
    """With the positions that it says and not one more; full_steps raises for a step that isn't full."""
    engine = make_engine(model, batch, decode.positions(batch, steps))
    refs = [AdapterRef(f"d{i}", f"a{i}", "") for i in range(distinct)]
    warm(engine, refs)
    assert len(full_steps(engine, model.config.vocab_size, batch, decode.PROMPT, steps, refs)) == steps
    assert engine.step().stats.num_running < batch, "the first to begin had one token left"
    assert decode.positions(batch, steps) == decode.PROMPT + max_tokens(batch, decode.PROMPT, steps, STEP_TOKENS)
    engine.close()


def test_a_step_that_is_not_full_is_not_timed(model: GPT2) -> None:
    engine = make_engine(model, 2, 64)  # a row less than sequences
    with pytest.raises(RuntimeError, match="a step of 2 sequences and 0 prompt tokens, expected 3 that decode"):
        full_steps(engine, model.config.vocab_size, 3, 8, 2, [])
    engine.close()


def test_weights_follow_from_the_digest(model: GPT2) -> None:
    first, again, other = (make_adapter(AdapterRef(digest, "", ""), model) for digest in ("a@4", "a@4", "b@4"))
    assert all(torch.equal(first.pairs[key].a, again.pairs[key].a) for key in first.pairs)
    assert all(torch.equal(first.pairs[key].b, again.pairs[key].b) for key in first.pairs)
    assert not any(torch.equal(first.pairs[key].a, other.pairs[key].a) for key in first.pairs)
    assert first.max_rank == 4
