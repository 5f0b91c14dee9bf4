"""Penalties, logit_bias, min_tokens and typical_p against transformers: same numbers, same tokens."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.native import Native
from server.engine.penalties import SamplingRow, penalise
from server.engine.sampler import sample, uniform
from server.engine.types import BANNED, DIVERGED
from tests.engine.sampling_oracle import BACKENDS, EOS, VOCAB, make_logits, openai_penalties, row, theirs

both = pytest.mark.parametrize("native", BACKENDS, ids=lambda backend: "kernels" if backend else "torch")
SLACK = 2e-5  # of cumulative probabilities: sums of fp32 numbers


def assert_drawn_from(probs: torch.Tensor, rows: Sequence[SamplingRow], tokens: Sequence[int]) -> None:
    """Each token is the first, in order of id, at which the cumulative probability passes the row's number."""
    running = probs.double().cumsum(0)
    for each, token in zip(rows, tokens, strict=True):
        u = uniform(each.params.seed, each.index)
        assert probs[token] > 0, f"token {token} was drawn, transformers leaves it out"
        below = float(running[token] - probs[token])
        assert below - SLACK <= u <= float(running[token]) + SLACK, f"{u} draws {token}: {below}..{running[token]}"


@both
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spread=st.sampled_from([0.5, 3.0, 12.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 0, 2, 50, 65, VOCAB]),
    top_p=st.sampled_from([0.1, 0.9, 0.999, 1.0, 1.0]),
    typical_p=st.sampled_from([1e-3, 0.2, 0.5, 0.95, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3]),
    frequency_penalty=st.sampled_from([0.0, -2.0, 0.3, 2.0]),
    presence_penalty=st.sampled_from([0.0, -1.0, 1.7]),
    logit_bias=st.sampled_from([(), ((2, 100.0),), ((0, 3.0), (12, -5.5), (EOS, 40.0), (VOCAB - 1, -100.0))]),
    min_tokens=st.sampled_from([0, 5, 6, 30]),
    seed=st.integers(0, 10_000),
)
def test_tokens_are_drawn_from_transformers_distribution(
    native: Native | None, spread: float, seed: int, **fields: Any
) -> None:
    logits = make_logits(1, seed, spread)[0]
    output = (int(logits.argmax()), 12, 12, 12, int(logits.argmin()))
    seen = (*range(0, 40, 3), int(logits.argmax()), 3, *output)
    rows = [row(seed=1000 * seed + i, seen=seen, output=output, **fields) for i in range(25)]
    tokens = sample(logits.repeat(len(rows), 1), rows, native).token_ids
    assert_drawn_from(theirs(logits, rows[0]), rows, tokens)


@both
@pytest.mark.parametrize("step", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("typical_p", [0.05, 0.4, 0.8])
def test_what_is_as_typical_as_the_last_is_kept_too(native: Native | None, step: float, typical_p: float) -> None:
    logits = (make_logits(1, 8)[0] / step).round() * step
    rows = [row(seed=i, temperature=1.0, typical_p=typical_p) for i in range(200)]
    tokens = sample(logits.repeat(len(rows), 1), rows, native).token_ids
    assert_drawn_from(theirs(logits, rows[0]), rows, tokens)


@both
def test_greedy_takes_the_best_of_the_changed_scores(native: Native | None) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 4, EOS, 5]] = torch.tensor([4.0, 3.5, 5.0, -2.0])
    cases: list[tuple[SamplingRow, int]] = [
        (row(), EOS),
        (row(min_tokens=1), 3),
        (row(min_tokens=2, output=(1,)), 3),
        (row(min_tokens=2, output=(1, 1)), EOS),
        (row(min_tokens=2, output=(1,), ignore_eos=True), 3),
        (row(min_tokens=1, logit_bias=((EOS, 100.0),)), 3),
        (row(logit_bias=((EOS, -1.5), (4, 0.6))), 4),
        (row(logit_bias=((5, 100.0),)), 5),
        (row(frequency_penalty=0.6, output=(EOS, EOS)), 3),
        (row(frequency_penalty=0.4, output=(EOS, EOS)), EOS),
        (row(presence_penalty=0.6, output=(EOS, EOS)), EOS),
        (row(presence_penalty=1.1, output=(EOS, 3)), EOS),
        (row(presence_penalty=1.7, output=(EOS, 3)), 4),
        (row(frequency_penalty=-1.0, output=(4, 4)), 4),
        (row(logit_bias=((5, 10.0),), repetition_penalty=2.0, seen=(5,)), EOS),  # 8 / 2, not -4 + 10
    ]
    rows = [case for case, _ in cases]
    assert sample(logits.repeat(len(rows), 1), rows, native).token_ids == [token for _, token in cases]


def test_frequency_and_presence_count_the_output_alone() -> None:
    logits = make_logits(1, 3)
    each = row(seen=(1, 2, 3, 9, 9), output=(9, 9), frequency_penalty=0.5, presence_penalty=0.25)
    scores = penalise(logits, [each])
    torch.testing.assert_close(scores, openai_penalties(logits, each.params, each.output), rtol=0, atol=1e-6)
    assert scores[0, 9] == logits[0, 9] - 1.25
    assert (scores != logits).nonzero().tolist() == [[0, 9]]


@both
def test_a_row_with_every_token_banned_is_told_apart_from_one_that_diverged(native: Native | None) -> None:
    logits = make_logits(5, 1, vocab=12)
    logits[3] = math.nan
    everything = tuple((token, -math.inf) for token in range(12))
    rows = [
        row(),
        row(logit_bias=everything),
        row(logit_bias=tuple(pair for pair in everything if pair[0] != EOS), min_tokens=1, temperature=1.0),
        row(logit_bias=everything, logprobs=True, top_logprobs=3),
        row(logit_bias=((2, 3e38), (3, 3.4e38)), repetition_penalty=0.1, seen=(2,)),
    ]
    sampled = sample(logits, rows, native)
    assert sampled.token_ids == [int(logits[0].argmax()), BANNED, BANNED, DIVERGED, BANNED]
    freed = [replace(each, params=replace(each.params, logit_bias=everything[1:])) for each in rows[:3]]
    assert sample(logits[:3], freed, native).token_ids == [0, 0, 0]
