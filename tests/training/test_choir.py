"""A choir's voices are the adapters that each would be alone; one that fails, or was there before, changes no other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training import choir_run
from training.__main__ import main
from training.base import Base
from training.choir import configs, groups, slug
from training.choir_report import summary
from training.config import TrainConfig
from training.errors import DataError
from training.sources import RawRow
from training.voice import Voice

NAMES = [f"author-{i}" for i in range(4)]


def flags(output: Path, base: Path, data: Path, *more: str) -> list[str]:
    return [
        "--output", str(output), "--model", str(base), "--data", str(data), "--eval-samples", "4", "--batch-size", "5",
        "--epochs", "3", "--rank", "2", "--seed", "3", "--dtype", "float32", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def quotes(quotes_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four authors with 20, 19, 18 and 17 quotes: their voices end at different steps."""
    rows = [json.loads(line) for line in quotes_file.read_text().splitlines()]
    kept = [row for i, row in enumerate(rows) if i >= 4 * int(row["author"][-1])]
    file = tmp_path_factory.mktemp("choir-data") / "quotes.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return file


@pytest.fixture(scope="module")
def choir(tiny_base: Path, quotes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("choir")
    assert main(["choir", "--min-quotes", "10", "--together", "3", *flags(output, tiny_base, quotes)]) == 0
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("number", [1, 3])
def test_a_voice_is_what_it_would_be_alone(
    number: int, choir: Path, tiny_base: Path, quotes: Path, tmp_path: Path
) -> None:
    alone = ["--name", NAMES[number], "--author", f"Author {number}", *flags(tmp_path, tiny_base, quotes)]
    assert main(alone) == 0
    expected, found = weights(tmp_path / NAMES[number]), weights(choir / NAMES[number])
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)
    reports = [json.loads((folder / NAMES[number] / "report.json").read_text()) for folder in (tmp_path, choir)]
    losses = [[loss for _, loss in report["training"]["valid_loss"]] for report in reports]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert reports[0]["data"]["used"] == reports[1]["data"]["used"]
    assert (choir / NAMES[number] / "recipe.yaml").read_text() == (tmp_path / NAMES[number] / "recipe.yaml").read_text()


def test_voices_differ(choir: Path) -> None:
    first, *others = (weights(choir / name) for name in NAMES)
    for other in others:
        assert max(float((first[name] - other[name]).abs().max()) for name in first) > 1e-3


