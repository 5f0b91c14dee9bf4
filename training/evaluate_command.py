"""`python -m training evaluate ADAPTER...`: measures adapters made elsewhere, or long ago, as a run measures its own.

It reads the adapters' folders and writes nothing into them.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.cli import add_flags, settings
from training.config import NAME_PATTERN, TrainConfig
from training.errors import ConfigError, DataError

# What of a run's settings says how its adapter is measured.
_MEASURED_BY = (
    "data", "columns", "authors", "tags", "template", "prompt", "max_chars", "limit", "model", "seed", "eval_samples",
    "contrast", "device",
)  # fmt: skip
# A flag -> what was recorded for the value that it replaces, and means nothing beside another.
_REPLACES = {"data": ("columns", "authors", "tags", "max_chars", "limit", "contrast"), "template": ("prompt",)}
_LEAST_COLUMN = 12


@dataclass(frozen=True)
class Measured:
    """One adapter, its base and what was measured of both."""

    name: str
    folder: str
    digest: str
    base: dict[str, str]
    config: dict[str, Any]
    evaluation: Any


def parser() -> argparse.ArgumentParser:
    """The flags."""
    made = argparse.ArgumentParser(
        prog="python -m training evaluate",
        description="Measure adapters beside their base, as a training run does: any PEFT LoRA folder that fits it.",
        epilog="Where an adapter's folder has a report.json, the data and settings that it records are the defaults.",
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("adapters", nargs="+", metavar="ADAPTER", help="an adapter's folder")
    made.add_argument("--output", metavar="FILE.json", help="write every figure and sample here")
    others = [name for name in TrainConfig.__dataclass_fields__ if name not in _MEASURED_BY]
    add_flags(made, leave_out=[*others, "recipe"])
    return made


def main(argv: Sequence[str]) -> None:
    """Measure, print, and write what was asked for. Raises TrainingError, OSError."""
    given = vars(parser().parse_intermixed_args(argv))
    folders, output = given.pop("adapters"), given.pop("output", None)
    if output is not None and not (output.endswith(".json") and Path(output).absolute().parent.is_dir()):
        raise ConfigError(f"--output {output}: give the path of a .json file in a folder that exists")
    given = {name: value for name, value in settings(given).items() if name in _MEASURED_BY}  # a recipe says more
    measured = _measure(folders, given)
    if len(measured) > 1:
        print(f"\n{across(measured)}")
    if output is not None:
        values = {"format_version": 1, "adapters": [asdict(one) for one in measured]}
        Path(output).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nwrote {output}")


def _measure(folders: Sequence[str], given: dict[str, Any]) -> list[Measured]:
    from training import made, report  # imported late: they import torch
    from training.base import open_base
    from training.data import load_corpus
    from training.distributed import join
    from training.evaluate import evaluate
    from training.run import summary
    from training.train import name_in_model

    jobs = []
    for adapter in made.find(folders):  # all of them are checked before the first is measured
        gone = {name for flag, names in _REPLACES.items() if flag in given for name in names}
        wanted = set(_MEASURED_BY) - gone
        recorded = {name: value for name, value in adapter.recorded.items() if name in wanted}
        name = adapter.folder.resolve().name
        values: dict[str, Any] = {"name": name if NAME_PATTERN.fullmatch(name) else "adapter"} | recorded | given
        config = TrainConfig(**values)
        base = open_base(config.model)
        try:
            corpus = load_corpus(config, base, of=adapter.folder)
        except DataError as error:
            raise DataError(f"{adapter.name}: {error}") from None
        jobs.append((adapter, config, base, adapter.digest(base), corpus))
    measured: list[Measured] = []
    weights, of = None, None
    for adapter, config, base, digest, corpus in jobs:
        if weights is None or of != base.folder:
            weights, of = base.load(), base.folder
        print(f"\n{adapter.name} ({digest[:12]}) on {base.name}\n{summary(config, corpus)}\n", flush=True)
        model = made.attach(weights, [adapter])
        model.to(join(config.device).device)
        evaluation = evaluate(model, name_in_model(0), base, corpus, config)
        print(report.side_by_side(evaluation), flush=True)
        recorded = {name: value for name, value in config.recorded().items() if name in _MEASURED_BY}
        of_base = {"name": base.name, "weights_sha256": base.weights_sha256()}
        measured.append(Measured(adapter.name, str(adapter.folder), digest, of_base, recorded, evaluation))
        weights = model.unload()  # the base again, without a trace
    return measured


def across(measured: Sequence[Measured], width: int | None = None) -> str:
    """A line for each figure and a column for each adapter; columns that don't fit go into a table below."""
    width = shutil.get_terminal_size().columns if width is None else width
    figures = [{_label(row): _figure(row.adapter) for row in one.evaluation.rows} for one in measured]
    labels = list(dict.fromkeys(label for column in figures for label in column))
    first = max(map(len, labels))
    widths = [max(_LEAST_COLUMN, len(one.name)) + 2 for one in measured]
    blocks: list[str] = []
    at = 0
    while at < len(measured):
        end, used = at + 1, first + widths[at]
        while end < len(measured) and used + widths[end] <= width:
            used += widths[end]
            end += 1
        part = range(at, end)
        lines = [" " * first + "".join(f"{measured[i].name:>{widths[i]}}" for i in part)]
        lines += [f"{x:{first}}" + "".join(f"{figures[i].get(x, '-'):>{widths[i]}}" for i in part) for x in labels]
        blocks.append("\n".join(lines))
        at = end
    return "\n\n".join(blocks)


def _label(row: Any) -> str:
    return f"{row.prompts}{', ' + row.form if row.form else ''}: {row.metric}"


def _figure(value: Any) -> str:
    """A number, or the share in one that comes with its interval."""
    value = getattr(value, "value", value)
    return f"{value:g}" if isinstance(value, int | float) else str(value)
