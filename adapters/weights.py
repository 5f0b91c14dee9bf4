"""Reads an adapter's tensors into host memory, proves they have an effect, and readies them for computing."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError

from adapters.adapter import Adapter, AdapterRef, BaseShape, LoraPair
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.golden import read_golden
from adapters.tensorfile import open_tensors
from adapters.validation import WEIGHTS_FILE, inspect_adapter


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
            f"adapter {ref.name!r} changed on disk since it was registered "
            f"(sha256 {ref.digest[:12]} then, {manifest.ref.digest[:12]} now): restart the server to serve the new one"
        )
    adapter = Adapter(ref.digest, {}, read_golden(Path(ref.path)))
    changes = False
    try:
        with open_tensors(Path(ref.path) / WEIGHTS_FILE, "pt") as file:
            for module in manifest.modules:
                a: torch.Tensor = file.get_tensor(module.a_name).float()
                b: torch.Tensor = file.get_tensor(module.b_name).float()
                b = (b * module.scaling).T.contiguous()  # [rank, out]
                cast = {module.a_name: a.to(dtype, copy=True), module.b_name: b.to(dtype)}
                for name, tensor in cast.items():
                    if not all(map(math.isfinite, (float(bound) for bound in tensor.aminmax()))):
                        raise AdapterRefused(
                            f"tensor {name!r} holds values that are not finite, or too large for {dtype} "
                            f"(scaling {module.scaling:g})"
                        )
                changes = changes or _has_effect(a, b)
                adapter.pairs[module.key] = LoraPair(*cast.values())
    except (SafetensorError, OSError) as error:
        raise AdapterUnavailable(f"{WEIGHTS_FILE} of {ref.name!r} can't be read: {error}") from error
    if not changes:
        raise AdapterRefused(f"adapter {ref.name!r} has no effect: B A is zero in every module (was it trained?)")
    return adapter


def _has_effect(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether B A, [out, in], holds anything but zeros. a [rank, in], b [rank, out].

    It is zero exactly if it maps a random vector to zero, but for a set of vectors of measure zero: much cheaper than
    the product.
    """
    vector = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0))
    return bool((b.T @ (a @ vector)).any())
