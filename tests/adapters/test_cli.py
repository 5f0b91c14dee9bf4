"""`python -m adapters`, as an operator uses it."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.__main__ import main
from tests.adapters.support import SHAPE, ref_of, tensors, write_adapter


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"n_layer": SHAPE.n_layer, "n_embd": SHAPE.n_embd, "n_inner": SHAPE.n_inner}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Shell:
    """Runs commands against one store."""

    def __init__(self, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._flags = ["--store-dir", str(tmp_path / "store"), "--model", str(model)]
        self._capsys = capsys

    def __call__(self, command: str, *arguments: object) -> Any:
        """What it prints as JSON."""
        assert main([command, *map(str, arguments), *self._flags, "--json"]) == 0, self._capsys.readouterr().err
        return json.loads(self._capsys.readouterr().out)

    def text(self, command: str, *arguments: object) -> str:
        """What it prints for people."""
        assert main([command, *map(str, arguments), *self._flags]) == 0
        return self._capsys.readouterr().out

    def fails(self, command: str, *arguments: object) -> str:
        """What it says when it fails."""
        assert main([command, *map(str, arguments), *self._flags]) == 1
        return self._capsys.readouterr().err


@pytest.fixture
def shell(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(tmp_path, model, capsys)


def test_a_voices_life(shell: Shell, tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / f"v{seed}" / "poe", tensors(seed=seed)) for seed in (1, 2)]
    digests = [ref_of(folder).digest for folder in folders]
    assert shell("validate", folders[0])["digest"] == digests[0]
    assert shell("list") == [], "validating publishes nothing"
    assert [shell("publish", folder)["digest"] for folder in folders] == digests
    assert shell("publish", folders[0], "--name", "edgar")["name"] == "edgar"
    assert shell("alias", "poe@stable", f"poe@{digests[0][:8]}")["targets"] == [[f"poe@{digests[0]}", 1.0]]
    assert shell("alias", "canary", "poe:90,edgar:10")["targets"] == [["poe", 90.0], ["edgar", 10.0]]
    assert [row["name"] for row in shell("list")] == ["canary", "edgar", "poe", "poe@stable"]
    assert shell("rollback", "poe")["digest"] == digests[0]
    shown = shell("show", "poe")
    assert (shown["versions"], shown["aliases"]) == (digests[:1], ["canary", "poe@stable"])
    assert [event["action"] for event in shown["history"]] == ["rollback", "publish", "publish"]
    assert shell("show", "poe@stable")["targets"] == [[f"poe@{digests[0]}", 1.0]]
    for name in ("canary", "poe@stable", "poe", "edgar"):
        assert shell("remove", name) == {"name": name, "removed": True}
    assert shell("list") == []
    assert shell("gc") == {"deleted": []}, "not within the grace"
    assert sorted(shell("gc", "--grace", 0)["deleted"]) == sorted(digests)


def test_what_people_read(shell: Shell, tmp_path: Path) -> None:
    shell("publish", write_adapter(tmp_path / "poe"))
    shell("alias", "edgar", "poe")
    listed = shell.text("list").splitlines()
    assert listed[0].split() == ["NAME", "DIGEST", "WHAT"]
    assert listed[1].split() == ["edgar", "alias", "poe", "x", "1"]
    assert listed[2].startswith("poe ")
    assert "rank 2, attn.c_attn, mlp.c_proj" in listed[2]
    assert "name: poe" in shell.text("show", "poe")


def test_a_changed_folder_is_told(shell: Shell, tmp_path: Path) -> None:
    write_adapter(tmp_path / "dropped" / "poe")
    flags = ("--adapters-dir", tmp_path / "dropped")
    assert shell("list", *flags)[0]["folder_changed"] is None
    write_adapter(tmp_path / "dropped" / "poe", tensors(seed=5))
    now = ref_of(tmp_path / "dropped" / "poe").digest
    assert shell("list", *flags)[0]["folder_changed"] == now
    assert "its folder has changed: publish it" in shell.text("list", *flags)
    shell("publish", tmp_path / "dropped" / "poe", *flags)
    assert (row := shell("list", *flags)[0])["digest"] == now
    assert row["folder_changed"] is None


def test_what_goes_wrong_is_said_in_a_line(shell: Shell, tmp_path: Path) -> None:
    shell("publish", write_adapter(tmp_path / "poe"))
    assert "peft_type is 'IA3'" in shell.fails("validate", write_adapter(tmp_path / "ia3", peft_type="IA3"))
    zero = {name: value * 0 for name, value in tensors().items()}
    assert "has no effect" in shell.fails("publish", write_adapter(tmp_path / "zero", zero))
    assert "nowhere' is no folder; expected a PEFT adapter folder" in shell.fails("publish", tmp_path / "nowhere")
    assert "'pow' does not exist; the nearest are 'poe'" in shell.fails("show", "pow")
    assert "no earlier value to roll back to" in shell.fails("rollback", "poe")
    assert "'nobody'" in shell.fails("remove", "nobody")
    assert "'twain'" in shell.fails("alias", "edgar", "twain")
    assert "the weight is 'x'" in shell.fails("alias", "edgar", "poe:x")
    assert "'a b' is no adapter name" in shell.fails("publish", tmp_path / "poe", "--name", "a b")
    assert len(shell("list")) == 1


def test_a_model_without_sizes_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["list", "--store-dir", str(tmp_path / "store"), "--model", str(tmp_path)]
    assert main(flags) == 1
    assert "config.json tells no sizes of a GPT-2" in capsys.readouterr().err
