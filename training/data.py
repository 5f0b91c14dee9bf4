"""From a data source to token ids: filters, checks, duplicates, splits. Runs before any weights are loaded.

Every row that can't be used is kept with its place and reason. A text that occurs twice is used once. A source that
comes in splits and has a text in two of them is refused: what is measured would have been trained on.
"""

import difflib
import random
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.base import Base
from training.config import TrainConfig, flag_of
from training.contrast import Contrast, completion, gather, written
from training.errors import DataError
from training.seen import HELD_OUT_SHARE, digest_of, learned_by, set_aside
from training.sources import RawRow, read_source
from training.template import Template, fill
from training.texts import normalised, plain

MAX_HELD_OUT = 500  # texts to validate, and to test on
DUPLICATE, LEAK, LEAKS_SHOWN = "duplicate", "in another split, too", 3
BEYOND = f"held out beyond the {MAX_HELD_OUT} that are measured"
_ORDER = ("heldout_authors", "test", "valid", "train", "all")


@dataclass(frozen=True)
class Example:
    """One usable row. token_ids ends with EOS; its first prompt_length ids are the prompt with its punctuation."""

    fields: dict[str, str]
    token_ids: list[int]
    prompt_length: int
    bare_length: int  # of the prompt without its closing punctuation: what is learned begins here
    key: str  # its main field, normalised: what it is known by under any template, and duplicates share


@dataclass(frozen=True)
class Skipped:
    """A row that was left out."""

    source: str
    line: int
    reason: str
    detail: str = ""


@dataclass
class Corpus:
    """What a run trains and measures on."""

    train: list[Example] = field(default_factory=list)
    valid: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    heldout_authors: list[Example] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    filtered: Counter[str] = field(default_factory=Counter)  # flag -> rows it left out
    others: dict[str, list[str]] = field(default_factory=dict)  # split -> what --author and --tag left out
    contrast: Contrast = field(default_factory=Contrast)  # what the style is told apart from
    learned: frozenset[bytes] = frozenset()  # digests of what was learned before: it is never measured on
    unsaid: list[str] = field(default_factory=list)  # folders of adapters whose reports don't say what they learned


def load_corpus(
    config: TrainConfig, base: Base, raw: Mapping[str, list[RawRow]] | None = None, of: Path | None = None
) -> Corpus:
    """Read, filter and encode the data. `raw`: its rows, where they have been read already; `of`: a finished adapter's
    folder, where it is to be measured. What that one, or the run's origin, has learned is never held out.

    Raises DataError if a column, an author or a tag isn't there, no row is usable, splits share a text, or --contrast
    can't be read.
    """
    raw = read_source(config.data, to_train=of is None) if raw is None else raw
    template = config.parsed_template()
    wanted = [*template.fields, *(["author"] if config.authors else []), *(["tags"] if config.tags else [])]
    columns = {name: config.columns.get(name, name) for name in wanted}
    _check_columns(config, columns, raw)
    for name, chosen, column in (("authors", config.authors, "author"), ("tags", config.tags, "tags")):
        if chosen:
            _check_chosen(config, name, chosen, columns[column], raw)
    before = {str(folder): learned_by(Path(folder)) for folder in (of, config.init_from) if folder is not None}
    corpus = Corpus(learned=frozenset().union(*(digests or () for digests in before.values())))
    corpus.unsaid = [folder for folder, digests in before.items() if digests is None]
    seen: dict[str, RawRow] = {}
    known_by = _main_field(template, columns, raw)
    splits: dict[str, list[Example]] = {}
    for split in _ORDER:
        # Filters choose what is learned; the authors held out are for prompts that it has never seen.
        filters = split != "heldout_authors"
        splits[split] = list(
            _examples(split, raw.get(split, ()), config, template, columns, base, corpus, seen, known_by, filters)
        )
    _check_leaks(config, corpus)
    _split(corpus, splits, config, to_train=of is None)
    own = [normalised(written(template, row.fields)) for rows in splits.values() for row in rows]
    corpus.contrast = gather(config, corpus.others, own)
    return corpus


