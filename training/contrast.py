"""Other voices' texts, from which a voice's style is told apart. Gathered with the data; knows nothing of classifiers.

They are what the template lets an adapter write, without the prompt: an author's name is never part of them.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.config import QUOTES, TrainConfig, flag_of, stable_path
from training.errors import DataError
from training.seen import HELD_OUT_SHARE, set_aside
from training.sources import read_source
from training.template import Template, fill
from training.texts import normalised, plain

_HELD_OUT = ("valid", "test")
_TEXT_COLUMNS = ("quote", "text")  # of a source that lacks the template's own


@dataclass
class Contrast:
    """Texts of others. `reason` says why there are none."""

    source: str = ""
    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    reason: str | None = None


def written(template: Template, values: Mapping[str, str]) -> str:
    """What an adapter is to write for a row: the template after its prompt."""
    return fill(template.text[len(template.prompt) :], values)


def gather(config: TrainConfig, left_out: Mapping[str, list[str]], own: Iterable[str]) -> Contrast:
    """The contrast of a run: `config.contrast`, or what its filters left out (split -> texts), or the shipped quotes.

    `own` are the normalised texts of the voice itself, which are no contrast to it. Raises DataError.
    """
    if config.contrast is not None:
        return _split(config.contrast, _read(config, config.contrast, "contrast"), own, config)
    if any(left_out.values()):
        flags = " and ".join(flag_of(name) for name in ("authors", "tags") if getattr(config, name))
        return _split(f"the rows of {stable_path(config.data)} that {flags} left out", left_out, own, config)
    if stable_path(config.data) == stable_path(str(QUOTES)):
        reason = "it was trained on all of its data's voices: there is no other to tell it apart from"
        return Contrast(reason=f"{reason}; --contrast names one")
    return _split(stable_path(str(QUOTES)), _read(config, str(QUOTES), "data"), own, config)


def _read(config: TrainConfig, source: str, flag: str) -> dict[str, list[str]]:
    try:
        raw = read_source(source)
    except DataError as error:
        raise DataError(str(error).replace("--data", flag_of(flag), 1)) from None
    template = config.parsed_template()
    found = {str(key) for rows in raw.values() for row in rows for key in row.values}
    columns = {name: config.columns.get(name, name) for name in template.completion_fields}
    instead = next((name for name in _TEXT_COLUMNS if name in found), None)
    if not set(columns.values()) <= found and instead is None:
        raise DataError(
            f"{flag_of(flag)} {source}: it has neither the column {', '.join(map(repr, columns.values()))} nor one of "
            f"{', '.join(map(repr, _TEXT_COLUMNS))}; it has {', '.join(map(repr, sorted(found)))}"
        )
    whole = set(columns.values()) <= found
    texts: dict[str, list[str]] = {}
    for split, rows in raw.items():
        for row in rows:
            text = completion(config, template, row.values, columns) if whole else plain(row.values.get(str(instead)))
            if text:
                texts.setdefault(split, []).append(text)
    return texts


def completion(
    config: TrainConfig, template: Template, values: Mapping[str, Any], columns: Mapping[str, str]
) -> str | None:  # fmt: skip
    """The text of a row as the adapter would have to write it; None if it can't be one."""
    own = {name: plain(values.get(columns[name])) for name in template.completion_fields}
    if not all(own.values()) or len(" ".join(own.values())) > config.max_chars:
        return None
    return written(template, own)


def _split(
    source: str, texts: Mapping[str, Sequence[str]], own: Iterable[str], config: TrainConfig
) -> Contrast:  # fmt: skip
    """Held-out texts are those of the source's own valid and test splits; without them, those that every run of it
    holds out."""
    seen = set(own)

    def fresh(splits: Iterable[str]) -> list[str]:
        found = []
        for text in (text for split in splits for text in texts.get(split, ())):
            key = normalised(text)
            if key and key not in seen:
                seen.add(key)
                found.append(text)
        return found

    held_out = fresh(_HELD_OUT)
    train = fresh(split for split in texts if split not in _HELD_OUT)
    random.Random(config.seed).shuffle(train)
    if not held_out:
        held_out = set_aside(train, normalised, 0.0, 2 * HELD_OUT_SHARE)
        aside = set(held_out)
        train = [text for text in train if text not in aside]
    return Contrast(source, train, held_out)
