"""Looks at an adapter folder without torch and without reading its weights into memory.

The safetensors header gives every tensor's name, dtype and shape: limits, completeness and fit to the base are
decided from it. What needs the values (finite, not all zero) is checked in `adapters.weights` when they are read.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from adapters.adapter import TARGETS, AdapterManifest, AdapterRef, BaseShape, LoraModule, ModuleKey
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.lora_config import CONFIG_FILE, LoraSpec, read_lora_spec
from adapters.tensorfile import open_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_WEIGHTS_BYTES = 1 << 30
MAX_TENSORS = 4096
DTYPES = ("F32", "F16", "BF16")
_TENSOR_NAME = re.compile(
    rf"base_model\.model\.(?:transformer\.)?h\.(\d+)\.({'|'.join(map(re.escape, TARGETS))})\.lora_([AB])\.weight"
)


@dataclass(frozen=True)
class TensorHeader:
    """One tensor as the safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]


def inspect_adapter(folder: Path, name: str, shape: BaseShape) -> AdapterManifest:
    """Check a PEFT adapter folder against a base of `shape` and describe it.

    Raises AdapterRefused (says which field or tensor, and what was expected), AdapterUnavailable on I/O errors.
    """
    weights = folder / WEIGHTS_FILE
    headers = _read_headers(weights)
    spec = read_lora_spec(folder, shape)
    modules = _match(headers, spec, shape)
    try:
        stat = weights.stat()
        digest = content_digest(weights, modules)
    except OSError as error:
        raise AdapterUnavailable(f"{WEIGHTS_FILE} can't be read: {error.strerror}") from error
    ref = AdapterRef(digest, name, str(folder))
    return AdapterManifest(ref, modules, stat.st_size, spec.base_model, stat.st_mtime)


def content_digest(weights: Path, modules: tuple[LoraModule, ...]) -> str:
    """sha256 over what decides the adapter's effect: each module's rank and scaling, each tensor's bytes.

    Metadata, tensor order in the file and fields that don't change the forward pass leave it as it is.
    """
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        header, data_start = _raw_header(file)
        for module in modules:
            digest.update(f"{module.key} {module.rank} {module.scaling!r}\n".encode())
            for tensor in (module.a_name, module.b_name):
                entry = header[tensor]
                digest.update(f"{entry['dtype']} {entry['shape']}\n".encode())
                begin, end = entry["data_offsets"]
                for chunk in _chunks(file, data_start + begin, end - begin):
                    digest.update(chunk)
    return digest.hexdigest()


def _read_headers(path: Path) -> dict[str, TensorHeader]:
    try:
        if path.stat().st_size > MAX_WEIGHTS_BYTES:
            raise AdapterRefused(f"{WEIGHTS_FILE} is larger than {MAX_WEIGHTS_BYTES} bytes")
        with open_tensors(path, "np") as file:
            names = list(file.keys())
            if len(names) > MAX_TENSORS:
                raise AdapterRefused(f"{WEIGHTS_FILE} holds {len(names)} tensors, at most {MAX_TENSORS} are read")
            slices = {name: file.get_slice(name) for name in names}
            return {n: TensorHeader(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except FileNotFoundError:
        other = sorted(p.name for p in path.parent.glob("*.bin")) if path.parent.is_dir() else []
        hint = f" ({', '.join(other)} is a pickle: convert it to safetensors)" if other else ""
        raise AdapterRefused(f"no {WEIGHTS_FILE} in {path.parent.name}{hint}") from None
    except SafetensorError as error:
        raise AdapterRefused(f"{WEIGHTS_FILE} is not a valid safetensors file: {error}") from None
    except OSError as error:
        raise AdapterUnavailable(f"{WEIGHTS_FILE} can't be read: {error.strerror or error}") from error


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
            if header.dtype not in DTYPES:
                raise AdapterRefused(f"tensor {tensor!r} is {header.dtype}; expected one of {', '.join(DTYPES)}")
        modules.append(module)
    return tuple(modules)


def _why(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "DoRA is not supported"
    if "modules_to_save" in name or "wte" in name or "lm_head" in name:
        return "embeddings, new tokens and whole saved modules would change the frozen base"
    return "another architecture, or a kind of adapter that is not supported"


def _raw_header(file: BinaryIO) -> tuple[dict[str, dict[str, list[int]]], int]:
    """The parsed JSON header and the offset where data begins; the caller has validated the file."""
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length)), 8 + length


def _chunks(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    file.seek(start)
    while length > 0 and (chunk := file.read(min(length, 1 << 20))):
        length -= len(chunk)
        yield chunk