def _examples(
    split: str, rows: Iterable[RawRow], config: TrainConfig, template: Template, columns: Mapping[str, str],
    base: Base, corpus: Corpus, seen: dict[str, RawRow], known_by: str, filters: bool,
) -> Iterable[Example]:  # fmt: skip
    bare = template.bare_prompt or template.prompt

    def left_out(flag: str, row: RawRow) -> None:
        corpus.filtered[flag] += 1
        text = completion(config, template, row.values, columns)
        if text:
            corpus.others.setdefault(split, []).append(text)

    for row in rows:

        def skip(reason: str, detail: str = "", row: RawRow = row) -> None:
            corpus.skipped.append(Skipped(row.source, row.line, reason, detail))

        if row.problem:
            skip("unreadable row", row.problem)
            continue
        if filters and config.authors and str(row.values.get(columns["author"])).strip() not in config.authors:
            left_out("--author", row)
            continue
        if filters and config.tags and not set(config.tags) & tags_of(row.values.get(columns["tags"])):
            left_out("--tag", row)
            continue
        values = {name: plain(row.values.get(columns[name])) for name in template.fields}
        missing = [columns[name] for name, value in values.items() if not value]
        if missing:
            skip("missing field", f"{', '.join(missing)} is missing or empty")
            continue
        if not _encodable(values.values()):
            skip("not valid Unicode", "it holds half of a surrogate pair")
            continue
        if len(" ".join(values[name] for name in template.completion_fields)) > config.max_chars:
            corpus.filtered["--max-chars"] += 1
            continue
        key = normalised(values[known_by])
        if not key:
            skip("without a letter or digit", f"{columns[known_by]} is {values[known_by][:20]!r}")
            continue
        if key in seen:
            first = seen[key]
            skip(DUPLICATE if first.source == row.source else LEAK, f"the same text as {first.source}:{first.line}")
            continue
        ids = [*base.encode(template.render(values)), base.eos]
        if base.eos in ids[:-1]:
            skip("holds the token that ends a text", "take it out of the row")
            continue
        if len(ids) > base.context:
            skip("longer than the context", f"{len(ids)} tokens; the base takes {base.context}")
            continue
        seen[key] = row
        prompt_length, bare_length = (_common(ids, base.encode(fill(p, values))) for p in (template.prompt, bare))
        yield Example(values, ids, prompt_length, bare_length, key)


def _main_field(template: Template, columns: Mapping[str, str], raw: Mapping[str, list[RawRow]]) -> str:
    """The template's field with the most different text in the source: the quote, not who said it."""
    rows = [row.values for of_split in raw.values() for row in of_split]

    def different(name: str) -> int:
        return sum(map(len, {plain(values.get(columns[name])) for values in rows}))

    return max(template.fields, key=different)


def _split(corpus: Corpus, splits: Mapping[str, list[Example]], config: TrainConfig, to_train: bool) -> None:
    """Fill the corpus's splits; of a source without one, or whose filters emptied it, texts are held out by `place`."""
    usable = sum(len(splits[name]) for name in ("train", "all", "valid", "test"))
    if usable == 0:
        raise DataError(_no_rows(config, corpus))
    if usable < 3 and to_train:
        raise DataError(f"--data {config.data}: {usable} usable rows; give at least 3, to train, validate and test on")
    train = [*splits["train"], *splits["all"]]
    if not train and to_train:
        raise DataError(f"--data {config.data}: {usable} usable rows to measure on, and none to train on")
    held_out = {name: _unlearned(corpus, splits[name]) for name in ("test", "valid", "heldout_authors")}
    for name, low in (("test", 0.0), ("valid", HELD_OUT_SHARE)):
        if not held_out[name]:
            held_out[name], train = _set_aside(corpus, train, low)
        if not held_out[name] and (to_train or name == "test"):
            verb = {"test": "test", "valid": "validate"}[name]
            before = ", which the adapter hasn't learned," if corpus.learned else ""
            raise DataError(f"--data {config.data}: too few rows to {verb} on some{before} of {usable}; give more")
    corpus.test, corpus.valid, corpus.heldout_authors = held_out["test"], held_out["valid"], held_out["heldout_authors"]
    random.Random(config.seed).shuffle(train)
    if config.limit is not None:
        corpus.filtered["--limit"] += max(0, len(train) - config.limit)
        train = train[: config.limit]
    corpus.train = train


def _unlearned(corpus: Corpus, rows: Sequence[Example]) -> list[Example]:
    left = [row for row in rows if digest_of(row.key) not in corpus.learned]
    if len(left) < len(rows):
        corpus.filtered["held out here, learned before"] += len(rows) - len(left)
    return left


