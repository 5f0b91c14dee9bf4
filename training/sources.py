"""Raw rows of a data source, each with the place it came from. Knows nothing about templates or tokens.

A source is a JSONL, CSV, TSV or parquet file, a folder of such files named by split, or a hub data set id.
"""

import codecs
import contextlib
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
    "train": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid", "test": "test",
    "heldout_authors": "heldout_authors",
}  # fmt: skip

REACH_SECONDS = 10
_CELL = 2**31 - 1  # characters of a CSV cell: a row that is too long is left out, not its file
_MARKS = (  # the longer ones first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip


@dataclass(frozen=True)
class RawRow:
    """One row as the source has it, or the reason why it can't be read."""

    source: str  # file or data set split
    line: int  # from 1; the row's number where a format has no lines
    values: dict[str, Any]
    problem: str | None = None


def read_source(source: str, to_train: bool = True) -> dict[str, list[RawRow]]:
    """Split name -> rows. A single file gives the one split `all`. `to_train`: a folder has to have a train file.

    Raises DataError if the source is not there, not readable, not UTF-8, or if one of its files has no rows.
    """
    path = Path(source)
    if path.is_dir():
        files: dict[str, Path] = {}
        for file in sorted(path.iterdir()):
            if file.suffix not in SUFFIXES:
                continue
            split = SPLITS.get(file.stem)
            if split is None:
                raise DataError(
                    f"--data {source}: {file.name} is named after no split ({', '.join(SPLITS)}); rename it, move it "
                    "away, or give it alone"
                )
            if split in files:
                raise DataError(f"--data {source}: {files[split].name} and {file.name} are one split; keep one of them")
            files[split] = file
        if not files or ("train" not in files and to_train):
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
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"--data {path}: can't be read: {error.strerror}") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if encoding is None and data[:1000].count(0) > len(data[:1000]) // 4:
        encoding = "UTF-16BE" if data.startswith(b"\0") else "UTF-16LE"  # most of its text is ASCII
    if encoding is not None:
        raise DataError(f"--data {path}: is {encoding}, not UTF-8; {_convert(path, encoding)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The bytes that Latin-1 has no letters for are Windows's quotation marks and dashes.
        encoding = "WINDOWS-1252" if any(0x80 <= byte <= 0x9F for byte in data) else "LATIN1"
        byte = data[error.start : error.start + 1]
        raise DataError(
            f"--data {path}: line {data.count(0x0A, 0, error.start) + 1} is not UTF-8 (byte 0x{byte.hex()}, "
            f"{byte.decode('cp1252', 'replace')!r} if the file is {encoding}, as it seems); {_convert(path, encoding)}"
        ) from None
    if not text.strip():
        raise DataError(f"--data {path}: is empty")
    return text


def _convert(path: Path, encoding: str) -> str:
    return f"convert the file first, for example: iconv -f {encoding} -t UTF-8 {path.name} > utf8{path.suffix}"


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
    mark = "\t" if path.suffix == ".tsv" else ","
    csv.field_size_limit(_CELL)
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter=mark)
    rows = 0
    try:
        header = list(reader.fieldnames or ())
        twice = next((name for name in header if header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"--data {path}: two of its columns are named {twice!r}; rename one of them")
        other = next((m for m in ",;\t|" if m != mark and len(header) == 1 and m in header[0]), None)
        if other is not None:
            raise DataError(
                f"--data {path}: its columns are separated by {other!r}, not by {mark!r}; "
                + ("name it .tsv" if other == "\t" else "save it with commas, or as JSONL")
            )
        for values in reader:
            surplus = values.pop(None, None)  # type: ignore[call-overload]
            problem = "more cells than the header has columns" if surplus is not None else None
            rows += 1
            yield RawRow(path.name, reader.line_num, values, problem)
    except csv.Error as error:
        raise DataError(f"--data {path}: line {reader.line_num + 1} is not valid CSV: {error}") from None
    if not rows:
        raise DataError(f"--data {path}: has a header ({', '.join(header)}) and no rows")


def _parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow  # imported late: `datasets` brings it, few need it
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(path.name, number, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"--data {path}: can't be read as parquet: {error}") from error
    if not number:
        raise DataError(f"--data {path}: has no rows")


def _read_hub(source: str) -> dict[str, list[RawRow]]:
    try:
        loaded = _load_from_hub(source)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"--data {source}: no such file, and no data set of this id could be loaded from the hub ({reason}); "
            f"give a file ({', '.join(SUFFIXES)}), or leave --data out for the shipped quotes"
        ) from error
    splits: dict[str, list[RawRow]] = {}
    for name, rows in loaded.items():
        split = SPLITS.get(str(name))
        if split in splits:
            raise DataError(f"--data {source}: it has two splits for {split} ({', '.join(map(str, loaded))})")
        if split:
            splits[split] = [RawRow(f"{source}[{name}]", n, dict(row)) for n, row in enumerate(rows, start=1)]
    if "train" not in splits:
        raise DataError(f"--data {source}: no train split; it has {', '.join(map(str, loaded))}")
    return splits if len(splits) > 1 else {"all": splits["train"]}


def _load_from_hub(source: str) -> Any:
    """The data set, from the hub or, where that can't be reached, from what was loaded before."""
    from datasets import config, load_dataset
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    reached = False
    with contextlib.suppress(Exception):  # asked once: `load_dataset` asks six times, for half a minute
        with contextlib.suppress(HfHubHTTPError):  # it answers: `load_dataset` says what is wrong
            HfApi().dataset_info(source, timeout=REACH_SECONDS)
        reached = True
    if reached:
        return load_dataset(source)
    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True  # straight to what it keeps on disk
    try:
        return load_dataset(source)
    except ConnectionError:
        raise ConnectionError("the hub can't be reached") from None
    finally:
        config.HF_HUB_OFFLINE = before
