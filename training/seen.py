"""Which texts an adapter has learned, so that no figure is ever taken on them; and which of a source are held out.

A text's place in a source without splits follows from the text alone: not from the seed, the filters, or the other
rows. What one run holds out no other run of that source trains on.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

HELD_OUT_SHARE = 0.05  # for validation, and as much for tests
_BYTES = 6  # of a text's digest: two of a million texts share theirs with probability 0.002


def place(key: str) -> float:
    """Where in [0, 1) a normalised text lies: below 0.05 it is for tests, below 0.1 for validation."""
    return int.from_bytes(_digest(key)[:8]) / 2**64


def packed(digests: Iterable[bytes]) -> str:
    """Digests as report.json holds them."""
    return base64.b64encode(b"".join(sorted(digests))).decode()


def digest_of(key: str) -> bytes:
    """What is recorded of a normalised text."""
    return _digest(key)[-_BYTES:]


def learned_by(folder: Path) -> frozenset[bytes]:
    """Digests of the texts that the adapter in `folder` was trained on, its origins' with them.

    Empty if its report doesn't say: then nobody knows.
    """
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        data = base64.b64decode(report["data"]["train_texts"])
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()
    return frozenset(data[i : i + _BYTES] for i in range(0, len(data), _BYTES))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