def test_one_that_fails_is_told_and_leaves_the_others_as_they_are(
    choir: Path, tiny_base: Path, quotes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Author 1's weights are NaN from its second step on."""
    plain = Voice.take_step

    def poisoned(self: Voice, loss: float) -> None:
        plain(self, loss)
        if self.config.name == "author-1" and self.history.steps == 2:
            for parameter in self.parameters.values():
                parameter.data.fill_(torch.nan)

    run = ["choir", "--min-quotes", "10", "--together", "3", *flags(tmp_path, tiny_base, quotes)]
    with monkeypatch.context() as patch:
        patch.setattr(Voice, "take_step", poisoned)
        assert main(run) == 2
    told = capsys.readouterr().err
    assert "1 of 4 voices did not pass" in told
    assert "author-1: the loss is no longer finite" in told or "author-1: the held-out loss is no longer" in told
    for name in ("author-0", "author-2", "author-3"):
        one, other = weights(tmp_path / name), weights(choir / name)
        assert all(torch.equal(one[key], other[key]) for key in other)

    assert main(run) == 2
    assert "--resume to leave the finished ones" in capsys.readouterr().err
    shutil.rmtree(tmp_path / ".author-1.partial")
    before = (tmp_path / "author-0" / "report.json").stat().st_mtime_ns
    assert main([*run, "--resume"]) == 0
    assert (tmp_path / "author-0" / "report.json").stat().st_mtime_ns == before
    for name, tensor in weights(choir / "author-1").items():
        torch.testing.assert_close(weights(tmp_path / "author-1")[name], tensor, atol=1e-4, rtol=1e-3)
    assert main([*run, "--resume", "--epochs", "2"]) == 2
    assert "author-0 was made by another recipe" in capsys.readouterr().err


def test_voices_that_were_there_before_a_gate_are_told_and_stay(
    choir: Path, tiny_base: Path, quotes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(choir, output)
    run = ["choir", "--min-quotes", "10", *flags(output, tiny_base, quotes), "--resume", "--gate"]
    assert main(run) == 3
    told = capsys.readouterr().err
    assert "4 of 4 voices did not pass" in told
    assert "author-0: eos_rate is" in told
    assert "It was published before" in told
    assert (output / "author-0" / "adapter_config.json").is_file()


def test_an_interrupted_choir_goes_on(
    choir: Path, tiny_base: Path, quotes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["choir", "--min-quotes", "10", "--together", "3", *flags(tmp_path, tiny_base, quotes)]
    with monkeypatch.context() as patch:
        interrupt(patch, after=20)
        assert main(run) == 130
    assert main([*run, "--resume"]) == 0
    for name in NAMES:
        for key, tensor in weights(choir / name).items():
            torch.testing.assert_close(weights(tmp_path / name)[key], tensor, atol=1e-4, rtol=1e-3)


def test_one_whose_checkpoint_cannot_be_read_leaves_the_others(
    choir: Path, tiny_base: Path, quotes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And an adapter that an interrupted --overwrite had not come to yet is replaced by --resume."""
    shutil.copytree(choir / NAMES[3], tmp_path / NAMES[3])
    old = (tmp_path / NAMES[3] / "report.json").stat().st_mtime_ns
    run = ["choir", "--min-quotes", "10", "--together", "3", *flags(tmp_path, tiny_base, quotes)]
    with monkeypatch.context() as patch:
        interrupt(patch, after=15)
        assert main([*run, "--overwrite"]) == 130
    (tmp_path / f".{NAMES[0]}.partial" / "state.pt").write_bytes(b"half")
    (tmp_path / f".{NAMES[1]}.partial" / "run.json").write_text("{")
    capsys.readouterr()
    assert main([*run, "--resume"]) == 2
    told = capsys.readouterr().err
    assert "2 of 4 voices did not pass" in told
    assert "author-0: --resume: " in told
    assert "state.pt can't be read" in told
    assert "run.json can't be read" in told
    assert (tmp_path / NAMES[3] / "report.json").stat().st_mtime_ns != old
    for name in NAMES[2:]:
        for key, tensor in weights(choir / name).items():
            torch.testing.assert_close(weights(tmp_path / name)[key], tensor, atol=1e-4, rtol=1e-3)


def test_a_finished_one_that_cannot_be_read_leaves_the_others(
    choir: Path, tiny_base: Path, quotes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "copy"
    shutil.copytree(choir, output)
    shutil.rmtree(output / NAMES[3])
    (output / NAMES[0] / "recipe.yaml").write_text("nosuch: 1\n")
    (output / NAMES[1] / "report.json").write_text("{")
    (output / NAMES[2] / "report.json").write_text('{"training": {}}')
    run = ["choir", "--min-quotes", "10", *flags(output, tiny_base, quotes), "--resume"]
    assert main(run) == 2
    told = capsys.readouterr().err
    assert "3 of 4 voices did not pass" in told
    assert "author-0: --recipe" in told
    assert "author-1: it was there before, and can't be measured" in told
    assert "author-2: it was there before, and can't be measured" in told
    assert (output / NAMES[3] / "report.json").is_file()
    voices = json.loads((output / "choir.json").read_text())
    assert [voice["name"] for voice in voices["voices"]] == [NAMES[3]]
    assert len(voices["failed"]) == 3


def test_overwrite_leaves_nothing_of_an_older_unfinished_choir(
    tiny_base: Path, quotes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ["choir", "--min-quotes", "10", *flags(tmp_path, tiny_base, quotes)]
    with monkeypatch.context() as patch:
        interrupt(patch, after=20)
        assert main(run) == 130
    again = [*run, "--together", "1", "--lr", "1e-3"]
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        assert main([*again, "--overwrite"]) == 130
    assert main([*again, "--resume", "--epochs", "3"]) == 0


def interrupt(patch: pytest.MonkeyPatch, after: int) -> None:
    """Have Ctrl-C come after so many steps of all voices."""
    steps = 0
    plain = Voice.take_step

    def interrupted(self: Voice, loss: float) -> None:
        nonlocal steps
        steps += 1
        if steps > after:
            raise KeyboardInterrupt
        plain(self, loss)

    patch.setattr(Voice, "take_step", interrupted)


def test_a_group_whose_rows_cannot_be_used_does_not_stop_the_others(
    tiny_base: Path, quotes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = quotes.read_text() + (json.dumps({"author": "Nobody", "quote": "Again and again."}) + "\n") * 21
    file = tmp_path / "more.jsonl"
    file.write_text(rows)
    run = ["choir", "--min-quotes", "18", *flags(tmp_path / "out", tiny_base, file, "--epochs", "1")]
    assert main(run) == 2
    assert "1 usable rows; give at least 3" in capsys.readouterr().err
    assert {folder.name for folder in (tmp_path / "out").iterdir() if folder.is_dir()} >= {"author-0", "author-1"}


def rows_of(**counts: int) -> dict[str, list[RawRow]]:
    rows = [
        {"author": name, "tags": ["all", name], "quote": f"{name} {i}"} for name, n in counts.items() for i in range(n)
    ]
    return {"all": [RawRow("f", i, row) for i, row in enumerate(rows)]}


def test_groups_are_counted_without_what_is_held_out() -> None:
    raw: dict[str, Any] = rows_of(A=5, B=9, C=2) | {"heldout_authors": [RawRow("g", 1, {"author": "D"})] * 50}
    config = TrainConfig("choir")
    assert groups(config, "author", raw, 5) == [("B", 9), ("A", 5)]
    assert groups(config, "tag", raw, 5) == [("all", 16), ("B", 9), ("A", 5)]
    with pytest.raises(
        DataError, match=r"no author in column 'author' has --min-quotes 10 rows; the most have 'B' \(9\)"
    ):
        groups(config, "author", raw, 10)


def test_every_group_has_a_name_of_its_own() -> None:
    made = configs(TrainConfig("choir"), "author", ["Émile Zola", "Emile Zola", "孔子", "x" * 90])
    assert list(made) == ["emile-zola", "emile-zola-2", "voice", "x" * 64]
    assert made["emile-zola-2"].authors == ("Emile Zola",)
    assert slug("Oscar Wilde") == "oscar-wilde"


def test_the_table_says_whose_a_voice_is_where_its_name_does_not() -> None:
    def of(name: str, *authors: str) -> dict[str, Any]:
        return {"name": name, "authors": authors, "tags": [], "texts": 9, "ratio": None, "figures": {}, "gate": "none"}

    voices = [of("voice", "老子"), of("emile-zola-2", "Émile  Zola"), of("oscar-wilde", "Oscar Wilde")]
    report = {"voices": voices, "failed": [], "confusion": {"reason": "none"}}
    names = [line.split("  ")[0].split(" 9")[0].strip() for line in summary(report).splitlines()[1:]]
    assert names[0] == "voice (老子)"
    assert names[1].startswith("emile-zola-2 (")
    assert names[2] == "oscar-wilde"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--min-quotes", "0"], "--min-quotes is 0"),
        (["--author", "Oscar Wilde"], "--author chooses rows of one voice"),
        (["--together", "0"], "--together is 0"),
    ],
)
def test_bad_flags_are_told(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["choir", *more]) == 2
    assert message in capsys.readouterr().err


def test_the_base_is_loaded_once_and_stays_frozen(
    tiny_base: Path, quotes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    plain = Base.load

    def counted(self: Base) -> Any:
        loaded.append(plain(self))
        return loaded[-1]

    monkeypatch.setattr(choir_run.Base, "load", counted)
    run = ["choir", "--min-quotes", "10", "--together", "2", *flags(tmp_path, tiny_base, quotes, "--epochs", "1")]
    assert main(run) == 0
    assert len(loaded) == 1
    before = load_file(tiny_base / "model.safetensors")
    after = loaded[0].state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
