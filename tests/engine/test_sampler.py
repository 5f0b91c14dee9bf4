"""The sampler against transformers' logits processors: what is kept, how probable it is, and that draws follow it."""

import math
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kernels.build import library
from kernels.native import Native
from server.engine import sampler
from server.engine.penalties import SamplingRow, penalise
from server.engine.sampler import candidates, uniform
from server.engine.types import Sampled, SamplingParams

BACKENDS = [None, *([Native()] if library().is_file() else [])]
_native: Native | None = None


@pytest.fixture(autouse=True, params=BACKENDS, ids=lambda backend: "kernels" if backend else "torch")
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with torch and with our kernel."""
    monkeypatch.setattr(sys.modules[__name__], "_native", request.param)


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> Sampled:
    return sampler.sample(logits.contiguous(), rows, _native)


VOCAB = 700  # more than the candidates that are looked at first


def make_logits(rows: int, seed: int, spread: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def row(seed: int = 0, index: int = 0, seen: tuple[int, ...] = (), **params: Any) -> SamplingRow:
    return SamplingRow(SamplingParams(seed=seed, **params), seen, index)


def ours(logits: torch.Tensor, params: SamplingParams, seen: tuple[int, ...]) -> torch.Tensor:
    """Every token's probability [V]."""
    scores = penalise(logits[None], [SamplingRow(params, seen, 0)]) / params.temperature
    ids, probs = candidates(scores, [params])
    return torch.zeros_like(logits).scatter(0, ids[0], probs[0])


