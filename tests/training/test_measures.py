"""Loss, sampling and rates against independent computations."""

import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional
from transformers import GPT2LMHeadModel

from training import evaluate
from training.base import Base
from training.config import TrainConfig
from training.data import load_corpus
from training.evaluate import perplexity_losses
from training.figures import METRICS, OVERLAP_WORDS, Written, distance, figures, quantiles
from training.intervals import Rate
from training.loss import TOKENS_PER_CHUNK, frozen_head_losses
from training.memorisation import Memory
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


def test_figures() -> None:
    """Ten words of the first are a training text's; the second says nothing new and doesn't stop."""
    run = [f"w{i}" for i in range(OVERLAP_WORDS)]
    memory = Memory([" ".join(["x", *run, "y"]), "a b"])
    found = figures(
        [Written(f'"{" ".join(run).upper()}"', 2, True, True), Written("a b a b", 4, False, False)],
        memory,
        [2, 2],
        None,
    )
    assert isinstance(found["eos_rate"], Rate)
    assert (found["eos_rate"].hits, found["eos_rate"].n) == (1, 2)
    assert found["eos_rate"] == found["format_rate"] == found["overlap_rate"] == Rate.of(1, 2)
    assert found["mean_tokens"] == 3
    assert found["length_distance"] == 0.5  # half of the samples are longer than every training text
    words = OVERLAP_WORDS + 4
    assert found["distinct_1"] == pytest.approx((OVERLAP_WORDS + 2) / words, abs=1e-4)
    assert found["distinct_2"] == pytest.approx((OVERLAP_WORDS - 1 + 2) / (words - 2), abs=1e-4)
    assert found["distinct_3"] == pytest.approx((OVERLAP_WORDS - 2 + 2) / (words - 4), abs=1e-4)
    assert (found["longest_overlap"], found["mean_overlap"]) == (OVERLAP_WORDS, (OVERLAP_WORDS + 2) / 2)
    assert found["copy_rate"] == Rate.of(0, 2)
    assert set(found) | {"perplexity", "style_rate"} == set(METRICS)


def test_distance_and_quantiles_of_lengths() -> None:
    rng = random.Random(0)
    a, b = [rng.randint(1, 30) for _ in range(50)], [rng.randint(5, 40) for _ in range(80)]
    shares = [abs(sum(x <= t for x in a) / 50 - sum(x <= t for x in b) / 80) for t in range(41)]
    assert distance(a, b) == pytest.approx(max(shares), abs=1e-4)
    assert quantiles(range(101)) == {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95}


def test_what_the_base_gives_is_computed_once_for_the_voices_that_share_it(
    base: Base, quotes_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(base.load(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    config = TrainConfig("x", data=str(quotes_file), eval_samples=4)
    corpus, drawn, plain = load_corpus(config, base), [], evaluate.sample

    def counted(model: PeftModel, *rest):
        drawn.append("base" if model.base_model.model.transformer.h[0].attn.c_attn.disable_adapters else "adapter")
        return plain(model, *rest)

    monkeypatch.setattr(evaluate, "sample", counted)
    cache = evaluate.BaseCache()
    first, second, alone = (
        evaluate.evaluate(model, "default", base, corpus, config, shared) for shared in (cache, cache, None)
    )
    assert first == second == alone
    assert drawn.count("adapter") == 6
    assert drawn.count("base") == 4, "two prompt forms, once for the two that share and once alone"


def test_perplexity_is_what_transformers_says(base: Base, quotes_file: Path) -> None:
    model = get_peft_model(base.load(), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    examples = load_corpus(TrainConfig("x", data=str(quotes_file)), base).test
    for example, (total, count) in zip(examples, perplexity_losses(model, examples, "default"), strict=True):
        ids = torch.tensor([example.token_ids])
        labels = ids.clone()
        labels[:, : example.prompt_length] = -100
        assert total / count == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-4)
        assert count == len(example.token_ids) - example.prompt_length
