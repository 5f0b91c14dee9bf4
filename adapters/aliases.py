"""What an alias leads to: one adapter, or several by weight. Works without torch."""

import hashlib
import random
from collections.abc import Sequence

from adapters.errors import AdapterConflict
from adapters.references import Reference, is_tag, parse_reference, parse_weight
from adapters.registry import Kind, Registry, targets_in

MAX_TARGETS = 16
MAX_WEIGHT = 100.0


def check_alias(name: str) -> Reference:
    """An alias's name, `name` or `adapter@tag`. Raises ValueError that says which part is wrong."""
    alias = parse_reference(name)
    if alias.at is not None and not is_tag(alias.at):
        raise ValueError(f"{name!r}: a tag of hex digits alone could be a digest's beginning; choose another")
    return alias


def check_targets(alias: Reference, wanted: Sequence[tuple[str, float]]) -> list[tuple[Reference, float]]:
    """The targets of a new alias. Raises ValueError that says which is wrong."""
    if not 1 <= len(wanted) <= MAX_TARGETS:
        raise ValueError(f"{len(wanted)} targets; expected 1 to {MAX_TARGETS}")
    targets: list[tuple[Reference, float]] = []
    for text, weight in wanted:
        target = parse_reference(text)
        if not 0 < parse_weight(weight, text) <= MAX_WEIGHT:
            raise ValueError(f"{text!r}: the weight is {weight!r}; expected a number above 0, at most {MAX_WEIGHT:g}")
        if alias.at is not None and target.name != alias.name:
            raise ValueError(f"{text!r}: {str(alias)!r} can only stand for versions of {alias.name!r}")
        if alias.at is None and target.name == alias.name:
            raise ValueError(f"{text!r}: an alias can't have its own name as target")
        targets.append((target, float(weight)))
    return targets


def check_leads(value: str, registry: Registry) -> None:
    """Raises AdapterConflict for an alias's value one of whose targets is no adapter any more."""
    for text, _ in targets_in(value):
        target = parse_reference(text)
        entry = registry.entries.get(target.name)
        if entry is None or entry.value is None or entry.kind is not Kind.ADAPTER:
            what = "was removed" if entry is None or entry.value is None else "is an alias now"
            raise AdapterConflict(f"{target.name!r} {what}, so {text!r} can't be a target: set the alias anew")
        if target.at is not None and target.at not in registry.versions:
            raise AdapterConflict(f"that version was deleted, so {text!r} can't be a target: set the alias anew")


def choose(alias: str, targets: Sequence[tuple[str, float]], key: str | None) -> str:
    """One target, as often as its weight says; for the same alias, targets and key always the same."""
    if key is None:
        point = random.random()
    else:
        point = int.from_bytes(hashlib.sha256(f"{alias}\0{key}".encode(errors="replace")).digest()[:8]) / 2**64
    point *= sum(weight for _, weight in targets)
    for reference, weight in targets:
        point -= weight
        if point < 0:
            return reference
    return targets[-1][0]
