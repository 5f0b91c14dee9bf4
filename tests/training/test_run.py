"""Whole runs on a tiny base: what is written, repeated, resumed and refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from adapters.validation import inspect_adapter
from server.model.config import GPT2Config
from training import forward
from training.__main__ import main
from training.base import Base

FILES = {
    "adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "report.json", "report.html", "golden.json",
    "loss.png", "README.md",
}  # fmt: skip


def flags(name: str, output: Path, base: Path, data: Path, *more: str) -> list[str]:
    return [
        "--name", name, "--output", str(output), "--model", str(base), "--data", str(data), "--eval-samples", "6",
        "--batch-size", "8", "--epochs", "2", "--rank", "4", "--seed", "3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_base: Path, quotes_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out")
    assert main(flags("voice", output, tiny_base, quotes_file)) == 0
    return output / "voice"


def test_the_folder_is_whole_and_nothing_else_is_left(trained: Path) -> None:
    assert {file.name for file in trained.iterdir()} == FILES
    assert all(file.stat().st_mode & 0o004 for file in trained.iterdir()), "a server may run as another user"
    assert [folder.name for folder in trained.parent.iterdir()] == ["voice"]


def test_the_server_takes_it_as_it_is(trained: Path, tiny_base: Path) -> None:
    manifest = inspect_adapter(trained, "voice", GPT2Config.read(tiny_base).adapter_shape)
    assert manifest.rank == 4
    assert set(manifest.targets) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_the_report_shows_base_beside_adapter(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    assert report["data"]["used"] == {"train": 74, "valid": 3, "test": 3, "heldout_authors": 0}
    assert report["training"]["steps"] == 20
    assert report["config"]["rank"] == 4
    assert {row["metric"] for row in report["rows"]} == set(report["metrics"])
    assert all(row["base"] is not None and row["adapter"] is not None for row in report["rows"])
    perplexity = next(row for row in report["rows"] if row["metric"] == "perplexity")
    assert perplexity["adapter"]["value"] < perplexity["base"]["value"]
    assert report["perplexity_ratio"]["test"]["high"] < 1


def test_golden_tokens_are_peft_generates(trained: Path, tiny_base: Path, base: Base) -> None:
    golden = json.loads((trained / "golden.json").read_text())
    model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base), trained).eval()
    for entry in golden["prompts"]:
        ids = torch.tensor([entry["prompt_token_ids"]])
        out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=24, pad_token_id=base.eos)
        assert out[0, ids.shape[1] :].tolist() == entry["token_ids"]


def interrupt(patch: pytest.MonkeyPatch, after: int) -> None:
    """Have Ctrl-C come in the pass after so many."""
    calls = 0
    plain_loss = forward.frozen_head_losses

    def interrupted(*args):
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls > after:
            raise KeyboardInterrupt
        return plain_loss(*args)

    patch.setattr(forward, "frozen_head_losses", interrupted)


def test_the_same_seed_gives_the_same_adapter_also_after_an_interruption(
    trained: Path, tiny_base: Path, quotes_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = flags("voice", tmp_path, tiny_base, quotes_file)
    with monkeypatch.context() as patch:
        interrupt(patch, after=11)
        assert main(run) == 130
    assert not (tmp_path / "voice").exists()
    assert main(run) == 2  # an unfinished run isn't thrown away silently
    assert main([*run, "--resume", "--lr", "0.1"]) == 2  # nor mixed with another
    assert main([*run, "--resume"]) == 0
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "voice", trained))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_an_adapter_that_was_being_replaced_is_put_back(
    tiny_base: Path, quotes_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run died between moving the old adapter away and moving the new one in. It goes on."""
    (tmp_path / ".voice.partial" / "replaced").mkdir(parents=True)
    assert main(flags("voice", tmp_path, tiny_base, quotes_file)) == 2
    assert "voice exists: choose another --name, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "voice").is_dir()
    (tmp_path / ".voice.partial" / "replaced" / "of a clean-up").mkdir(parents=True)
    assert main([*flags("voice", tmp_path, tiny_base, quotes_file), "--overwrite", "--epochs", "0.2"]) == 0
    assert {file.name for file in (tmp_path / "voice").iterdir()} == FILES


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_other_data_of_any_split_is_another_run(
    split: str, tiny_base: Path, quotes_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = quotes_file.read_text().splitlines(keepends=True)
    for name, part in (("train", rows[:60]), ("valid", rows[60:70]), ("test", rows[70:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    run = flags("voice", tmp_path / "out", tiny_base, tmp_path)
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        assert main(run) == 130
    file = tmp_path / f"{split}.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert main([*run, "--resume"]) == 2
    assert "this is another run (texts_sha256 was" in capsys.readouterr().err


def test_auto_is_what_it_was_where_a_run_goes_on(
    tiny_base: Path, quotes_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node with another processor."""
    run = flags("voice", tmp_path, tiny_base, quotes_file)
    monkeypatch.setattr("training.run.auto_dtype", lambda device: "bfloat16")
    with monkeypatch.context() as patch:
        interrupt(patch, after=11)
        assert main(run) == 130
    monkeypatch.setattr("training.run.auto_dtype", lambda device: "float32")
    assert main([*run, "--ensure"]) == 0
    assert json.loads((tmp_path / "voice" / "report.json").read_text())["config"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_run_file_that_cannot_be_read_is_told(
    content: bytes, tiny_base: Path, quotes_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".voice.partial").mkdir()
    (tmp_path / ".voice.partial" / "run.json").write_bytes(content)
    assert main([*flags("voice", tmp_path, tiny_base, quotes_file), "--resume"]) == 2
    assert "run.json can't be read; start anew with --overwrite" in capsys.readouterr().err


def test_a_gpu_that_is_too_small_is_told(
    tiny_base: Path, quotes_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forward, "frozen_head_losses", full)
    assert main(flags("voice", tmp_path, tiny_base, quotes_file)) == 2
    assert "memory is too small for 1 x --batch-size 8 rows: give a smaller one" in capsys.readouterr().err


def test_an_interrupted_replacement_is_gone_on_with(
    trained: Path, tiny_base: Path, quotes_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice" / "old").touch()
    run = flags("voice", tmp_path, tiny_base, quotes_file)
    with monkeypatch.context() as patch:
        interrupt(patch, after=11)
        assert main([*run, "--overwrite"]) == 130
    assert (tmp_path / "voice" / "old").exists(), "it stays until the new one is whole"
    assert main(run) == 2
    assert "voice exists" in capsys.readouterr().err
    assert main([*run, "--resume"]) == 0
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "voice", trained))
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert not (tmp_path / "voice" / "old").exists()
    assert main([*run, "--resume"]) == 2, "there is nothing more to go on with"


def test_an_adapter_is_replaced_only_when_told_to(
    trained: Path, tiny_base: Path, quotes_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = flags("voice", trained.parent, tiny_base, quotes_file)
    assert main(run) == 2
    assert "exists: choose another --name, or --overwrite" in capsys.readouterr().err


def test_a_single_step_learns_something(tiny_base: Path, quotes_file: Path, tmp_path: Path) -> None:
    """Transformers' schedules begin with a learning rate of 0."""
    run = flags("voice", tmp_path, tiny_base, quotes_file, "--max-tokens", "10")
    assert main(run) == 0
    assert json.loads((tmp_path / "voice" / "report.json").read_text())["training"]["steps"] == 1
    weights = load_file(tmp_path / "voice" / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
