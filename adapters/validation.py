"""Looks at an adapter folder without torch and without reading its weights into memory.

The safetensors header gives every tensor's name, dtype and shape: limits, completeness and fit to the base are
decided from it. What needs the values (finite, not all zero) is checked in `adapters.weights` when they are read.
"""

import hashlib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from adapters.adapter import TARGETS, AdapterManifest, AdapterRef, BaseShape, LoraModule, ModuleKey
from adapters.errors import AdapterRefused
from adapters.golden import Golden, read_golden
from adapters.lora_config import CONFIG_FILE, LoraSpec, read_lora_spec
from adapters.tensorfile import TensorHeader, chunks, open_regular, read_headers

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_WEIGHTS_BYTES = 1 << 30
_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?:transformer\.)?h\.(0|[1-9][0-9]*)"
    rf"\.({'|'.join(map(re.escape, TARGETS))})\.lora_([AB])\.weight"
)


def inspect_adapter(
    folder: Path, name: str, shape: BaseShape, roots: Collection[Path] | None = None
) -> AdapterManifest:
    """Check a PEFT adapter folder against a base of `shape` and describe it.

    `roots`: resolved folders that its files must lie in, whatever links lead there; None follows links anywhere.
    Raises AdapterRefused (says which field or tensor, and what was expected), AdapterUnavailable on I/O errors.
    """
    try:
        with open_regular(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES, roots) as file:
            headers = read_headers(file, WEIGHTS_FILE)
            spec = read_lora_spec(folder, shape, roots)
            modules = _match(headers, spec, shape)
            digest = _content_digest(file, headers, modules, read_golden(folder))
            stat = os.fstat(file.fileno())
    except FileNotFoundError:
        other = sorted(ascii(p.name)[1:-1] for p in folder.glob("*.bin"))[:3] if folder.is_dir() else []
        hint = f" ({', '.join(other)} is a pickle: convert it to safetensors)" if other else ""
        raise AdapterRefused(f"no {WEIGHTS_FILE} in {folder.name}{hint}") from None
    ref = AdapterRef(digest, name, str(folder))
    return AdapterManifest(ref, modules, stat.st_size, spec.base_model, stat.st_mtime)


def _content_digest(
    file: BinaryIO, headers: dict[str, TensorHeader], modules: tuple[LoraModule, ...], golden: Golden | None
) -> str:
    """sha256 over what decides the adapter's effect: each module's rank and scaling, each tensor's bytes.

    And over its golden prompts, where it has some: they decide whether it is served. Metadata, tensor order in the file
    and fields that don't change the forward pass leave it as it is.
    """
    digest = hashlib.sha256()
    for module in modules:
        digest.update(f"{module.key} {module.rank} {module.scaling!r}\n".encode())
        for tensor in (module.a_name, module.b_name):
            header = headers[tensor]
            digest.update(f"{header.dtype} {list(header.shape)}\n".encode())
            for chunk in chunks(file, header, WEIGHTS_FILE):
                digest.update(chunk)
    for prompt in golden.prompts if golden is not None else ():
        digest.update(f"golden {prompt.prompt_token_ids} {prompt.token_ids} {prompt.logprobs}\n".encode())
    return digest.hexdigest()


def _match(headers: dict[str, TensorHeader], spec: LoraSpec, shape: BaseShape) -> tuple[LoraModule, ...]:
    """Pair every tensor with its module; every tensor must be used and every configured module complete."""
    names: dict[tuple[ModuleKey, str], str] = {}
    for name in sorted(headers):
        found = _TENSOR_NAME.fullmatch(name)
        if found is None:
            raise AdapterRefused(f"tensor {name!r} is not a LoRA weight of a GPT-2 projection: {_why(name)}")
        key = ModuleKey(int(found[1]), found[2])
        if key.layer >= shape.n_layer:
            raise AdapterRefused(f"tensor {name!r} is for layer {key.layer}; the base has {shape.n_layer} layers")
        if key not in spec.modules:
            raise AdapterRefused(f"tensor {name!r} adapts {key}, which {CONFIG_FILE} does not target")
        if (key, found[3]) in names:
            raise AdapterRefused(f"tensors {names[key, found[3]]!r} and {name!r} are for the same weight")
        names[key, found[3]] = name
    modules: list[LoraModule] = []
    for key, (rank, scaling) in sorted(spec.modules.items()):
        missing = [side for side in "AB" if (key, side) not in names]
        if missing:
            raise AdapterRefused(f"{key} is targeted by {CONFIG_FILE} but its lora_{missing[0]} is not in the file")
        module = LoraModule(key, rank, scaling, names[key, "A"], names[key, "B"])
        n_in, n_out = shape.in_out(key.target)
        for tensor, expected in ((module.a_name, (rank, n_in)), (module.b_name, (n_out, rank))):
            header = headers[tensor]
            if header.shape != expected:
                raise AdapterRefused(f"tensor {tensor!r} has shape {header.shape}, this base needs {expected}")
        modules.append(module)
    return tuple(modules)


def _why(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "DoRA is not supported"
    if "modules_to_save" in name or "wte" in name or "lm_head" in name:
        return "embeddings, new tokens and whole saved modules would change the frozen base"
    return "another architecture, or a kind of adapter that is not supported"
