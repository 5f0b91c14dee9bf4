"""The shipped corpora are what their README says."""

import json
from collections import Counter
from pathlib import Path

from training.config import QUOTES
from training.data import normalised

SPLITS = ("train", "valid", "test", "heldout_authors")


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_quotes_have_their_fields_and_old_authors() -> None:
    everything = [row for split in SPLITS for row in rows(QUOTES / f"{split}.jsonl")]
    assert len(everything) == 10_574
    for row in everything:
        assert row["author_died"] < 1931
        assert 20 <= len(row["quote"]) <= 300
        assert row["source"]
        assert "\n" not in row["quote"]
    authors = Counter(row["author"] for row in everything)
    assert len(authors) == 325
    assert sum(count >= 40 for count in authors.values()) == 75


def test_no_quote_and_no_near_copy_is_in_two_files() -> None:
    """A near copy shares a run of seven words."""
    homes: dict[tuple[str, ...], str] = {}
    for split in SPLITS:
        for row in rows(QUOTES / f"{split}.jsonl"):
            words = normalised(row["quote"]).split()
            for i in range(max(1, len(words) - 6)):
                run = tuple(words[i : i + 7])
                assert homes.setdefault(run, split) == split, (row["quote"], homes[run])


def test_held_out_authors_are_nowhere_else() -> None:
    held_out = {row["author"] for row in rows(QUOTES / "heldout_authors.jsonl")}
    others = {row["author"] for split in SPLITS[:3] for row in rows(QUOTES / f"{split}.jsonl")}
    assert len(held_out) == 25
    assert not held_out & others


def test_dictionary_entries_are_whole() -> None:
    entries = rows(QUOTES.parent / "devils_dictionary.jsonl")
    assert len(entries) == 786
    assert all(entry["word"] and entry["pos"] and entry["text"] for entry in entries)
