"""Takes an adapter folder out of a tar, tar.gz or zip that nobody vouches for. Works without torch.

Members are listed first and all of them judged; then the few that make an adapter are streamed out, each under its
own plain name: no path of the archive ever reaches the file system. Every limit counts bytes that were really read.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.lora_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adapters.objects import ADAPTER_FILES, MAX_SIDECAR_BYTES
from adapters.tarstream import TarStream
from adapters.tensorfile import open_regular, shown
from adapters.validation import MAX_WEIGHTS_BYTES, WEIGHTS_FILE
from adapters.zipstream import ArchiveMember, zip_members

MAX_MEMBERS = 10_000
MAX_NAME_CHARS = 1024
_LIMITS = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: MAX_WEIGHTS_BYTES}
_LISTED = 100


@dataclass(frozen=True)
class Unpacked:
    """What came out of an archive."""

    folder: Path
    ignored: tuple[str, ...]
    """Members that are no part of an adapter, or lie elsewhere; the first 100."""


@dataclass(frozen=True)
class _File:
    name: str  # as the archive has it
    parts: tuple[str, ...]
    chunks: Callable[[], Iterator[bytes]]


def unpack(archive: Path, into: Path, max_bytes: int = 1 << 30) -> Unpacked:
    """Write the adapter in `archive` to the empty folder `into`: from its top, or the one folder with a config.

    `max_bytes` bounds the archive and what it expands to. Raises AdapterRefused naming the member that is wrong,
    AdapterUnavailable on I/O errors; either leaves `into` empty.
    """
    into.mkdir(parents=True, exist_ok=True)
    try:
        with open_regular(archive, max_bytes) as file:
            files = _list(file, archive.name, max_bytes)
            wanted, ignored = _choose(files, archive.name)
            left = max_bytes
            for entry in wanted:
                left -= _write(entry, into / entry.parts[-1], left, max_bytes)
            return Unpacked(into, ignored)
    except BaseException as error:
        for name in ADAPTER_FILES:
            (into / name).unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError):
            raise AdapterUnavailable(f"{archive.name} can't be read: {error.strerror}") from error
        raise


def _list(file: BinaryIO, what: str, max_bytes: int) -> list[_File]:
    magic = file.read(4)
    members = (
        zip_members(file, what)
        if magic in (b"PK\3\4", b"PK\5\6")
        else _tar(file, magic[:2] == b"\x1f\x8b", what, max_bytes)
    )
    files: list[_File] = []
    for count, (name, is_file, chunks) in enumerate(members, 1):
        if count > MAX_MEMBERS:
            raise AdapterRefused(f"{what} has more than {MAX_MEMBERS:,} members")
        parts = _parts(name)
        if is_file:
            files.append(_File(name, parts, chunks))
    return files


def _choose(files: Iterable[_File], what: str) -> tuple[list[_File], tuple[str, ...]]:
    """The files that make the adapter, in the archive's order, and the names of the others."""
    files = list(files)
    homes = {file.parts[:-1]: file.name for file in files if file.parts[-1] == CONFIG_FILE}
    if not homes:
        raise AdapterRefused(f"{what} holds no {CONFIG_FILE}: expected an archive of a PEFT adapter folder")
    if len(homes) > 1:
        first, second = list(homes.values())[:2]
        raise AdapterRefused(
            f"{what} holds two adapters, {shown(first)} and {shown(second)}: send one folder at a time"
        )
    (home,) = homes
    wanted: dict[str, _File] = {}
    ignored: list[str] = []
    for file in files:
        name = file.parts[-1]
        if file.parts[:-1] != home or name not in ADAPTER_FILES:
            ignored.append(file.name)
        elif name in wanted:
            raise AdapterRefused(f"{what} holds {shown(file.name)} twice")
        else:
            wanted[name] = file
    if WEIGHTS_FILE not in wanted:
        pickles = [name for name in ignored if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
        hint = f" ({shown(pickles[0])} is a pickle: convert it to safetensors)" if pickles else ""
        raise AdapterRefused(f"{what} holds no {WEIGHTS_FILE} beside {CONFIG_FILE}{hint}")
    return list(wanted.values()), tuple(ignored[:_LISTED])


def _write(entry: _File, target: Path, left: int, max_bytes: int) -> int:
    """Returns the bytes written."""
    limit, written = _LIMITS.get(target.name, MAX_SIDECAR_BYTES), 0
    with _writing(target), target.open("xb") as copy:
        for chunk in entry.chunks():
            written += len(chunk)
            if written > limit:
                raise AdapterRefused(f"{shown(entry.name)} is larger than {limit:,} bytes")
            if written > left:
                raise AdapterRefused(f"{shown(entry.name)}: the archive expands to more than {max_bytes:,} bytes")
            copy.write(chunk)
    return written


@contextmanager
def _writing(target: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterUnavailable(f"{target.name} can't be unpacked: {error.strerror or error}") from error


def _parts(name: str) -> tuple[str, ...]:
    """A member's path, judged."""
    if any("\ud800" <= char <= "\udfff" for char in name):
        raise AdapterRefused(f"the member {shown(name)} has a name that is not UTF-8")
    if "\\" in name or "\0" in name:
        raise AdapterRefused(f"the member {shown(name)} has a backslash or a null character in its name")
    if name.startswith("/"):
        raise AdapterRefused(f"the member {shown(name)} has an absolute path")
    if len(name) > MAX_NAME_CHARS:
        raise AdapterRefused(f"the member {shown(name)} has a name of {len(name)} characters")
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts:
        raise AdapterRefused(f"the member {shown(name)} has '..' in its path")
    return parts or (".",)


def _tar(file: BinaryIO, gzipped: bool, what: str, max_bytes: int) -> Iterator[ArchiveMember]:
    source = TarStream(file, gzipped, what, max_bytes)  # the wanted ones are read in the archive's order: in one go
    for member in TarStream(file, gzipped, what, max_bytes).members():
        yield member.name, member.is_file, partial(source.chunks, member)
