"""The backend of our Triton kernels: torch's products, our attention of decoding tokens, our norms.

Everything can be captured in a CUDA graph: no synchronisation, no shape that depends on values.
"""

import torch
import torch.nn.functional as F

from kernels.gpu.attention import attend, attention_scratch
from kernels.gpu.norm import add_norm
from server.model.backend import Attend, Embedding, Norm, TorchBackend, TorchEmbedding


class TritonBackend(TorchBackend):
    """On a GPU; in tests on a CPU, through Triton's interpreter."""

    graphs = True

    def __init__(self) -> None:
        super().__init__("triton", prepack=False)

    @property
    def attend(self) -> Attend | None:
        """Split over the length; reads only what is filled."""
        return _attend

    def embedding(self, weight: torch.Tensor) -> Embedding:
        """(V, d) is what `F.linear` takes."""
        return TritonEmbedding(weight)

    def norm(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> Norm:
        """Adds and norms in one pass."""
        return TritonNorm(weight, bias, eps)


class TritonEmbedding(TorchEmbedding):
    """Logits stay in the model's type: the sampling kernel widens them as it reads."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight)


class TritonNorm:
    """Residual and layer norm in one kernel."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self._weight, self._bias, self._eps = weight, bias, eps
        self.nbytes = weight.nbytes + bias.nbytes

    def __call__(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        return add_norm(x, delta, self._weight, self._bias, self._eps, torch.empty_like(x))


def _attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    return attend(qkv, keys, values, rows, positions, scale, out.flatten(1), attention_scratch(len(qkv), keys))
