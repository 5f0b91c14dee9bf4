"""Checkpoints as they come: prefixes, shards, dtypes, tied heads; every tensor accounted for, by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.model import loader
from server.model.config import GPT2Config, ModelError
from server.model.loader import INDEX_FILE, WEIGHTS_FILE, build_model, expected_shapes, load_model
from server.model.source import resolve_model
from tests.oracle import make_checkpoint

CPU = torch.device("cpu")
FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make_checkpoint(folder, n_layer=2, n_embd=16, n_head=2, n_positions=8)
    return folder


@pytest.fixture
def weights(saved: Path) -> dict[str, torch.Tensor]:
    return load_file(saved / WEIGHTS_FILE)


def put(folder: Path, saved: Path, weights: dict[str, torch.Tensor], **fields: object) -> Path:
    folder.mkdir(exist_ok=True)
    config = json.loads((saved / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / WEIGHTS_FILE, {"format": "pt"})
    return folder


def put_shards(folder: Path, saved: Path, weights: dict[str, torch.Tensor]) -> Path:
    put(folder, saved, {}, n_layer=2)
    (folder / WEIGHTS_FILE).unlink()
    names = sorted(weights)
    weight_map = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: weights[n] for n in names if weight_map[n] == file}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def named(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors that the model is built of, under the checkpoint's names."""
    taken: dict[str, torch.Tensor] = {}

    def build(config, backend, take):
        def recorded(name: str) -> torch.Tensor:
            assert name not in taken
            taken[name] = take(name)
            return taken[name]

        return build_model(config, backend, recorded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "build_model", build)
        load_model(folder, CPU, dtype)
    return taken


