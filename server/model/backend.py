"""How the frozen base is computed on a device: projections, embedding, norms, attention of decoding tokens.

TorchBackend runs everywhere; on a CPU it packs weights for oneDNN. NativeBackend runs our C++ kernels.
"""

import logging
from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.nn.functional as F

from kernels.native import Native, NativeUnavailable

logger = logging.getLogger(__name__)

GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


Activation = Callable[[torch.Tensor], torch.Tensor]


class Linear(Protocol):
    """y [N, out] = x [N, in] W + b. The result may be overwritten by the next product of the same width."""

    nbytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Embedding(Protocol):
    """The tied embedding: rows of it on the way in, products with it on the way out."""

    nbytes: int

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[N] -> [N, d]."""
        ...

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[S, d] -> [S, V]; fp32, but where a kernel samples that takes the model's type."""
        ...


class Norm(Protocol):
    """x += delta in place, if there is one; the layer norm of x. The result may be overwritten by the next norm."""

    nbytes: int

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor: ...


class Attend(Protocol):
    """One token of each of D sequences over its own cache row; its key and value are written there first."""

    def __call__(
        self,
        qkv: torch.Tensor,  # [D, 3 H Dh]
        keys: torch.Tensor,  # [rows, H, max_len, Dh]
        values: torch.Tensor,
        rows: torch.Tensor,  # [D]
        positions: torch.Tensor,  # [D]
        scale: float,
        out: torch.Tensor,  # [D, H, Dh]
    ) -> object: ...


class Backend(Protocol):
    """Makes layers of weights, which may be freed afterwards."""

    name: str  # for the log and /info

    def linear(self, weight: torch.Tensor, bias: torch.Tensor) -> Linear:
        """weight [in, out] as in the checkpoint, bias [out]."""
        ...

    def embedding(self, weight: torch.Tensor) -> Embedding:
        """weight [V, d]."""
        ...

    def norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Norm:
        """weight, bias [d]."""
        ...

    def activation(self, name: str) -> Activation:
        """The function of transformers' name for it; may work in place."""
        ...

    @property
    def attend(self) -> Attend | None:
        """Our kernel for decoding tokens, where there is one; torch computes them otherwise."""
        ...

    @property
    def native(self) -> Native | None:
        """Our CPU kernels, where they run."""
        ...

    @property
    def graphs(self) -> bool:
        """Whether a decoding step can be captured in a CUDA graph: no shape in it depends on a value."""
        ...


def choose_backend(device: torch.device, dtype: torch.dtype, kernels: str = "auto") -> Backend:
    """The fastest one for this device and type. kernels: auto, or off for torch alone."""
    if device.type != "cpu":
        return _gpu_backend(kernels)
    from server.model.native_backend import NativeBackend  # it imports this module

    if kernels != "off":
        try:
            native = Native()
        except NativeUnavailable as error:
            logger.warning("no CPU kernels: %s; computing with torch alone, which is slower", error)
        else:
            if native.supports(dtype):
                return NativeBackend(native)
    prepack = torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
    return TorchBackend("torch, oneDNN" if prepack else "torch", prepack)


def _gpu_backend(kernels: str) -> Backend:
    if kernels != "off":
        try:
            from server.model.triton_backend import TritonBackend
        except ImportError as error:
            logger.warning("no GPU kernels: %s; computing with torch alone, which is slower", error)
        else:
            return TritonBackend()
    return TorchBackend("torch", prepack=False)


class TorchBackend:
    """torch's own operators."""

    native: Native | None = None
    graphs = False

    @property
    def attend(self) -> Attend | None:
        """None: by `scaled_dot_product_attention`."""
        return None

    def __init__(self, name: str, prepack: bool) -> None:
        self.name, self._prepack = name, prepack

    def linear(self, weight: torch.Tensor, bias: torch.Tensor) -> Linear:
        """Packed for oneDNN where that helps."""
        return PrepackedLinear(weight, bias) if self._prepack else TorchLinear(weight, bias)

    def embedding(self, weight: torch.Tensor) -> Embedding:
        """(V, d) is what `F.linear` takes."""
        return TorchEmbedding(weight)

    def norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Norm:
        """`layer_norm`."""
        return TorchNorm(weight, bias, eps)

    def activation(self, name: str) -> Activation:
        """torch's."""
        return torch_activation(name)


def torch_activation(name: str) -> Activation:
    """The functions of transformers' names. Raises KeyError for others; the configuration is checked for them."""
    if name in GELU_TANH:
        return lambda x: F.gelu(x, approximate="tanh")
    return {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh}[name]


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


class TorchNorm:
    """`layer_norm`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self._weight, self._bias, self._eps = weight, bias, eps
        self.nbytes = weight.nbytes + bias.nbytes

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        if delta is not None:
            x += delta
        return F.layer_norm(x, self._weight.shape, self._weight, self._bias, self._eps)


class TorchEmbedding:
    """Rows by indexing, logits by `F.linear`."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight, self.nbytes = weight, weight.nbytes

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._weight[token_ids]

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight).float()
