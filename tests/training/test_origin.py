"""A run that goes on from an adapter: what it takes of it, what it starts from, what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from adapters.validation import inspect_adapter
from training.__main__ import main
from training.base import Base
from training.cli import parse_args
from training.errors import ConfigError
from training.origin import adapter_shape

Run = tuple[Path, list[str]]


@pytest.fixture(scope="module")
def origin(tiny_base: Path, quotes_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An adapter of rank 3 with rsLoRA on two targets, and the flags that its run shares with those that go on."""
    output = tmp_path_factory.mktemp("origin")
    shared = [
        "--model", str(tiny_base), "--data", str(quotes_file), "--eval-samples", "2", "--epochs", "1", "--seed", "3",
        "--batch-size", "8",
    ]  # fmt: skip
    shape = ["--rank", "3", "--alpha", "5", "--rslora", "--targets", "c_attn,mlp.c_proj"]
    assert main(["--name", "first", "--output", str(output), *shared, *shape]) == 0
    return output / "first", shared


def digest(folder: Path, base: Base) -> str:
    return inspect_adapter(folder, folder.name, adapter_shape(base)).ref.digest


def losses(folder: Path) -> list[tuple[int, float]]:
    return json.loads((folder / "report.json").read_text())["training"]["valid_loss"]


def test_it_goes_on_where_the_other_ended_and_says_so(
    origin: Run, base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, shared = origin
    run = ["--name", "second", "--output", str(tmp_path), *shared]
    assert main([*run, "--init-from", str(folder)]) == 0
    second = tmp_path / "second"
    assert losses(second)[0][1] == losses(folder)[-1][1], "step 0 is the other's last"
    assert losses(second)[-1][1] < losses(folder)[-1][1]
    config = json.loads((second / "report.json").read_text())["config"]
    shape = {name: config[name] for name in ("rank", "alpha", "rslora", "targets")}
    assert shape == {"rank": 3, "alpha": 5, "rslora": True, "targets": ["c_attn", "mlp.c_proj"]}
    assert config["init_digest"] == digest(folder, base) != digest(second, base)
    assert f"Continued from first, digest `{digest(folder, base)}`." in (second / "README.md").read_text()

    again = ["--name", "third", "--output", str(tmp_path), "--recipe", str(second)]
    assert main(again) == 0, "its own recipe makes it again"
    third = tmp_path / "third" / "adapter_model.safetensors"
    assert third.read_bytes() == (second / "adapter_model.safetensors").read_bytes()
    moved = tmp_path / "recipe.yaml"
    moved.write_text((second / "recipe.yaml").read_text().replace(str(folder), str(second)))
    capsys.readouterr()
    assert main(["--name", "fourth", "--output", str(tmp_path), "--recipe", str(moved)]) == 2
    error = capsys.readouterr().err
    assert digest(folder, base) in error
    assert digest(second, base) in error
    assert parse_args([*again, "--init-from", str(second)]).init_digest is None, "another origin, given by hand"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "8"], "--rank is 8, and the adapter of --init-from {} has 3: leave --rank out"),
        (["--alpha", "6"], "--alpha is 6, and the adapter of --init-from {} has 5"),
        (["--no-rslora"], "--rslora is False, and the adapter of --init-from {} has True"),
        (["--targets", "c_attn"], "--targets is c_attn, and the adapter of --init-from {} has c_attn,mlp.c_proj"),
    ],
)
def test_another_shape_is_an_error(flags: list[str], message: str, origin: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--name", "x", "--init-from", str(origin[0]), *flags])
    assert message.format(origin[0]) in str(caught.value)


def test_the_same_shape_may_be_given(origin: Run) -> None:
    flags = ["--rank", "3", "--alpha", "5", "--rslora", "--targets", "mlp.c_proj,c_attn"]
    assert parse_args(["--name", "x", "--init-from", str(origin[0]), *flags]).targets == ("c_attn", "mlp.c_proj")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"h.0.attn.c_attn": 2}}, "its layers differ in rank, scaling or targets"),
        ({"alpha_pattern": {"c_attn": 2}}, "its layers differ in rank, scaling or targets"),
        ({"layers_to_transform": [1]}, "its layers differ in rank, scaling or targets"),
        ({"target_modules": ["h.0.attn.c_attn", "h.1.mlp.c_fc"]}, "its layers differ in rank, scaling or targets"),
        ({"lora_alpha": 2.5}, "lora_alpha is 2.5, and a run takes whole numbers"),
    ],
)
def test_what_a_run_cannot_have_is_refused(
    settings: dict, message: str, tiny_base: Path, origin: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} | settings
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_base), LoraConfig(**made))
    model.save_pretrained(str(tmp_path / "made"))
    flags = ["--name", "x", "--output", str(tmp_path), *origin[1], "--init-from", str(tmp_path / "made")]
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert f"--init-from {tmp_path / 'made'}: " in error
    assert message in error


def test_what_is_no_adapter_for_the_base_is_refused(
    origin: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, shared = origin

    def refused(origin: Path, *more: str) -> str:
        assert main(["--name", "x", "--output", str(tmp_path), *shared, "--init-from", str(origin), *more]) == 2
        return capsys.readouterr().err

    assert "there is no such folder" in refused(tmp_path / "nowhere")
    assert f"--init-from {tmp_path}: no adapter_config.json" in refused(tmp_path)
    assert "this base needs" in refused(folder, "--model", "models/demo")
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "adapter_model.bin is a pickle: convert it to safetensors" in refused(pickled)
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    assert "holds values that aren't finite" in refused(broken)
