"""Which texts an adapter has learned, so that no figure is ever taken on them; and which of a source are held out.

A text's place in a source without splits follows from the text alone: not from the seed, the filters, the template, or
the other rows. What one run holds out no other run of that source trains on, unless few rows made it take the nearest.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
HELD_OUT_SHARE = 0.05  # for validation, and as much for tests
LEAST_HELD_OUT = 3
_BYTES = 6  # of a text's digest: two of a million texts share theirs with probability 0.002


def place(text: str) -> float:
    """Where in [0, 1) a normalised text lies: below 0.05 it is for tests, below 0.1 for validation."""
    return int.from_bytes(_digest(text)[:8]) / 2**64


def set_aside(
    rows: Sequence[T], text: Callable[[T], str], low: float, share: float = HELD_OUT_SHARE,
    learned: Collection[bytes] = (),
) -> list[T]:  # fmt: skip
    """The rows whose text, normalised, was not learned and has its place in [low, low + share), the lowest first.

    At least LEAST_HELD_OUT, or a tenth of fewer than 30, the nearest to 0 then; never more than half of the rows.
    """
    free = sorted((row for row in rows if digest_of(text(row)) not in learned), key=lambda row: place(text(row)))
    chosen = [row for row in free if low <= place(text(row)) < low + share]
    least = min(LEAST_HELD_OUT, max(1, len(rows) // 10))
    return (chosen if len(chosen) >= least else free[:least])[: len(rows) // 2]


def digest_of(text: str) -> bytes:
    """What is recorded of a normalised text."""
    return _digest(text)[-_BYTES:]


def packed(digests: Iterable[bytes]) -> str:
    """Digests as report.json holds them."""
    return base64.b64encode(b"".join(sorted(digests))).decode()


def learned_by(folder: Path) -> frozenset[bytes] | None:
    """Digests of the texts that the adapter in `folder` was trained on, its origins' with them.

    None if its report doesn't say: then nobody knows.
    """
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        data = base64.b64decode(report["data"]["train_texts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return frozenset(data[i : i + _BYTES] for i in range(0, len(data), _BYTES))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
