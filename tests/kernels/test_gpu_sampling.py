"""The Triton sampler against kernels/reference.py: on a GPU where there is one, else by the interpreter."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference

sampling = pytest.importorskip("kernels.gpu.sampling", exc_type=ImportError)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def parameters(s: int, **options: Any) -> dict[str, torch.Tensor]:
    """A row's parameters each, a number for all rows or a list; where nothing is said, full sampling."""
    kinds = {
        "penalty": (1.0, torch.float32),
        "temperature": (1.0, torch.float32),
        "top_k": (1 << 40, torch.int64),
        "top_p": (1.0, torch.float32),
        "uniform": ([(i + 0.5) / s for i in range(s)], torch.float64),
        "wanted": (0, torch.int64),
    }
    full = {}
    for name, (default, dtype) in kinds.items():
        value = options.get(name, default)
        full[name] = torch.tensor(value if isinstance(value, list) else [value] * s, dtype=dtype)
    return full


def run(
    logits: torch.Tensor, parts: dict[str, torch.Tensor], seen: torch.Tensor | None = None, block: int = 64
) -> tuple[list[int], list[float], torch.Tensor]:
    """Tokens, logprobs and what is seen afterwards. Outputs and scratch hold nonsense before; logits have a stride."""
    s, vocab = logits.shape
    marks = torch.zeros(s, vocab, dtype=torch.uint8) if seen is None else seen
    wide = torch.full((s, vocab + 3), math.nan, dtype=logits.dtype, device=DEVICE)
    wide[:, :-3] = logits.to(DEVICE)
    marks = marks.to(DEVICE, copy=True)
    weights = torch.full((s, vocab), math.nan, device=DEVICE)
    tokens = torch.full((s,), -77, dtype=torch.int64, device=DEVICE)
    logprobs = torch.full((s,), math.nan, device=DEVICE)
    rows = torch.arange(s - 1, -1, -1, device=DEVICE)  # row s of the batch is not row s of the cache
    moved = {name: part.to(DEVICE) for name, part in parts.items()}
    sampling.choose(
        wide[:, :-3], marks, rows, *moved.values(), weights=weights, tokens=tokens, logprobs=logprobs, block=block
    )
    return tokens.tolist(), logprobs.tolist(), marks.cpu()


def expected(
    logits: torch.Tensor, parts: dict[str, torch.Tensor], seen: torch.Tensor | None = None
) -> tuple[list[int], list[float], torch.Tensor]:
    s, vocab = logits.shape
    marks = torch.zeros(s, vocab, dtype=torch.uint8) if seen is None else seen.clone()
    tokens, logprobs = reference.choose(logits, marks, torch.arange(s - 1, -1, -1), *parts.values())
    return tokens.tolist(), logprobs.tolist(), marks


KINDS = [
    {},
    {"top_p": 0.9},
    {"top_k": 20},
    {"top_k": 50, "top_p": 0.7},
    {"temperature": 0.5},
    {"temperature": 1.7, "top_p": 0.01},
    {"top_k": 1},
    {"top_k": 203, "top_p": 0.999},
]


@pytest.mark.parametrize(("options", "block"), [*((kind, 64) for kind in KINDS), (KINDS[3], 256)])
def test_draws_each_token_as_often_as_it_is_probable(options: dict[str, float], block: int) -> None:
    """Evenly spread uniform numbers through the inverse of the distribution: counts are right to one."""
    torch.manual_seed(5)
    vocab, n = 203, 4001 if CUDA else 21
    row = 2 * torch.randn(vocab)
    parts = parameters(n, **options)
    k, p = int(min(options.get("top_k", vocab), vocab)), options.get("top_p", 1.0)
    probs = reference.kept_probabilities(row.double(), options.get("temperature", 1.0), k, p if p < 1 else math.inf)
    tokens, logprobs, _ = run(row.repeat(n, 1), parts, block=block)
    counts = torch.tensor(tokens).bincount(minlength=vocab)
    assert (counts - n * probs).abs().max() <= 1.5
    assert counts[probs == 0].sum() == 0
    assert tokens == sorted(tokens), "drawn in order of id"
    assert logprobs == [0.0] * n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 65, 300])
