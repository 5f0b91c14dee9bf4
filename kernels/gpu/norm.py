"""x += delta, and the layer norm of x, in one pass over a row. Knows nothing of the model."""

import torch
import triton
import triton.language as tl


def add_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    out: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """x [N, d] += delta in place, if there is one; out [N, d] = layer norm of x, rounded as it is stored.

    All contiguous and of one type; weight, bias [d]. Sums in fp32.
    """
    n, d = x.shape
    if n:
        _add_norm[n,](
            x, x if delta is None else delta, weight, bias, out, eps, D=d, BLOCK=triton.next_power_of_2(d),
            ADD=delta is not None,
        )  # fmt: skip
    return out


@triton.jit
def _add_norm(
    x: tl.tensor, delta: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, eps: tl.tensor,
    D: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A program for each row."""
    row = tl.program_id(0).to(tl.int64) * D
    c = tl.arange(0, BLOCK)
    inside = c < D
    v = tl.load(x + row + c, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(delta + row + c, mask=inside, other=0.0).to(tl.float32)
        stored = v.to(x.dtype.element_ty)
        tl.store(x + row + c, stored, mask=inside)
        v = stored.to(tl.float32)
    mean = tl.sum(v, axis=0) / D
    centred = tl.where(inside, v - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + c, (centred * scale * w + b).to(out.dtype.element_ty), mask=inside)
