"""Measures an adapter beside its base: held-out perplexity, and what samples look like.

Every row of the result holds both. Rates come with Wilson's 95 % interval.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel

from training.base import Base
from training.config import TrainConfig
from training.data import Corpus, Example, normalised
from training.forward import Lane
from training.loop import example_losses
from training.sampling import Sample, SamplingSettings, sample
from training.template import fill

OVERLAP_WORDS = 8
SHOWN = 5  # samples kept of each measurement
METRICS = {
    "perplexity": "exp of the mean cross-entropy a token, over what follows the prompt, with EOS",
    "eos_rate": "share of samples that end in EOS within the token limit",
    "format_rate": "share of samples that end in EOS and are exactly the rest of the template",
    "mean_tokens": "mean length of a sample in tokens, without EOS; one that doesn't stop counts the limit",
    "distinct_2": "different pairs of words over all pairs of words, in all samples together",
    "overlap_rate": f"share of samples that hold {OVERLAP_WORDS} words in a row of a training text",
}
RATES = ("eos_rate", "format_rate", "overlap_rate")


@dataclass(frozen=True)
class Rate:
    """A share with Wilson's 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: int, n: int) -> "Rate":
        """`hits` of `n`, n above 0."""
        z, share = 1.959964, hits / n
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return cls(round(share, 4), round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4))


@dataclass(frozen=True)
class Row:
    """One figure of base and adapter. `form` and `seed` are None where nothing is sampled."""

    metric: str
    prompts: str  # where the rows or prompts come from: heldout_authors, test
    form: str | None
    n: int  # samples, or tokens of a perplexity
    seed: int | None
    base: float | Rate
    adapter: float | Rate


@dataclass(frozen=True)
class Shown:
    """What base and adapter wrote after one prompt."""

    prompts: str
    form: str
    prompt: str
    base: str
    base_stopped: bool
    adapter: str
    adapter_stopped: bool


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured."""

    rows: list[Row]
    shown: list[Shown]
    settings: SamplingSettings


def evaluate(model: PeftModel, adapter: str, base: Base, corpus: Corpus, config: TrainConfig) -> Evaluation:
    """Measure `adapter`, the active one, on the test rows and, where there are any, on authors held out whole."""
    settings = SamplingSettings()
    held_out: dict[str, list[Example]] = {"heldout_authors": corpus.heldout_authors, "test": corpus.test}
    sets = {name: examples for name, examples in held_out.items() if examples}
    rows: list[Row] = []
    shown: list[Shown] = []
    training = _runs([example.key for example in corpus.train])
    for name, examples in sets.items():
        n = sum(len(example.token_ids) - example.prompt_length for example in examples)
        rows.append(Row("perplexity", name, None, n, None, *(perplexity(model, examples, a) for a in (None, adapter))))
    template = config.parsed_template()
    for name, examples in sets.items():
        for form, text in template.forms().items():
            seed = config.seed + 1000
            prompts = _prompts(text, examples, config.eval_samples, seed)
            encoded = [base.encode(prompt) for prompt in prompts]
            with model.disable_adapter():
                of_base = sample(model, encoded, base.eos, settings, seed)
            of_adapter = sample(model, encoded, base.eos, settings, seed)
            pattern = template.completion_pattern(form)
            measured = []
            for samples in (of_base, of_adapter):
                texts = [base.tokenizer.decode(s.token_ids) for s in samples]
                formatted = [s.stopped and bool(pattern.fullmatch(t)) for s, t in zip(samples, texts, strict=True)]
                measured.append((texts, figures(samples, texts, formatted, training)))
            (base_texts, base_figures), (adapter_texts, adapter_figures) = measured
            rows += [Row(m, name, form, len(prompts), seed, base_figures[m], adapter_figures[m]) for m in base_figures]
            shown += [
                Shown(
                    name, form, prompts[i], base_texts[i], of_base[i].stopped, adapter_texts[i], of_adapter[i].stopped
                )
                for i in _first_of_each(prompts)
            ]
    return Evaluation(rows, shown, settings)


def figures(
    samples: Sequence[Sample], texts: Sequence[str], formatted: Sequence[bool], training: set[tuple[str, ...]]
) -> dict[str, float | Rate]:
    """The sampled metrics of METRICS by name; `training` holds the training texts' runs of OVERLAP_WORDS words."""
    n = len(samples)
    words = [normalised(text).split() for text in texts]
    pairs = [pair for sample_words in words for pair in itertools.pairwise(sample_words)]
    overlapping = sum(not training.isdisjoint(_windows(sample_words)) for sample_words in words)
    return {
        "eos_rate": Rate.of(sum(s.stopped for s in samples), n),
        "format_rate": Rate.of(sum(formatted), n),
        "mean_tokens": round(sum(len(s.token_ids) for s in samples) / n, 2),
        "distinct_2": round(len(set(pairs)) / max(1, len(pairs)), 4),
        "overlap_rate": Rate.of(overlapping, n),
    }


def perplexity(model: Any, examples: Sequence[Example], adapter: str | None) -> float:
    """Perplexity a token of what follows the prompts, EOS with it, under an adapter of the model or the base alone."""
    device = next(model.parameters()).device
    after = [replace(example, bare_length=example.prompt_length) for example in examples]
    losses = example_losses(model, after, Lane(adapter), device)
    return round(math.exp(sum(total for total, _ in losses) / sum(count for _, count in losses)), 3)


def _prompts(text: str, examples: Sequence[Example], n: int, seed: int) -> list[str]:
    """n prompts: the different ones of `examples` in turn, in an order set by the seed."""
    different = sorted({fill(text, example.fields) for example in examples})
    random.Random(seed).shuffle(different)
    return [different[i % len(different)] for i in range(n)]


def _first_of_each(prompts: Sequence[str]) -> list[int]:
    """Indexes of the samples to show: of different prompts first."""
    first = list({prompt: i for i, prompt in reversed(list(enumerate(prompts)))}.values())[::-1]
    rest = [i for i in range(len(prompts)) if i not in set(first)]
    return (first + rest)[:SHOWN]


def _runs(keys: Sequence[str]) -> set[tuple[str, ...]]:
    return {window for key in keys for window in _windows(key.split())}


def _windows(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + OVERLAP_WORDS]) for i in range(len(words) - OVERLAP_WORDS + 1))
