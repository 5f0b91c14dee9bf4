"""How requests name adapters: `name`, `name@tag`, `name@digest-prefix`, and mixtures of them. Works without torch."""

import math
import re
from dataclasses import dataclass

from adapters.adapter import NAME_PATTERN

TAG_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
DIGEST_PREFIX = re.compile(r"[0-9a-f]{6,64}")
MAX_COMPOSED = 8
MAX_WEIGHT = 100.0


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
    return check_composition(parts)


def check_composition(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The parts as they are. Raises ValueError when there are none or too many."""
    if not 1 <= len(parts) <= MAX_COMPOSED:
        raise ValueError(f"{len(parts)} adapters; expected 1 to {MAX_COMPOSED}")
    return parts


def parse_weight(value: str | float, where: str) -> float:
    """A finite weight that is not zero. Raises ValueError."""
    try:
        weight = float(value)
    except (ValueError, OverflowError):
        weight = math.nan
    if not (0 < abs(weight) <= MAX_WEIGHT):
        raise ValueError(f"{where!r}: the weight is {value!r}; expected a number between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}, not 0")
    return weight


def is_tag(text: str) -> bool:
    """Whether `text` may be an alias's tag: no digest could begin like it."""
    return TAG_PATTERN.fullmatch(text) is not None and DIGEST_PREFIX.fullmatch(text) is None
