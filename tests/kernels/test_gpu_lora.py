"""The Triton LoRA kernels against adapters/lora/reference.py: on a GPU where there is one, else by the interpreter."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from adapters.adapter import Adapter, LoraPair, ModuleKey
from adapters.lora import reference

lora = pytest.importorskip("kernels.gpu.lora", exc_type=ImportError)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# y is rounded to its type, and x A^T cut to tf32 before it meets B; the interpreter cuts fp32 to bf16, too.
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}
KEY = ModuleKey(0, "attn.c_attn")
Pair = tuple[torch.Tensor, torch.Tensor]


def make_pairs(ranks: Sequence[int], k: int, n: int, dtype: torch.dtype) -> list[Pair | None]:
    """A [r, k] and B [r, n] for each slot; None where the rank is 0. Products are of size 1 or so."""
    return [
        (
            (torch.randn(r, k) / math.sqrt(k)).to(dtype),
            (torch.randn(r, n) / math.sqrt(r)).to(dtype),
        )
        if r
        else None
        for r in ranks
    ]


def make_arena(pairs: Sequence[Pair | None], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs one after another, each part on 16 bytes, NaN between and after them; and the module's table."""
    align = 16 // dtype.itemsize
    parts, table, at = [], [], 0
    for pair in pairs:
        entry = [0, 0, 0 if pair is None else len(pair[0])]
        for side, weight in enumerate(pair or ()):
            gap = align + -weight.numel() % align
            parts += [weight.flatten(), torch.full((gap,), math.nan, dtype=dtype)]
            entry[side], at = at, at + weight.numel() + gap
        table.append(entry)
    arena = torch.cat([*parts, torch.full((align,), math.nan, dtype=dtype)])
    return arena.to(DEVICE), torch.tensor(table, dtype=torch.int64, device=DEVICE)


def scratch(rows: int, in_features: int, max_rank: int) -> torch.Tensor:
    return torch.full((lora.splits(in_features), rows, max_rank), math.nan, device=DEVICE)


def on_device(meta: "lora.LoraMeta") -> "lora.LoraMeta":
    return lora.LoraMeta(*(part.to(DEVICE) for part in vars(meta).values()))


def group_rows(slots: Sequence[int], weights: Sequence[float] | None = None, tile: int = lora.TILE) -> lora.LoraMeta:
    """The grouping of rows with these slots and weights (None: all 1), on the host."""
    buffer = torch.empty(5, len(slots), dtype=torch.int32)
    lora.write_meta(slots, [1.0] * len(slots) if weights is None else weights, buffer, tile)
    return lora.LoraMeta.of(buffer)


def check(
    slots: list[int], ranks: Sequence[int], k: int, n: int, dtype: torch.dtype, max_rank: int,
    weights: Sequence[float] = (1.0,),
) -> None:  # fmt: skip
    """`weights`: of the rows, in turn."""
    weights = [weights[i % len(weights)] for i in range(len(slots))]
    pairs = make_pairs(ranks, k, n, dtype)
    arena, table = make_arena(pairs, dtype)
    x, y = torch.randn(len(slots), k).to(dtype), torch.randn(len(slots), n).to(dtype)
    expected = y.float().clone()
    adapters = [p and Adapter("digest", {KEY: LoraPair(p[0].float(), p[1].float())}) for p in pairs]
    mixes = [((adapter, w),) if (adapter := adapters[s]) else () for s, w in zip(slots, weights, strict=True)]
    reference.add_lora(expected, x.float(), KEY, mixes)
    wide = torch.full((len(slots), n + 5), 7.0, dtype=dtype, device=DEVICE)  # y is a part of something wider
    wide[:, :n] = y.to(DEVICE)
    meta = on_device(group_rows(slots, weights))
    lora.add_lora(wide[:, :n], x.to(DEVICE), arena, table, meta, scratch(len(slots), k, max_rank))
    torch.testing.assert_close(wide[:, :n].cpu(), expected.to(dtype), **CLOSE[dtype])
    untouched = [i for i, s in enumerate(slots) if pairs[s] is None]
    assert torch.equal(wide[untouched, :n].cpu(), y[untouched]), "a row without an adapter changed"
    assert (wide[:, n:] == 7).all(), "written beyond y"


def rows_of(popularity: str, n: int, slots: int) -> list[int]:
    """Slots of n rows. Slot 0 is the base."""
    return {
        "one": [2] * n,
        "distinct": [1 + i % (slots - 1) for i in range(n)],
        "skewed": [1 if i % 4 else 2 + i % (slots - 2) for i in range(n)],
        "with base": [(0, 3, 0, 1)[i % 4] for i in range(n)],
        "base": [0] * n,
    }[popularity]


POPULARITIES = ("one", "distinct", "skewed", "with base", "base")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("n", [1, 7, 35])
def test_lora(dtype: torch.dtype, popularity: str, n: int) -> None:
    torch.manual_seed(n)
    check(rows_of(popularity, n, 6), [0, 8, 3, 1, 0, 16], 64, 130, dtype, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 35])
def test_rows_have_their_own_weights(dtype: torch.dtype, n: int) -> None:
    torch.manual_seed(n)
    check(rows_of("skewed", n, 6), [0, 8, 3, 1, 0, 16], 64, 130, dtype, 16, (1.0, -0.5, 0.25))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n", "max_rank"), [(1, 1, 64), (65, 16, 80), (300, 129, 64), (1030, 48, 70)])
