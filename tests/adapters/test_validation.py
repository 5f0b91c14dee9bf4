"""What a folder's files say before any value is read: a misfit is refused by name, the digest is the content."""

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapters.tensorfile as tensorfile
from adapters.adapter import BaseShape, ModuleKey
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.validation import MAX_WEIGHTS_BYTES, WEIGHTS_FILE, inspect_adapter
from tests.adapters.support import PREFIX, SHAPE, ref_of, tensors, write_adapter

Weights = dict[str, np.ndarray]
A0 = f"{PREFIX}h.0.attn.c_attn.lora_A.weight"
B0 = f"{PREFIX}h.0.attn.c_attn.lora_B.weight"


def test_a_manifest_tells_what_the_adapter_is(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", base_model_name_or_path="some/base")
    manifest = inspect_adapter(folder, "poe", SHAPE)
    assert (manifest.ref.name, manifest.ref.path) == ("poe", str(folder))
    assert [module.key for module in manifest.modules] == [
        ModuleKey(layer, target) for layer in (0, 1) for target in ("attn.c_attn", "mlp.c_proj")
    ]
    assert {(module.rank, module.scaling) for module in manifest.modules} == {(2, 2.0)}
    assert manifest.targets == ("attn.c_attn", "mlp.c_proj")
    assert manifest.rank == 2
    assert manifest.nbytes == (folder / WEIGHTS_FILE).stat().st_size
    assert manifest.base_model == "some/base"
    assert manifest.created == (folder / WEIGHTS_FILE).stat().st_mtime


def test_the_largest_rank_is_the_adapters(tmp_path: Path) -> None:
    weights = tensors(5, ("attn.c_attn",)) | tensors(3, ("mlp.c_proj",))
    manifest = inspect_adapter(write_adapter(tmp_path, weights, rank_pattern={"c_attn": 5}, r=3), "a", SHAPE)
    assert manifest.rank == 5
    assert {(m.key.target, m.rank, m.scaling) for m in manifest.modules} == {
        ("attn.c_attn", 5, 4 / 5),
        ("mlp.c_proj", 3, 4 / 3),
    }


def replace(name: str, value: np.ndarray | None) -> Callable[[Weights], Weights]:
    """Put another tensor in `name`'s place, or none."""
    return lambda weights: {k: v for k, v in weights.items() if k != name} | ({} if value is None else {name: value})


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


LLAMA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MISFITS: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "A is missing": (replace(A0, None), "h.0.attn.c_attn is targeted by .* its lora_A is not in the file"),
    "B is missing": (replace(B0, None), "h.0.attn.c_attn is targeted by .* its lora_B is not in the file"),
    "no tensors": (lambda weights: {}, "lora_A is not in the file"),
    "A is too narrow": (replace(A0, zeros(2, 7)), rf"{A0}' has shape \(2, 7\), this base needs \(2, 8\)"),
    "B is too wide": (replace(B0, zeros(25, 2)), rf"{B0}' has shape \(25, 2\), this base needs \(24, 2\)"),
    "B is transposed": (replace(B0, zeros(2, 24)), rf"{B0}' has shape \(2, 24\)"),
    "A of another rank": (replace(A0, zeros(3, 8)), rf"{A0}' has shape \(3, 8\)"),
    "A has one dimension": (replace(A0, zeros(16)), rf"{A0}' has shape \(16,\)"),
    "integers": (replace(A0, zeros(2, 8, dtype="int32")), rf"{A0}' is I32; expected one of F32, F16, BF16"),
    "doubles": (replace(B0, zeros(24, 2, dtype="float64")), rf"{B0}' is F64; expected one of"),
    "a layer too many": (replace(A0.replace("h.0", "h.2"), zeros(2, 8)), "for layer 2; the base has 2 layers"),
    "not targeted": (
        replace(A0.replace("attn.c_attn", "mlp.c_fc"), zeros(2, 8)),
        "adapts h.0.mlp.c_fc, which adapter_config.json does not target",
    ),
    "one weight twice": (replace(A0.replace("transformer.", ""), zeros(2, 8)), "are for the same weight"),
    "another architecture": (replace(LLAMA, zeros(2, 8)), f"{LLAMA}' is not a LoRA weight .*another architecture"),
    "a DoRA vector": (
        replace(f"{PREFIX}h.0.attn.c_attn.lora_magnitude_vector", zeros(24)),
        "lora_magnitude_vector' .*DoRA is not supported",
    ),
    "a saved module": (replace("base_model.model.lm_head.weight", zeros(9, 8)), "would change the frozen base"),
    "an embedding": (replace(f"{PREFIX}wte.lora_embedding_A", zeros(2, 9)), "would change the frozen base"),
    "a bias": (replace(f"{PREFIX}h.0.attn.c_attn.bias", zeros(24)), "is not a LoRA weight of a GPT-2 projection"),
    "B's bias": (replace(f"{PREFIX}h.0.attn.c_attn.lora_B.bias", zeros(24)), "is not a LoRA weight"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_tensor_that_does_not_fit_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = MISFITS[case]
    with pytest.raises(AdapterRefused, match=message):
        inspect_adapter(write_adapter(tmp_path, change(tensors())), "a", SHAPE)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (BaseShape(2, 16, 20), "c_attn.lora_A.weight' has shape .2, 8., this base needs .2, 16."),
        (BaseShape(2, 8, 32), "mlp.c_proj.lora_A.weight' has shape .2, 20., this base needs .2, 32."),
        (BaseShape(1, 8, 20), "is for layer 1; the base has 1 layers"),
        (BaseShape(3, 8, 20), "h.2.attn.c_attn is targeted by .* lora_A is not in the file"),
    ],
    ids=["wider", "wider inside", "shallower", "deeper"],
)
def test_an_adapter_of_another_base_is_refused(shape: BaseShape, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=message):
        inspect_adapter(write_adapter(tmp_path), "a", shape)


