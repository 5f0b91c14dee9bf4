"""The figures of samples, each with its definition. They are computed from texts: nothing here knows a model."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training import style
from training.intervals import Interval, Rate
from training.memorisation import COPY, Memory
from training.style import StyleJudge
from training.texts import normalised

OVERLAP_WORDS = 8
QUANTILES = (5, 25, 50, 75, 95)
METRICS = {
    "perplexity": "exp of the mean cross-entropy a token, over what follows the prompt, with EOS; its 95 % interval is "
    "the bootstrap's over the texts",
    "eos_rate": "share of samples that end in EOS within the token limit",
    "format_rate": "share of samples that end in EOS and are exactly the rest of the template",
    "mean_tokens": "mean length of a sample in tokens, without EOS; one that doesn't stop counts the limit",
    "length_distance": "Kolmogorov and Smirnov's: the largest difference between the shares of samples and of training "
    "texts that have at most so many tokens; 0 is alike",
    "distinct_1": "different words over all words, in all samples together",
    "distinct_2": "different pairs of words over all pairs of words, in all samples together",
    "distinct_3": "different runs of three words over all of them, in all samples together",
    "overlap_rate": f"share of samples that hold {OVERLAP_WORDS} words in a row of a training text",
    "longest_overlap": "words in the longest run that a sample shares with a training text: the longest of all samples",
    "mean_overlap": "the same, mean over the samples",
    "copy_rate": f"share of samples that are copies: {COPY}",
    "style_rate": style.DEFINITION,
}


@dataclass(frozen=True)
class Written:
    """A sample as a reader sees it: its text, its length in tokens without EOS, whether EOS ended it."""

    text: str
    tokens: int
    stopped: bool
    formatted: bool


def figures(
    samples: Sequence[Written], memory: Memory, lengths: Sequence[int], judge: StyleJudge | None
) -> dict[str, float | Rate | Interval]:
    """The sampled metrics of METRICS by name. `lengths` are the training texts', in tokens; without any, what is held
    against training texts is left out."""
    n = len(samples)
    words = [normalised(sample.text).split() for sample in samples]
    overlaps = [memory.longest(of_sample) for of_sample in words]
    found: dict[str, float | Rate | Interval] = {
        "eos_rate": Rate.of(sum(s.stopped for s in samples), n),
        "format_rate": Rate.of(sum(s.formatted for s in samples), n),
        "mean_tokens": round(sum(s.tokens for s in samples) / n, 2),
        **({"length_distance": distance([s.tokens for s in samples], lengths)} if lengths else {}),
        **distinct(words),
    }
    if lengths:
        found |= {
            "overlap_rate": Rate.of(sum(run >= OVERLAP_WORDS for run in overlaps), n),
            "longest_overlap": max(overlaps),
            "mean_overlap": round(sum(overlaps) / n, 2),
        }
    if lengths or memory.learned:
        found["copy_rate"] = Rate.of(sum(map(memory.copied, words)), n)
    return found | ({} if judge is None else {"style_rate": judge.rate([s.text for s in samples])})


def distinct(words: Iterable[Sequence[str]]) -> dict[str, float]:
    """distinct_1 to distinct_3 of texts given as words (Li et al. 2016). More texts give lower ones."""
    texts = list(words)
    found = {}
    for size in (1, 2, 3):
        runs = [run for text in texts for run in zip(*(itertools.islice(text, i, None) for i in range(size)))]  # noqa: B905
        found[f"distinct_{size}"] = round(len(set(runs)) / max(1, len(runs)), 4)
    return found


def distance(a: Sequence[int], b: Sequence[int]) -> float:
    """The two-sample Kolmogorov-Smirnov statistic."""
    from scipy.stats import ks_2samp  # imported late

    found: float = ks_2samp(a, b, method="asymp").statistic  # type: ignore[attr-defined]
    return round(float(found), 4)


def quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """The quantiles of QUANTILES, in per cent."""
    return {
        f"p{q}": round(float(value), 1) for q, value in zip(QUANTILES, np.percentile(lengths, QUANTILES), strict=True)
    }


def value_of(figure: float | Rate | Interval) -> float:
    """The plain number."""
    return figure if isinstance(figure, float | int) else figure.value


def reference(texts: Sequence[str], memory: Memory | None) -> Mapping[str, float]:
    """The same figures of real texts, as a measure of the samples'; `memory` None: the texts are in it themselves."""
    words = [normalised(text).split() for text in texts]
    found: dict[str, float] = {"n": len(texts), **distinct(words)}
    if memory is not None:
        runs = [memory.longest(of_text) for of_text in words]
        found |= {
            "overlap_rate": round(sum(run >= OVERLAP_WORDS for run in runs) / len(runs), 4),
            "longest_overlap": max(runs),
            "mean_overlap": round(sum(runs) / len(runs), 2),
            "copy_rate": round(sum(map(memory.copied, words)) / len(words), 4),
        }
    return {name: value for name, value in found.items() if math.isfinite(value)}