def assert_loaded(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    loaded = named(folder, dtype)
    assert set(loaded) == {name.removeprefix("transformer.") for name in weights}
    for name, tensor in weights.items():
        got = loaded[name.removeprefix("transformer.")]
        assert got.dtype == dtype
        assert torch.equal(got, tensor.to(dtype)), name


def test_with_the_prefix_as_transformers_saves_it(saved: Path, weights: dict[str, torch.Tensor]) -> None:
    assert all(name.startswith("transformer.") for name in weights)
    assert_loaded(saved, weights)
    nbytes = sum(tensor.nbytes for tensor in weights.values())
    assert load_model(saved, CPU, torch.float32).nbytes == nbytes


def test_without_the_prefix_as_openais_gpt2_is(saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(2)}
    masks |= {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    assert_loaded(put(tmp_path, saved, bare | masks), weights)


def test_in_shards(saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert_loaded(put_shards(tmp_path, saved, weights), weights)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_into_any(
    stored: torch.dtype, dtype: torch.dtype, saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    stored_weights = {name: tensor.to(stored) for name, tensor in weights.items()}
    assert_loaded(put(tmp_path, saved, stored_weights, dtype=str(stored).removeprefix("torch.")), stored_weights, dtype)


def test_a_tied_head_is_accepted_and_another_refused(
    saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    head = weights["transformer.wte.weight"].clone()
    assert_loaded(put(tmp_path, saved, weights | {"lm_head.weight": head}), weights)
    head[3, 3] += 1
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from wte\.weight; only tied"):
        load_model(put(tmp_path, saved, weights | {"lm_head.weight": head}), CPU, torch.float32)
    with pytest.raises(ModelError, match=r"'lm_head\.weight' has shape \(210, 16\), config.json makes it \(211, 16\)"):
        load_model(put(tmp_path, saved, weights | {"lm_head.weight": head[:210].clone()}), CPU, torch.float32)


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "ln_f.bias", "h.0.ln_1.weight", "h.1.attn.c_attn.bias"])
def test_a_missing_tensor_is_named(name: str, saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    del weights[f"transformer.{name}"]
    with pytest.raises(ModelError, match=f"tensor '{name}' .* is missing from the checkpoint"):
        load_model(put(tmp_path, saved, weights), CPU, torch.float32)


@pytest.mark.parametrize(
    "name",
    ["transformer.h.2.ln_1.weight", "score.weight", "h.0.attn.q_attn.weight", "h.0.crossattention.c_attn.weight"],
)
def test_a_surplus_tensor_is_named(name: str, saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    surplus = name.removeprefix("transformer.")
    with pytest.raises(ModelError, match=rf"tensors that GPT-2 does not have: {surplus} \(1 in all\)"):
        load_model(put(tmp_path, saved, weights | {name: torch.ones(16)}), CPU, torch.float32)


def test_a_misshapen_tensor_is_named(saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for wrong, shape in (
        (weights[FC].T.contiguous(), r"\(64, 16\)"),
        (weights[FC][:, :60].contiguous(), r"\(16, 60\)"),
    ):
        with pytest.raises(ModelError, match=rf"'{FC}' has shape {shape}, config.json makes it \(16, 64\)"):
            load_model(put(tmp_path, saved, weights | {FC: wrong}), CPU, torch.float32)


def test_a_tensor_that_is_there_twice_is_named(saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tensor 'h\.1\.mlp\.c_fc\.weight' is in the checkpoint twice"):
        load_model(put(tmp_path, saved, weights | {"h.1.mlp.c_fc.weight": weights[FC].clone()}), CPU, torch.float32)
    folder = put_shards(tmp_path / "shards", saved, weights)
    for file in sorted(folder.glob("*.safetensors")):
        save_file(load_file(file) | {FC: weights[FC]}, file)
    with pytest.raises(ModelError, match=r"tensor 'h\.1\.mlp\.c_fc\.weight' is in the checkpoint twice"):
        load_model(folder, CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_a_tensor_of_a_kind_that_is_not_served_is_named(
    dtype: torch.dtype, saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=rf"'{FC}' is (I8|F8_E4M3|F64); expected one of F32, F16, BF16"):
        load_model(put(tmp_path, saved, weights | {FC: weights[FC].to(dtype)}), CPU, torch.float32)


def test_files_that_are_missing_or_broken_are_named(
    saved: Path, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = put_shards(tmp_path, saved, weights)
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors can't be read as safetensors"):
        load_model(folder, CPU, torch.float32)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"shards named in .* are missing: model-00002-of-00003\.safetensors"):
        load_model(folder, CPU, torch.float32)
    for content in ("{", "{}", "[]", '{"weight_map": []}', '{"weight_map": null}'):
        (folder / INDEX_FILE).write_text(content)
        with pytest.raises(ModelError, match="is not a valid shard index"):
            load_model(folder, CPU, torch.float32)
    (folder / INDEX_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match=f"has neither {WEIGHTS_FILE} nor {INDEX_FILE} .pickles are not read"):
        load_model(folder, CPU, torch.float32)


PEAK = """
import re, sys, torch
from pathlib import Path
from server.model.loader import load_model

def high_water() -> int:
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

torch.ones(64, 64) @ torch.ones(64, 64)
before = high_water()
model = load_model(Path(sys.argv[1]), torch.device("cpu"), torch.float32)
print((high_water() - before) / model.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_loading_holds_the_weights_and_little_more(saved: Path, tmp_path: Path) -> None:
    fields = {"n_layer": 12, "n_embd": 512, "n_head": 8, "vocab_size": 4000, "n_positions": 64, "n_inner": 2048}
    config = GPT2Config.parse(json.loads((saved / "config.json").read_text()) | fields)
    weights = {name: torch.full(shape, 0.5) for name, shape in expected_shapes(config).items()}
    folder = put(tmp_path, saved, weights, **fields)
    del weights
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) <= 1.3, f"peak is {done.stdout.strip()} times the weights"


HUB = "import sys; from server.model.source import resolve_model; resolve_model(sys.argv[1])"


def test_a_hub_that_cannot_be_reached_leaves_two_ways_out(tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, "openai-community/gpt2"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
    )
    message = done.stderr.splitlines()[-1]
    assert message.startswith("server.model.config.ModelError: model 'openai-community/gpt2' is not in the local cache")
    assert "the hub can't be reached" in message
    assert "--model DIR" in message
    assert "leave --model out for the demo base" in message


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "~/no-such-model", "a/b/c"])
def test_a_directory_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=f"model directory '{name}' does not exist"):
        resolve_model(name)


def test_a_name_that_no_hub_takes_is_refused() -> None:
    with pytest.raises(ModelError, match="'two words' is neither a directory nor a hub id"):
        resolve_model("two words")


def test_a_directory_is_taken_as_it_is(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert resolve_model(saved.name) == saved.resolve()
