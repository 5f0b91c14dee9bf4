"""The configuration of one training run, and the command line that builds it."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from training.errors import ConfigError
from training.template import Template

ROOT = Path(__file__).resolve().parents[1]
DEMO_BASE = ROOT / "models" / "demo"
QUOTES = ROOT / "training" / "corpora" / "quotes"
TARGETS = ("c_attn", "c_proj", "c_fc", "attn.c_proj", "mlp.c_proj")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class TrainConfig:
    """One run. Building it checks every value; ConfigError names the flag, its value and the way out."""

    name: str
    data: str = str(QUOTES)  # a file, a folder of splits, or a hub data set id
    columns: dict[str, str] = field(default_factory=dict)  # template field -> column, where they differ
    authors: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    template: str = 'Quote by {author}: "{quote}"'
    prompt: str | None = None  # where the template's prompt ends; None: before its last field
    max_chars: int = 200  # of the text to be written; 200 characters are about 50 tokens
    limit: int | None = None  # training rows
    model: str = str(DEMO_BASE)  # a directory or a hub id
    output: str = "runs/adapters"  # the parent; the adapter is output/name
    epochs: float = 2.0
    seed: int = 0
    rank: int = 8
    alpha: int | None = None  # None: twice the rank
    lr: float = 2e-3
    batch_size: int = 16
    targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")
    dropout: float = 0.05
    eval_samples: int = 200  # per prompt form
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ConfigError(
                f"--name {self.name!r}: use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
            )
        _at_least("--rank", self.rank, 1)
        _at_most("--rank", self.rank, 512)
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--eval-samples", self.eval_samples, 1)
        _at_least("--max-chars", self.max_chars, 1)
        _at_least("--seed", self.seed, 0)
        if self.limit is not None:
            _at_least("--limit", self.limit, 1)
        if self.alpha is not None:
            _at_least("--alpha", self.alpha, 1)
        for flag, value in (("--epochs", self.epochs), ("--lr", self.lr)):
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{flag} is {value}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout is {self.dropout}: give a number from 0 up to, not including, 1")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"--targets {','.join(self.targets)!r}: choose some of {', '.join(TARGETS)}")
        if self.resume and self.overwrite:
            raise ConfigError("--resume goes on with a run and --overwrite starts anew: give one of them")
        self.parsed_template()

    def parsed_template(self) -> Template:
        """The template, split into prompt and completion."""
        return Template.parse(self.template, self.prompt)

    @property
    def lora_alpha(self) -> int:
        """LoRA's alpha; the update is scaled by alpha / rank."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def folder(self) -> Path:
        """Where the finished adapter will be."""
        return Path(self.output) / self.name

    @property
    def partial(self) -> Path:
        """Where the run keeps checkpoints and unfinished files: hidden, on the file system of `folder`."""
        return Path(self.output) / f".{self.name}.partial"

    def recorded(self) -> dict[str, Any]:
        """What decides the result, as plain JSON; paths inside the project are relative to it."""
        values = asdict(self)
        for ignored in ("resume", "overwrite", "output"):
            del values[ignored]
        values["alpha"] = self.lora_alpha
        return values | {"data": stable_path(self.data), "model": stable_path(self.model)}


def stable_path(name: str) -> str:
    """`name` as it is written into adapters: relative to the project if it lies in it, otherwise as given."""
    path = Path(name)
    if path.exists() and path.resolve().is_relative_to(ROOT):
        return path.resolve().relative_to(ROOT).as_posix()
    return name


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """Build the configuration from the command line. Raises ConfigError; argparse exits on unknown flags."""
    values = vars(_parser().parse_args(argv))
    values["columns"] = dict(_column(pair) for pair in values["columns"])
    values["targets"] = tuple(target for target in values["targets"].split(",") if target)
    values["authors"], values["tags"] = tuple(values["authors"]), tuple(values["tags"])
    return TrainConfig(**values)


def _column(pair: str) -> tuple[str, str]:
    name, equals, column = pair.partition("=")
    if not (equals and name.isidentifier() and column):
        raise ConfigError(f"--column {pair!r}: write FIELD=COLUMN, for example --column quote=text")
    return name, column


def _at_least(flag: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{flag} is {value}: give at least {minimum}")


def _at_most(flag: str, value: int, maximum: int) -> None:
    if value > maximum:
        raise ConfigError(f"{flag} is {value}: give at most {maximum}")


def _parser() -> argparse.ArgumentParser:
    default = {f.name: f.default for f in fields(TrainConfig)}
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train one LoRA adapter on a frozen GPT-2 and measure it beside the base.",
    )
    add = parser.add_argument
    add("--name", required=True, help="the adapter's name; the server serves it under this name")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", default=default["data"], metavar="FILE|DIR|ID",
        help="JSONL, CSV, TSV or parquet file; a folder with train, valid, test and heldout_authors files; or a hub "
        "data set id (default: the shipped quotes)",
    )  # fmt: skip
    data.add_argument("--column", dest="columns", action="append", default=[], metavar="FIELD=COLUMN",
                      help="the column of a template field, where its name differs; repeatable")  # fmt: skip
    data.add_argument("--author", dest="authors", action="append", default=[], help="only this author; repeatable")
    data.add_argument("--tag", dest="tags", action="append", default=[], help="only rows with this tag; repeatable")
    data.add_argument("--template", default=default["template"], help="the text of a row (default: %(default)s)")
    data.add_argument("--prompt", help="where the template's prompt ends (default: before its last field)")
    data.add_argument("--max-chars", type=int, default=default["max_chars"], metavar="N",
                      help="only rows whose text has at most N characters (default: %(default)s)")  # fmt: skip
    data.add_argument("--limit", type=int, metavar="N", help="train on N rows, chosen by the seed")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default=default["model"], metavar="DIR|ID",
                       help="the frozen GPT-2: a directory or a hub id (default: the embedded demo base)")  # fmt: skip
    model.add_argument("--rank", type=int, default=default["rank"], help="default: %(default)s")
    model.add_argument("--alpha", type=int, help="default: twice the rank")
    model.add_argument("--targets", default="c_attn,c_proj,c_fc",
                       help=f"comma-separated, of {', '.join(TARGETS)} (default: %(default)s)")  # fmt: skip
    model.add_argument("--dropout", type=float, default=default["dropout"], help="default: %(default)s")
    run = parser.add_argument_group("run")
    run.add_argument("--output", default=default["output"], metavar="DIR",
                     help="the parent folder: the adapter is DIR/NAME (default: %(default)s)")  # fmt: skip
    run.add_argument("--epochs", type=float, default=default["epochs"], help="default: %(default)s")
    run.add_argument("--lr", type=float, default=default["lr"], help="default: %(default)s")
    run.add_argument("--batch-size", type=int, default=default["batch_size"], help="default: %(default)s")
    run.add_argument("--seed", type=int, default=default["seed"], help="default: %(default)s")
    run.add_argument("--eval-samples", type=int, default=default["eval_samples"], metavar="N",
                     help="samples per prompt form for the report's rates (default: %(default)s)")  # fmt: skip
    run.add_argument("--resume", action="store_true", help="go on from the last checkpoint of an unfinished run")
    run.add_argument("--overwrite", action="store_true", help="replace an adapter or an unfinished run of this name")
    return parser
