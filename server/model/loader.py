"""Hugging Face GPT-2 checkpoint -> GPT2, one tensor at a time, every name and shape accounted for."""

import json
import mmap
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from adapters.tensorfile import open_tensors
from server.model.backend import Backend, Linear, Norm, choose_backend
from server.model.config import GPT2Config, ModelError
from server.model.gpt2 import GPT2, Layer

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_STORED = ("F32", "F16", "BF16")
# Causal masks that old checkpoints carry as tensors; they hold no learned value.
_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, kernels: str = "auto") -> GPT2:
    """Read the checkpoint in `folder` (`model.safetensors` or its shards) as `dtype` onto `device`.

    `kernels`: auto, or off to compute with torch alone.

    Tensor names may start with `transformer.` or not; `lm_head.weight`, if present, must equal the tied embedding.
    Holds the weights and at most one tensor more in memory. Raises ModelError naming the tensor: missing, surplus,
    misshapen or unreadable.
    """
    config = GPT2Config.read(folder)
    reader = _Reader(folder)
    shapes = expected_shapes(config)
    surplus = sorted(reader.names - shapes.keys() - {"lm_head.weight"})
    if surplus := [name for name in surplus if not _BUFFER.fullmatch(name)]:
        raise ModelError(
            f"{folder}: tensors that GPT-2 does not have: {', '.join(surplus[:5])} ({len(surplus)} in all)"
        )

    def take(name: str) -> torch.Tensor:
        tensor = reader.read(name, shapes[name], device, dtype)
        if name == "wte.weight" and "lm_head.weight" in reader.names:
            head = reader.read("lm_head.weight", shapes[name], device, dtype)
            if not torch.equal(head, tensor):
                raise ModelError(
                    f"{folder}: lm_head.weight differs from wte.weight; only tied embeddings are supported"
                )
        return tensor

    return build_model(config, choose_backend(device, dtype, kernels), take)


def build_model(config: GPT2Config, backend: Backend, take: Callable[[str], torch.Tensor]) -> GPT2:
    """A GPT2 of the tensors that `take` gives by name, once each, shaped as `expected_shapes` says."""

    def linear(name: str) -> Linear:
        return backend.linear(take(f"{name}.weight"), take(f"{name}.bias"))

    def norm(name: str) -> Norm:
        return backend.norm(take(f"{name}.weight"), take(f"{name}.bias"), config.layer_norm_epsilon)

    wte = backend.embedding(take("wte.weight"))
    layers = [
        Layer(
            ln_1=norm(f"h.{i}.ln_1"),
            attn_c_attn=linear(f"h.{i}.attn.c_attn"),
            attn_c_proj=linear(f"h.{i}.attn.c_proj"),
            ln_2=norm(f"h.{i}.ln_2"),
            mlp_c_fc=linear(f"h.{i}.mlp.c_fc"),
            mlp_c_proj=linear(f"h.{i}.mlp.c_proj"),
        )
        for i in range(config.n_layer)
    ]
    return GPT2(config, backend, wte, take("wpe.weight"), layers, norm("ln_f"))


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a GPT-2 checkpoint, by its name without the `transformer.` prefix.

    The four projections are Conv1D: (in, out), not nn.Linear's (out, in).
    """
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, config.n_embd),
        "wpe.weight": (config.n_positions, config.n_embd),
    }
    for i in range(config.n_layer):
        shapes |= {f"h.{i}.{name}": shape for name, shape in _layer_shapes(config).items()}
    return shapes | {"ln_f.weight": (config.n_embd,), "ln_f.bias": (config.n_embd,)}


def _layer_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    d, inner = config.n_embd, config.n_inner
    return {
        "ln_1.weight": (d,),
        "ln_1.bias": (d,),
        "attn.c_attn.weight": (d, 3 * d),
        "attn.c_attn.bias": (3 * d,),
        "attn.c_proj.weight": (d, d),
        "attn.c_proj.bias": (d,),
        "ln_2.weight": (d,),
        "ln_2.bias": (d,),
        "mlp.c_fc.weight": (d, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, d),
        "mlp.c_proj.bias": (d,),
    }


class _Reader:
    """The tensors of a checkpoint's files, under their names without the `transformer.` prefix."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where: dict[str, tuple[Path, str]] = {}
        names = [(path, name) for path in self._files() for name in _names(path)]
        for path, name in names:
            self._where[name.removeprefix("transformer.")] = (path, name)
        if len(self._where) != len(names):
            counts = Counter(name.removeprefix("transformer.") for _, name in names)
            raise ModelError(f"{folder}: tensor {counts.most_common(1)[0][0]!r} is in the checkpoint twice")
        self.names = frozenset(self._where)

    def read(self, name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if name not in self._where:
            raise ModelError(f"{self._folder}: tensor {name!r} {shape} is missing from the checkpoint")
        path, full_name = self._where[name]
        # Opened anew for each tensor: closing unmaps the file, so that its pages don't add up to a second copy.
        with open_tensors(path, "pt") as file:
            header = file.get_slice(full_name)
            found, stored = tuple(header.get_shape()), header.get_dtype()
            if stored not in _STORED:
                raise ModelError(
                    f"{self._folder}: tensor {full_name!r} is {stored}; expected one of {', '.join(_STORED)}"
                )
            if found != shape:
                raise ModelError(
                    f"{self._folder}: tensor {full_name!r} has shape {found}, config.json makes it {shape}"
                )
            stored_tensor: torch.Tensor = file.get_tensor(full_name)
            if device.type != "cpu":
                return stored_tensor.to(device, dtype, copy=True)
            return _own_mapping(stored_tensor.shape, dtype).copy_(stored_tensor)

    def _files(self) -> list[Path]:
        single, index = self._folder / WEIGHTS_FILE, self._folder / INDEX_FILE
        if single.is_file():
            return [single]
        if index.is_file():
            try:
                weight_map: dict[str, Any] = json.loads(index.read_text())["weight_map"]
                names = sorted({str(value) for value in weight_map.values()})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{index} is not a valid shard index: {error!r}") from None
            shards = [self._folder / name for name in names]
            if missing := [path.name for path in shards if not path.is_file()]:
                raise ModelError(f"{self._folder}: shards named in {INDEX_FILE} are missing: {', '.join(missing)}")
            return shards
        raise ModelError(f"{self._folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE} (pickles are not read)")


def _own_mapping(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor in a mapping of its own: freed after packing, it leaves no hole in the heap behind it."""
    memory = mmap.mmap(-1, max(1, shape.numel() * dtype.itemsize))
    return torch.frombuffer(memory, dtype=dtype, count=shape.numel()).view(shape)


def _names(path: Path) -> list[str]:
    try:
        with open_tensors(path, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} can't be read as safetensors: {error}") from None
