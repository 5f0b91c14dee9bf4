"""Checks an adapter's numbers without torch: all finite, and B A not zero everywhere."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from adapters.adapter import AdapterManifest
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.tensorfile import TensorHeader, chunks, open_regular, read_headers
from adapters.validation import MAX_WEIGHTS_BYTES, WEIGHTS_FILE

LEAST_EFFECT = 1e-8
"""What an adapter has to add somewhere, for inputs of variance 1: less is lost beside the base's own values."""


def check_values(folder: Path, manifest: AdapterManifest) -> None:
    """Read every number of an adapter that `inspect_adapter` passed.

    Raises AdapterRefused naming the tensor, or saying that there is no effect; AdapterUnavailable on I/O errors.
    """
    effect = False
    try:
        with open_regular(folder / WEIGHTS_FILE, MAX_WEIGHTS_BYTES) as file:
            headers = read_headers(file, WEIGHTS_FILE)
            for module in manifest.modules:
                a, b = (_finite(file, headers[name], name) for name in (module.a_name, module.b_name))
                effect = effect or _has_effect(a, b, module.scaling)
    except (FileNotFoundError, KeyError) as error:
        raise AdapterUnavailable(f"{WEIGHTS_FILE} in {folder.name} changed while it was read") from error
    if not effect:
        raise AdapterRefused("the adapter has no effect: B A is zero in every module (was it trained?)")


def _finite(file: BinaryIO, header: TensorHeader, name: str) -> npt.NDArray[np.float32]:
    raw = b"".join(chunks(file, header, WEIGHTS_FILE))
    match header.dtype:
        case "F32":
            values = np.frombuffer(raw, "<f4")
        case "F16":
            values = np.frombuffer(raw, "<f2").astype(np.float32)
        case _:  # BF16: the upper half of a float32
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    if values.size and not np.isfinite(values).all():
        raise AdapterRefused(f"tensor {name!r} holds values that are not finite")
    return values.reshape(header.shape)


def _has_effect(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], scaling: float) -> bool:
    """Whether B A moves a random vector by more than rounding would hide. a [rank, in], b [out, rank]."""
    vector = np.asarray(np.random.default_rng(0).standard_normal(a.shape[1]), np.float64)
    product: npt.NDArray[np.float64] = np.matmul(b, np.matmul(a, vector))  # in float64, as the vector is
    return bool((np.abs(scaling * product) > LEAST_EFFECT).any())
