"""Two processes on one run: the adapter of one, its files written once, and what fails on one fails on both."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import forward
from training.__main__ import main
from training.config import TrainConfig
from training.distributed import auto_dtype
from training.output import settled

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 120


def flags(output: Path, base: Path, data: Path, *more: str) -> list[str]:
    """Batches of 7 rows: 4 on one process, 3 on the other; the last batch of 74 rows has 4."""
    return [
        "--name", "voice", "--output", str(output), "--model", str(base), "--data", str(data), "--eval-samples", "4",
        "--batch-size", "7", "--epochs", "2", "--rank", "4", "--lr", "1e-2", "--seed", "3", "--device", "cpu",
        "--dtype", "float32", *more,
    ]  # fmt: skip


def launch(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run a module or a script in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )


def assert_same(one: Path, two: Path) -> None:
    """Adapters and held-out losses equal but for the order of sums."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    alone, shared = (json.loads((folder / "report.json").read_text())["training"] for folder in (one, two))
    assert shared["steps"] == alone["steps"] == 22
    assert shared["tokens"] == alone["tokens"]
    for (step, loss), (same_step, same_loss) in zip(alone["valid_loss"], shared["valid_loss"], strict=True):
        assert same_step == step
        assert same_loss == pytest.approx(loss, abs=1e-3)
    assert alone["valid_loss"][-1][1] < alone["valid_loss"][0][1] - 0.1, "it has learned something"


@pytest.fixture(scope="module")
def alone(tiny_base: Path, quotes_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of one process."""
    output = tmp_path_factory.mktemp("one")
    assert main(flags(output, tiny_base, quotes_file)) == 0
    return output / "voice"


def test_two_processes_make_the_adapter_of_one(alone: Path, tiny_base: Path, quotes_file: Path, tmp_path: Path) -> None:
    done = launch("-m", "training", *flags(tmp_path, tiny_base, quotes_file))
    assert done.returncode == 0, done.stderr
    assert_same(alone, tmp_path / "voice")
    assert [folder.name for folder in tmp_path.iterdir()] == ["voice"]
    assert {file.name for file in (tmp_path / "voice").iterdir()} == {file.name for file in alone.iterdir()}
    assert done.stdout.count("wrote ") == 1
    assert done.stdout.count("step 0/22") == 1


def test_a_choir_of_two_processes_tells_of_a_bad_group_when_all_is_written(
    tiny_base: Path, quotes_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "more.jsonl"
    again = json.dumps({"author": "Nobody", "quote": "Again and again."}) + "\n"
    file.write_text(quotes_file.read_text() + 25 * again)
    run = flags(tmp_path / "out", tiny_base, file, "--epochs", "0.5")[2:]
    done = launch("-m", "training", "choir", "--min-quotes", "15", *run)
    assert done.returncode != 0
    assert done.stderr.count("1 of 5 voices did not pass") == 1
    assert "nobody: --data" in done.stderr
    report = json.loads((tmp_path / "out" / "choir.json").read_text())
    assert [voice["name"] for voice in report["voices"]] == [f"author-{i}" for i in range(4)]
    assert [voice["name"] for voice in report["failed"]] == ["nobody"]


def test_two_go_on_with_the_run_of_one(
    alone: Path, tiny_base: Path, quotes_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, plain_loss = 0, forward.frozen_head_losses

    def interrupted(*args):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls > 11:
            raise KeyboardInterrupt
        return plain_loss(*args)

    run = flags(tmp_path, tiny_base, quotes_file)
    with monkeypatch.context() as patch:
        patch.setattr(forward, "frozen_head_losses", interrupted)
        assert main(run) == 130
    done = launch("-m", "training", *run, "--resume")
    assert done.returncode == 0, done.stderr
    assert "step 0/22" not in done.stdout
    assert_same(alone, tmp_path / "voice")


@pytest.mark.parametrize("more", [("--lr", "-1"), ("--data", "/nowhere.jsonl"), ("--resume",)])
def test_an_error_is_told_once_and_ends_both(
    more: tuple[str, ...], tiny_base: Path, quotes_file: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    done = launch("-m", "training", *flags(tmp_path, tiny_base, quotes_file, *more))
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:") or ": error:" in line]
    assert more[0] in line
    assert time.monotonic() - start < LIMIT_SECONDS / 2
    assert not list(tmp_path.iterdir())


def test_what_fails_on_one_is_raised_on_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
import sys
from training.distributed import join
from training.errors import ConfigError, DataError, TrainingError

ranks = join("cpu")

def told(work):
    try:
        return str(work())
    except TrainingError as error:
        return repr(error)

def fails():
    if ranks.rank == 1:
        raise DataError("not on this node")

def sevens():
    return 7 if ranks.first else 1 / 0

said = [told(lambda: ranks.everywhere(fails)), told(lambda: ranks.first_does(sevens)),
        told(lambda: ranks.agree(ranks.rank, "differs")), told(lambda: ranks.agree(3, "differs"))]
ranks.leave()
open(sys.argv[1] + str(ranks.rank), "w").write("; ".join(said))
""")
    done = launch(str(script), str(tmp_path / "said"))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        said = (tmp_path / f"said{rank}").read_text()
        assert said == "DataError('not on this node'); 7; ConfigError('differs'); None"


def test_ensure_starts_goes_on_or_does_nothing(alone: Path, tmp_path: Path) -> None:
    config = TrainConfig(name="voice", output=str(tmp_path), ensure=True)
    fresh = settled(config)
    assert fresh is not None
    assert not fresh.resume
    config.partial.mkdir()  # a run that was killed before it had written anything
    begun = settled(config)
    assert begun is not None
    assert begun.overwrite
    (config.partial / "run.json").write_text("{}")
    unfinished = settled(config)
    assert unfinished is not None
    assert (unfinished.resume, unfinished.overwrite) == (True, False)
    assert settled(TrainConfig(name="voice", output=str(alone.parent), ensure=True)) is None


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"avx2": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_is_bfloat16_on_cpus_that_compute_it(
    capabilities: dict[str, bool], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert auto_dtype(torch.device("cpu")) == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert auto_dtype(torch.device("cpu")) == "float32", "torch 2.11 doesn't say"