def test_lora_of_odd_sizes_over_several_blocks_of_rank_and_parts(
    dtype: torch.dtype, k: int, n: int, max_rank: int
) -> None:
    torch.manual_seed(k)
    check([1, 0, 2, 3, 1, 2], [0, 64, 33, 5], k, n, dtype, max_rank)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_lora_at_full_size(dtype: torch.dtype, popularity: str) -> None:
    torch.manual_seed(2)
    for (k, n), rows in itertools.product(((1024, 3072), (4096, 1024), (1023, 4095)), (1, 8, 33, 256)):
        check(rows_of(popularity, rows, 9), [0, 8, 16, 1, 64, 512, 7, 128, 16], k, n, dtype, 512)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_with_its_adapter(dtype: torch.dtype) -> None:
    """A diverged adapter, or a row that has NaN already, harms no row but those."""
    torch.manual_seed(3)
    pairs = make_pairs([0, 8, 8], 64, 40, dtype)
    assert pairs[1] is not None
    pairs[1][0][3, 5], pairs[1][1][2, 7] = math.nan, math.inf
    arena, table = make_arena(pairs, dtype)
    slots = [1, 2, 0, 2, 2, 1]
    x, y = torch.randn(6, 64).to(dtype), torch.randn(6, 40).to(dtype)
    x[4] = math.inf
    out = y.to(DEVICE)
    lora.add_lora(out, x.to(DEVICE), arena, table, on_device(group_rows(slots)), scratch(6, 64, 8))
    assert out[[0, 4, 5]].isnan().any(-1).all()
    assert out[[1, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    arena, table = make_arena(make_pairs([0, 8, 20], 300, 40, dtype), dtype)
    slots = [1, 2, 0, 1, 1, 2] * 4
    x, y = torch.randn(24, 300).to(dtype).to(DEVICE), torch.randn(24, 40).to(dtype).to(DEVICE)

    def run(rows: slice) -> torch.Tensor:
        part, out = slots[rows], y[rows].clone()
        lora.add_lora(out, x[rows], arena, table, on_device(group_rows(part)), scratch(len(part), 300, 20))
        return out

    together = run(slice(0, 24))
    for rows in (slice(0, 1), slice(3, 6), slice(5, 24)):
        # numpy's matrix product, the interpreter's, does depend on a row's place.
        close = {"rtol": 0.0, "atol": 0.0} if CUDA else CLOSE[dtype]
        torch.testing.assert_close(run(rows), together[rows], **close)


def test_rows_are_grouped_by_slot() -> None:
    """LoraMeta's example."""
    meta = group_rows([2, 0, 1, 2, 2], [0.5, 0.0, 1.0, -2.0, 3.0], tile=2)
    assert {name: part.tolist() for name, part in vars(meta).items()} == {
        "order": [1, 2, 0, 3, 4],
        "tile_start": [1, 2, 4, 0, 0],
        "tile_count": [1, 2, 1, 0, 0],
        "tile_slot": [1, 2, 2, 0, 0],
        "weight": [0.5, 0.0, 1.0, -2.0, 3.0],
    }


@pytest.mark.parametrize(
    "slots", [[], [0], [5], [0, 0], [3] * 16, [3] * 17, [1, 2] * 20, [9, 0, 9, 4, 0, 4, 4], list(range(70))]
)
def test_every_row_of_an_adapter_is_in_one_tile(slots: list[int]) -> None:
    meta = group_rows(slots)
    order, starts, counts, tile_slots, _ = (part.tolist() for part in vars(meta).values())
    assert sorted(order) == list(range(len(slots)))
    rows: list[int] = []
    for start, count, slot in zip(starts, counts, tile_slots, strict=True):
        tile = order[start : start + count]
        assert count <= lora.TILE
        assert all(slots[row] == slot for row in tile)
        assert tile == sorted(tile), "rows of a slot stay in order"
        rows += tile
    assert sorted(rows) == [i for i, slot in enumerate(slots) if slot]
    used = sum(count > 0 for count in counts)
    assert all(counts[:used]), "the used tiles come first"
    assert used <= lora.max_tiles(len(slots), max(slots, default=0) + 1)


def test_meta_of_fewer_rows_than_the_buffer_has_room_for() -> None:
    buffer = torch.full((5, 6), 77, dtype=torch.int32)
    lora.write_meta([2, 2, 1], [1.0, -1.0, 0.5], buffer)
    assert lora.LoraMeta.of(buffer).weight.tolist() == [1.0, -1.0, 0.5, 0.0, 0.0, 0.0]
    assert buffer[:4].tolist() == [[3, 4, 5, 2, 0, 1], [3, 4, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0]]
    assert lora.LoraMeta.of(buffer).tile_slot.data_ptr() == buffer[3].data_ptr(), "views, not copies"


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_a_captured_graph_takes_each_step_s_slots() -> None:
    torch.manual_seed(5)
    n, k, out = 24, 1024, 3072
    pairs = make_pairs([0, 8, 16, 64], k, out, torch.bfloat16)
    arena, table = make_arena(pairs, torch.bfloat16)
    x, y = (torch.zeros(n, size, dtype=torch.bfloat16, device="cuda") for size in (k, out))
    host, device = torch.zeros(5, n, dtype=torch.int32), torch.zeros(5, n, dtype=torch.int32, device="cuda")
    xa, meta = scratch(n, k, 64), lora.LoraMeta.of(device)
    lora.add_lora(y, x, arena, table, meta, xa)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora.add_lora(y, x, arena, table, meta, xa)
    for slots in ([0] * n, [3] * n, [i % 4 for i in range(n)], [2, 0, 1]):
        lora.write_meta(slots, [1.0 + i for i in range(len(slots))], host)
        device.copy_(host)
        x.copy_(torch.randn(n, k))
        y.copy_(torch.randn(n, out))
        expected = y.clone()
        lora.add_lora(expected, x, arena, table, meta, xa)
        graph.replay()
        assert torch.equal(y, expected)