def test_any_mix_of_parameters_in_one_batch(dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(vocab)
    s = 12
    logits = (3 * torch.randn(s, vocab)).to(dtype)
    seen = (torch.rand(s, vocab) < 0.3).to(torch.uint8)
    parts = parameters(
        s,
        penalty=[1.0, 1.3, 0.7] * 4,
        temperature=[0.0, 1.0, 0.6, 1.0] * 3,
        top_k=[vocab, 5, 40, 1, 1000, 2] * 2,
        top_p=[1.0, 0.8, 0.3, 1.0, 0.99, 0.5] * 2,
        uniform=torch.rand(s, dtype=torch.float64).tolist(),
        wanted=[0, 1] * 6,
    )
    tokens, logprobs, marks = run(logits, parts, seen)
    true_tokens, true_logprobs, true_marks = expected(logits, parts, seen)
    assert tokens == true_tokens
    torch.testing.assert_close(logprobs, true_logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(marks, true_marks)


def test_over_the_whole_vocabulary_in_blocks_of_the_real_size() -> None:
    torch.manual_seed(1)
    s, vocab = 5, 50257
    logits = 3 * torch.randn(s, vocab)
    parts = parameters(
        s, temperature=[1.0, 1.0, 0.8, 0.0, 1.0], top_k=[50, vocab, 1000, vocab, vocab],
        top_p=[0.9, 0.95, 1.0, 1.0, 1.0], uniform=[0.3, 0.7, 0.99, 0.5, 1 - 2**-53], wanted=1,
    )  # fmt: skip
    tokens, logprobs, _ = run(logits, parts, block=sampling._BLOCK)
    true_tokens, true_logprobs, _ = expected(logits, parts)
    assert tokens == true_tokens
    torch.testing.assert_close(logprobs, true_logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("row", "options", "kept"),
    [
        ([1.0] * 8, {"top_p": 0.5}, [0, 1, 2, 3]),  # top-p cuts between equals, the lowest ids stay
        ([1.0] * 8, {"top_p": 0.51}, [0, 1, 2, 3, 4]),
        ([1.0] * 8, {"top_p": 1e-9}, [0]),  # the first always stays
        ([1.0] * 8, {"top_k": 3}, [0, 1, 2, 3, 4, 5, 6, 7]),  # what equals the k-th stays too
        ([0.0, 2.0, 1.0, 1.0, 0.0, 1.0], {"top_k": 2}, [1, 2, 3, 5]),
        ([0.0, 2.0, 1.0, 1.0, 0.0, 1.0], {"top_k": 2, "top_p": 0.7}, [1, 2, 3]),
        ([1.0] * 200, {"top_p": 0.5}, list(range(100))),  # over several blocks
        ([0.0] * 150 + [1.0] * 70, {"top_k": 9, "top_p": 0.9}, list(range(150, 213))),
        ([0.0] * 6 + [1.0], {"top_p": 0.6}, [0, 1, 2, 6]),  # equals are cut ahead of a better one
        ([0.0, -math.inf, 0.0], {}, [0, 2]),
        ([0.0, -math.inf, 0.0], {"top_k": 3, "top_p": 0.999}, [0, 2]),
        ([-1e30, 0.0, -200.0], {"top_p": 0.99}, [1]),
        ([3.0, 7.0, 7.0, 1.0], {"temperature": 0.0}, [1]),
        ([3.0, 7.0, 7.0, 1.0], {"temperature": 1e-30}, [1, 2]),
    ],
)
def test_what_is_kept(row: list[float], options: dict[str, float], kept: list[int]) -> None:
    n = 256 if CUDA else 10
    uniform = [0.0, *((i + 0.5) / n for i in range(n)), 1 - 2**-53]
    tokens, _, _ = run(torch.tensor([row] * (n + 2)), parameters(n + 2, uniform=uniform, **options))
    assert tokens == sorted(tokens)
    assert (tokens[0], tokens[-1]) == (kept[0], kept[-1])
    assert set(tokens) <= set(kept)
    assert len(kept) > 8 or set(tokens) == set(kept)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.0}])
