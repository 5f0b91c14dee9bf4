"""Loss, batches, sampling and rates against independent computations."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import GPT2LMHeadModel

from training.base import Base
from training.collate import IGNORED, LengthGrouped, collate
from training.evaluate import OVERLAP_WORDS, Rate, figures
from training.loss import TOKENS_PER_CHUNK, frozen_head_loss
from training.sampling import Sample, SamplingSettings, _choose, greedy, sample


@pytest.fixture(scope="module")
def model(base: Base) -> GPT2LMHeadModel:
    return base.load().eval()


@pytest.mark.parametrize("n", [1, 7, TOKENS_PER_CHUNK + 3])
def test_the_loss_and_its_gradient_are_cross_entropy(n: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(n, 16, requires_grad=True)
    again = hidden.detach().clone().requires_grad_()
    weight, targets = 3 * torch.randn(101, 16), torch.randint(0, 101, (n,))
    ours, plain = frozen_head_loss(hidden, weight, targets), functional.cross_entropy(again @ weight.T, targets)
    (2 * ours).backward()
    (2 * plain).backward()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(hidden.grad, again.grad)


def test_padding_is_masked_by_length_and_eos_is_learned() -> None:
    eos = 50256
    rows = [([5, 6, eos], 1), ([7, eos], 0), ([eos], 0)]
    batch = collate([{"input_ids": ids, "learn_from": start} for ids, start in rows], pad_id=eos)
    assert batch["input_ids"].shape == (3, 3)  # the longest of the batch, not the model's maximum
    assert batch["labels"].tolist() == [[IGNORED, 6, eos], [7, eos, IGNORED], [eos, IGNORED, IGNORED]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 1]


def test_every_epoch_has_its_own_order_of_all_examples_in_batches_of_like_length() -> None:
    lengths = [(7 * i) % 50 for i in range(205)]
    sampler = LengthGrouped(lengths, 10, seed=4)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(205))
    assert orders[0] == orders[2] != orders[1]
    spread = [max(ls) - min(ls) for i in range(0, 200, 10) for ls in [[lengths[j] for j in orders[0][i : i + 10]]]]
    assert max(spread) <= 4


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
