"""How the frozen base is computed on a device: projections, embedding, attention of decoding tokens.

TorchBackend runs everywhere; on a CPU it packs weights for oneDNN. NativeBackend runs our C++ kernels.
"""

import logging
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from kernels.native import Native, NativeUnavailable

logger = logging.getLogger(__name__)


class Linear(Protocol):
    """y [N, out] = x [N, in] W + b."""

    nbytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Embedding(Protocol):
    """The tied embedding: rows of it on the way in, products with it on the way out."""

    nbytes: int

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, d]."""
        ...

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[S, d] -> [S, V] fp32."""
        ...


class Backend(Protocol):
    """Makes layers of weights, which may be freed afterwards."""

    name: str  # for the log and /info

    def linear(self, weight: torch.Tensor, bias: torch.Tensor) -> Linear:
        """weight [in, out] as in the checkpoint, bias [out]."""
        ...

    def embedding(self, weight: torch.Tensor) -> Embedding:
        """weight [V, d]."""
        ...

    @property
    def native(self) -> Native | None:
        """Our kernels, where they run."""
        ...


def choose_backend(device: torch.device, dtype: torch.dtype, kernels: str = "auto") -> Backend:
    """The fastest one for this device and type. kernels: auto, or off for torch alone."""
    if device.type != "cpu":
        return TorchBackend("torch", prepack=False)
    if kernels != "off":
        try:
            native = Native()
        except NativeUnavailable as error:
            logger.warning("no CPU kernels: %s; computing with torch alone, which is slower", error)
        else:
            if native.supports(dtype):
                return NativeBackend(native)
    prepack = torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16)
    return TorchBackend("torch, oneDNN" if prepack else "torch", prepack)


class TorchBackend:
    """torch's own operators."""

    native = None

    def __init__(self, name: str, prepack: bool) -> None:
        self.name, self._prepack = name, prepack

    def linear(self, weight: torch.Tensor, bias: torch.Tensor) -> Linear:
        """Packed for oneDNN where that helps."""
        return PrepackedLinear(weight, bias) if self._prepack else TorchLinear(weight, bias)

    def embedding(self, weight: torch.Tensor) -> Embedding:
        """(V, d) is what `F.linear` takes."""
        return TorchEmbedding(weight)


class TorchLinear:
    """`addmm` on the checkpoint's layout."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._weight, self._bias = weight, bias
        self.nbytes = weight.nbytes + bias.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self._bias, x, self._weight)


class PrepackedLinear:
    """A weight in oneDNN's own order, as inductor's freezing packs it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous())
        self._bias = bias
        self.nbytes = weight.nbytes + bias.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], ""))


class TorchEmbedding:
    """Rows by indexing, logits by `F.linear`."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight, self.nbytes = weight, weight.nbytes

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._weight[token_ids]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight).float()


class NativeBackend:
    """Our C++ kernels on packed weights."""

    def __init__(self, native: Native) -> None:
        self.native: Native | None = native
        self._kernels = native
        self.name = f"kernels, {native.isa}"

    def linear(self, weight: torch.Tensor, bias: torch.Tensor) -> Linear:
        """Packed into panels."""
        return NativeLinear(self._kernels, weight, bias)

    def embedding(self, weight: torch.Tensor) -> Embedding:
        """One packed copy serves both ends."""
        return NativeEmbedding(self._kernels, weight)


class NativeLinear:
    """The small-batch GEMM."""

    def __init__(self, native: Native, weight: torch.Tensor, bias: torch.Tensor) -> None:
        self._native, self._packed = native, native.pack(weight, bias)
        self.nbytes = weight.nbytes + bias.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._native.linear(x, self._packed, x.new_empty(x.shape[0], self._packed.n))


class NativeEmbedding:
    """The embedding packed as the output head; rows are gathered from the panels."""

    def __init__(self, native: Native, weight: torch.Tensor) -> None:
        self._native, self._packed = native, native.pack(weight.T, None)
        self.nbytes = weight.nbytes

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._native.rows_of(self._packed, token_ids)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._native.linear(x, self._packed, x.new_empty(x.shape[0], self._packed.n, dtype=torch.float32))
