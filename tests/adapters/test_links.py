"""Links and files that change under the reader: where an adapter may lie, and no crash whatever happens meanwhile."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adapters.validation as validation
import adapters.weights as weights
from adapters.adapter import AdapterManifest
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.lora_config import CONFIG_FILE
from adapters.tensorfile import open_regular
from adapters.validation import WEIGHTS_FILE, inspect_adapter
from tests.adapters.support import SHAPE, ref_of, tensors, write_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    write_adapter(tmp_path / "outside")
    return (tmp_path / "root").resolve()


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("via", ["link", "link to a link", "relative link"])
def test_a_file_that_links_out_of_the_roots_is_refused(file: str, via: str, root: Path) -> None:
    folder = write_adapter(root / "a")
    (folder / file).unlink()
    target = root.parent / "outside" / file
    if via == "link to a link":
        (root / "between").symlink_to(target)
        target = root / "between"
    (folder / file).symlink_to(Path("../../outside", file) if via == "relative link" else target)
    with pytest.raises(AdapterRefused, match=f"{file} is a link that leads outside of where adapters may lie"):
        inspect_adapter(folder, "a", SHAPE, [root])
    assert inspect_adapter(folder, "a", SHAPE, [root, root.parent / "outside"]).rank == 2
    assert inspect_adapter(folder, "a", SHAPE).rank == 2, "who names no roots follows links"


def test_a_folder_that_links_out_of_the_roots_is_refused(root: Path) -> None:
    (root / "a").symlink_to(root.parent / "outside")
    with pytest.raises(AdapterRefused, match=f"{WEIGHTS_FILE} is a link that leads outside"):
        inspect_adapter(root / "a", "a", SHAPE, [root])


def test_a_snapshot_of_links_inside_a_root_is_taken(root: Path) -> None:
    blobs = write_adapter(root / "blobs")
    (root / "snapshot").mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (root / "snapshot" / file).symlink_to(Path("../blobs", file))
    assert inspect_adapter(root / "snapshot", "a", SHAPE, [root]).ref.digest == ref_of(blobs).digest


def test_a_link_that_turns_after_the_file_was_opened_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened through a link to the outside, which points inside by the time that it is resolved."""
    inside, link = write_adapter(root / "a") / WEIGHTS_FILE, root / "link"
    link.symlink_to(root.parent / "outside" / WEIGHTS_FILE)
    real = os.path.realpath

    def turned(path: Path) -> str:
        link.unlink()
        link.symlink_to(inside)
        return real(path)

    monkeypatch.setattr(os.path, "realpath", turned)
    with pytest.raises(AdapterRefused, match="link is a link that leads outside"), open_regular(link, 1 << 20, [root]):
        pytest.fail("opened")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("change", [longer, rewritten])
def test_a_file_that_changes_while_it_is_read_may_be_tried_again(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path)
    reading = open_regular(folder / CONFIG_FILE, 1 << 20)
    assert reading.__enter__().read()
    change(folder / CONFIG_FILE)
    with pytest.raises(AdapterUnavailable, match=f"{CONFIG_FILE} changed while it was read"):
        reading.__exit__(None, None, None)
    write_adapter(tmp_path)
    real = validation.read_lora_spec

    def meanwhile(*arguments: object) -> object:
        change(folder / WEIGHTS_FILE)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(validation, "read_lora_spec", meanwhile)
    with pytest.raises(AdapterUnavailable, match=f"{WEIGHTS_FILE} changed while it was read"):
        inspect_adapter(folder, "a", SHAPE)


@pytest.mark.parametrize("after", [longer, rewritten, os.unlink, lambda path: os.truncate(path, 100)])
def test_weights_that_change_after_their_digest_was_taken_are_not_served(
    after: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path)
    ref, real = ref_of(folder), weights.inspect_adapter

    def then(*arguments: object) -> AdapterManifest:
        manifest = real(*arguments)  # type: ignore[arg-type]
        after(folder / WEIGHTS_FILE)
        return manifest

    monkeypatch.setattr(weights, "inspect_adapter", then)
    with pytest.raises(AdapterUnavailable, match=f"{WEIGHTS_FILE} of .* (changed while it was read|is gone)"):
        weights.load_adapter(ref, SHAPE, torch.float32)


CUT_WHILE_READ = """
import os, sys
from pathlib import Path
import torch
import adapters.weights as weights
from adapters.errors import AdapterUnavailable
from tests.adapters.support import SHAPE, ref_of

folder = Path(sys.argv[1])
ref, real = ref_of(folder), weights._tensor
def cut_first(file, header):
    os.truncate(folder / "adapter_model.safetensors", 3000)
    return real(file, header)
weights._tensor = cut_first
try:
    weights.load_adapter(ref, SHAPE, torch.float32)
except AdapterUnavailable as error:
    print(error)
"""


def test_weights_cut_off_while_they_are_loaded_do_not_kill_the_process(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, tensors(64), r=64)
    done = subprocess.run([sys.executable, "-c", CUT_WHILE_READ, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{WEIGHTS_FILE} became shorter while it was read\n"), done.stderr
