"""An adapter comes out of any ordinary archive whole; from any other nothing does, and the answer names the member."""

import gzip
import os
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import adapters.archive as archive_module
from adapters.archive import unpack
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.lora_config import CONFIG_FILE
from adapters.validation import WEIGHTS_FILE
from tests.adapters.archives import entry, files_of, header_block, tar, tar_of, zip_of
from tests.adapters.support import ref_of, write_adapter

Files = dict[str, bytes]
Make = Callable[[Path, Files], object]
WRITERS: dict[str, Make] = {
    "tar": tar_of,
    "tar.gz": lambda target, files: tar_of(target, files, gzipped=True),
    "gnu tar": lambda target, files: tar(target, [entry(n, d) for n, d in files.items()], pax=False),
    "zip": zip_of,
    "stored zip": lambda target, files: zip_of(target, files, zipfile.ZIP_STORED),
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "good")


def opened(tmp_path: Path, make: Make, files: Files, **limits: int) -> archive_module.Unpacked:
    make(tmp_path / "upload", files)
    return unpack(tmp_path / "upload", tmp_path / "into", **limits)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("home", ["", "./", "wilde/", "home/me/wilde/", f"{'long' * 40}/"])
def test_an_adapter_comes_out_as_it_went_in(writer: str, home: str, good: Path, tmp_path: Path) -> None:
    files = files_of(good, home) | {f"{home}report.json": b"{}", f"{home}notes.txt": b"?", "other/README.md": b"?"}
    unpacked = opened(tmp_path, WRITERS[writer], files)
    assert ref_of(unpacked.folder).digest == ref_of(good).digest
    assert files_of(unpacked.folder) == files_of(good) | {"report.json": b"{}"}
    assert unpacked.ignored == (f"{home}notes.txt", "other/README.md")


def test_folders_in_an_archive_are_no_files(good: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "upload", "w:gz") as made:
        made.add(good, "wilde")
    assert unpack(tmp_path / "upload", tmp_path / "into").ignored == ()


def test_at_most_a_hundred_ignored_members_are_listed(good: Path, tmp_path: Path) -> None:
    unpacked = opened(tmp_path, zip_of, files_of(good) | {f"{i}.txt": b"" for i in range(200)})
    assert unpacked.ignored == tuple(f"{i}.txt" for i in range(100))


def linked(kind: bytes) -> Make:
    return lambda target, files: tar(
        target, [entry(WEIGHTS_FILE, kind=kind, link="/etc/passwd"), *(entry(n, d) for n, d in files.items())]
    )


def raw(*blocks: bytes) -> Make:
    return lambda target, files: target.write_bytes(b"".join(blocks) + b"\0" * 1024)


def zipped_as(mode: int) -> Make:
    return lambda target, files: zip_of(target, files, external_attr=mode << 16)


def patched(make: Make, change: Callable[[bytearray], object]) -> Make:
    def made(target: Path, files: Files) -> None:
        make(target, files)
        data = bytearray(target.read_bytes())
        change(data)
        target.write_bytes(data)

    return made


def in_directory(offset: int, value: int) -> Callable[[bytearray], object]:
    """Change 2 bytes of every entry in a zip's directory, and where they stand there in the local header."""

    def change(data: bytearray) -> None:
        for magic, place in ((b"PK\1\2", offset), (b"PK\3\4", offset - 2)):
            found = data.find(magic)
            while found >= 0:
                struct.pack_into("<H", data, found + place, value)
                found = data.find(magic, found + 4)

    return change


def cut(keep: float) -> Callable[[bytearray], object]:
    def change(data: bytearray) -> None:
        del data[int(len(data) * keep) :]

    return change


def flip(from_end: int) -> Callable[[bytearray], object]:
    return lambda data: data.__setitem__(-from_end, data[-from_end] ^ 1)


def broken_member(data: bytearray) -> None:
    data[data.find(b"peft_type")] ^= 1


def plus(more: Files) -> Make:
    return lambda target, files: tar_of(target, files | more)


def zip_plus(more: Files) -> Make:
    return lambda target, files: zip_of(target, files | more)


