"""`python -m training choir`: one adapter for each author or tag, several at a time on one frozen base.

A voice of a choir is the adapter that `python -m training --author NAME` makes; it can be taken up again, served and
judged alone. One that fails leaves the others as they are.
"""

import argparse
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from training.cli import add_flags, settings
from training.config import NAME_PATTERN, TrainConfig
from training.errors import ConfigError, DataError, GateFailed, TrainingError

TOGETHER = 8
NAMELESS = "voice"  # the name of a group whose own has no Latin letter
GROUPINGS = {"author": "authors", "tag": "tags"}  # --by -> the field that chooses a group's rows


@dataclass
class Outcome:
    """What became of the voices, by name."""

    published: list[str] = field(default_factory=list)
    there_before: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)  # name -> which figure failed its gate
    failed: dict[str, str] = field(default_factory=dict)  # name -> why

    def check(self) -> None:
        """Raises GateFailed or TrainingError if a voice failed or didn't pass its gate."""
        missing = self.rejected | self.failed
        if missing:
            kind = TrainingError if self.failed else GateFailed
            listed = "".join(f"\n  {name}: {why}" for name, why in missing.items())
            raise kind(f"{len(missing)} of {self.total()} voices did not pass:{listed}")

    def total(self) -> int:
        return len(self.published) + len(self.there_before) + len(self.rejected) + len(self.failed)


def main(argv: Sequence[str]) -> None:
    """Train the choir that the command line asks for. Raises TrainingError."""
    arguments: dict[str, Any] = vars(_parser().parse_args(argv))
    by, minimum, limit, together = (arguments.pop(name) for name in ("by", "min_quotes", "voices", "together"))
    for flag, value in (("--min-quotes", minimum), ("--limit", limit), ("--together", together)):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}: give at least 1")
    values = settings(arguments)
    chosen = GROUPINGS[by]
    if values.get(chosen):
        raise ConfigError(f"--{by} chooses rows of one voice, --by {by} makes a voice of each: give one of them")
    values["name"] = "choir"
    config = TrainConfig(**values)
    from training.choir_run import run_choir  # torch takes seconds

    run_choir(config, by, minimum, limit, together).check()


def groups(config: TrainConfig, by: str, rows: Mapping[str, Sequence[Any]], minimum: int) -> list[tuple[str, int]]:
    """The values of the column with at least `minimum` rows that aren't held out, and their numbers, most first.

    `rows`: split -> RawRow. Raises DataError if there is none.
    """
    from training.data import tags_of

    field = "author" if by == "author" else "tags"
    column = config.columns.get(field, field)
    counted: Counter[str] = Counter()
    for split, raw in rows.items():
        for row in raw if split != "heldout_authors" else ():
            value = row.values.get(column)
            counted.update(tags_of(value) if by == "tag" else {str(value).strip()} if value else ())
    counted.pop("", None)
    found = sorted(((name, n) for name, n in counted.items() if n >= minimum), key=lambda item: (-item[1], item[0]))
    if not found:
        most = ", ".join(f"{name!r} ({n})" for name, n in counted.most_common(3))
        raise DataError(
            f"--data {config.data}: no {by} in column {column!r} has --min-quotes {minimum} rows"
            + (f"; the most have {most}" if most else f"; is {column!r} its name? --column {field}=COLUMN says another")
        )
    return found


def configs(config: TrainConfig, by: str, values: Sequence[str]) -> dict[str, TrainConfig]:
    """Name -> configuration of each group's voice. Groups that would have one name are told apart by a number."""
    named: dict[str, TrainConfig] = {}
    for value in values:
        stem = slug(value)
        name, number = stem, 2
        while name in named:
            name, number = f"{stem[:60]}-{number}", number + 1
        chosen: dict[str, Any] = {GROUPINGS[by]: (value,)}
        named[name] = replace(config, name=name, **chosen)
    return named


def slug(value: str) -> str:
    """An adapter's name for a group: `Oscar Wilde` -> `oscar-wilde`."""
    plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:64].rstrip("-")
    return name if NAME_PATTERN.fullmatch(name) else NAMELESS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training choir",
        description="Train one adapter for each author or tag, several at a time on one frozen base.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--by", choices=GROUPINGS, default="author", help="what makes a voice (default: %(default)s); "
                        "another column: --column author=COLUMN")  # fmt: skip
    parser.add_argument("--min-quotes", type=int, default=40, metavar="N",
                        help="only groups with at least N rows (default: %(default)s)")  # fmt: skip
    parser.add_argument("--limit", dest="voices", type=int, default=None, metavar="N",
                        help="at most N voices: those with the most rows")  # fmt: skip
    parser.add_argument("--together", type=int, default=TOGETHER, metavar="N",
                        help="voices in one pass; fewer need less memory (default: %(default)s)")  # fmt: skip
    add_flags(parser, leave_out=("limit", "ensure"))
    return parser