def _set_aside(corpus: Corpus, rows: Sequence[Example], low: float) -> tuple[list[Example], list[Example]]:
    """Rows to measure on, and those that are left to train on."""
    chosen = set_aside(rows, lambda row: row.key, low, learned=corpus.learned)
    if len(chosen) > MAX_HELD_OUT:
        corpus.filtered[BEYOND] += len(chosen) - MAX_HELD_OUT
    keys = {row.key for row in chosen}
    return chosen[:MAX_HELD_OUT], [row for row in rows if row.key not in keys]


def _common(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens of `ids` are the prompt's: its last may have merged with what follows."""
    return next((i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), len(prompt))


def _check_columns(config: TrainConfig, columns: Mapping[str, str], raw: Mapping[str, list[RawRow]]) -> None:
    found = sorted({str(key) for rows in raw.values() for row in rows for key in row.values})
    if not found:
        problems = [row for rows in raw.values() for row in rows]
        first = f"; {problems[0].source} line {problems[0].line}: {problems[0].problem}" if problems else ""
        raise DataError(f"--data {config.data}: no usable row{first}")
    missing = {name: column for name, column in columns.items() if column not in found}
    if missing:
        free = [name for name in found if name not in columns.values()]
        near = {name: difflib.get_close_matches(column, free, n=1) for name, column in missing.items()}
        hints = (shlex.quote(f"{name}={of[0]}") if of else f"{name}=COLUMN" for name, of in near.items())
        raise DataError(
            f"--data {config.data}: no column {', '.join(repr(c) for c in missing.values())}; it has "
            f"{', '.join(map(repr, found))}. Say which it is: {' '.join(f'--column {hint}' for hint in hints)}"
        )


def _check_chosen(
    config: TrainConfig, name: str, wanted: Sequence[str], column: str, raw: Mapping[str, list[RawRow]]
) -> None:
    """Raises DataError, with the nearest that there are, if no row that may be trained on is of a `wanted` one."""
    rows = [row for split, rows in raw.items() if split != "heldout_authors" for row in rows]
    of_row = tags_of if name == "tags" else lambda value: {plain(value)}
    counted = Counter(value for row in rows for value in of_row(row.values.get(column)) if value)
    for one in wanted:
        if one not in counted:
            by_fold = {value.casefold(): value for value in counted}
            near = [by_fold[n] for n in difflib.get_close_matches(one.casefold(), by_fold, n=3, cutoff=0.5)]
            near = near or [value for value, _ in counted.most_common(3)]
            whose = "has this tag" if name == "tags" else "is by this author"
            listed = ", ".join(f"{value!r} ({counted[value]} rows)" for value in near) or "there is none at all"
            raise DataError(f"{flag_of(name)} {one!r}: no row of {config.data} {whose}; nearest: {listed}")


def _check_leaks(config: TrainConfig, corpus: Corpus) -> None:
    leaks = [row for row in corpus.skipped if row.reason == LEAK]
    if leaks:
        shown = "; ".join(f"{row.source}:{row.line} is {row.detail}" for row in leaks[:LEAKS_SHOWN])
        more = f"; and {len(leaks) - LEAKS_SHOWN} more" if len(leaks) > LEAKS_SHOWN else ""
        raise DataError(
            f"--data {config.data}: its splits leak, {len(leaks)} of their texts are in two of them ({shown}{more}). "
            "Remove each from one of them, or give one file with all rows: it is split without leaks"
        )


def _no_rows(config: TrainConfig, corpus: Corpus) -> str:
    reasons = Counter(skipped.reason for skipped in corpus.skipped) + corpus.filtered
    listed = ", ".join(f"{n} by {r}" if r.startswith("--") else f"{n} {r}" for r, n in reasons.most_common())
    first = next((f"; first: {s.source} line {s.line}: {s.detail or s.reason}" for s in corpus.skipped), "")
    return f"--data {config.data}: no usable row (left out: {listed or 'the source is empty'}){first}"


def _encodable(values: Iterable[str]) -> bool:
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def tags_of(value: Any) -> set[str]:
    """The tags that a row's column holds: a list, or text with commas between."""
    if isinstance(value, str):
        value = value.split(",")
    return {str(tag).strip() for tag in value} if isinstance(value, list | tuple) else set()