TARGZ, STORED = WRITERS["tar.gz"], WRITERS["stored zip"]
HOSTILE: dict[str, tuple[Make, str]] = {
    "no archive": (lambda t, f: t.write_bytes(b"hello" * 500), "upload is no tar, tar.gz or zip archive"),
    "empty": (lambda t, f: t.write_bytes(b""), "upload is cut off at byte 0"),
    "a pickle": (lambda t, f: t.write_bytes(b"\x80\x04" + b"K\x01" * 500), "no tar, tar.gz or zip archive"),
    "a gzip of something else": (lambda t, f: t.write_bytes(gzip.compress(b"x" * 999)), "no tar, tar.gz or zip"),
    "a pipe": (lambda t, f: os.mkfifo(t), "upload is not a regular file"),
    "nothing in it": (lambda t, f: tar_of(t, {}), f"upload holds no {CONFIG_FILE}: expected an archive of a PEFT"),
    "an empty zip": (lambda t, f: zip_of(t, {}), f"upload holds no {CONFIG_FILE}"),
    "no weights": (lambda t, f: tar_of(t, {CONFIG_FILE: b"{}"}), f"no {WEIGHTS_FILE} beside {CONFIG_FILE}$"),
    "pickled weights": (
        lambda t, f: tar_of(t, {CONFIG_FILE: b"{}", "adapter_model.bin": b"?"}),
        r"\('adapter_model.bin' is a pickle: convert it to safetensors\)",
    ),
    "absolute": (plus({"/etc/x": b""}), "the member '/etc/x' has an absolute path"),
    "absolute in a zip": (zip_plus({"/etc/x": b""}), "the member '/etc/x' has an absolute path"),
    "upwards": (plus({"a/../../x": b""}), r"the member 'a/../../x' has '..' in its path"),
    "upwards in a zip": (zip_plus({f"../{WEIGHTS_FILE}": b""}), rf"'../{WEIGHTS_FILE}' has '..' in its path"),
    "backslash": (plus({"a\\b": b""}), r"the member 'a\\\\b' has a backslash or a null"),
    "backslash in a zip": (zip_plus({"..\\x": b""}), r"the member '..\\\\x' has a backslash"),
    "null in a zip": (zip_plus({f"{CONFIG_FILE}\0.txt": b""}), "a null character in its name"),
    "a long name": (plus({"x" * 1025: b""}), "has a name of 1025 characters"),
    "not UTF-8": (plus({"\udcff.txt": b""}), r"'\\udcff.txt' has a name that is not UTF-8"),
    "not UTF-8 in a zip": (
        patched(zip_plus({"\xe9.txt": b""}), lambda d: d.__setitem__(slice(None), d.replace(b"\xc3\xa9", b"\xff\xff"))),
        "upload has a member whose name is not UTF-8",
    ),
    "symbolic link": (linked(tarfile.SYMTYPE), f"'{WEIGHTS_FILE}' is a symbolic link; only files and folders"),
    "hard link": (linked(tarfile.LNKTYPE), f"'{WEIGHTS_FILE}' is a hard link"),
    "device": (linked(tarfile.CHRTYPE), f"'{WEIGHTS_FILE}' is a device"),
    "block device": (linked(tarfile.BLKTYPE), f"'{WEIGHTS_FILE}' is a device"),
    "pipe inside": (linked(tarfile.FIFOTYPE), f"'{WEIGHTS_FILE}' is a pipe"),
    "sparse": (linked(tarfile.GNUTYPE_SPARSE), f"'{WEIGHTS_FILE}' is a sparse file"),
    "unknown kind": (linked(b"Z"), f"'{WEIGHTS_FILE}' is of type b'Z'"),
    "zipped link": (zipped_as(stat.S_IFLNK | 0o777), f"'{CONFIG_FILE}' is a symbolic link"),
    "zipped pipe": (zipped_as(stat.S_IFIFO), f"'{CONFIG_FILE}' is a pipe"),
    "zipped device": (zipped_as(stat.S_IFCHR), f"'{CONFIG_FILE}' is a device"),
    "twice": (
        lambda t, f: tar(t, [entry(n, d) for n, d in [*f.items(), *f.items()]]),
        f"upload holds '{CONFIG_FILE}' twice",
    ),
    "twice by another name": (plus({f"./{WEIGHTS_FILE}": b""}), f"upload holds './{WEIGHTS_FILE}' twice"),
    "two adapters": (
        plus({f"checkpoint-9/{CONFIG_FILE}": b"{}"}),
        f"two adapters, '{CONFIG_FILE}' and 'checkpoint-9/{CONFIG_FILE}'",
    ),
    "encrypted": (patched(zip_of, in_directory(8, 1)), f"'{CONFIG_FILE}' is encrypted: send the archive without"),
    "bzip2": (lambda t, f: zip_of(t, f, zipfile.ZIP_BZIP2), f"'{CONFIG_FILE}' is compressed in way 12: use deflate"),
    "lzma": (lambda t, f: zip_of(t, f, zipfile.ZIP_LZMA), f"'{CONFIG_FILE}' is compressed in way 14: use deflate"),
    "unknown compression": (patched(zip_of, in_directory(10, 77)), "is compressed in way 77: use deflate"),
    "tar cut in a member": (patched(tar_of, cut(0.2)), "upload is cut off at byte"),
    "tar without an end": (lambda t, f: t.write_bytes(header_block("a", 0)), "upload is cut off at byte 512"),
    "gzip cut": (patched(TARGZ, cut(0.5)), "upload is cut off: its gzip stream has no end"),
    "gzip without a checksum": (patched(TARGZ, lambda d: d.__delitem__(slice(-8, None))), "gzip stream has no end"),
    "zip cut": (patched(zip_of, cut(0.5)), "upload is damaged: File is not a zip file"),
    "bad CRC in a zip": (patched(STORED, broken_member), f"'{CONFIG_FILE}' is damaged: Bad CRC-32"),
    "bad CRC in a gzip": (patched(TARGZ, flip(8)), "upload is damaged: .*incorrect data check"),
    "bad length in a gzip": (patched(TARGZ, flip(1)), "upload is damaged: .*incorrect length check"),
    "two gzip streams": (patched(TARGZ, lambda d: d.extend(d)), "has something behind its gzip stream"),
    "bad tar checksum": (patched(tar_of, lambda d: d.__setitem__(512 * 2, 1)), "upload is damaged at byte 1,024"),
    "negative size": (raw(header_block("a", -512)), "'a' is of type b'0' and size -512"),
    "a size past the end": (raw(header_block(CONFIG_FILE, 1 << 60)), "upload is cut off at byte"),
    "negative pax size": (
        raw(header_block("p", 12, tarfile.XHDTYPE), b"12 size=-99\n".ljust(512, b"\0"), header_block("a", 0)),
        "upload has a size of b'-99' in the extended header at byte 0",
    ),
    "sizes for all": (
        raw(header_block("p", 10, tarfile.XGLTYPE), b"10 size=5\n".ljust(512, b"\0"), header_block("a", 0)),
        "has a path or size for all members at byte 0",
    ),
    "a pax record past the end": (
        raw(header_block("p", 10, tarfile.XHDTYPE), b"99 size=5\n".ljust(512, b"\0"), header_block("a", 0)),
        "the extended header at byte 0 can't be read",
    ),
    "a pax record of no length": (
        raw(header_block("p", 10, tarfile.XHDTYPE), b"00 size=5\n".ljust(512, b"\0"), header_block("a", 0)),
        "the extended header at byte 0 can't be read",
    ),
    "a sparse file in pax": (
        raw(header_block("p", 22, tarfile.XHDTYPE), b"22 GNU.sparse.major=1\n".ljust(512, b"\0"), header_block("a", 0)),
        "holds a sparse file at byte 0",
    ),
    "a huge pax header": (raw(header_block("p", 1 << 30, tarfile.XHDTYPE)), "1,073,741,824 bytes of extended header"),
    "a huge global header": (raw(header_block("p", 1 << 30, tarfile.XGLTYPE)), "1,073,741,824 bytes of extended"),
    "a huge long name": (raw(header_block("p", 1 << 30, tarfile.GNUTYPE_LONGNAME)), "1,073,741,824 bytes of extended"),
    "extended headers without end": (
        raw(*[header_block("p", 65536, tarfile.GNUTYPE_LONGLINK), b"x" * 65536] * 260),
        "65,536 bytes of extended header at byte",
    ),
    "a config of megabytes": (plus({CONFIG_FILE: b" " * (2 << 20)}), f"'{CONFIG_FILE}' is larger than 1,048,576"),
    "a large sidecar": (zip_plus({"golden.json": b" " * (17 << 20)}), "'golden.json' is larger than 16,777,216 bytes"),
    "a zip's size that lies": (
        patched(zip_plus({"golden.json": b" " * 99}), lambda d: struct.pack_into("<I", d, d.rfind(b"PK\1\2") + 24, 9)),
        "'golden.json' is damaged: Bad CRC-32",
    ),
    "a zip's directory elsewhere": (
        patched(zip_of, lambda d: struct.pack_into("<I", d, d.rfind(b"PK\5\6") + 16, 1 << 31)),
        "is damaged: it points to",
    ),
    "a member outside the zip": (
        patched(zip_of, lambda d: struct.pack_into("<I", d, d.find(b"PK\1\2") + 42, 1 << 31)),
        "is damaged: it points to",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_hostile_is_refused_by_name_and_leaves_nothing(case: str, good: Path, tmp_path: Path) -> None:
    make, message = HOSTILE[case]
    with pytest.raises(AdapterRefused, match=message):
        opened(tmp_path, make, files_of(good))
    assert list((tmp_path / "into").iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"good", "upload", "into"}


@pytest.mark.parametrize("writer", ["tar", "tar.gz", "zip"])
def test_too_many_members_are_refused(writer: str, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "MAX_MEMBERS", 20)
    opened(tmp_path, WRITERS[writer], files_of(good) | {f"{i}": b"" for i in range(18)})
    (tmp_path / "other").mkdir()
    with pytest.raises(AdapterRefused, match="upload has more than 20 members"):
        opened(tmp_path / "other", WRITERS[writer], files_of(good) | {f"{i}": b"" for i in range(19)})


def test_a_zip_whose_directory_is_huge_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=r"directory has .* bytes; at most 1,048,576 are read"):
        opened(tmp_path, zip_of, {f"{i:0100}": b"" for i in range(8000)})


@pytest.mark.parametrize("writer", ["tar.gz", "zip"])
@pytest.mark.parametrize("member", [WEIGHTS_FILE, "ignored.bin"])
def test_a_bomb_is_stopped_by_what_it_expands_to(writer: str, member: str, good: Path, tmp_path: Path) -> None:
    limit, files = 4 << 20, files_of(good)
    WRITERS[writer](tmp_path / "upload", files | {member: files.get(member, b"") + b"\0" * (32 << 20)})
    assert (tmp_path / "upload").stat().st_size < 100_000
    tracemalloc.start()
    try:
        if writer == "zip" and member == "ignored.bin":
            unpack(tmp_path / "upload", tmp_path / "into", limit)  # it is never expanded
        else:
            with pytest.raises(AdapterRefused, match=f"expands to more than {limit:,} bytes"):
                unpack(tmp_path / "upload", tmp_path / "into", limit)
            assert list((tmp_path / "into").iterdir()) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_of_many_megabytes_is_not_read_into_memory(kind: bytes, tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(gzip.compress(header_block("p", 64 << 20, kind) + b"1" * (64 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRefused, match="bytes of extended header"):
            unpack(tmp_path / "upload", tmp_path / "into")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_an_archive_larger_than_the_limit_is_not_read(good: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=r"upload has .* bytes; at most 1,000 are read"):
        opened(tmp_path, tar_of, files_of(good), max_bytes=1000)


def test_a_missing_archive_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(AdapterUnavailable, match="upload can't be read: No such file"):
        unpack(tmp_path / "upload", tmp_path / "into")


def test_what_lies_in_the_target_is_not_written_through(good: Path, tmp_path: Path) -> None:
    (tmp_path / "into").mkdir()
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "into" / CONFIG_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(AdapterUnavailable, match=r"adapter_config\.json can't be unpacked: File exists"):
        opened(tmp_path, tar_of, files_of(good))
    assert (tmp_path / "victim").read_text() == "mine"
