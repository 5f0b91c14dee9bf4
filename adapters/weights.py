"""Reads an adapter's tensors into host memory, proves they have an effect, and readies them for computing."""

import math
import os
from pathlib import Path
from typing import BinaryIO

import torch

from adapters.adapter import Adapter, AdapterRef, BaseShape, LoraPair
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.golden import read_golden
from adapters.tensorfile import TensorHeader, chunks, open_regular, read_headers
from adapters.validation import MAX_WEIGHTS_BYTES, WEIGHTS_FILE, inspect_adapter
from adapters.values import LEAST_EFFECT

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_adapter(ref: AdapterRef, shape: BaseShape, dtype: torch.dtype) -> Adapter:
    """Read the adapter at `ref.path` into host memory; its content must still be `ref.digest`.

    The scaling (alpha / r, or alpha / sqrt(r) for rsLoRA) is folded into B in fp32 before the cast to `dtype`.
    Raises AdapterRefused or AdapterUnavailable.
    """
    try:
        manifest = inspect_adapter(Path(ref.path), ref.name, shape)
    except AdapterRefused as error:
        # It was fine when it was registered: the files are gone or being replaced, not what this digest stands for.
        raise AdapterUnavailable(f"adapter {ref.name!r} can't be loaded any more: {error}") from error
    if manifest.ref.digest != ref.digest:
        raise AdapterUnavailable(
            f"adapter {ref.name!r} changed on disk since it was published "
            f"(sha256 {ref.digest[:12]} then, {manifest.ref.digest[:12]} now): publish it again"
        )
    adapter = Adapter(ref.digest, {}, read_golden(Path(ref.path)))
    changes = trained = False
    try:
        with open_regular(Path(ref.path) / WEIGHTS_FILE, MAX_WEIGHTS_BYTES) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime) != (manifest.nbytes, manifest.created):
                raise AdapterUnavailable(f"{WEIGHTS_FILE} of {ref.name!r} changed while it was read")
            headers = read_headers(file, WEIGHTS_FILE)
            for module in manifest.modules:
                a = _tensor(file, headers[module.a_name]).float()
                b = _tensor(file, headers[module.b_name]).float()
                b = (b * module.scaling).T.contiguous()  # [rank, out]
                cast = {module.a_name: a.to(dtype), module.b_name: b.to(dtype)}
                for name, tensor in cast.items():
                    if not all(map(math.isfinite, (float(bound) for bound in tensor.aminmax()))):
                        raise AdapterRefused(
                            f"tensor {name!r} holds values that are not finite, or too large for {dtype} "
                            f"(scaling {module.scaling:g})"
                        )
                changes = changes or _has_effect(*cast.values())
                trained = trained or changes or _has_effect(a, b)
                adapter.pairs[module.key] = LoraPair(*cast.values())
    except FileNotFoundError as error:
        raise AdapterUnavailable(f"{WEIGHTS_FILE} of {ref.name!r} is gone") from error
    if not changes:
        why = f"its values are too small for {dtype}; serve with another --dtype" if trained else "was it trained?"
        raise AdapterRefused(f"adapter {ref.name!r} has no effect: B A is zero in every module ({why})")
    return adapter


def _tensor(file: BinaryIO, header: TensorHeader) -> torch.Tensor:
    """Read into memory of its own: a file that is mapped and then cut kills the process that touches it."""
    raw = bytearray(b"".join(chunks(file, header, WEIGHTS_FILE)))
    return torch.frombuffer(raw, dtype=_DTYPES[header.dtype]).view(header.shape)


def _has_effect(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether B A moves a random vector by more than rounding would hide. a [rank, in], b [rank, out], scaled."""
    vector = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0))
    moved = (b.float().T @ (a.float() @ vector)).abs()
    return not bool((moved <= LEAST_EFFECT).all())  # what overflows has an effect, too
