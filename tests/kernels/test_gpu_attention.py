"""The Triton decode attention against kernels/reference.py: on a GPU where there is one, else by the interpreter."""

import math

import pytest
import torch

from kernels import reference

attention = pytest.importorskip("kernels.gpu.attention", exc_type=ImportError)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
}


def check(heads: int, head_dim: int, max_len: int, positions: list[int], dtype: torch.dtype, size: float = 1.0) -> None:
    """Tokens at these positions, each in a row of its own, among caches that hold NaN wherever nothing was written."""
    d = len(positions)
    rows = torch.randperm(d + 2)[:d]
    keys, values = (torch.full((d + 2, heads, max_len, head_dim), math.nan, dtype=dtype) for _ in "kv")
    for row, position in zip(rows.tolist(), positions, strict=True):
        keys[row, :, :position] = torch.randn(heads, position, head_dim).to(dtype)
        values[row, :, :position] = torch.randn(heads, position, head_dim).to(dtype)
    qkv = (size * torch.randn(d, 3, heads, head_dim)).to(dtype)
    at = torch.tensor(positions)

    plain = keys.float().clone(), values.float().clone()
    # Beyond its position a sequence's mask is 0, but 0 times NaN isn't.
    expected = reference.attend(qkv.float(), *(cache.nan_to_num_(0.0) for cache in plain), rows, at, 0.3)

    ours = keys.to(DEVICE, copy=True), values.to(DEVICE, copy=True)
    wide = torch.full((d, 3 * heads * head_dim + 4), math.nan, dtype=dtype, device=DEVICE)
    wide[:, :-4] = qkv.flatten(1).to(DEVICE)
    out = torch.full((d, heads * head_dim), math.nan, dtype=dtype, device=DEVICE)
    scratch = attention.attention_scratch(d, ours[0]).fill_(math.nan)
    attention.attend(wide[:, :-4], *ours, rows.to(DEVICE), at.to(DEVICE), 0.3, out, scratch)

    torch.testing.assert_close(out.cpu(), expected.to(dtype), **CLOSE[dtype])
    for cache, before, part in zip(ours, (keys, values), (1, 2), strict=True):
        before[rows, :, at] = qkv[:, part]
        torch.testing.assert_close(cache.cpu(), before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 20, 32, 64])
def test_attend(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(head_dim)
    check(2, head_dim, 70, [0, 1, 15, 69, 33, 63, 64, 65], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attend_over_several_parts(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    length = attention.split_length(300)
    check(1, 16, 300, [0, length - 1, length, length + 1, 2 * length - 1, 2 * length, 299], dtype)


def test_attend_with_scores_far_apart() -> None:
    """exp of what lies hundreds below the best is 0, never NaN, whichever part the best lies in."""
    torch.manual_seed(2)
    check(2, 16, 400, [0, 130, 399, 256], torch.float32, size=300.0)


@pytest.mark.parametrize("head_dim", [1, 130])
def test_attend_with_odd_heads(head_dim: int) -> None:
    torch.manual_seed(3)
    check(3, head_dim, 5, [4, 0, 2], torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_row() -> None:
    torch.manual_seed(4)
    keys, values = torch.randn(3, 1, 20, 16, device=DEVICE), torch.randn(3, 1, 20, 16, device=DEVICE)
    keys[1, 0, 3, 5], values[1, 0, 2, 4] = math.nan, math.inf
    qkv, out = torch.randn(3, 48, device=DEVICE), torch.empty(3, 16, device=DEVICE)
    rows, positions = torch.arange(3, device=DEVICE), torch.tensor([10, 10, 10], device=DEVICE)
    attention.attend(qkv, keys, values, rows, positions, 1.0, out, attention.attention_scratch(3, keys))
    assert out[1].isnan().any()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("max_len", [1, 64, 128, 129, 1024, 4096, 100_000])
def test_parts_cover_the_cache(max_len: int) -> None:
    length = attention.split_length(max_len)
    assert length % 64 == 0
    assert -(-max_len // length) <= 16


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 100, 128, 256])
def test_attend_at_full_size(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(5)
    for max_len in (1024, 1000, 4096):
        check(16, head_dim, max_len, torch.randint(max_len, (33,)).tolist(), dtype)
        check(16, head_dim, max_len, [max_len - 1], dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_captured_graph_takes_each_step_s_positions() -> None:
    torch.manual_seed(6)
    keys, values = (torch.randn(8, 16, 1024, 64, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    qkv = torch.randn(8, 3 * 1024, dtype=torch.bfloat16, device="cuda")
    rows, positions = torch.arange(8, device="cuda"), torch.zeros(8, dtype=torch.int64, device="cuda")
    out, scratch = torch.empty(8, 1024, dtype=torch.bfloat16, device="cuda"), attention.attention_scratch(8, keys)
    attention.attend(qkv, keys, values, rows, positions, 0.125, out, scratch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.attend(qkv, keys, values, rows, positions, 0.125, out, scratch)
    for high in (1, 100, 1024):
        positions.copy_(torch.randint(high, (8,)))
        qkv.copy_(torch.randn(8, 3 * 1024))
        expected = reference.attend(
            qkv.view(8, 3, 16, 64).float(), keys.float(), values.float(), rows, positions, 0.125
        )
        graph.replay()
        torch.testing.assert_close(out.float(), expected, **CLOSE[torch.bfloat16])
