"""Loss, sampling and rates against independent computations."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import GPT2LMHeadModel

from training.base import Base
from training.evaluate import OVERLAP_WORDS, Rate, figures
from training.loss import TOKENS_PER_CHUNK, frozen_head_losses
from training.sampling import Sample, SamplingSettings, _choose, greedy, sample


@pytest.fixture(scope="module")
def model(base: Base) -> GPT2LMHeadModel:
    return base.load().eval()


@pytest.mark.parametrize("n", [1, 7, TOKENS_PER_CHUNK + 3])
def test_the_losses_and_their_gradient_are_cross_entropy(n: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(n, 16, requires_grad=True)
    again = hidden.detach().clone().requires_grad_()
    weight, targets, factors = 3 * torch.randn(101, 16), torch.randint(0, 101, (n,)), torch.randn(n)
    ours = frozen_head_losses(hidden, weight, targets)
    plain = functional.cross_entropy(again @ weight.T, targets, reduction="none")
    (factors * ours).sum().backward()
    (factors * plain).sum().backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(hidden.grad, again.grad)


def test_greedy_is_generate(model: GPT2LMHeadModel, base: Base) -> None:
    prompt = base.encode("Quote by Oscar Wilde:")
    expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=base.eos)
    tokens, logprobs = greedy(model, prompt, base.eos, 12)
    assert tokens == expected[0, len(prompt) :].tolist()
    assert len(logprobs) == len(tokens)
    assert all(value < 0 for value in logprobs)


def test_a_batch_samples_what_each_prompt_alone_does(model: GPT2LMHeadModel, base: Base) -> None:
    """At a temperature near zero sampling is greedy, so that padding and rows that leave can be checked."""
    prompts = [base.encode(text) for text in ("Quote by A:", "Quote by Oscar Wilde and many others:", "Maxim")]
    cold = SamplingSettings(temperature=1e-4, max_tokens=10, batch_size=2)
    assert [s.token_ids for s in sample(model, prompts, base.eos, cold, 1)] == [
        greedy(model, prompt, base.eos, 10)[0] for prompt in prompts
    ]


def test_eos_stops_a_sample_and_is_not_in_it(model: GPT2LMHeadModel, base: Base) -> None:
    prompt = base.encode("Quote by A:")
    tokens, _ = greedy(model, prompt, base.eos, 6)
    end = tokens[3]
    cold = SamplingSettings(temperature=1e-4, max_tokens=6)
    assert sample(model, [prompt], end, cold, 1) == [Sample(tokens[: tokens.index(end)], True)]


def test_draws_follow_temperature_and_top_p() -> None:
    """Chi-square over 20,000 draws; 13.8 is its 0.999 quantile at two degrees of freedom."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -4.0])
    settings = SamplingSettings(temperature=0.8, top_p=0.9)
    probabilities = (logits / settings.temperature).softmax(0)
    before = probabilities.cumsum(0) - probabilities
    kept = torch.where(before < settings.top_p, probabilities, 0.0)
    kept /= kept.sum()
    assert 0 < int((kept == 0).sum()) < len(kept)
    generator = torch.Generator().manual_seed(3)
    drawn = _choose(logits.repeat(20_000, 1), settings, generator).bincount(minlength=6)
    inside = kept > 0
    assert drawn[~inside].sum() == 0
    expected = 20_000 * kept[inside]
    assert len(expected) == 3
    assert ((drawn[inside] - expected) ** 2 / expected).sum() < 13.8


def test_wilson_intervals() -> None:
    assert Rate.of(190, 200) == Rate(0.95, 0.9104, 0.9726)
    assert Rate.of(0, 200).low == 0.0
    assert Rate.of(200, 200).high == 1.0


def test_figures() -> None:
    run = tuple(f"w{i}" for i in range(OVERLAP_WORDS))
    found = figures(
        [Sample([1, 2], True), Sample([1, 2, 3, 4], False)], [" ".join(run), "a b a b"], [True, False], {run}
    )
    assert found["eos_rate"].value == found["format_rate"].value == found["overlap_rate"].value == 0.5
    assert found["mean_tokens"] == 3
    assert found["distinct_2"] == pytest.approx((OVERLAP_WORDS - 1 + 2) / (OVERLAP_WORDS - 1 + 3), abs=1e-4)
    assert not math.isnan(found["distinct_2"])
