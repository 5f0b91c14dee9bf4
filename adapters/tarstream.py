"""Reads a tar or tar.gz forwards, one block at a time; `tarfile` reads extended headers of any size into memory."""

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from adapters.errors import AdapterRefused

CHUNK = 1 << 18
MAX_EXTENDED_BYTES = 64 << 10
MAX_EXTENDED_TOTAL = 16 << 20
_BLOCK = tarfile.BLOCKSIZE
_PAX, _GLOBAL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.FIFOTYPE: "a pipe",
    tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.GNUTYPE_SPARSE: "a sparse file",
}  # fmt: skip


@dataclass(frozen=True)
class TarMember:
    """A file or folder in the archive."""

    name: str
    is_file: bool
    offset: int  # of its data in the (unpacked) stream, bytes
    size: int


class TarStream:
    """Passes over a tar once, from its start. What is read never exceeds `limit` bytes, unpacked."""

    def __init__(self, file: BinaryIO, gzipped: bool, what: str, limit: int) -> None:
        self._file, self._what, self._limit = file, what, limit
        self._inflate = zlib.decompressobj(wbits=31) if gzipped else None
        self._raw, self._ready, self._in, self.position = b"", b"", 0, 0

    def members(self) -> Iterator[TarMember]:
        """Every file and folder. Raises AdapterRefused for anything else, and for what is cut off or damaged."""
        extended, name, size = 0, None, None
        while True:
            start = self.position
            try:
                info = tarfile.TarInfo.frombuf(self._take(_BLOCK), "utf-8", "surrogateescape")
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                break
            except tarfile.HeaderError as error:
                if start == 0:
                    raise AdapterRefused(f"{self._what} is no tar, tar.gz or zip archive") from None
                raise AdapterRefused(f"{self._what} is damaged at byte {start:,}: {error}") from None
            if info.type in (*_PAX, *_LONG, _GLOBAL):
                extended += _BLOCK + info.size
                if not 0 <= info.size <= MAX_EXTENDED_BYTES or extended > MAX_EXTENDED_TOTAL:
                    raise AdapterRefused(f"{self._what} has {info.size:,} bytes of extended header at byte {start:,}")
                data = self._take(_padded(info.size))[: info.size]
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    name = _text(data.partition(b"\0")[0])
                elif info.type not in _LONG:
                    fields = self._pax(data, start)
                    if info.type == _GLOBAL and fields:
                        raise AdapterRefused(f"{self._what} has a path or size for all members at byte {start:,}")
                    name = _text(fields["path"]) if "path" in fields else name
                    size = self._size(fields["size"], start) if "size" in fields else size
                continue
            name, size = info.name if name is None else name, info.size if size is None else size
            if info.type in _KINDS or not (info.isreg() or info.isdir()) or size < 0:
                kind = _KINDS.get(info.type, f"of type {info.type!r} and size {size}")
                raise AdapterRefused(f"the member {name[:80]!r} is {kind}; only files and folders are taken")
            is_file = info.isreg() and not name.endswith("/")
            yield TarMember(name, is_file, self.position, size)
            if info.isreg():
                self._skip(_padded(size))
            name = size = None
        while self._inflate and self._some(CHUNK):  # to its end, where the checksum is
            pass

    def chunks(self, member: TarMember) -> Iterator[bytes]:
        """A file's bytes; members must be asked for in the archive's order."""
        self._skip(member.offset - self.position)
        left = member.size
        while left:
            chunk = self._take(min(left, CHUNK))
            left -= len(chunk)
            yield chunk

    def _skip(self, count: int) -> None:
        while count > 0:
            count -= len(self._take(min(count, CHUNK)))

    def _take(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        parts: list[bytes] = []
        while count and (part := self._some(count)):
            parts.append(part)
            count -= len(part)
        if count:
            raise AdapterRefused(f"{self._what} is cut off at byte {self.position:,}")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _some(self, count: int) -> bytes:
        """Up to `count` bytes; none at the end."""
        if not self._ready:
            self._ready = self._inflated() if self._inflate else self._next()
        part, self._ready = self._ready[:count], self._ready[count:]
        self.position += len(part)
        if self.position > self._limit:
            raise AdapterRefused(f"{self._what} expands to more than {self._limit:,} bytes")
        return part

    def _next(self) -> bytes:
        self._file.seek(self._in)  # another pass may be under way on the same file
        data = self._file.read(CHUNK)
        self._in += len(data)
        return data

    def _inflated(self) -> bytes:
        assert self._inflate is not None
        data = b""
        while not data and not self._inflate.eof:
            self._raw = self._raw or self._next()
            if not self._raw:
                raise AdapterRefused(f"{self._what} is cut off: its gzip stream has no end")
            try:
                data = self._inflate.decompress(self._raw, CHUNK)
            except zlib.error as error:
                raise AdapterRefused(f"{self._what} is damaged: {error}") from None
            self._raw = self._inflate.unconsumed_tail
        if self._inflate.eof and (self._inflate.unused_data.strip(b"\0") or self._next().strip(b"\0")):
            raise AdapterRefused(f"{self._what} has something behind its gzip stream")
        return data

    def _pax(self, data: bytes, start: int) -> dict[str, bytes]:
        """The records of a pax header that matter: "LENGTH KEY=VALUE\\n" each."""
        found: dict[str, bytes] = {}
        place = 0
        while place < len(data):
            digits = data[place : place + 8].partition(b" ")[0]
            end = place + int(digits) if digits.isdigit() else 0
            key, equals, value = data[place + len(digits) + 1 : max(end - 1, 0)].partition(b"=")
            if not place < end <= len(data) or not equals or data[end - 1 : end] != b"\n":
                raise AdapterRefused(f"{self._what} is damaged: the extended header at byte {start:,} can't be read")
            if key.startswith(b"GNU.sparse."):
                raise AdapterRefused(f"{self._what} holds a sparse file at byte {start:,}: pack it without --sparse")
            if key in (b"path", b"size"):
                found[key.decode()] = value
            place = end
        return found

    def _size(self, digits: bytes, start: int) -> int:
        if not digits.isdigit() or len(digits) > 18:
            raise AdapterRefused(f"{self._what} has a size of {digits[:20]!r} in the extended header at byte {start:,}")
        return int(digits)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
