"""The residual and norm in one kernel against kernels/reference.py: through Triton's interpreter without a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from kernels import reference
from kernels.gpu.norm import add_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    # The interpreter truncates to bf16 where a GPU rounds, and the residual's last bit is scaled by the norm.
    torch.bfloat16: {"rtol": 1e-2, "atol": 2e-2 if DEVICE == "cuda" else 2e-1},
}


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("width", [1, 5, 64, 200, 1024])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_add_norm(dtype: torch.dtype, width: int, rows: int) -> None:
    torch.manual_seed(0)
    weight, bias = (torch.randn(width).to(dtype).to(DEVICE) for _ in "wb")
    for add in (False, True):
        x = (3 + torch.randn(rows, width)).to(dtype).to(DEVICE)
        delta = torch.randn(rows, width).to(dtype).to(DEVICE) if add else None
        ours, plain = x.clone(), x.clone()
        out = add_norm(ours, delta, weight, bias, 1e-5, torch.full_like(x, torch.nan))
        expected = reference.norm(plain, delta, weight.float(), bias.float(), 1e-5)
        torch.testing.assert_close(ours, plain, rtol=0 if not add else CLOSE[dtype]["rtol"], atol=0)
        if width > 1:  # the norm of one number is 0 / sqrt(eps): rounding is all there is
            torch.testing.assert_close(out, expected, **CLOSE[dtype])
