"""Measures an adapter beside its base: held-out perplexity, and what samples look like. Every row holds both."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftModel

from training.base import Base
from training.config import TrainConfig
from training.contrast import written
from training.data import Corpus, Example
from training.figures import Written, figures, quantiles, reference
from training.forward import Lane
from training.intervals import Interval, Perplexities, Rate, perplexities
from training.loop import example_losses
from training.memorisation import Memory
from training.sampling import Sample, SamplingSettings, sample
from training.style import StyleJudge, StyleTest, why_not
from training.template import Template, fill
from training.texts import normalised

SHOWN = 5  # samples shown of each measurement


@dataclass(frozen=True)
class Row:
    """One figure of base and adapter. `form` and `seed` are None where nothing is sampled."""

    metric: str
    prompts: str  # where the rows or prompts come from: heldout_authors, test
    form: str | None
    n: int  # samples, or tokens of a perplexity
    seed: int | None
    base: float | Rate | Interval
    adapter: float | Rate | Interval


@dataclass(frozen=True)
class Sampled:
    """What base and adapter wrote after the prompts of one set, in one form."""

    prompts: str
    form: str
    texts: list[str]  # the prompts themselves; few different ones are taken in turn
    base: list[Written]
    adapter: list[Written]
    training_lengths: list[int]  # of the training texts in tokens, counted as the samples'


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
    sampled: list[Sampled]
    settings: SamplingSettings
    perplexities: dict[str, Perplexities]  # prompt set -> base, adapter and their ratio
    style: StyleTest | str  # or why there is none
    references: dict[str, Any]  # real texts' figures beside which the samples' stand

    @property
    def shown(self) -> list[Shown]:
        """A few samples of each kind, of different prompts first."""
        return [
            Shown(of.prompts, of.form, of.texts[i], of.base[i].text, of.base[i].stopped, of.adapter[i].text,
                  of.adapter[i].stopped)
            for of in self.sampled for i in _first_of_each(of.texts)
        ]  # fmt: skip

    def adapter_texts(self, prompts: str = "test") -> list[str]:
        """All that the adapter wrote after the prompts of a set, in every form."""
        return [sample.text for of in self.sampled if of.prompts == prompts for sample in of.adapter]

    def base_texts(self, prompts: str = "test") -> list[str]:
        """The base's after the same prompts."""
        return [sample.text for of in self.sampled if of.prompts == prompts for sample in of.base]


