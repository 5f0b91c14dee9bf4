"""The slot table against a plain model of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.slots import SlotTable


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(2, 5), st.lists(st.tuples(st.sampled_from("atpuv"), st.sampled_from("abcdef")), max_size=60))
def test_the_slot_table_keeps_its_promises(count: int, actions: list[tuple[str, str]]) -> None:
    """Against a plain model: a list in order of use, and a count of pins."""
    table, order, pins, indices = SlotTable(count), list[str](), dict[str, int](), dict[str, int]()
    for action, digest in actions:
        if action == "a" and digest not in order and len(order) < count - 1:
            indices[digest] = table.add(digest)
            order.append(digest)
            pins[digest] = 0
        elif action == "t":
            table.touch(digest)
            order = [d for d in order if d != digest] + [digest] * (digest in order)
        elif action == "p" and digest in order:
            table.pin(digest)
            pins[digest] += 1
        elif action == "u" and pins.get(digest):
            table.unpin(digest)
            pins[digest] -= 1
            order = [*(d for d in order if d != digest), digest]
        elif action == "v":
            victim = next(table.idle({digest}), None)
            assert victim == next((d for d in order if not pins[d] and d != digest), None)
            if victim is not None:
                table.remove(victim)
                order.remove(victim)
                del pins[victim], indices[victim]
        assert {d for d in "abcdef" if d in table} == set(order)
        assert (len(table), table.full) == (len(order), len(order) == count - 1)
        assert len(set(indices.values()) - {0}) == len(order), "an index each, and never the base's"
    for digest, held in pins.items():
        for _ in range(held):
            table.unpin(digest)
    table.check_integrity()


def test_a_table_without_places_is_refused() -> None:
    with pytest.raises(ValueError, match="1 slots: the base takes one"):
        SlotTable(1)
