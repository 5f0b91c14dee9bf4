"""Raw rows of a data source, each with the place it came from. Knows nothing about templates or tokens.

A source is a JSONL, CSV, TSV or parquet file, a folder of such files named by split, or a hub data set id.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
# A source's names for its splits -> ours. `all` is a source that doesn't say: the caller splits it.
SPLITS = {
    "train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test",
    "heldout_authors": "heldout_authors",
}  # fmt: skip


@dataclass(frozen=True)
class RawRow:
    """One row as the source has it, or the reason why it can't be read."""

    source: str  # file or data set split
    line: int  # from 1; the row's number where a format has no lines
    values: dict[str, Any]
    problem: str | None = None


def read_source(source: str) -> dict[str, list[RawRow]]:
    """Split name -> rows. A single file gives the one split `all`.

    Raises DataError if the source is not there, not readable, or not UTF-8.
    """
    path = Path(source)
    if path.is_dir():
        files = {s: f for f in sorted(path.iterdir()) if f.suffix in SUFFIXES and (s := SPLITS.get(f.stem))}
        if "train" not in files:
            raise DataError(
                f"--data {source}: the folder has no train file ({', '.join('train' + s for s in SUFFIXES)})"
            )
        return {split: _read_file(file) for split, file in files.items()}
    if path.is_file():
        return {"all": _read_file(path)}
    if path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise DataError(f"--data {source}: there is no such file or folder")
    return _read_hub(source)


def _read_file(path: Path) -> list[RawRow]:
    if path.suffix == ".parquet":
        return list(_parquet(path))
    if path.suffix in (".csv", ".tsv"):
        return list(_csv(path))
    if path.suffix in (".jsonl", ".ndjson"):
        return list(_jsonl(path))
    raise DataError(f"--data {path}: can't tell the format by its name; expected one of {', '.join(SUFFIXES)}")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"--data {path}: line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file "
            f"first, for example: iconv -f latin1 -t utf-8 {path.name} > utf8{path.suffix}"
        ) from None
    except OSError as error:
        raise DataError(f"--data {path}: can't be read: {error.strerror}") from error


def _jsonl(path: Path) -> Iterator[RawRow]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            yield RawRow(path.name, number, {}, f"not valid JSON: {error}")
            continue
        if isinstance(value, dict):
            yield RawRow(path.name, number, value)
        else:
            yield RawRow(path.name, number, {}, f"holds {type(value).__name__}, not a JSON object")


def _csv(path: Path) -> Iterator[RawRow]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    try:
        for values in reader:
            surplus = values.pop(None, None)  # type: ignore[call-overload]
            problem = "more cells than the header has columns" if surplus is not None else None
            yield RawRow(path.name, reader.line_num, values, problem)
    except csv.Error as error:
        raise DataError(f"--data {path}: line {reader.line_num} is not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[RawRow]:
    from datasets import load_dataset  # imported late: it takes seconds

    try:  # streaming reads the file where it is instead of copying it into a cache
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield RawRow(path.name, number, dict(row))
    except Exception as error:
        raise DataError(f"--data {path}: can't be read as parquet: {error}") from error


def _read_hub(source: str) -> dict[str, list[RawRow]]:
    from datasets import load_dataset

    try:
        loaded = load_dataset(source)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"--data {source}: no such file, and no data set of this id could be loaded from the hub ({reason}); "
            f"give a file ({', '.join(SUFFIXES)}), or leave --data out for the shipped quotes"
        ) from error
    splits: dict[str, list[RawRow]] = {}
    for name, rows in loaded.items():
        split = SPLITS.get(str(name))
        if split:
            splits[split] = [RawRow(f"{source}[{name}]", n, dict(row)) for n, row in enumerate(rows, start=1)]
    if "train" not in splits:
        raise DataError(f"--data {source}: no train split; it has {', '.join(map(str, loaded))}")
    return splits if len(splits) > 1 else {"all": splits["train"]}
