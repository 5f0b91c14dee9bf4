"""The search on a tiny base: counted, gone on with, and its best recipe trains."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import yaml

from training.__main__ import main
from training.config import TrainConfig
from training.errors import ConfigError
from training.search import Choice, Range, _study, space


def flags(output: Path, base: Path, data: Path, *more: str) -> list[str]:
    return [
        "search", "--output", str(output), "--model", str(base), "--data", str(data), "--batch-size", "16",
        "--max-tokens", "1000", "--tune", "rank=2,4", "--tune", "lr=1e-3..1e-2", "--tune", "dropout=",
        "--tune", "targets=c_attn,c_attn+c_fc", "--device", "cpu", *more,
    ]  # fmt: skip


def test_a_search_goes_on_and_its_best_recipe_trains(
    tiny_base: Path, quotes_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = flags(tmp_path, tiny_base, quotes_file)
    assert main([*run, "--trials", "2"]) == 0
    first = capsys.readouterr().out
    assert [f"\ntrial   {n}" in first for n in range(3)] == [True, True, False]
    assert main([*run, "--trials", "3"]) == 0
    going_on, _, best = capsys.readouterr().out.partition("best first:")
    assert [f"\ntrial   {n}" in going_on for n in range(4)] == [False, False, True, False]
    losses = [float(line.split()[2]) for line in best.splitlines() if line.startswith("trial")]
    assert len(losses) == 3
    assert losses == sorted(losses)
    assert [file.name for file in tmp_path.iterdir()] == ["search"]

    assert main([*run, "--trials", "4", "--seed", "9"]) == 2
    assert "holds another search (seed differ)" in capsys.readouterr().err
    recipe = yaml.safe_load((tmp_path / "search" / "recipe.yaml").read_text())
    assert recipe["rank"] in (2, 4)
    assert recipe["targets"] in (["c_attn"], ["c_attn", "c_fc"])
    more = ["--name", "best", "--output", str(tmp_path), "--eval-samples", "4"]
    assert main(["--recipe", str(tmp_path / "search" / "recipe.yaml"), *more]) == 0
    report = json.loads((tmp_path / "best" / "report.json").read_text())
    assert report["training"]["valid_loss"][-1][1] == pytest.approx(losses[0], abs=1e-4), "the trial's loss again"


def test_an_adapter_of_the_name_keeps_its_recipe_and_an_unfinished_run_its_checkpoint(
    tiny_base: Path, quotes_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = flags(tmp_path, tiny_base, quotes_file, "--trials", "1", "--name", "mine")
    (tmp_path / ".mine.partial").mkdir()
    assert main(run) == 2
    assert "has an unfinished run of this name" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    assert main(run) == 2
    assert "has an adapter of this name" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["adapter_config.json"]
    assert (tmp_path / ".mine.partial").is_dir()


def test_a_search_from_an_adapter_keeps_its_shape(
    tiny_base: Path, quotes_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--output", str(tmp_path), "--model", str(tiny_base), "--data", str(quotes_file), "--rank", "3"]
    assert main(["--name", "origin", "--epochs", "0.5", "--eval-samples", "2", *data]) == 0
    run = ["search", "--init-from", str(tmp_path / "origin"), "--trials", "1", "--epochs", "0.5", "--tune", "epochs="]
    assert main([*run, *data[:-2]]) == 0
    recipe = yaml.safe_load((tmp_path / "search" / "recipe.yaml").read_text())
    assert (recipe["rank"], recipe["init_from"]) == (3, str(tmp_path / "origin"))
    assert len(recipe["init_digest"]) == 64
    assert main([*run, *data[:-2], "--tune", "rank=2,4"]) == 2
    assert "has its rank; leave one out" in capsys.readouterr().err


def test_a_storage_nowhere_is_told_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "--storage", str(tmp_path / "no" / "study.db")]) == 2
    assert "there is no such folder; make it first" in capsys.readouterr().err


def test_a_search_goes_on_on_another_processor(tmp_path: Path) -> None:
    """Where `auto` means another dtype; one that was given is held against the study's."""
    before = TrainConfig(name="search", dtype="bfloat16")
    now, file = replace(before, dtype="float32"), tmp_path / "study.db"
    _study(optuna, before, space([]), file, auto=True)
    _study(optuna, now, space([]), file, auto=True)
    with pytest.raises(ConfigError, match="holds another search \\(dtype differ\\)"):
        _study(optuna, now, space([]), file, auto=False)


def test_spaces() -> None:
    assert space([])["lr"] == Range(3e-4, 1e-2, False)
    assert space([])["rank"] == Choice(("4", "8", "16"))
    assert space(["warmup=0..50"])["warmup"] == Range(0, 50, True)
    assert "epochs" not in space(["epochs="])
    for wrong in ("lr=5..1", "rank=a", "rank=0,1", "nosuch=1", "lr", "schedule=cosine..linear", "rslora=maybe",
                  "dropout=2..3", "dropout=0..1"):  # fmt: skip
        with pytest.raises(ConfigError):
            space([wrong])


def test_without_optuna_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", "--output", str(tmp_path)]) == 2
    assert "pip install 'chorus-serve[search]'" in capsys.readouterr().err