def test_more_tensors_than_anyone_needs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorfile, "MAX_TENSORS", 7)
    with pytest.raises(AdapterRefused, match="holds 8 tensors, at most 7"):
        inspect_adapter(write_adapter(tmp_path), "a", SHAPE)


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    os.truncate(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES + 1)  # sparse: takes no space
    with pytest.raises(AdapterRefused, match=f"at most {MAX_WEIGHTS_BYTES:,} are read"):
        inspect_adapter(folder, "a", SHAPE)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 4, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"[]", b"PK\x03\x04" + b"\0" * 60],
    ids=["empty", "short", "header past the end", "header is a list", "a zip"],
)
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(AdapterRefused, match=r"not a valid safetensors file|holds list"):
        inspect_adapter(folder, "a", SHAPE)


def test_a_file_cut_off_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    whole = (folder / WEIGHTS_FILE).read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 40):
        (folder / WEIGHTS_FILE).write_bytes(whole[:length])
        with pytest.raises(AdapterRefused, match="not a valid safetensors file"):
            inspect_adapter(folder, "a", SHAPE)


def test_a_pickle_is_not_read_and_the_way_out_is_named(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterRefused, match=f"no {WEIGHTS_FILE} in {folder.name}$"):
        inspect_adapter(folder, "a", SHAPE)
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    with pytest.raises(AdapterRefused, match=r"adapter_model.bin is a pickle: convert it to safetensors"):
        inspect_adapter(folder, "a", SHAPE)


def test_what_cannot_be_opened_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path)
    monkeypatch.setattr(os, "open", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(AdapterUnavailable, match=f"{WEIGHTS_FILE} can't be read: Input/output error"):
        inspect_adapter(folder, "a", SHAPE)


def backwards(weights: Weights) -> bytes:
    """A safetensors file with the tensors in the opposite order; `save_file` always sorts them."""
    header, data = {}, b""
    for name in sorted(weights, reverse=True):
        value = weights[name]
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [len(data), len(data) + value.nbytes]}
        data += value.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


SAME: dict[str, Callable[[Path], object]] = {
    "another name": lambda folder: folder,
    "tensors in another order": lambda folder: (folder / WEIGHTS_FILE).write_bytes(backwards(tensors())),
    "metadata": lambda folder: save_file(load_file(folder / WEIGHTS_FILE), folder / WEIGHTS_FILE, {"who": "me"}),
    "names without transformer": lambda folder: save_file(
        {k.replace("transformer.", ""): v for k, v in load_file(folder / WEIGHTS_FILE).items()}, folder / WEIGHTS_FILE
    ),
    "inert fields": lambda folder: write_adapter(folder, lora_dropout=0.3, base_model_name_or_path="b", revision="x"),
    "the same targets in other words": lambda folder: write_adapter(folder, target_modules=r".*(c_attn|mlp\.c_proj)"),
    "the same scaling in other words": lambda folder: write_adapter(folder, alpha_pattern={".*": 4}, lora_alpha=99),
}
OTHER: dict[str, Callable[[Path], object]] = {
    "alpha": lambda folder: write_adapter(folder, lora_alpha=5),
    "alpha of one module": lambda folder: write_adapter(folder, alpha_pattern={"h.1.mlp.c_proj": 5}),
    "rslora": lambda folder: write_adapter(folder, use_rslora=True),
    "weights": lambda folder: write_adapter(folder, tensors(seed=1)),
    "dtype": lambda folder: write_adapter(folder, {k: v.astype("float16") for k, v in tensors().items()}),
    "fewer layers": lambda folder: write_adapter(
        folder, {k: v for k, v in tensors().items() if "h.0." in k}, layers_to_transform=0
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_content_has_the_same_digest(case: str, tmp_path: Path) -> None:
    first = ref_of(write_adapter(tmp_path / "first"))
    SAME[case](write_adapter(tmp_path / "second"))
    assert ref_of(tmp_path / "second").digest == first.digest


@pytest.mark.parametrize("case", OTHER)
def test_another_content_has_another_digest(case: str, tmp_path: Path) -> None:
    first = ref_of(write_adapter(tmp_path / "first"))
    OTHER[case](write_adapter(tmp_path / "second"))
    assert ref_of(tmp_path / "second").digest != first.digest


def test_every_byte_of_every_tensor_counts(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    raw = bytearray((folder / WEIGHTS_FILE).read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    digests = {ref_of(folder).digest}
    places = range(start, len(raw), 97)
    for place in places:
        changed = bytearray(raw)
        changed[place] ^= 1
        (folder / WEIGHTS_FILE).write_bytes(changed)
        digests.add(ref_of(folder).digest)
    assert len(digests) == len(places) + 1


def test_a_release_does_not_rename_what_has_not_changed(tmp_path: Path) -> None:
    weights = {k: np.arange(v.size, dtype=np.float32).reshape(v.shape) for k, v in tensors().items()}
    expected = "dcca373641608f6b29d0587693f90581b48a6ee68c56b6a0a9839b705b782646"
    assert ref_of(write_adapter(tmp_path, weights)).digest == expected
