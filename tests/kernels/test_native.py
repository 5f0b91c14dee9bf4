"""The C++ kernels against kernels/reference.py, for every instruction set that this processor has."""

import itertools

import pytest
import torch

from adapters.adapter import Adapter, LoraPair, ModuleKey
from adapters.lora.reference import add_lora
from kernels import reference
from kernels.build import library
from kernels.native import Edits, Native, NativeUnavailable

pytestmark = pytest.mark.skipif(not library().is_file(), reason="no C++ compiler built the kernels")
DTYPES = (torch.float32, torch.bfloat16)
# bf16 results are rounded to 8 bits; sums are taken in fp32 in another order than torch's.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
LARGE_BLOCK = 256 << 10  # bytes, as in kernels/cpu/linear.h


@pytest.fixture(params=["plain", "avx2", "avx512", "avx512_bf16"])
def native(request: pytest.FixtureRequest) -> Native:
    try:
        return Native(request.param)
    except NativeUnavailable as error:
        pytest.skip(str(error))


def rand(*shape: int, dtype: torch.dtype, size: float = 1.0) -> torch.Tensor:
    return (size * torch.randn(*shape)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(native: Native, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for k, n, m in itertools.product((2, 34, 256), (1, 63, 64, 200), (1, 2, 5, 6, 7, 13, 40)):
        weight, bias, x = rand(k, n, dtype=dtype, size=0.2), rand(n, dtype=dtype), rand(m, k, dtype=dtype)
        packed = native.pack(weight, bias)
        expected = reference.linear(x.float(), weight.float(), bias.float())
        torch.testing.assert_close(native.linear(x, packed, torch.empty(m, n)), expected, **CLOSE[dtype])
        rounded = native.linear(x, packed, torch.empty(m, n, dtype=dtype))
        torch.testing.assert_close(rounded, expected.to(dtype), **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_many_rows_and_a_panel_longer_than_a_block(native: Native, dtype: torch.dtype) -> None:
    """48 rows make a group; from 19 on it reads large blocks, whose sums wait in memory for the next one."""
    torch.manual_seed(7)
    depth, n = LARGE_BLOCK // (native._panel * dtype.itemsize), native._panel + 3
    for k in (64, depth + 66):
        weight, bias, x = rand(k, n, dtype=dtype, size=k**-0.5), rand(n, dtype=dtype), rand(130, k, dtype=dtype)
        packed, expected = native.pack(weight, bias), reference.linear(x.float(), weight.float(), bias.float())
        for m in (48, 49, 64, 97, 130):
            ours = native.linear(x[:m], packed, torch.empty(m, n))
            torch.testing.assert_close(ours, expected[:m], **CLOSE[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_of_a_transposed_weight_without_bias_and_its_rows(native: Native, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    embedding, x = rand(131, 32, dtype=dtype), rand(3, 32, dtype=dtype)
    packed = native.pack(embedding.T, None)
    expected = reference.linear(x.float(), embedding.float().T, None)
    torch.testing.assert_close(native.linear(x, packed, torch.empty(3, 131)), expected, **CLOSE[dtype])
    ids = torch.tensor([0, 130, 64, 7, 7])
    assert torch.equal(native.rows_of(packed, ids), embedding[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(native: Native, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    packed = native.pack(rand(64, 100, dtype=dtype), rand(100, dtype=dtype))
    x = rand(33, 64, dtype=dtype)
    together = native.linear(x, packed, torch.empty(33, 100, dtype=dtype))
    for m in (1, 2, 5, 17):
        assert torch.equal(native.linear(x[:m], packed, torch.empty(m, 100, dtype=dtype)), together[:m])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 20, 64])
def test_attend(native: Native, dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(3)
    heads, max_len, sequences = 3, 70, 5
    keys, values = (rand(8, heads, max_len, head_dim, dtype=dtype) for _ in "kv")
    rows, positions = torch.tensor([6, 0, 3, 7, 1]), torch.tensor([0, 1, 15, 69, 33])
    qkv = rand(sequences, 3, heads, head_dim, dtype=dtype)
    ours = [keys.clone(), values.clone()]
    out = torch.empty(sequences, heads * head_dim, dtype=dtype)
    native.attend(qkv.flatten(1), *ours, rows, positions, 0.3, out)
    plain = [keys.float(), values.float()]
    expected = reference.attend(qkv.float(), *plain, rows, positions, 0.3)
    torch.testing.assert_close(out, expected.to(dtype), **CLOSE[dtype])
    assert torch.equal(ours[0].float(), plain[0])
    assert torch.equal(ours[1].float(), plain[1])


def test_attend_with_scores_far_apart(native: Native) -> None:
    """exp of what lies hundreds below the best is 0, never NaN."""
    keys, values = torch.zeros(1, 1, 40, 8), torch.randn(1, 1, 40, 8)
    keys[0, 0, :39, 0] = torch.linspace(-1000, 0, 39)
    qkv = torch.zeros(1, 3, 1, 8)
    qkv[0, 0, 0, 0] = 1.0
    args = torch.tensor([0]), torch.tensor([39]), 1.0
    expected = reference.attend(qkv, keys.clone(), values.clone(), *args)
    out = native.attend(qkv.flatten(1), keys, values, *args, torch.empty(1, 8))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 16, 70, 256])
def test_norm(native: Native, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(6)
    for rows in (1, 3, 32):
        x, delta = rand(rows, width, dtype=dtype) + 5, rand(rows, width, dtype=dtype)
        weight, bias = torch.randn(width), torch.randn(width)
        for given in (None, delta):
            ours, plain = x.clone(), x.clone()
            out = native.norm(ours, given, weight, bias, 1e-5, torch.full_like(x, torch.nan))
            expected = reference.norm(plain, given, weight, bias, 1e-5)
            assert torch.equal(ours, plain), "the residual is added in place"
            torch.testing.assert_close(out, expected, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(native: Native, dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, 1e-30, -1e-30, 60.0, -60.0, torch.inf, torch.nan])
    for size in (1, 15, 16, 17, 1000):
        x = torch.cat([torch.linspace(-9, 9, size), extremes]).to(dtype)
        expected = reference.gelu(x)
        torch.testing.assert_close(native.gelu(x), expected, equal_nan=True, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popularity", ["distinct", "one", "mixed", "composed"])
def test_lora(native: Native, dtype: torch.dtype, popularity: str) -> None:
    torch.manual_seed(4)
    for k, n, m in itertools.product((16, 65, 256), (16, 130), (1, 3, 32)):
        ranks = (1, 8, 3, 64)
        pool = [(rand(r, k, dtype=dtype, size=0.2), rand(r, n, dtype=dtype, size=0.2)) for r in ranks]
        choice = {
            "distinct": [[(i % 4, 1.0)] for i in range(m)],
            "one": [[(1, 1.0)]] * m,
            "mixed": [([], [(2, 1.0)], [(0, -0.5)], [], [(3, 1.0)])[i % 5] for i in range(m)],
            "composed": [
                ([(0, 0.7), (3, -0.3)], [], [(1, 1.0)], [(0, 1.0), (1, 1.5), (2, -2.0)])[i % 4] for i in range(m)
            ],
        }
        mixes = choice[popularity]
        key = ModuleKey(0, "attn.c_attn")
        adapters = [Adapter(f"{i}", {key: LoraPair(a.float(), b.float())}) for i, (a, b) in enumerate(pool)]
        x, y = rand(m, k, dtype=dtype), rand(m, n, dtype=dtype)
        expected = y.float()
        add_lora(expected, x.float(), key, [tuple((adapters[i], weight) for i, weight in mix) for mix in mixes])
        lines = lines_of(pool, mixes)
        native.lora(x, y, lines.data_ptr(), lines.shape[1])
        torch.testing.assert_close(y, expected.to(dtype), **CLOSE[dtype])


Pool = list[tuple[torch.Tensor, torch.Tensor]]


def lines_of(pool: Pool, mixes: list[list[tuple[int, float]]]) -> torch.Tensor:
    """The kernel's lines for rows that use these of the pool with these weights, by adapter."""
    order = sorted((i, row, weight) for row, mix in enumerate(mixes) for i, weight in mix)
    whole = [[row, pool[i][0].data_ptr(), pool[i][1].data_ptr(), pool[i][0].shape[0]] for i, row, _ in order]
    weights = torch.tensor([weight for _, _, weight in order], dtype=torch.float64)
    return torch.cat([torch.tensor(whole, dtype=torch.int64).reshape(-1, 4).T, weights.view(1, -1).view(torch.int64)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_composed_row_does_not_depend_on_its_neighbours(native: Native, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    pool = [(rand(r, 64, dtype=dtype), rand(r, 130, dtype=dtype)) for r in (4, 1, 9)]
    mixes = [[(0, 0.7), (2, -0.3)], [(2, 1.0)], [], [(0, 1.0), (1, 0.2), (2, 0.5)], [(1, -1.0), (0, 2.0)]]
    x, y = rand(5, 64, dtype=dtype), rand(5, 130, dtype=dtype)

    def run(rows: slice) -> torch.Tensor:
        out, lines = y[rows].clone(), lines_of(pool, mixes[rows])
        native.lora(x[rows].contiguous(), out, lines.data_ptr(), lines.shape[1])
        return out

    together = run(slice(0, 5))
    for i in range(5):
        assert torch.equal(run(slice(i, i + 1))[0], together[i])


def choose(native: Native, logits: torch.Tensor, **settings: float) -> list[int]:
    """Tokens of equal rows under uniform numbers spread evenly over [0, 1)."""
    n = len(logits)
    full = {"temperature": 1.0, "top_k": float(logits.shape[1]), "top_p": 1.0, "typical_p": 1.0} | settings
    return native.choose(
        logits, torch.ones(n), torch.zeros(0, dtype=torch.int64), torch.zeros(n + 1, dtype=torch.int64),
        torch.full((n,), full["temperature"]), torch.full((n,), int(full["top_k"])),
        torch.full((n,), full["top_p"]), (torch.arange(n, dtype=torch.float64) + 0.5) / n,
        torch.zeros(n, dtype=torch.int64), torch.full((n,), full["typical_p"]),
    )[0]  # fmt: skip


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.9}, {"top_k": 20}, {"top_k": 50, "top_p": 0.7}, {"temperature": 0.5}]
)
def test_choose_draws_each_token_as_often_as_it_is_probable(native: Native, settings: dict[str, float]) -> None:
    """Evenly spread uniform numbers through the inverse of the distribution: counts are right to one."""
    torch.manual_seed(5)
    vocab, n = 203, 4001
    row = 2 * torch.randn(vocab)
    probs = reference.kept_probabilities(
        row, settings.get("temperature", 1.0), int(settings.get("top_k", vocab)), settings.get("top_p", 1.0)
    )
    counts = torch.tensor(choose(native, row.repeat(n, 1), **settings)).bincount(minlength=vocab)
    assert (counts - n * probs).abs().max() <= 1.5
    assert counts[probs == 0].sum() == 0


def test_choose_survives_what_is_not_finite(native: Native) -> None:
    """A diverged adapter's logits are told by -1, and harm nobody else's."""
    for value in (float("nan"), float("inf"), float("-inf")):
        logits = torch.randn(3, 101)
        logits[1] = value
        for settings in ({}, {"top_p": 0.5}, {"top_k": 3}, {"temperature": 0.0}):
            tokens = choose(native, logits, **settings)
            assert tokens[1] == -1
            assert all(0 <= token < 101 for token in (tokens[0], tokens[2]))
            alone = choose(native, torch.stack([logits[0], logits[0], logits[2]]), **settings)
            assert (tokens[0], tokens[2]) == (alone[0], alone[2])


@pytest.mark.parametrize("typical_p", [0.01, 0.3, 0.9])
def test_choose_draws_what_is_typical(native: Native, typical_p: float) -> None:
    torch.manual_seed(6)
    vocab, n = 203, 4001
    row = 2 * torch.randn(vocab)
    probs = reference.typical_probabilities(row, typical_p)
    tokens = torch.tensor(choose(native, row.repeat(n, 1), typical_p=typical_p))
    counts = tokens.bincount(minlength=vocab)
    assert 0 < int((probs > 0).sum()) < vocab
    assert (counts - n * probs).abs().max() <= 1.5
    assert counts[probs == 0].sum() == 0


def test_choose_edits_before_and_after_the_penalty(native: Native) -> None:
    """(score + added) penalised - taken; row 1 has no edits, and all of row 2's tokens are banned."""
    n, vocab = 3, 37
    logits = torch.full((n, vocab), -1.0)
    logits[:, 4], logits[:, 9] = 3.0, 2.5
    ids = torch.tensor([4, 9, 11, *range(vocab)])
    added = torch.tensor([0.0, 4.0, 5.0, *[1.0] * vocab])
    taken = torch.tensor([0.5, 3.0, 0.0, *[torch.inf] * vocab])
    tokens, _ = native.choose(
        logits, torch.tensor([2.0, 2.0, 1.0]), torch.tensor([11, 4]), torch.tensor([0, 1, 2, 2]), torch.zeros(n),
        torch.full((n,), vocab), torch.ones(n), torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.int64),
        edits=Edits(ids, torch.tensor([0, 3, 3, 3 + vocab]), added, taken),
    )  # fmt: skip
    assert tokens == [9, 9, -2]  # 3.5 beats 2.5 and (-1 + 5) / 2; then 2.5 beats 3 / 2


@pytest.mark.parametrize("vocab", [1, 3, 37, 50257])
def test_logprobs_and_the_best_tokens(native: Native, vocab: int) -> None:
    torch.manual_seed(7)
    raw = (4 * torch.randn(5, vocab)).to(torch.bfloat16).float()  # full of ties
    tokens, counts = torch.randint(vocab, (5,)), torch.tensor([0, 1, 5, 20, 3]).clamp(max=vocab)
    at, ids, best = native.logprobs(raw, tokens, counts)
    expected = raw.double().log_softmax(-1)
    assert (at - expected.gather(1, tokens[:, None])[:, 0]).abs().max() < 1e-6
    for r, count in enumerate(counts.tolist()):
        order = raw[r].sort(descending=True, stable=True).indices[:count]
        assert torch.equal(ids[r, :count], order)
        assert count == 0 or (best[r, :count] - expected[r, order]).abs().max() < 1e-6
        alone = native.logprobs(raw[r : r + 1], tokens[r : r + 1], counts[r : r + 1])
        assert alone[0] == at[r], "a row doesn't depend on its neighbours"
        assert torch.equal(alone[2][0], best[r, :count])
