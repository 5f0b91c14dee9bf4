"""Intervals against their definitions, and how often the bootstrap's holds the truth."""

import math
import random

import pytest

from training.intervals import RESAMPLES, Interval, Rate, perplexities


def test_wilson_intervals() -> None:
    assert Rate.of(190, 200) == Rate(0.95, 0.9104, 0.9726, 190, 200)
    assert Rate.of(0, 200).low == 0.0
    assert Rate.of(200, 200).high == 1.0


def test_the_perplexity_is_token_weighted_and_the_ratio_paired() -> None:
    base, adapter = [(6.0, 2), (4.0, 4), (9.0, 3)], [(4.0, 2), (2.0, 4), (7.0, 3)]
    found = perplexities(base, adapter, seed=0)
    assert found.base.value == pytest.approx(math.exp(19 / 9), abs=1e-3)
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(math.exp((13 - 19) / 9), abs=1e-4)
    assert (found.examples, found.tokens) == (3, 9)
    assert found.base.low == pytest.approx(math.exp(1.0), abs=1e-3)  # the best and the worst possible draw
    assert found.base.high == pytest.approx(math.exp(3.0), abs=1e-3)
    assert found == perplexities(base, adapter, seed=0)


def test_an_adapter_that_is_always_better_by_as_much_has_no_doubt_in_its_ratio() -> None:
    """The texts differ much, which the perplexities' intervals show; of each, the adapter is as much better."""
    rng = random.Random(0)
    base = [(rng.gauss(40, 10), 10) for _ in range(50)]
    found = perplexities(base, [(total - 1.0, n) for total, n in base], seed=1)
    assert found.ratio == Interval(*[round(math.exp(-0.1), 4)] * 3)
    assert found.base.high / found.base.low > 1.5


@pytest.mark.parametrize("texts", [2, 4, 10])
def test_a_useless_adapter_passes_as_seldom_as_the_interval_says_on_few_texts_too(texts: int) -> None:
    """Its ratio is 1: the upper end is below that in 2.5 % of all cases, here in at most 4.5 % of 400."""
    rng, below = random.Random(texts), 0
    for seed in range(400):
        base = [(rng.gauss(3, 0.8) * n, n) for n in [rng.randint(10, 30) for _ in range(texts)]]
        adapter = [(total + rng.gauss(0, 0.3) * n, n) for total, n in base]
        ratio = perplexities(base, adapter, seed).ratio
        assert ratio is not None
        below += ratio.high < 1
    assert below / 400 <= 0.045


def test_one_text_has_no_ratio_to_judge_by() -> None:
    assert perplexities([(6.0, 2)], [(4.0, 2)], seed=0).ratio is None


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Losses a token of 3 nats in the mean; 200 repetitions. The percentile bootstrap of 40 texts errs a bit more."""
    rng, hits = random.Random(5), 0
    for seed in range(200):
        losses = [(rng.gauss(3, 0.8) * n, n) for n in [rng.randint(10, 30) for _ in range(40)]]
        found = perplexities(losses, losses, seed)
        hits += found.base.low <= math.exp(3) <= found.base.high
    assert 0.88 <= hits / 200 <= 0.99
    assert RESAMPLES == 1000
