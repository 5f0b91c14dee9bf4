"""What expands to more than it may does so in little memory: the address space is limited, `tracemalloc` sees no C."""

import gzip
import io
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.lora_config import CONFIG_FILE
from adapters.validation import WEIGHTS_FILE
from tests.adapters.support import write_adapter

HUGE = 300 << 20
LIMITED = """
import resource, sys
from pathlib import Path
from adapters.adapter import BaseShape
from adapters.archive import unpack
from adapters.errors import AdapterRefused
from adapters.validation import inspect_adapter

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (160 << 20),) * 2)
try:
    if Path(sys.argv[1]).is_dir():
        inspect_adapter(Path(sys.argv[1]), "a", BaseShape(2, 8, 20))
    else:
        unpack(Path(sys.argv[1]), Path(sys.argv[2]), 200 << 20)
except AdapterRefused as error:
    print(error)
"""


def tar_header(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = HUGE, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def gzipped(target: Path, first: bytes) -> Path:
    with gzip.open(target, "wb", compresslevel=1) as file:
        file.write(first)
        for _ in range(HUGE >> 20):
            file.write(bytes(1 << 20))
    return target


def zipped(target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        made.writestr(CONFIG_FILE, "{}")
        with made.open(WEIGHTS_FILE, "w") as member:
            for _ in range(HUGE >> 20):
                member.write(bytes(1 << 20))
    return target


def folder(target: Path, header: bytes, announced: int) -> Path:
    write_adapter(target)
    with (target / WEIGHTS_FILE).open("wb") as file:
        file.write(struct.pack("<Q", announced) + header)
        file.truncate(HUGE)  # sparse: takes no space
    return target


def nested(target: Path) -> Path:
    """A zip of zips: not followed."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr(CONFIG_FILE, bytes(32 << 20))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        for i in range(1000):
            made.writestr(f"{i}.zip", inner.getvalue())
    return target


BOMBS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zeros in a tar.gz": (lambda t: gzipped(t, tar_header(WEIGHTS_FILE)), "expands to more than 209,715,200 bytes"),
    "ignored zeros": (lambda t: gzipped(t, tar_header("optimizer.pt")), "expands to more than 209,715,200 bytes"),
    "a pax header": (lambda t: gzipped(t, tar_header("p", tarfile.XHDTYPE)), "314,572,800 bytes of extended header"),
    "zeros in a zip": (zipped, "expands to more than 209,715,200 bytes"),
    "a zip of zips": (nested, f"holds no {CONFIG_FILE}"),
    "a header as large as the file": (lambda t: folder(t, b"{", HUGE - 8), "has a header of 314,572,792 bytes"),
    "a header of brackets": (lambda t: folder(t, b"[" + b"[]," * 600_000 + b"1]", 1_800_003), "holds list, expected"),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_takes_little_memory(case: str, tmp_path: Path) -> None:
    make, message = BOMBS[case]
    command = [sys.executable, "-c", LIMITED, str(make(tmp_path / "upload")), str(tmp_path / "into")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert message in done.stdout
    assert not (tmp_path / "into").exists() or list((tmp_path / "into").iterdir()) == []
