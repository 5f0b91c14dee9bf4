"""Folders that lie: each is refused by name, none costs much, and what was published before stays as it was."""

import os
import shutil
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import adapters.tensorfile as tensorfile
from adapters.archive import unpack
from adapters.errors import AdapterError, AdapterRefused, AdapterUnavailable
from adapters.store import AdapterStore
from adapters.validation import WEIGHTS_FILE, inspect_adapter
from adapters.values import check_values
from tests.adapters.archives import entry, tar, tar_of, zip_of
from tests.adapters.hostile import HOSTILE, value, write_raw
from tests.adapters.support import SHAPE, write_adapter


def check(folder: Path) -> None:
    check_values(folder, inspect_adapter(folder, "a", SHAPE))


@pytest.mark.parametrize("case", HOSTILE)
def test_a_folder_that_lies_is_refused_by_name_and_cheaply(case: str, tmp_path: Path) -> None:
    make, message = HOSTILE[case]
    make(write_adapter(tmp_path / "a"))
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRefused, match=message) as caught:
            check(tmp_path / "a")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000, "a message is for people"
    assert str(caught.value).isprintable()
    assert peak < 16 << 20


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_largest_finite_numbers_are_taken(dtype: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    value(dtype, {"F32": 0x7F7FFFFF, "F16": 0x7BFF, "BF16": 0x7F7F}[dtype])(folder)
    check(folder)


def test_a_full_directory_of_json_costs_a_bounded_amount(tmp_path: Path) -> None:
    write_raw(write_adapter(tmp_path), b'{"a":[' + b"[]," * 650_000 + b"[]]}", b"")
    tracemalloc.start()
    try:
        with pytest.raises(AdapterRefused, match="has no dtype"):
            check(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 96 << 20


@pytest.mark.parametrize("keep", [4, 100, 1500])
def test_weights_that_become_shorter_while_they_are_read_may_be_tried_again(
    keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path)
    size = (folder / WEIGHTS_FILE).stat().st_size
    real = os.fstat

    def before_it_shrank(descriptor: int) -> Any:
        status = real(descriptor)
        return os.stat_result([*status[:6], size, *status[7:]]) if status.st_size == keep else status

    os.truncate(folder / WEIGHTS_FILE, keep)
    monkeypatch.setattr(tensorfile.os, "fstat", before_it_shrank)
    with pytest.raises(AdapterUnavailable, match=f"{WEIGHTS_FILE} became shorter while it was read"):
        check(folder)


@pytest.mark.parametrize("file", ["README.md", "golden.json"])
def test_a_sidecar_that_is_no_file_is_refused(file: str, tmp_path: Path) -> None:
    os.mkfifo(write_adapter(tmp_path / "a") / file)
    with pytest.raises(AdapterRefused, match=f"{file} is not a regular file"):
        AdapterStore(tmp_path / "store", SHAPE).stage("a", tmp_path / "a")


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_what_was_published_stays_as_it_was(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", SHAPE)
    found = store.stage("poe", write_adapter(tmp_path / "good"))
    store.publish(found, "test")
    good = everything(Path(found.ref.path))
    folders = {path.name for path in (tmp_path / "store").rglob("*")}
    for number, (make, _) in enumerate(HOSTILE.values()):
        make(write_adapter(tmp_path / f"{number}"))
        with pytest.raises(AdapterError):
            store.publish(store.stage("poe", tmp_path / f"{number}"), "test")
    for name in ("../poe", "pое", "poe\0", "p/oe", "ｐoe", "..", "", "poe ", "poe\n", "poé", "a" * 65):
        with pytest.raises(AdapterRefused, match="is no adapter name"):
            store.stage(name, tmp_path / "good")
    archives = {
        "up.zip": lambda t: zip_of(t, good | {"../../objects/x": b"?"}),
        "link.tar": lambda t: tar(t, [entry(WEIGHTS_FILE, kind=tarfile.SYMTYPE, link=found.ref.path)]),
        "abs.tar": lambda t: tar_of(t, good | {f"{found.ref.path}/{WEIGHTS_FILE}": b"?"}),
    }
    for name, make in archives.items():
        make(tmp_path / name)
        with store.objects.staging() as into, pytest.raises(AdapterRefused):
            unpack(tmp_path / name, into)
    assert everything(Path(found.ref.path)) == good
    assert store.get("poe").ref == found.ref
    assert {path.name for path in (tmp_path / "store").rglob("*")} == folders
    assert [entry.name for entry in store.entries()] == ["poe"]
    shutil.rmtree(tmp_path / "good")
    again = AdapterStore(tmp_path / "store", SHAPE)
    assert again.get("poe").ref == found.ref
