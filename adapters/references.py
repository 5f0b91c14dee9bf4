"""How requests name adapters: `name`, `name@tag`, `name@digest-prefix`, and mixtures of them. Works without torch."""

import difflib
import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.adapter import LEAST_WEIGHT, MOST_WEIGHT, NAME_PATTERN

TAG_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
DIGEST_PREFIX = re.compile(r"[0-9a-f]{6,64}")
_COMPARED = 200  # comparing in full ten thousand names takes 0.15 s


@dataclass(frozen=True)
class Reference:
    """A name, and perhaps which of its versions."""

    name: str
    at: str | None = None  # a tag, or the beginning of a digest

    def __str__(self) -> str:
        return self.name if self.at is None else f"{self.name}@{self.at}"


def parse_reference(text: str) -> Reference:
    """`name`, `name@tag` or `name@digest-prefix`. Raises ValueError that says which part is wrong."""
    name, at, tag = text.partition("@")
    if not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"{text!r}: {name!r} is no adapter name (expected {NAME_PATTERN.pattern})")
    if at and not TAG_PATTERN.fullmatch(tag) and not DIGEST_PREFIX.fullmatch(tag):
        raise ValueError(f"{text!r}: {tag!r} after the @ is neither a tag nor 6 to 64 digits of a digest")
    return Reference(name, tag if at else None)


def parse_composition(text: str) -> list[tuple[str, float]]:
    """`ref:weight,ref:weight`; a weight left out is 1. Raises ValueError that names the part that is wrong."""
    parts: list[tuple[str, float]] = []
    for part in text.split(","):
        reference, colon, number = part.strip().partition(":")
        parts.append((str(parse_reference(reference)), parse_weight(number, part) if colon else 1.0))
    return parts


def parse_weight(value: str | float, where: str) -> float:
    """A weight that a composition takes. Raises ValueError."""
    try:
        weight = float(value)
    except (ValueError, OverflowError):
        weight = math.nan
    if not LEAST_WEIGHT <= abs(weight) <= MOST_WEIGHT:
        raise ValueError(
            f"{where!r}: the weight is {value!r}; expected a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g} "
            "or the negative of one"
        )
    return weight


def is_tag(text: str) -> bool:
    """Whether `text` may be an alias's tag: no digest could begin like it."""
    return TAG_PATTERN.fullmatch(text) is not None and DIGEST_PREFIX.fullmatch(text) is None


def nearest(asked: str, names: Sequence[str]) -> list[str]:
    """The three names most like `asked`, case aside; any three if none is."""
    letters = _pairs(asked.casefold())
    likely = heapq.nlargest(_COMPARED, names, key=lambda name: len(letters & _pairs(name.casefold())))
    folded = [name.casefold() for name in likely]
    close = difflib.get_close_matches(asked.casefold(), folded, n=3, cutoff=0.4)
    return [name for c in close for name, f in zip(likely, folded, strict=True) if f == c][:3] or list(names[:3])


def _pairs(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text))}
