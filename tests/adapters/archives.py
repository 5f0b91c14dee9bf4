"""Archives written by hand, good and hostile."""

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

Entry = tuple[tarfile.TarInfo, bytes]


def files_of(folder: Path, under: str = "") -> dict[str, bytes]:
    """The files of a folder by the names that an archive gives them."""
    return {f"{under}{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def tar(target: Path, entries: Iterable[Entry], gzipped: bool = False, pax: bool = True) -> Path:
    with tarfile.open(
        target, "w:gz" if gzipped else "w", format=tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    ) as made:
        for info, data in entries:
            made.addfile(info, io.BytesIO(data))
    return target


def tar_of(target: Path, files: dict[str, bytes], gzipped: bool = False) -> Path:
    return tar(target, [entry(name, data) for name, data in files.items()], gzipped)


def zip_of(target: Path, files: dict[str, bytes], way: int = zipfile.ZIP_DEFLATED, **changes: int) -> Path:
    """`changes`: fields of every ZipInfo, e.g. external_attr."""
    with zipfile.ZipFile(target, "w") as made:
        for name, data in files.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename = info.orig_filename = name
            info.compress_type = way
            for field, value in changes.items():
                setattr(info, field, value)
            made.writestr(info, data)
    return target


def header_block(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header that may announce any size."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)
