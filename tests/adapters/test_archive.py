"""Archives: what is taken out of them, and everything that is not."""

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.archive import unpack
from adapters.errors import AdapterRefused
from tests.adapters.support import ref_of, tensors, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Change = Callable[[tarfile.TarFile], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "poe", tensors())


def member(name: str, data: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(data)


def tar(folder: Path, *extra: tuple[tarfile.TarInfo, io.BytesIO], under: str = "poe", mode: str = "w:") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as packed:
        for each in extra:
            packed.addfile(*each)
        packed.add(folder, under)
    return out.getvalue()


def zipped(folder: Path, *extra: tuple[str, bytes], under: str = "poe/") -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in extra:
            packed.writestr(name, data)
        for file in sorted(folder.iterdir()):
            packed.write(file, f"{under}{file.name}")
    return out.getvalue()


def unpacked(tmp_path: Path, data: bytes, max_bytes: int = 1 << 20):
    (tmp_path / "archive").write_bytes(data)
    return unpack(tmp_path / "archive", tmp_path / "into", max_bytes)


def refused(tmp_path: Path, data: bytes, message: str, max_bytes: int = 1 << 20) -> None:
    before = sorted(path for path in tmp_path.rglob("*") if path.name != "archive")
    with pytest.raises(AdapterRefused, match=message):
        unpacked(tmp_path, data, max_bytes)
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "archive") == before, "nothing is left"


@pytest.mark.parametrize(
    "pack",
    [
        tar,
        lambda folder: tar(folder, under="."),
        lambda folder: tar(folder, mode="w:gz"),
        lambda folder: gzip.compress(tar(folder)[:5000]) + gzip.compress(tar(folder)[5000:]),
        zipped,
        lambda folder: zipped(folder, under=""),
    ],
    ids=["tar", "tar without a folder", "tar.gz", "gzip in two members", "zip", "zip without a folder"],
)
def test_an_adapter_is_taken_out(pack: Callable[[Path], bytes], folder: Path, tmp_path: Path) -> None:
    found = unpacked(tmp_path, pack(folder))
    assert ref_of(found.folder).digest == ref_of(folder).digest
    assert (sorted(file.name for file in found.folder.iterdir()), found.ignored) == ([CONFIG, WEIGHTS], ())


