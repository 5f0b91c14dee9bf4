"""Checks an adapter's numbers without torch: all finite, and B A not zero everywhere."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from adapters.adapter import AdapterManifest
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.tensorfile import TensorHeader, chunks, open_regular, read_headers
from adapters.validation import MAX_WEIGHTS_BYTES, WEIGHTS_FILE


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
                effect = effect or (module.scaling != 0 and _has_effect(a, b))
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


def _has_effect(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    """Whether B A maps a random vector to anything but zero: it does unless it is zero. a [rank, in], b [out, rank]."""
    vector = np.random.default_rng(0).standard_normal(a.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((b.astype(np.float64) @ (a.astype(np.float64) @ vector)).any())