def test_what_is_not_finite_is_told_and_harms_nobody(options: dict[str, float]) -> None:
    torch.manual_seed(6)
    logits = torch.randn(8, 101)
    parts, seen = parameters(8, wanted=1, penalty=1.2, **options), torch.ones(8, 101, dtype=torch.uint8)
    alone, _, _ = expected(logits, parts, seen)
    spoilt = [1, 2, 3, 5, 6]
    logits[1], logits[2], logits[3] = math.nan, math.inf, -math.inf
    logits[5, 70], logits[6, 70] = math.nan, math.inf
    tokens, logprobs, _ = run(logits, parts, seen)
    for i in range(8):
        assert tokens[i] == (-1 if i in spoilt else alone[i])
        assert (logprobs[i] == 0) == (i in spoilt)


NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 2.0, -math.inf]), st.floats(-20, 20, width=32), st.floats(-3, 3, width=16)
)


@settings(max_examples=300 if CUDA else 60, deadline=None)
@given(
    row=st.lists(NUMBERS, min_size=1, max_size=150),
    odd=st.sampled_from([None, None, None, None, math.nan, math.inf]),
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.0]),
    top_k=st.integers(1, 160),
    top_p=st.one_of(st.just(1.0), st.floats(2**-10, 1.0, width=32)),
    penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3]),
    uniform=st.floats(0, 1, exclude_max=True),
    data=st.data(),
)
def test_agrees_with_the_reference(
    row: list[float], odd: float | None, temperature: float, top_k: int, top_p: float, penalty: float,
    uniform: float, data: st.DataObject,
) -> None:  # fmt: skip
    if odd is not None:
        row[data.draw(st.integers(0, len(row) - 1))] = odd
    seen = torch.tensor([data.draw(st.lists(st.integers(0, 1), min_size=len(row), max_size=len(row)))])
    logits, seen = torch.tensor([row]), seen.to(torch.uint8)
    options = {"temperature": temperature, "top_k": top_k, "penalty": penalty, "wanted": 1}
    tokens, logprobs, marks = run(logits, parameters(1, top_p=top_p, uniform=uniform, **options), seen)
    # Where a limit or the uniform number lies on a boundary, rounding decides: either side is right.
    right = [
        expected(logits, parameters(1, top_p=p, uniform=u, **options), seen)
        for p in (top_p, *((top_p - 1e-6, top_p + 1e-6) if top_p < 1 else ()))
        for u in (uniform, max(uniform - 1e-6, 0.0), min(uniform + 1e-6, 1 - 2**-53))
    ]
    assert tokens in [r[0] for r in right]
    for true_tokens, true_logprobs, true_marks in right:
        if tokens == true_tokens:
            torch.testing.assert_close(logprobs, true_logprobs, rtol=1e-5, atol=1e-5)
            assert torch.equal(marks, true_marks)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mixed_batch_in_a_captured_graph(dtype: torch.dtype) -> None:
    """One graph, replayed with other logits and parameters."""
    s, vocab = 64, 50257
    logits = torch.zeros(s, vocab, dtype=dtype, device="cuda")
    parts = {name: part.cuda() for name, part in parameters(s).items()}
    marks, rows = torch.zeros(s, vocab, dtype=torch.uint8, device="cuda"), torch.arange(s, device="cuda")
    weights = torch.full((s, vocab), math.nan, device="cuda")
    tokens, logprobs = torch.empty(s, dtype=torch.int64, device="cuda"), torch.empty(s, device="cuda")

    def step() -> None:
        sampling.choose(logits, marks, rows, *parts.values(), weights=weights, tokens=tokens, logprobs=logprobs)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = parameters(
            s,
            penalty=[1.0, 1.3] * 32,
            temperature=[0.0, 1.0, 0.6, 1.0] * 16,
            top_k=[vocab, 50, 40, vocab] * 16,
            top_p=[1.0, 0.8, 0.3, 0.95] * 16,
            uniform=torch.rand(s, dtype=torch.float64).tolist(),
            wanted=1,
        )
        logits.copy_(3 * torch.randn(s, vocab))
        marks.copy_(torch.rand(s, vocab) < 0.01)
        for name, part in fresh.items():
            parts[name].copy_(part)
        seen = marks.cpu()
        true_tokens, true_logprobs = reference.choose(logits.cpu(), seen, rows.cpu(), *fresh.values())
        graph.replay()
        assert tokens.tolist() == true_tokens.tolist()
        torch.testing.assert_close(logprobs.cpu(), true_logprobs, rtol=1e-4, atol=1e-4)
        assert torch.equal(marks.cpu(), seen)