@dataclass
class BaseCache:
    """What one base gave, for the next adapters that are measured beside it on the same prompts and texts."""

    found: dict[Any, Any] = field(default_factory=dict)

    def of(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, which `key` decides wholly, given the base."""
        if key not in self.found:
            self.found[key] = compute()
        return self.found[key]


def evaluate(
    model: PeftModel, adapter: str, base: Base, corpus: Corpus, config: TrainConfig, cache: BaseCache | None = None
) -> Evaluation:
    """Measure `adapter`, the active one, on the test rows and, where there are any, on authors held out whole.

    `cache` is shared by the adapters of one base. Raises nothing of its own.
    """
    settings, template, cache = SamplingSettings(), config.parsed_template(), cache or BaseCache()
    sets = {"heldout_authors": corpus.heldout_authors, "test": corpus.test}
    sets = {name: examples for name, examples in sets.items() if examples}
    seed = config.seed + 1000
    compared = {name: _perplexities(model, adapter, examples, seed, cache) for name, examples in sets.items()}
    rows = [Row("perplexity", name, None, of.tokens, None, of.base, of.adapter) for name, of in compared.items()]
    memory = Memory([normalised(written(template, row.fields)) for row in corpus.train], corpus.learned)
    judge = style_judge(corpus, config)
    usable = None if isinstance(judge, str) else judge
    sampled = []
    for name, examples in sets.items():
        for form in template.forms():
            prompts = _prompts(template.forms()[form], examples, config.eval_samples, seed)
            of_both = _sampled(model, base, prompts, template, form, settings, seed, cache)
            lengths = _lengths(corpus.train, form, settings.max_tokens)
            sampled.append(Sampled(name, form, prompts, *of_both, lengths))
            measured = [figures(samples, memory, lengths, usable) for samples in of_both]
            rows += [Row(m, name, form, len(prompts), seed, measured[0][m], measured[1][m]) for m in measured[0]]
    style = judge if isinstance(judge, str) else judge.test
    return Evaluation(rows, sampled, settings, compared, style, _references(corpus, memory, template, config))


def style_judge(corpus: Corpus, config: TrainConfig) -> StyleJudge | str:
    """A classifier of the voice against the corpus's contrast, or why there is none.

    The held-out texts are of the valid and test splits: neither it nor the adapter was trained on them.
    """
    contrast, template = corpus.contrast, config.parsed_template()
    if contrast.reason:
        return contrast.reason
    train = [written(template, example.fields) for example in corpus.train]
    held_out = [written(template, example.fields) for example in [*corpus.valid, *corpus.test]]
    reason = why_not((train, held_out), (contrast.train, contrast.held_out))
    if reason:
        return reason
    return StyleJudge(train, held_out, contrast.train, contrast.held_out, contrast.source, config.seed)


def perplexity_losses(model: Any, examples: Sequence[Example], adapter: str | None) -> list[tuple[float, int]]:
    """Of each example: the sum of the losses of what follows its prompt, EOS with it, and their number."""
    device = next(model.parameters()).device
    after = [replace(example, bare_length=example.prompt_length) for example in examples]
    return example_losses(model, after, Lane(adapter), device)


def _perplexities(
    model: Any, adapter: str, examples: Sequence[Example], seed: int, cache: BaseCache
) -> Perplexities:  # fmt: skip
    key = ("losses", tuple((example.prompt_length, *example.token_ids) for example in examples))
    of_base = cache.of(key, lambda: perplexity_losses(model, examples, None))
    return perplexities(of_base, perplexity_losses(model, examples, adapter), seed)


def _sampled(
    model: PeftModel, base: Base, prompts: Sequence[str], template: Template, form: str, settings: SamplingSettings,
    seed: int, cache: BaseCache,
) -> tuple[list[Written], list[Written]]:  # fmt: skip
    encoded = [base.encode(prompt) for prompt in prompts]

    def of_base() -> list[Sample]:
        with model.disable_adapter():
            return sample(model, encoded, base.eos, settings, seed)

    pattern = template.completion_pattern(form)

    def written_by(samples: Sequence[Sample]) -> list[Written]:
        texts = [base.tokenizer.decode(s.token_ids) for s in samples]
        return [
            Written(text, len(s.token_ids), s.stopped, s.stopped and bool(pattern.fullmatch(text)))
            for s, text in zip(samples, texts, strict=True)
        ]

    key = ("samples", settings, seed, tuple(map(tuple, encoded)))
    adapters = sample(model, encoded, base.eos, settings, seed)
    return written_by(cache.of(key, of_base)), written_by(adapters)


def _lengths(train: Sequence[Example], form: str, limit: int) -> list[int]:
    """Tokens that follow the prompt of this form, without EOS; longer texts count the samples' limit, as samples do."""
    starts = (row.prompt_length if form == "punctuated" else row.bare_length for row in train)
    return [min(limit, len(row.token_ids) - 1 - start) for row, start in zip(train, starts, strict=True)]


def _references(corpus: Corpus, memory: Memory, template: Template, config: TrainConfig) -> dict[str, Any]:
    """As many real texts as there are samples, so that distinct-n can be compared; and how long they are."""
    rng = random.Random(config.seed)

    def some(rows: Sequence[Example]) -> list[str]:
        chosen = rows if len(rows) <= config.eval_samples else rng.sample(list(rows), config.eval_samples)
        return [written(template, row.fields) for row in chosen]

    of_training = {"training_texts": dict(reference(some(corpus.train), None))} if corpus.train else {}
    return of_training | ({"held_out_texts": dict(reference(some(corpus.test), memory))} if corpus.test else {})


def lengths_of(sampled: Sampled) -> dict[str, Any]:
    """The quantiles of the lengths in tokens, for report.json."""
    return {
        "prompts": sampled.prompts, "form": sampled.form,
        "training": quantiles(sampled.training_lengths),
        "base": quantiles([s.tokens for s in sampled.base]),
        "adapter": quantiles([s.tokens for s in sampled.adapter]),
    }  # fmt: skip


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
