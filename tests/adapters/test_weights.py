"""Reading the values: scaling folded in, and what has no effect or no finite value refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adapters.adapter import ModuleKey
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.validation import WEIGHTS_FILE, inspect_adapter
from adapters.values import check_values
from adapters.weights import load_adapter
from tests.adapters.support import PREFIX, SHAPE, ref_of, tensors, write_adapter

NAMES = sorted(tensors())


def load(folder: Path, dtype: torch.dtype = torch.float32):
    return load_adapter(ref_of(folder), SHAPE, dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_pair_is_what_peft_adds(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, lora_alpha=3, use_rslora=True)
    weights = {name: torch.from_numpy(value).to(stored) for name, value in tensors().items()}
    save_file(weights, folder / WEIGHTS_FILE)
    adapter = load(folder, dtype)
    assert set(adapter.pairs) == {ModuleKey(i, t) for i in (0, 1) for t in ("attn.c_attn", "mlp.c_proj")}
    for key, pair in adapter.pairs.items():
        a, b = (weights[f"{PREFIX}{key}.lora_{side}.weight"].float() for side in "AB")
        assert (pair.a.dtype, pair.b.dtype) == (dtype, dtype)
        assert torch.equal(pair.a, a.to(dtype))
        assert torch.equal(pair.b, (b * (3 / 2**0.5)).T.to(dtype)), "the scaling is folded in before the cast"
    assert adapter.nbytes == sum(value.size for value in tensors().values()) * dtype.itemsize


def test_weights_in_memory_do_not_follow_the_file(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    pair = load(folder).pairs[ModuleKey(0, "attn.c_attn")]
    before = pair.a.clone()
    size = (folder / WEIGHTS_FILE).stat().st_size
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\x55" * (size - size // 2))
    assert torch.equal(pair.a, before)
    assert pair.a.is_contiguous()
    assert pair.b.is_contiguous()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NAMES[0], NAMES[-1]])
def test_a_value_that_is_not_finite_is_refused_by_its_tensor(value: float, name: str, tmp_path: Path) -> None:
    weights = tensors()
    weights[name][-1, -1] = value
    with pytest.raises(AdapterRefused, match=f"{name}' holds values that are not finite"):
        load(write_adapter(tmp_path, weights))


def test_a_value_that_overflows_by_its_scaling_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, lora_alpha=1e39)
    with pytest.raises(AdapterRefused, match=r"lora_B.weight' .*too large for torch.float32 .scaling 5e\+38"):
        load(folder)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_value_that_the_served_dtype_cannot_hold_is_refused(side: str, tmp_path: Path) -> None:
    weights = tensors()
    weights[f"{PREFIX}h.1.mlp.c_proj.lora_{side}.weight"][0, 0] = 1e5
    folder = write_adapter(tmp_path, weights)
    with pytest.raises(AdapterRefused, match=f"h.1.mlp.c_proj.lora_{side}.weight' .*too large for torch.float16"):
        load(folder, torch.float16)
    assert load(folder, torch.bfloat16).pairs, "bfloat16 has the range"


@pytest.mark.parametrize("case", ["B is zero", "A is zero", "their product is zero", "alpha is zero"])
def test_an_adapter_without_effect_is_refused(case: str, tmp_path: Path) -> None:
    weights = tensors()
    for name, value in weights.items():
        if case == f"{name[-8]} is zero":  # lora_A.weight, lora_B.weight
            value[:] = 0
        elif case == "their product is zero":
            (value[0] if "lora_A" in name else value[:, 1])[:] = 0
    with pytest.raises(AdapterRefused, match="has no effect: B A is zero in every module"):
        load(write_adapter(tmp_path, weights, lora_alpha=0 if case == "alpha is zero" else 4))


def test_one_module_with_an_effect_is_enough(tmp_path: Path) -> None:
    weights = tensors()
    for name, value in weights.items():
        if "lora_B" in name and name != NAMES[-1]:
            value[:] = 0
    assert len(load(write_adapter(tmp_path, weights)).pairs) == 4


def test_an_effect_may_be_tiny(tmp_path: Path) -> None:
    weights = {name: np.full_like(value, 1e-3) for name, value in tensors().items()}
    assert load(write_adapter(tmp_path, weights)).pairs


def test_an_effect_that_rounding_hides_is_none(tmp_path: Path) -> None:
    weights = {name: value * np.float32(1e-42 if "lora_B" in name else 1) for name, value in tensors().items()}
    assert all(value.any() for value in weights.values())
    folder = write_adapter(tmp_path, weights)
    with pytest.raises(AdapterRefused, match="has no effect"):
        load(folder)
    with pytest.raises(AdapterRefused, match="has no effect"):
        check_values(folder, inspect_adapter(folder, "tiny", SHAPE))


@pytest.mark.parametrize("what", ["weights", "alpha"])
def test_what_changed_on_disk_is_not_served_under_the_old_digest(what: str, tmp_path: Path) -> None:
    ref = ref_of(write_adapter(tmp_path))
    write_adapter(tmp_path, tensors(seed=1)) if what == "weights" else write_adapter(tmp_path, lora_alpha=9)
    now = ref_of(tmp_path).digest
    with pytest.raises(AdapterUnavailable, match=f"changed on disk .*{ref.digest[:12]} then, {now[:12]} now"):
        load_adapter(ref, SHAPE, torch.float32)
    write_adapter(tmp_path)
    assert load_adapter(ref, SHAPE, torch.float32).digest == ref.digest, "the old content is back"


def test_what_is_gone_from_disk_may_come_back(tmp_path: Path) -> None:
    ref = ref_of(write_adapter(tmp_path))
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterUnavailable, match=f"no {WEIGHTS_FILE}"):
        load_adapter(ref, SHAPE, torch.float32)
    write_adapter(tmp_path)
    assert load_adapter(ref, SHAPE, torch.float32).digest == ref.digest


def test_values_that_vanish_in_the_type_it_is_served_in_are_no_effect(tmp_path: Path) -> None:
    small = {name: value * (1e-9 if "lora_B" in name else 30) for name, value in tensors().items()}
    folder = write_adapter(tmp_path, small)
    assert load(folder).pairs
    with pytest.raises(AdapterRefused, match=r"too small for torch\.float16; serve with another --dtype"):
        load(folder, torch.float16)
