"""Small PEFT adapter folders written by hand, so that every field and tensor can be made wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from adapters.adapter import TARGETS, AdapterRef, BaseShape
from adapters.lora_config import CONFIG_FILE
from adapters.validation import WEIGHTS_FILE, inspect_adapter

SHAPE = BaseShape(n_layer=2, n_embd=8, n_inner=20)
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "mlp.c_proj"]}
PREFIX = "base_model.model.transformer."


def tensors(
    rank: int = 2, targets: tuple[str, ...] = ("attn.c_attn", "mlp.c_proj"), seed: int = 0, shape: BaseShape = SHAPE
) -> dict[str, np.ndarray]:
    """Random float32 weights for every layer, under PEFT's names."""
    assert set(targets) <= set(TARGETS)
    random = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for layer in range(shape.n_layer):
        for target in targets:
            n_in, n_out = shape.in_out(target)
            made[f"{PREFIX}h.{layer}.{target}.lora_A.weight"] = random.normal(size=(rank, n_in)).astype(np.float32)
            made[f"{PREFIX}h.{layer}.{target}.lora_B.weight"] = random.normal(size=(n_out, rank)).astype(np.float32)
    return made


def write_adapter(folder: Path, weights: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """CONFIG with `config` over it, and `weights` (default: `tensors()`), as PEFT saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG | config))
    save_file(tensors() if weights is None else weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    return folder


def write_config(folder: Path, **config: Any) -> Path:
    """Only the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG | config))
    return folder


def ref_of(folder: Path) -> AdapterRef:
    return inspect_adapter(folder, folder.name, SHAPE).ref
