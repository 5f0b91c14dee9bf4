"""Takes an adapter folder out of an archive that nobody vouches for. Works without torch.

Only the files that belong to an adapter are written, one by one, under their own names, while the bytes are counted:
what an archive says of itself decides nothing. Others are named, not unpacked.
"""

import gzip
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, cast

from adapters.errors import AdapterRefused
from adapters.lora_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adapters.objects import ADAPTER_FILES, MAX_SIDECAR_BYTES
from adapters.validation import WEIGHTS_FILE

MAX_MEMBERS = 10_000
MAX_IGNORED_BYTES = 64 << 20  # of members that are skipped, and of a tar's own headers
TOLD = 100
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Unpacked:
    """What an archive held."""

    folder: Path
    ignored: tuple[str, ...]  # members that are no adapter's files; the first TOLD


@dataclass(frozen=True)
class _Member:
    """One member; `why`: what it is, if it is no plain file or folder."""

    name: str
    is_folder: bool
    why: str | None
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, into: Path, max_bytes: int = 1 << 30) -> Unpacked:
    """Write the adapter that a tar, tar.gz or zip holds, at its top or in one folder, to the new folder `into`.

    Raises AdapterRefused; `into` is gone then.
    """
    into.mkdir()
    try:
        with archive.open("rb") as file, _members(file, max_bytes) as members:
            return _write(members, into, max_bytes)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
        UnicodeError,
        NotImplementedError,
    ) as error:
        shutil.rmtree(into)
        raise AdapterRefused(f"the archive is damaged or of a kind that is not read: {error}") from None
    except BaseException:
        shutil.rmtree(into)
        raise


def _write(members: Iterator[_Member], into: Path, max_bytes: int) -> Unpacked:
    ignored: list[str] = []
    top: PurePosixPath | None = None  # the folder that the adapter's files lie in
    for number, member in enumerate(members):
        if number >= MAX_MEMBERS:
            raise AdapterRefused(f"the archive has more than {MAX_MEMBERS} members")
        path = _checked(member)
        if member.is_folder:
            continue
        if path.name not in ADAPTER_FILES or len(path.parts) > 2:
            ignored.append(member.name[:200])
            continue
        if top is not None and path.parent != top:
            raise AdapterRefused(f"{member.name!r} lies beside {str(top)!r}: an archive holds one adapter")
        top = path.parent
        if (into / path.name).exists():
            raise AdapterRefused(f"{member.name!r} comes twice")
        limit = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: max_bytes}.get(path.name, MAX_SIDECAR_BYTES)
        with member.open() as source, (into / path.name).open("wb") as target:
            while chunk := source.read(_CHUNK):
                if target.tell() + len(chunk) > limit:
                    raise AdapterRefused(f"{member.name!r} holds more than {limit:,} bytes")
                target.write(chunk)
    if top is None:
        beside = f" (it holds {', '.join(map(repr, ignored[:3]))})" if ignored else ""
        raise AdapterRefused(f"the archive holds no {CONFIG_FILE}, at its top or in one folder{beside}")
    return Unpacked(into, tuple(ignored[:TOLD]))


def _checked(member: _Member) -> PurePosixPath:
    name = member.name
    if member.why is not None:
        raise AdapterRefused(f"{name[:200]!r} is {member.why}; only plain files are taken")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not name.isprintable():
        raise AdapterRefused(f"{name[:200]!r} is no plain relative path")
    return path


@contextmanager
def _members(file: BinaryIO, max_bytes: int) -> Generator[Iterator[_Member]]:
    magic = file.read(262 + 5)
    file.seek(0)
    if magic.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        with zipfile.ZipFile(file) as opened:
            yield _of_zip(opened)
    elif magic.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=file) as plain:
            counted = _Counted(plain, max_bytes)
            with _tar(counted) as opened:
                yield _of_tar(opened)
            while counted.read(_CHUNK):
                pass  # to its end, where the checksum is
    elif magic[257:262] == b"ustar":
        with _tar(_Counted(file, max_bytes)) as opened:
            yield _of_tar(opened)
    else:
        raise AdapterRefused("the body is no archive; expected a tar, tar.gz or zip of an adapter folder")


def _tar(stream: "_Counted") -> tarfile.TarFile:
    return tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|")


def _of_tar(opened: tarfile.TarFile) -> Iterator[_Member]:
    for info in opened:
        why = None
        if not (info.isfile() or info.isdir()) or info.issparse():
            why = "a link" if info.issym() or info.islnk() else "a sparse file" if info.issparse() else "a special file"
        yield _Member(info.name, info.isdir(), why, lambda info=info: _opened(opened, info))
        opened.members.clear()  # pyright: ignore  (it keeps every header otherwise)


def _opened(opened: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = opened.extractfile(info)
    assert file is not None, "a regular file"
    return file


def _of_zip(opened: zipfile.ZipFile) -> Iterator[_Member]:
    for info in opened.infolist():
        kind = info.external_attr >> 28  # of Unix's mode, where there is one
        why = "encrypted" if info.flag_bits & 1 else None if kind in (0, 4, 8) else "a link or a special file"
        yield _Member(info.filename, info.is_dir(), why, lambda info=info: opened.open(info))


class _Counted:
    """A stream that ends in a refusal when more comes out of it than an adapter and a little beside may hold."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, max_bytes: int) -> None:
        self._stream, self._left = stream, max_bytes + MAX_IGNORED_BYTES

    def read(self, size: int) -> bytes:
        """At most `size` bytes, and of what a tar's own headers ask for no more than a part at a time."""
        if size > MAX_IGNORED_BYTES:
            raise AdapterRefused(f"a header of the archive announces {size:,} bytes")
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise AdapterRefused("the archive unpacks to more than an adapter may hold: --max-adapter-bytes")
        return data
