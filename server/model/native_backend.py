"""The backend of our C++ kernels: weights packed at load, buffers of a step allocated once."""

import torch

from kernels.native import Native
from server.model.backend import GELU_TANH, Activation, Attend, Embedding, Linear, Norm, torch_activation


class StepBuffer:
    """Rows of one width that every step writes anew: allocated once, grown only when a step has more of them."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._whole = torch.empty(0, width, dtype=dtype)
        self._rows, self._count = self._whole, 0

    def rows(self, count: int) -> torch.Tensor:
        """[count, width], holding what was written last."""
        if self._count != count:
            if len(self._whole) < count:
                self._whole = self._whole.new_empty(count, self._whole.shape[1])
            self._rows, self._count = self._whole[:count], count
        return self._rows


class NativeBackend:
    """Our C++ kernels on packed weights."""

    graphs = False

    def __init__(self, native: Native) -> None:
        self.native: Native | None = native
        self._kernels = native
        self._buffers: dict[tuple[str, int, torch.dtype], StepBuffer] = {}
        self.name = f"kernels, {native.isa}"

    @property
    def attend(self) -> Attend | None:
        """Attention over ragged rows."""
        return self._kernels.attend

    def linear(self, weight: torch.Tensor, bias: torch.Tensor) -> Linear:
        """Packed into panels."""
        return NativeLinear(self._kernels, weight, bias, self._buffer("linear", weight.shape[1], weight.dtype))

    def embedding(self, weight: torch.Tensor) -> Embedding:
        """One packed copy serves both ends."""
        return NativeEmbedding(self._kernels, weight, self._buffer("logits", weight.shape[0], torch.float32))

    def norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Norm:
        """Adds and norms in one pass."""
        return NativeNorm(self._kernels, weight, bias, eps, self._buffer("norm", len(weight), weight.dtype))

    def activation(self, name: str) -> Activation:
        """Ours for GPT-2's own, in place; torch's otherwise."""
        return self._kernels.gelu if name in GELU_TANH else torch_activation(name)

    def _buffer(self, use: str, width: int, dtype: torch.dtype) -> StepBuffer:
        """Shared by all layers of a use and width: each result is consumed before the next one is made."""
        return self._buffers.setdefault((use, width, dtype), StepBuffer(width, dtype))


class NativeLinear:
    """The small-batch GEMM."""

    def __init__(self, native: Native, weight: torch.Tensor, bias: torch.Tensor, out: StepBuffer) -> None:
        self._native, self._packed, self._out = native, native.pack(weight, bias), out
        self.nbytes = weight.nbytes + bias.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self._out.rows(x.shape[0])
        if out.data_ptr() == x.data_ptr():  # n_inner equal to n_embd: c_fc's result is what c_proj reads
            out = torch.empty_like(out)
        return self._native.linear(x, self._packed, out)


class NativeNorm:
    """Residual and layer norm in one pass; weights are kept in fp32."""

    def __init__(self, native: Native, weight: torch.Tensor, bias: torch.Tensor, eps: float, out: StepBuffer) -> None:
        self._native, self._weight, self._bias, self._eps, self._out = native, weight.float(), bias.float(), eps, out
        self.nbytes = self._weight.nbytes + self._bias.nbytes

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        return self._native.norm(x, delta, self._weight, self._bias, self._eps, self._out.rows(x.shape[0]))


class NativeEmbedding:
    """The embedding packed as the output head; rows are gathered from the panels."""

    def __init__(self, native: Native, weight: torch.Tensor, logits: StepBuffer) -> None:
        self._native, self._packed, self._logits = native, native.pack(weight.T, None), logits
        self.nbytes = weight.nbytes

    def rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._native.rows_of(self._packed, token_ids)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self._native.linear(x, self._packed, self._logits.rows(x.shape[0]))
