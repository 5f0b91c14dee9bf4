"""Figures with their uncertainty: Wilson's interval of a share, the bootstrap's of a perplexity, Student's of a ratio.

It knows no models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
_CELLS = 4_000_000  # drawn at once


@dataclass(frozen=True)
class Rate:
    """A share with Wilson's 95 % interval: `hits` of `n`."""

    value: float
    low: float
    high: float
    hits: int
    n: int

    @classmethod
    def of(cls, hits: int, n: int) -> "Rate":
        """`hits` of `n`, n above 0."""
        z, share = 1.959964, hits / n
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        low, high = max(0.0, centre - half), min(1.0, centre + half)
        return cls(round(share, 4), round(low, 4), round(high, 4), hits, n)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Perplexities:
    """Base and adapter on the same examples; `ratio` is adapter / base, its interval paired: below 1 is better.

    One example has a ratio, but nothing that would say how sure it is: None.
    """

    base: Interval
    adapter: Interval
    ratio: Interval | None
    examples: int
    tokens: int


def perplexities(
    base: Sequence[tuple[float, int]], adapter: Sequence[tuple[float, int]], seed: int
) -> Perplexities:  # fmt: skip
    """From each example's summed loss in nats and its number of tokens, the same examples in both.

    The perplexities' intervals are the percentile bootstrap's over RESAMPLES draws of whole examples, every token
    weighing the same: tokens of one text are not independent of each other, texts are taken to be. The bootstrap of a
    handful is too sure of itself, and a gate judges by the ratio: its interval is Student's, of the linearised ratio
    of sums (Cochran, Sampling Techniques, 1977, section 6.3).
    """
    tokens = np.array([count for _, count in base], dtype=np.float64)  # [E]
    losses = np.array([[total for total, _ in base], [total for total, _ in adapter]])  # [2, E]
    drawn = np.concatenate(list(_resampled_means(losses, tokens, seed)), axis=1)  # [2, RESAMPLES]
    means = losses.sum(1) / tokens.sum()  # [2]
    return Perplexities(
        _interval(means[0], drawn[0]),
        _interval(means[1], drawn[1]),
        _ratio(losses[1] - losses[0], tokens),
        len(base),
        int(tokens.sum()),
    )


def _resampled_means(losses: np.ndarray, tokens: np.ndarray, seed: int):
    rng, examples, left = np.random.default_rng(seed), len(tokens), RESAMPLES
    while left:
        draws = min(left, max(1, _CELLS // examples))
        chosen = rng.integers(0, examples, (draws, examples))
        yield losses[:, chosen].sum(2) / tokens[chosen].sum(1)  # [2, draws]
        left -= draws


def _ratio(differences: np.ndarray, tokens: np.ndarray) -> Interval | None:
    """exp(sum of differences / sum of tokens)."""
    from scipy.stats import t  # imported late: it takes half a second

    examples = len(tokens)
    if examples < 2:
        return None
    mean = differences.sum() / tokens.sum()
    spread = math.sqrt(((differences - mean * tokens) ** 2).sum() / (examples - 1) / examples) / tokens.mean()
    half = float(t.ppf(0.975, examples - 1)) * spread
    return Interval(*(round(_exp(float(x)), 4) for x in (mean, mean - half, mean + half)))


def _interval(log_value: float, log_drawn: np.ndarray) -> Interval:
    low, high = np.quantile(log_drawn, (0.025, 0.975))
    return Interval(*(round(_exp(float(x)), 3) for x in (log_value, low, high)))


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))  # a broken adapter's perplexity is still a number that JSON can hold
