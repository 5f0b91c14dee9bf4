"""Reads safetensors files that nobody vouches for. Works without torch.

The header is checked here before anything is allocated for it; only then does the safetensors library read values.
Format: 8 bytes little-endian length, that many bytes of JSON, the tensors' bytes side by side.
"""

import json
import os
import stat
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from safetensors import safe_open

from adapters.errors import AdapterRefused, AdapterUnavailable

MAX_HEADER_BYTES = 2 << 20
MAX_TENSORS = 4096
_SIZES = {"F32": 4, "F16": 2, "BF16": 2}
_MAX_NAME_CHARS = 256
_MAX_DEPTH = 16
_SHOWN_CHARS = 200


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # in the file, bytes
    nbytes: int


class TensorSlice(Protocol):
    """One tensor's header."""

    def get_shape(self) -> Sequence[int]: ...

    def get_dtype(self) -> str: ...


class TensorFile(Protocol):
    """An open safetensors file; its header has been validated."""

    def keys(self) -> Sequence[str]: ...

    def get_slice(self, name: str) -> TensorSlice: ...

    def get_tensor(self, name: str) -> Any:
        """A numpy array or a torch tensor, as the file was opened; mapped from the file."""
        ...


@contextmanager
def open_tensors(path: Path, framework: str) -> Generator[TensorFile]:
    """Open `path` for reading with `framework` "np" or "pt". Raises SafetensorError or OSError."""
    opened: Any = safe_open(path, framework=framework)
    with opened as file:
        yield cast("TensorFile", file)


@contextmanager
def open_regular(path: Path, limit: int, roots: Collection[Path] | None = None) -> Generator[BinaryIO]:
    """Open a regular file of at most `limit` bytes. Raises AdapterRefused for anything else, never waits for a pipe.

    `roots`: resolved folders, in one of which the file itself must lie, whatever links led to it; None: anywhere.
    Raises FileNotFoundError when it is not there, AdapterUnavailable when it can't be read or has changed meanwhile.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise AdapterUnavailable(f"{path.name} can't be read: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        os.close(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterRefused(f"{path.name} is not a regular file")
        raise AdapterRefused(f"{path.name} has {status.st_size:,} bytes; at most {limit:,} are read")
    with open(descriptor, "rb") as file:
        try:
            if roots is not None and not _lies_in(path, status, roots):
                raise AdapterRefused(f"{path.name} is a link that leads outside of where adapters may lie")
            yield file
            now = os.fstat(descriptor)
        except OSError as error:
            raise AdapterUnavailable(f"{path.name} can't be read: {error.strerror or error}") from error
    if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise AdapterUnavailable(f"{path.name} changed while it was read")


def _lies_in(path: Path, opened: os.stat_result, roots: Collection[Path]) -> bool:
    """Whether the open file is the one at `path` without links, and that lies in a root: links may change meanwhile."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(root) for root in roots) and os.path.samestat(os.lstat(real), opened)


def parse_json(data: bytes, what: str) -> Any:
    """JSON without duplicate keys, constants that JSON lacks, half characters, or nesting that no file needs.

    Raises AdapterRefused.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant, parse_int=_integer
        )
        _check(value)
    except UnicodeEncodeError:
        raise AdapterRefused(f"{what} is not valid JSON: a string holds half a surrogate pair") from None
    except RecursionError:
        raise AdapterRefused(f"{what} is not valid JSON: nested deeper than {_MAX_DEPTH}") from None
    except ValueError as error:
        raise AdapterRefused(f"{what} is not valid JSON: {error}") from None
    return value


def shown(value: Any) -> str:
    """A value as a message shows it: not all of a megabyte."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def read_headers(file: BinaryIO, what: str) -> dict[str, TensorHeader]:
    """Every tensor of an open safetensors file. Raises AdapterRefused naming what is wrong, and with which tensor."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= size - 8:
        raise AdapterRefused(
            f"{what} is not a valid safetensors file: {size:,} bytes, a header of {length:,} announced"
        )
    if length > MAX_HEADER_BYTES:
        raise AdapterRefused(f"{what} has a header of {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read")
    header = file.read(length)
    if len(header) < length:
        raise AdapterUnavailable(f"{what} became shorter while it was read")
    raw = parse_json(header, f"the header of {what}")
    if not isinstance(raw, dict):
        raise AdapterRefused(f"the header of {what} holds {type(raw).__name__}, expected an object")
    entries = cast("dict[str, Any]", raw)
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _strings(metadata):
        raise AdapterRefused(f"__metadata__ of {what} is not an object of strings")
    if len(entries) > MAX_TENSORS:
        raise AdapterRefused(f"{what} holds {len(entries)} tensors, at most {MAX_TENSORS} are read")
    headers = {name: _header(name, entry, 8 + length) for name, entry in entries.items()}
    end = 8 + length
    for name, header in sorted(headers.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if header.offset != end:
            raise AdapterRefused(f"tensor {name!r} begins at byte {header.offset}, the one before ends at {end}")
        end += header.nbytes
    if end != size:
        raise AdapterRefused(
            f"{what} is not a valid safetensors file: its tensors end at byte {end}, the file at {size}"
        )
    return headers


def chunks(file: BinaryIO, header: TensorHeader, what: str) -> Iterator[bytes]:
    """A tensor's bytes. Raises AdapterUnavailable when the file became shorter meanwhile."""
    file.seek(header.offset)
    left = header.nbytes
    while left > 0:
        chunk = file.read(min(left, 1 << 20))
        if not chunk:
            raise AdapterUnavailable(f"{what} became shorter while it was read")
        left -= len(chunk)
        yield chunk


def _header(name: str, entry: Any, data_start: int) -> TensorHeader:
    if len(name) > _MAX_NAME_CHARS:
        raise AdapterRefused(f"a tensor's name has {len(name)} characters: {name[:40]!r}...")
    fields: dict[str, Any] = cast("dict[str, Any]", entry) if isinstance(entry, dict) else {}
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        raise AdapterRefused(f"tensor {name!r} has no dtype, shape and data_offsets alone in the header")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise AdapterRefused(f"tensor {name!r} is {str(dtype)[:20]}; expected one of {', '.join(_SIZES)}")
    if not _naturals(shape) or len(shape) > 8:
        raise AdapterRefused(f"tensor {name!r} has shape {str(shape)[:60]}; expected a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise AdapterRefused(f"tensor {name!r} has data_offsets {str(offsets)[:60]}; expected two offsets")
    nbytes = _SIZES[dtype]
    for count in shape:
        nbytes *= count
    if offsets[1] - offsets[0] != nbytes:
        raise AdapterRefused(
            f"tensor {name!r} takes {offsets[1] - offsets[0]} bytes in the file; {dtype} of shape {tuple(shape)} "
            f"needs {nbytes}"
        )
    return TensorHeader(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in cast("dict[str, Any]", value).values())


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 48 for value in cast("Sequence[Any]", values)
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:80]!r} comes twice")
        found[name] = value
    return found


def _check(value: Any) -> None:
    """Raises ValueError for nesting deeper than _MAX_DEPTH or a string that UTF-8 can't hold."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode()
            elif isinstance(item, dict):
                below += cast("dict[str, Any]", item).keys()
                below += cast("dict[str, Any]", item).values()
            elif isinstance(item, list):
                below += cast("list[Any]", item)
        level = below
    if level:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}")


def _integer(text: str) -> int:
    if text == "-0":  # an integer to Python, a float to the safetensors library
        raise ValueError("-0 is no integer")
    return int(text)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")
