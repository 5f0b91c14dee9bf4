"""Whether an adapter is good enough to be published. The figures are judged as they are measured; nothing is trained.

It knows neither torch nor scikit-learn, so that a gate's flags are checked before anything is loaded.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError

if TYPE_CHECKING:
    from training.evaluate import Evaluation


@dataclass(frozen=True)
class Limit:
    """What a figure has to be: `at least`, `at most` or `below` a number, and whether that is a share."""

    word: str
    share: bool
    meaning: str


LIMITS = {
    "eos_rate": Limit("at least", True, "of the worse prompt form"),
    "format_rate": Limit("at least", True, "of the worse prompt form"),
    "perplexity_ratio": Limit("below", False, "adapter / base: the upper end of its 95 % interval"),
    "copy_rate": Limit("at most", True, "of the worse prompt form"),
    "perplexity": Limit("at most", False, "the adapter's"),
    "overlap_rate": Limit("at most", True, "of the worse prompt form"),
    "longest_overlap": Limit("at most", False, "words, of the worse prompt form"),
    "length_distance": Limit("at most", True, "of the worse prompt form"),
    "distinct_1": Limit("at least", True, "of the worse prompt form"),
    "distinct_2": Limit("at least", True, "of the worse prompt form"),
    "distinct_3": Limit("at least", True, "of the worse prompt form"),
    "style_rate": Limit("at least", True, "of the worse prompt form"),
    "style_gain": Limit("at least", False, "style_rate, adapter minus base, of the worse prompt form"),
}
DEFAULT = {"eos_rate": 0.9, "format_rate": 0.85, "perplexity_ratio": 1.0, "copy_rate": 0.05}
PROMPTS = "test"  # the set whose figures are judged: prompts of the kind that the adapter was made for


@dataclass(frozen=True)
class Check:
    """One figure of a gate. `found` is None where it can't be measured, which doesn't pass."""

    figure: str
    required: str  # such as "at least 0.9"
    found: float | None
    passed: bool

    def __str__(self) -> str:
        found = "can't be measured on this data" if self.found is None else f"is {self.found:g}"
        return f"{self.figure} {found} and has to be {self.required}"


@dataclass(frozen=True)
class Verdict:
    """What a gate says of an adapter; no checks where none was asked for."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    def recorded(self) -> dict[str, Any]:
        """As report.json has it."""
        checks = [{k: getattr(c, k) for k in ("figure", "required", "found", "passed")} for c in self.checks]
        return {"passed": self.passed, "prompts": PROMPTS, "checks": checks}


def check_gate(overrides: Mapping[str, float]) -> None:
    """Raises ConfigError if a figure is unknown, or its number can't be one of it."""
    for figure, number in overrides.items():
        if figure not in LIMITS:
            near = difflib.get_close_matches(figure, LIMITS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LIMITS)}"
            raise ConfigError(f"--gate {figure}: there is no such figure; {hint}")
        share = LIMITS[figure].share
        if not math.isfinite(number) or (share and not 0 <= number <= 1):
            raise ConfigError(f"--gate {figure}={number:g}: give a number{' from 0 to 1' if share else ''}")


def judge(overrides: Mapping[str, float] | None, evaluation: "Evaluation") -> Verdict:
    """Judge an adapter by the default gate with `overrides`; None: no gate at all."""
    if overrides is None:
        return Verdict(())
    return Verdict(tuple(_check(name, limit, evaluation) for name, limit in (DEFAULT | dict(overrides)).items()))


def _check(figure: str, limit: float, evaluation: "Evaluation") -> Check:
    word = LIMITS[figure].word
    worse = min if word == "at least" else max
    values = _found(figure, evaluation)
    found = worse(values) if values else None
    holds: Callable[[float], bool] = {
        "at least": lambda x: x >= limit, "at most": lambda x: x <= limit, "below": lambda x: x < limit,
    }[word]  # fmt: skip
    return Check(figure, f"{word} {limit:g}", found, found is not None and holds(found))


def _found(figure: str, evaluation: "Evaluation") -> list[float]:
    """The figure of each prompt form; of what is not sampled, one."""
    if figure == "perplexity_ratio":
        own = evaluation.perplexities.get(PROMPTS)
        return [own.ratio.high] if own is not None and own.ratio is not None else []
    metric = "style_rate" if figure == "style_gain" else figure
    rows = [row for row in evaluation.rows if row.metric == metric and row.prompts == PROMPTS]
    pairs = [(_value(row.base), _value(row.adapter)) for row in rows]
    return [round(adapter - base, 4) if figure == "style_gain" else adapter for base, adapter in pairs]


def _value(figure: Any) -> float:
    return figure if isinstance(figure, float | int) else figure.value
