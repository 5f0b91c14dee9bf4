"""Reads a zip with `zipfile`, which must not be led to read a huge directory, or to expand what nobody asked for."""

import errno
import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, cast

from adapters.errors import AdapterRefused
from adapters.tarstream import CHUNK
from adapters.tensorfile import shown

MAX_DIRECTORY_BYTES = 1 << 20
ArchiveMember = tuple[str, bool, Callable[[], Iterator[bytes]]]
"""Its name as the archive has it, whether it is a file and no folder, and its bytes."""
_KINDS = {
    stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError)


def zip_members(file: BinaryIO, what: str) -> Iterator[ArchiveMember]:
    """Every file and folder. Raises AdapterRefused for anything else, what is encrypted and what is damaged."""
    try:
        archive = zipfile.ZipFile(cast("BinaryIO", _Bounded(file)))
    except UnicodeDecodeError:
        raise AdapterRefused(f"{what} has a member whose name is not UTF-8, though it says so") from None
    except _BROKEN as error:
        raise AdapterRefused(f"{what} is damaged: {str(error)[:200]}") from None
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind in _KINDS:
            raise AdapterRefused(
                f"the member {shown(info.filename)} is {_KINDS[kind]}; only files and folders are taken"
            )
        if info.flag_bits & 1:
            raise AdapterRefused(f"the member {shown(info.filename)} is encrypted: send the archive without a password")
        yield info.orig_filename, not info.is_dir(), partial(_unzipped, archive, info)


def _unzipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others expand without a bound
        raise AdapterRefused(
            f"the member {shown(info.filename)} is compressed in way {info.compress_type}: use deflate"
        )
    try:
        with archive.open(info) as member:
            while chunk := member.read(CHUNK):
                yield chunk
    except _BROKEN as error:
        raise AdapterRefused(f"the member {shown(info.filename)} is damaged: {str(error)[:200] or 'cut off'}") from None


class _Bounded(io.RawIOBase):
    """A file that `zipfile` can't be led to read too much of at once, or outside of."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, file.seek(0, io.SEEK_END)

    def read(self, size: int = -1, /) -> Any:
        left = max(self._size - self._file.tell(), 0)
        count = left if size < 0 else min(size, left)
        if count > MAX_DIRECTORY_BYTES:
            raise AdapterRefused(f"the zip's directory has {count:,} bytes; at most {MAX_DIRECTORY_BYTES:,} are read")
        return self._file.read(count)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        place = offset + (0, self._file.tell(), self._size)[whence]
        if place < 0 and whence == io.SEEK_END:
            raise OSError(errno.EINVAL, "before the beginning")  # `zipfile` tries, and expects this
        if not 0 <= place <= self._size:
            raise zipfile.BadZipFile(f"it points to byte {place:,} of {self._size:,}")
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True