def theirs(logits: torch.Tensor, params: SamplingParams, seen: tuple[int, ...]) -> torch.Tensor:
    """The same from transformers, in the order in which `generate` applies them."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    return chain(torch.tensor([seen], dtype=torch.long), logits[None].clone())[0].softmax(-1)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    spread=st.sampled_from([0.01, 0.5, 3.0, 12.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 1.9, 10.0]),
    top_k=st.sampled_from([0, 1, 2, 50, 64, 65, 300, VOCAB - 1, VOCAB, VOCAB + 5]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.2, 5.0]),
    seed=st.integers(0, 10_000),
)
def test_the_kept_tokens_and_their_probabilities_are_transformers(spread: float, seed: int, **fields: Any) -> None:
    logits = make_logits(1, seed, spread)[0]
    seen = (*range(0, 40, 3), int(logits.argmax()), int(logits.argmin()), 3, 3)
    params = SamplingParams(**fields)
    expected, got = theirs(logits, params, seen), ours(logits, params, seen)
    tiny = torch.finfo(torch.float32).tiny
    assert torch.equal(got > tiny, expected > tiny), f"{int((got > 0).sum())} kept, not {int((expected > 0).sum())}"
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("top_k", [1, 5, 63, 64, 65, 500])
def test_what_ties_with_the_kth_best_is_kept_as_in_transformers(top_k: int) -> None:
    for step in (0.125, 1.0, 4.0):
        logits = (make_logits(1, top_k)[0] / step).round() * step
        params = SamplingParams(temperature=1.0, top_k=top_k)
        expected = theirs(logits, params, ())
        assert int((expected > 0).sum()) >= top_k
        torch.testing.assert_close(ours(logits, params, ()), expected)


def test_seen_tokens_are_penalised_once_and_others_never() -> None:
    logits = torch.tensor([[2.0, -2.0, 0.0, 4.0], [2.0, -2.0, 0.0, 4.0]])
    rows = [row(seen=(0, 1, 0, 0, 2), repetition_penalty=2.0), row(seen=(0, 1))]
    assert penalise(logits, rows).tolist() == [[1.0, -4.0, 0.0, 4.0], [2.0, -2.0, 0.0, 4.0]]
    assert logits[0].tolist() == [2.0, -2.0, 0.0, 4.0], "the raw logits are kept for the logprobs"


def test_greedy_takes_the_best_after_the_penalty() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]] * 3)
    rows = [row(), row(seen=(0,), repetition_penalty=1.5), row(seed=99, top_k=2, top_p=0.1)]
    assert sample(logits, rows).token_ids == [0, 1, 0]


def critical(freedom: int, z: float = 4.0) -> float:
    """The chi-square value that chance exceeds once in 30,000 times (z = 4; Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(tokens: list[int], expected: torch.Tensor) -> tuple[float, int]:
    """Over tokens expected at least 10 times, the others as one. (statistic, degrees of freedom)"""
    assert (expected[torch.tensor(tokens)] > 0).all(), "a token that should have been left out was drawn"
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    expected = expected.double() * len(tokens)
    often = expected >= 10
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    used = expected > 0
    return float(((counts - expected)[used] ** 2 / expected[used]).sum()), int(used.sum()) - 1


DRAWS = 12_000
WAYS = {
    "plain": {"temperature": 1.0},
    "cold": {"temperature": 0.6},
    "top-k": {"temperature": 1.0, "top_k": 12},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "all": {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_draws_follow_the_distribution(way: str, over: str) -> None:
    logits, seen = make_logits(1, 5, spread=2.0, vocab=80)[0], (1, 2, 3)
    params = SamplingParams(**WAYS[way])
    rows = [
        row(seed=i, seen=seen, **WAYS[way]) if over == "seeds" else row(seed=77, index=i, seen=seen, **WAYS[way])
        for i in range(DRAWS)
    ]
    tokens = sample(logits.expand(DRAWS, -1), rows).token_ids
    statistic, freedom = chi_square(tokens, theirs(logits, params, seen))
    assert freedom >= 5, "a vain test: too few tokens are left"
    assert statistic < critical(freedom), f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


def test_the_chi_square_would_notice() -> None:
    """The test above can fail: a distribution 20% off in its best token is found out."""
    logits = make_logits(1, 5, spread=2.0, vocab=80)[0]
    tokens = sample(logits.expand(DRAWS, -1), [row(seed=i, temperature=1.0) for i in range(DRAWS)]).token_ids
    wrong = logits.softmax(-1)
    wrong[wrong.argmax()] *= 1.2
    statistic, freedom = chi_square(tokens, wrong / wrong.sum())
    assert statistic > critical(freedom)


def test_the_streams_numbers_are_uniform_and_independent() -> None:
    for numbers in (
        torch.tensor([uniform(7, i) for i in range(DRAWS)], dtype=torch.float64),
        torch.tensor([uniform(i, 0) for i in range(DRAWS)], dtype=torch.float64),
        torch.tensor([uniform(2**64 - 1 - i, i) for i in range(DRAWS)], dtype=torch.float64),
    ):
        assert float(numbers.min()) >= 0
        assert float(numbers.max()) < 1
        counts = torch.histc(numbers, 64, 0, 1)
        assert float(((counts - DRAWS / 64) ** 2).sum() / (DRAWS / 64)) < critical(63)
        centred = numbers - 0.5
        correlation = float((centred[1:] * centred[:-1]).mean() * 12)
        assert abs(correlation) < 4 / math.sqrt(DRAWS), "neighbours depend on each other"


def test_a_seed_repeats_its_tokens_and_another_gives_others() -> None:
    logits = make_logits(1, 1, spread=1.0).expand(64, -1)

    def draw(seed: int) -> list[int]:
        return sample(logits, [row(seed=seed, index=i, temperature=1.0) for i in range(64)]).token_ids

    assert draw(3) == draw(3)
    assert sum(a == b for a, b in zip(draw(3), draw(4), strict=True)) < 10
    assert len(set(draw(3))) > 40, "positions have numbers of their own"


MIX = [
    {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.0, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9}, {"temperature": 3.0, "top_p": 0.99}, {"temperature": 1.0, "top_k": 400},
    {"temperature": 1.0, "repetition_penalty": 1.3}, {"temperature": 0.8, "top_k": 60, "top_p": 0.7},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16, full of ties"])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    logits = make_logits(len(MIX), 11).to(dtype).float()
    for seed in range(12):
        rows = [row(seed=seed, index=i, seen=(1, 2), logprobs=True, **params) for i, params in enumerate(MIX)]
        mixed = sample(logits, rows)
        alone = [sample(logits[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
        assert mixed.token_ids == [one.token_ids[0] for one in alone], f"seed {seed}"
        assert mixed.logprobs == pytest.approx([one.logprobs[0] for one in alone], abs=1e-5)


def test_logprobs_are_of_the_raw_logits_whatever_the_sampling() -> None:
    logits = make_logits(4, 2)
    odd = {"temperature": 0.3, "top_k": 3, "repetition_penalty": 5.0, "seen": tuple(range(50))}
    rows = [
        row(logprobs=True),
        row(seed=1, logprobs=True, **odd),
        row(seed=2, **odd),
        row(seed=3, logprobs=True, **odd),
    ]
    got: Sampled = sample(logits, rows)
    expected = logits.log_softmax(-1)[range(4), got.token_ids]
    assert got.logprobs == pytest.approx([float(expected[0]), float(expected[1]), 0.0, float(expected[3])], abs=1e-5)


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-40, 1e-300])
@pytest.mark.parametrize("filters", [{}, {"top_k": 9}, {"top_p": 0.5}])
def test_hardly_any_temperature_is_greedy(temperature: float, filters: dict[str, Any]) -> None:
    logits = 10 * make_logits(6, 4)
    rows = [row(seed=i, temperature=temperature, **filters) for i in range(6)]
    assert sample(logits, rows).token_ids == logits.argmax(-1).tolist()


def test_the_largest_seed_and_an_excluded_token() -> None:
    logits = make_logits(1, 6).repeat(200, 1)
    logits[:, 5] = float("-inf")
    tokens = sample(logits, [row(seed=2**64 - 1 - i, temperature=50.0) for i in range(200)]).token_ids
    assert 5 not in tokens
    assert len(set(tokens)) > 100
