"""The arena: every adapter's matrices lie apart from all others', whatever came and went before."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.adapter import Adapter, LoraPair, ModuleKey
from adapters.arena import ALIGN, Arena, Extents

CPU = torch.device("cpu")
sizes = st.lists(st.integers(1, 5 * ALIGN), max_size=6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 40), st.lists(st.tuples(st.booleans(), sizes, st.integers(0, 9)), max_size=40))
def test_extents_never_overlap_and_all_comes_back(blocks: int, actions: list[tuple[bool, list[int], int]]) -> None:
    extents = Extents(blocks * ALIGN + 5)
    held: list[tuple[list[int], list[int]]] = []
    for give_back, wanted, which in actions:
        if give_back and held:
            extents.give_back(*held.pop(which % len(held)))
        else:
            starts = extents.take(wanted)
            if starts is not None:
                held.append((starts, wanted))
            else:
                assert sum(wanted) > 0
        extents.check_integrity()
        spans = sorted((a, a + n) for starts, ns in held for a, n in zip(starts, ns, strict=True))
        assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "an overlap"
        assert all(start % ALIGN == 0 and end <= extents.capacity for start, end in spans)
    for starts, ns in held:
        extents.give_back(starts, ns)
    assert extents.used == 0
    assert extents.take([extents.capacity] if blocks else []) is not None, "the free parts are joined again"


def test_what_is_free_in_pieces_is_used() -> None:
    extents = Extents(4 * ALIGN)
    a, b, c, d = (extents.take([ALIGN]) for _ in range(4))
    assert None not in (a, b, c, d)
    extents.give_back(a or [], [ALIGN])
    extents.give_back(c or [], [ALIGN])
    assert extents.take([2 * ALIGN]) is None, "a matrix lies in one piece"
    assert extents.take([ALIGN, ALIGN]) == [0, 2 * ALIGN], "an adapter may lie in several"


def adapter(rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        ModuleKey(layer, "attn.c_attn"): LoraPair(
            torch.randn(rank, 5, generator=generator), torch.randn(rank, 9, generator=generator)
        )
        for layer in range(3)
    }
    return Adapter(str(seed), pairs)


def test_an_adapter_is_the_same_in_the_arena_and_takes_what_its_rank_needs() -> None:
    arena = Arena(1 << 16, CPU, torch.float32)
    used = [0]
    for i, rank in enumerate((1, 8, 64)):
        given_ = adapter(rank, i)
        place = arena.reserve(given_)
        assert place is not None
        resident = arena.fill(given_, place)
        for key, pair in given_.pairs.items():
            assert torch.equal(resident.pairs[key].a, pair.a)
            assert torch.equal(resident.pairs[key].b, pair.b)
            assert resident.pairs[key].a.untyped_storage().data_ptr() == arena.memory.untyped_storage().data_ptr()
            assert resident.pairs[key].b.data_ptr() % 64 == 0, "rows start on a cache line"
        used.append(arena.used_bytes)
    exact = [4 * 3 * rank * (5 + 9) for rank in (1, 8, 64)]
    for before, now, need in zip(used, used[1:], exact, strict=False):
        assert need <= now - before < need + 3 * 2 * 4 * ALIGN, "no more than the rank's rows, but for alignment"


def test_more_than_the_system_gives_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"^--adapter-memory: cpu has no 900,000,000,000,000 bytes for adapters"):
        Arena(900 * 10**12, CPU, torch.float32)
