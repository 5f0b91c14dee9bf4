"""`packed` equals `reference`, for any mix of adapters, ranks and rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import Adapter, LoraPair, Mix, ModuleKey
from adapters.lora.packed import LoraPack, PackCache
from adapters.lora.reference import add_lora

CPU = torch.device("cpu")
KEYS = {ModuleKey(0, "attn.c_attn"): (16, 48), ModuleKey(0, "mlp.c_proj"): (64, 16), ModuleKey(1, "mlp.c_fc"): (16, 64)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of the largest value


def make(name: str, rank: int, keys: list[ModuleKey], dtype: torch.dtype = torch.float32, size: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(sum(name.encode()) * 131 + rank)

    def weight(width: int) -> torch.Tensor:
        return (size * torch.randn(rank, width, generator=generator)).to(dtype)

    return Adapter(name, {key: LoraPair(weight(KEYS[key][0]), weight(KEYS[key][1])) for key in keys})


def mix(*adapters: Adapter) -> Mix:
    """A row with these, weights 1; none is the base."""
    return tuple((adapter, 1.0) for adapter in adapters)


def both(rows: list[Mix], key: ModuleKey, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed, reference) of the same random x and y."""
    generator = torch.Generator().manual_seed(len(rows))
    x = torch.randn(len(rows), KEYS[key][0], generator=generator).to(dtype)
    y = torch.randn(len(rows), KEYS[key][1], generator=generator).to(dtype)
    packed, reference = y.clone(), y.float()
    if (batch := PackCache().batch(rows, CPU)) is not None:
        batch.add(packed, x, key)
    in_fp32 = {
        a: Adapter(a.digest, {k: LoraPair(p.a.float(), p.b.float()) for k, p in a.pairs.items()})
        for row in rows
        for a, _ in row
    }
    add_lora(reference, x.float(), key, [tuple((in_fp32[a], weight) for a, weight in row) for row in rows])
    return packed.float(), reference


def assert_close(packed: torch.Tensor, reference: torch.Tensor, dtype: torch.dtype) -> None:
    worst = float((packed - reference).abs().max() / reference.abs().max())
    assert worst < TOLERANCE[dtype], f"off by {worst:.2e} of the largest value"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 7, 8, 16, 64])
@pytest.mark.parametrize("rows", [1, 3, 32, 33])
def test_one_adapter(dtype: torch.dtype, rank: int, rows: int) -> None:
    adapter = make("a", rank, list(KEYS), dtype, size=rank**-0.5)
    for key in KEYS:
        assert_close(*both([mix(adapter)] * rows, key, dtype), dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    adapters=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 3, 5, 16, 64]), st.lists(st.sampled_from(list(KEYS)), min_size=1, unique=True)
        ),
        min_size=1,
        max_size=6,
    ),
    choice=st.lists(
        st.dictionaries(st.integers(0, 5), st.sampled_from([1.0, 0.5, -0.3, 2.0]), max_size=3), min_size=1, max_size=40
    ),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_mix(
    adapters: list[tuple[int, list[ModuleKey]]], choice: list[dict[int, float]], dtype: torch.dtype
) -> None:
    made = [make(f"a{i}", rank, keys, dtype, size=rank**-0.5) for i, (rank, keys) in enumerate(adapters)]
    rows = [tuple((made[i], weight) for i, weight in sorted(row.items()) if i < len(made)) for row in choice]
    for key in KEYS:
        packed, reference = both(rows, key, dtype)
        assert_close(packed, reference, dtype)


def test_a_row_without_the_module_is_not_touched() -> None:
    key, other = list(KEYS)[:2]
    partial, full = make("partial", 4, [other]), make("full", 4, [key, other])
    x, y = torch.randn(4, KEYS[key][0]), torch.randn(4, KEYS[key][1])
    after = y.clone()
    batch = PackCache().batch([(), mix(partial), mix(full), ()], CPU)
    assert batch is not None
    batch.add(after, x, key)
    assert torch.equal(after[[0, 1, 3]], y[[0, 1, 3]]), "exact zeros are added to these"
    assert not torch.equal(after[2], y[2])
    untouched = after.clone()
    batch.add(after, torch.randn(4, 16), ModuleKey(1, "mlp.c_fc"))
    assert torch.equal(after, untouched), "no adapter of the batch has this module"


def test_a_row_does_not_depend_on_the_others() -> None:
    key = next(iter(KEYS))
    a, b = make("a", 3, [key]), make("b", 9, [key])
    x = torch.randn(3, KEYS[key][0])
    mixed, alone = torch.zeros(3, KEYS[key][1]), torch.zeros(1, KEYS[key][1])
    cache = PackCache()
    cache.batch([mix(a), mix(b), ()], CPU).add(mixed, x, key)
    cache.batch([mix(b)], CPU).add(alone, x[1:2], key)
    torch.testing.assert_close(mixed[1:2], alone)


@pytest.mark.parametrize("weight", [1e30, 3e38])
def test_an_adapter_that_overflows_harms_its_own_row_only(weight: float) -> None:
    """Finite weights, infinite products: zero times infinity must not reach the neighbours."""
    key = next(iter(KEYS))
    n_in, n_out = KEYS[key]
    good = make("good", 4, [key])
    wild = Adapter("wild", {key: LoraPair(torch.full((2, n_in), weight), torch.full((2, n_out), weight))})
    x, y = 10 + torch.randn(3, n_in), torch.zeros(3, n_out)
    expected = torch.zeros(3, n_out)
    add_lora(expected, x, key, [mix(good), (), ()])
    PackCache().batch([mix(good), (), mix(wild)], CPU).add(y, x, key)
    assert not y[2].isfinite().any(), "a vain test: nothing overflows"
    # Terms of about 10 times their sum, in another order; what is guarded against is NaN.
    torch.testing.assert_close(y[:2], expected[:2], rtol=1e-5, atol=1e-4)


def test_a_batch_of_the_base_needs_no_pack() -> None:
    assert PackCache().batch([(), ()], CPU) is None
    assert PackCache().batch([], CPU) is None


def test_a_pack_is_built_once_for_a_set_of_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, ...]] = []
    build = LoraPack.build
    monkeypatch.setattr(
        LoraPack, "build", lambda adapters: built.append(tuple(a.digest for a in adapters)) or build(adapters)
    )
    key = next(iter(KEYS))
    a, b, c = (make(name, 2, [key]) for name in "abc")
    cache = PackCache()
    for rows in ([a, b], [b, a], [b, b, a], [a], [a, b]):
        cache.batch([(), *map(mix, rows)], CPU)
    cache.batch([mix(a, b)], CPU)
    assert built == [("a", "b"), ("a",)], "order and repetition don't matter"
    for rows in ([b], [c], [a, c], [b, c], [a, b]):
        cache.batch([mix(a) for a in rows], CPU)
    assert built[-1] == ("a", "b"), "only the last few packs are kept"


def test_a_pack_follows_the_content_not_the_object() -> None:
    """An adapter evicted and loaded again is another object with the same digest."""
    key = next(iter(KEYS))
    first, again = make("a", 2, [key]), make("a", 2, [key])
    x = torch.randn(2, KEYS[key][0])
    y, expected = torch.zeros(2, KEYS[key][1]), torch.zeros(2, KEYS[key][1])
    PackCache().batch([mix(first), mix(again)], CPU).add(y, x, key)
    add_lora(expected, x, key, [mix(first)] * 2)
    torch.testing.assert_close(y, expected)
