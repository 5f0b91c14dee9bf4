"""The command line of a training run: flags over a recipe file over the defaults.

A flag that isn't given is not in the parsed values, so that a recipe can speak. `choir` and `search` share the flags.
"""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from training.config import DEVICES, DTYPES, SCHEDULES, TARGETS, TrainConfig
from training.errors import ConfigError
from training.origin import take
from training.recipe import read_recipe

_DEFAULTS = {f.name: f.default for f in fields(TrainConfig) if f.default is not MISSING}


def parse_args(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration of `python -m training`. Raises ConfigError; argparse exits on unknown flags."""
    parser = argparse.ArgumentParser(
        prog="python -m training",
        description="Train one LoRA adapter on a frozen GPT-2 and measure it beside the base.",
        epilog="Other commands: python -m training choir|search|evaluate|compare|export|push --help",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--name", help="the adapter's name; the server serves it under this name")
    add_flags(parser)
    values = settings(vars(parser.parse_args(argv)))
    if "name" not in values:
        raise ConfigError("--name is missing: give the adapter a name, or a --recipe that has one")
    return TrainConfig(**values)


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """TrainConfig's values from parsed flags: those of the recipe, and over them the flags that were given."""
    given = dict(given)
    recipe = given.pop("recipe", None)
    if "columns" in given:
        given["columns"] = dict(pair_of("--column", pair, "quote=text") for pair in given["columns"])
    if "gate" in given:
        given["gate"] = dict(_number(pair) for pair in given["gate"] if pair)
    if "targets" in given:
        given["targets"] = tuple(target for target in given["targets"].split(",") if target)
    for name in ("authors", "tags"):
        if name in given:
            given[name] = tuple(given[name])
    values = read_recipe(Path(recipe)) if recipe is not None else {}
    if "init_from" in given:
        values.pop("init_digest", None)  # the recipe's is of the recipe's origin
    values |= given
    return take(values) if values.get("init_from") else values


def pair_of(flag: str, pair: str, example: str) -> tuple[str, str]:
    """`NAME=VALUE` in two. Raises ConfigError."""
    name, equals, value = pair.partition("=")
    if not (equals and name.isidentifier() and value):
        left, _, right = example.partition("=")
        kinds = "FIELD=COLUMN" if flag == "--column" else "NAME=VALUE"
        raise ConfigError(f"{flag} {pair!r}: write {kinds}, for example {flag} {left}={right}")
    return name, value


def _number(pair: str) -> tuple[str, float]:
    name, value = pair_of("--gate", pair, "eos_rate=0.95")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--gate {pair!r}: {value!r} is not a number") from None


def add_flags(parser: argparse.ArgumentParser, leave_out: Sequence[str] = ()) -> None:
    """The flags of a run, but for those of the fields `leave_out`."""

    def add(group: Any, name: str, flag: str, text: str, **more: Any) -> None:
        if name in leave_out:
            return
        default = _DEFAULTS.get(name)
        shown = "" if default in (None, False) or "(default" in text or "action" in more else f" (default: {default})"
        group.add_argument(flag, dest=name, help=text.replace("%", "%%") + shown, **more)

    parser.add_argument("--recipe", metavar="FILE", help="a YAML or TOML file of settings; flags go over it")
    data = parser.add_argument_group("data")
    add(data, "data", "--data", "JSONL, CSV, TSV or parquet file; a folder with train, valid, test and heldout_authors "
        "files; or a hub data set id (default: the shipped quotes)", metavar="FILE|DIR|ID")  # fmt: skip
    add(data, "columns", "--column", "the column of a template field, where its name differs; repeatable",
        action="append", metavar="FIELD=COLUMN")  # fmt: skip
    add(data, "authors", "--author", "only this author; repeatable", action="append")
    add(data, "tags", "--tag", "only rows with this tag; repeatable", action="append")
    add(data, "template", "--template", "the text of a row")
    add(data, "prompt", "--prompt", "where the template's prompt ends (default: before its last field)")
    add(data, "max_chars", "--max-chars", "only rows whose text has at most N characters", type=int, metavar="N")
    add(data, "limit", "--limit", "train on N rows, chosen by the seed", type=int, metavar="N")
    model = parser.add_argument_group("model")
    add(model, "model", "--model", "the frozen GPT-2: a directory or a hub id (default: the embedded demo base)",
        metavar="DIR|ID")  # fmt: skip
    add(model, "init_from", "--init-from", "go on from this adapter instead of a fresh one; its rank, alpha and "
        "targets are taken", metavar="ADAPTER")  # fmt: skip
    add(
        model, "init_digest", "--init-digest", "refuse --init-from unless its content has this digest", metavar="SHA256"
    )
    add(model, "rank", "--rank", "LoRA's rank", type=int)
    add(model, "alpha", "--alpha", "LoRA's alpha (default: twice the rank)", type=int)
    add(model, "rslora", "--rslora", "scale by alpha / sqrt(rank)", action=argparse.BooleanOptionalAction)
    add(model, "targets", "--targets", f"comma-separated, of {', '.join(TARGETS)} (default: c_attn,c_proj,c_fc)")
    add(model, "dropout", "--dropout", "on what goes into the adapter", type=float)
    run = parser.add_argument_group("run")
    add(run, "output", "--output", "the parent folder: the adapter is DIR/NAME", metavar="DIR")
    add(run, "epochs", "--epochs", "times through the data", type=float)
    add(run, "max_tokens", "--max-tokens", "end after N real tokens, if the epochs haven't ended it", type=int,
        metavar="N")  # fmt: skip
    add(run, "patience", "--patience", "stop after N evaluations in a row without a better held-out loss, and keep the "
        "best", type=int, metavar="N")  # fmt: skip
    add(run, "seed", "--seed", "of the order, the weights' start, dropout and the samples", type=int)
    add(run, "lr", "--lr", "the learning rate's peak", type=float)
    add(run, "schedule", "--schedule", "of the learning rate after the warm-up", choices=SCHEDULES)
    add(run, "warmup", "--warmup", "steps (default: a tenth of the run, 50 at most)", type=int, metavar="N")
    add(run, "weight_decay", "--weight-decay", "AdamW's", type=float)
    add(run, "clip", "--clip", "the gradient's largest norm", type=float)
    add(run, "batch_size", "--batch-size", "rows in one pass", type=int)
    add(run, "accumulate", "--accumulate", "passes in one step", type=int, metavar="N")
    add(run, "checkpointing", "--checkpointing", "save memory: compute activations again in the backward pass",
        action=argparse.BooleanOptionalAction)  # fmt: skip
    add(
        run,
        "dtype",
        "--dtype",
        "of the computation; auto: bfloat16 on GPUs and CPUs that compute it at speed, otherwise float32",
        choices=DTYPES,
    )
    add(run, "device", "--device", "auto: a GPU if there is one", choices=DEVICES)
    add(run, "resume", "--resume", "go on from the last checkpoint of an unfinished run", action="store_true")
    add(run, "overwrite", "--overwrite", "replace an adapter or an unfinished run of this name", action="store_true")
    add(run, "ensure", "--ensure", "for jobs that are restarted: start, go on with the unfinished run, or do nothing "
        "if the adapter is there", action="store_true")  # fmt: skip
    judge = parser.add_argument_group("judging")
    add(judge, "eval_samples", "--eval-samples", "samples per prompt form for the report's rates", type=int,
        metavar="N")  # fmt: skip
    add(judge, "contrast", "--contrast", "a source of other voices, from which the style is told apart (default: the "
        "rows that --author and --tag leave out)", metavar="FILE|DIR|ID")  # fmt: skip
    add(judge, "gate", "--gate", "publish only if the figures are good enough: without a value by the default gate, "
        "which --gate FIGURE=NUMBER changes; an adapter that fails is kept aside, and the status is 3",
        action="append", nargs="?", const="", metavar="FIGURE=NUMBER")  # fmt: skip