def test_what_is_no_adapters_file_is_named_and_left(folder: Path, tmp_path: Path) -> None:
    (folder / "report.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / WEIGHTS).write_bytes(b"an older one")
    (folder / "adapter_cоnfig.json").write_text("a Cyrillic o")
    for data in (tar(folder), tar(folder, mode="w:gz")):
        found = unpacked(tmp_path, data)
        assert sorted(file.name for file in found.folder.iterdir()) == [CONFIG, WEIGHTS, "report.json"]
        assert sorted(found.ignored) == [
            "poe/adapter_cоnfig.json", f"poe/checkpoint-5/{WEIGHTS}", "poe/optimizer.pt",
        ]  # fmt: skip
        for file in found.folder.iterdir():
            file.unlink()
        found.folder.rmdir()


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}
TARS: dict[str, tuple[tuple[tarfile.TarInfo, io.BytesIO], str]] = {
    "absolute": (member("/etc/cron.d/x"), "'/etc/cron.d/x' is no plain relative path"),
    "upwards": (member(f"poe/../../{CONFIG}"), r"is no plain relative path"),
    "backslash": (member("poe\\..\\x"), "is no plain relative path"),
    "control characters": (member("poe/\x1b[2J"), "is no plain relative path"),
    "symlink": (member(f"poe/{CONFIG}", **LINK), f"'poe/{CONFIG}' is a link; only plain files are taken"),
    "symlinked folder": (member("poe", **LINK), "'poe' is a link"),
    "hard link": (member(f"poe/{WEIGHTS}", **LINK | {"type": tarfile.LNKTYPE}), "is a link"),
    "device": (member("poe/null", type=tarfile.CHRTYPE, size=0), "'poe/null' is a special file"),
    "pipe": (member("poe/pipe", type=tarfile.FIFOTYPE, size=0), "'poe/pipe' is a special file"),
    "twice": (member(f"poe/{CONFIG}"), f"'poe/{CONFIG}' comes twice"),
    "two adapters": (member(f"twain/{CONFIG}"), "lies beside 'twain': an archive holds one adapter"),
    "a large configuration": (member(f"poe/{CONFIG}", b" " * ((1 << 20) + 1)), "holds more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("case", TARS)
def test_a_tar_that_is_not_plain_is_refused(case: str, folder: Path, tmp_path: Path) -> None:
    extra, message = TARS[case]
    extra[1].seek(0)
    refused(tmp_path, tar(folder, extra), message)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((f"../{CONFIG}", b"x"), "is no plain relative path"),
        (("/etc/x", b"x"), "is no plain relative path"),
        ((f"poe/{CONFIG}", b"x"), "comes twice"),
        ((f"twain/{CONFIG}", b"x"), "an archive holds one adapter"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_is_not_plain_is_refused(
    extra: tuple[str, bytes], message: str, folder: Path, tmp_path: Path
) -> None:
    refused(tmp_path, zipped(folder, extra), message)


def test_a_link_in_a_zip_is_refused(folder: Path, tmp_path: Path) -> None:
    info = zipfile.ZipInfo(f"poe/{CONFIG}")
    info.external_attr = 0o120777 << 16
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as packed:
        packed.writestr(info, "/etc/passwd")
    refused(tmp_path, out.getvalue(), "is a link or a special file")


def test_an_encrypted_zip_is_refused(folder: Path, tmp_path: Path) -> None:
    data = bytearray(zipped(folder))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        data[at + offset] |= 1
    refused(tmp_path, bytes(data), "is encrypted")


def test_what_is_no_archive_is_refused(folder: Path, tmp_path: Path) -> None:
    for data in (b"", b"hello", (folder / WEIGHTS).read_bytes(), os.urandom(2000)):
        refused(tmp_path, data, "no archive; expected a tar, tar.gz or zip")
    refused(tmp_path, zipped(folder)[:-40], "damaged")


def test_an_archive_without_an_adapter_names_what_it_holds(folder: Path, tmp_path: Path) -> None:
    (folder / CONFIG).rename(folder / "config.json")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refused(tmp_path, tar(folder), r"holds no adapter_config.json, .* \(it holds 'poe/[a-z_]+.(bin|json)', ")


@pytest.mark.parametrize("mode", ["w:", "w:gz"])
def test_a_cut_off_archive_is_refused_wherever_it_is_cut(mode: str, folder: Path, tmp_path: Path) -> None:
    whole = tar(folder, mode=mode)
    ends = len(gzip.decompress(whole)) if mode == "w:gz" else len(whole)
    for length in range(0, min(len(whole), ends - 10240), max(1, len(whole) // 40)):
        with pytest.raises(AdapterRefused):
            unpacked(tmp_path, whole[:length])
        assert not (tmp_path / "into").exists()


def test_a_damaged_member_is_refused(folder: Path, tmp_path: Path) -> None:
    data = bytearray(zipped(folder))
    data[len(data) // 2] ^= 0xFF
    refused(tmp_path, bytes(data), "damaged")
    data = bytearray(tar(folder, mode="w:gz"))
    data[-6] ^= 0xFF  # of the checksum
    refused(tmp_path, bytes(data), "damaged")


def test_too_many_members_are_refused(folder: Path, tmp_path: Path) -> None:
    extra = [member(f"poe/{i}", b"") for i in range(10_001)]
    refused(tmp_path, tar(folder, *extra), "more than 10000 members")


BOMB = 300 << 20


def bombs() -> dict[str, bytes]:
    """Archives of a megabyte at most that unpack to BOMB bytes."""
    zeros = io.BytesIO()
    with zipfile.ZipFile(zeros, "w", zipfile.ZIP_DEFLATED) as packed, packed.open(f"poe/{WEIGHTS}", "w") as file:
        for _ in range(BOMB >> 20):
            file.write(bytes(1 << 20))
    header = tarfile.TarInfo(f"poe/{WEIGHTS}")
    header.size = BOMB
    stream = zlib.compressobj(wbits=31)
    tarred = [stream.compress(header.tobuf())] + [stream.compress(bytes(1 << 20)) for _ in range(BOMB >> 20)]
    ignored = tarfile.TarInfo("poe/elsewhere")
    ignored.size = BOMB
    other = zlib.compressobj(wbits=31)
    skipped = [other.compress(ignored.tobuf())] + [other.compress(bytes(1 << 20)) for _ in range(BOMB >> 20)]
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, BOMB
    third = zlib.compressobj(wbits=31)
    headers = [third.compress(pax.tobuf())] + [third.compress(bytes(1 << 20)) for _ in range(BOMB >> 20)]
    return {
        "zip": zeros.getvalue(),
        "tar.gz": b"".join([*tarred, stream.flush()]),
        "a member that is ignored": b"".join([*skipped, other.flush()]),
        "a pax header": b"".join([*headers, third.flush()]),
    }


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "a member that is ignored", "a pax header"])
def test_a_bomb_neither_fills_the_disk_nor_memory(kind: str, tmp_path: Path) -> None:
    data = bombs()[kind]
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        refused(tmp_path, data, "holds more than|unpacks to more than|announces|damaged", max_bytes=4 << 20)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_zip_that_lies_about_a_size_is_refused(folder: Path, tmp_path: Path) -> None:
    data = bytearray(zipped(folder))
    at = data.find(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 7)  # the size before compressing
    refused(tmp_path, bytes(data), "damaged|not valid|bytes")
