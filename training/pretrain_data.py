"""Prose to tokens: reads a folder of text files, splits off what is held out, draws windows by weight.

Knows nothing about models. A source is one `NAME.txt` (UTF-8); a line `<|endoftext|>` ends a document in it,
and so does the end of the file. Every document ends with the EOS token.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DOCUMENT_END = "<|endoftext|>"
HELD_OUT_SHARE = 0.01
HELD_OUT_LEAST = 257
HELD_OUT_DEFINITION = (
    f"the last {HELD_OUT_SHARE:.0%} of every source's tokens (at least {HELD_OUT_LEAST}), cut into windows of "
    "the model's positions, each starting at the last token of the one before; mean cross-entropy in nats "
    "over all predicted tokens"
)

# How often a source is seen, beside its size. Stage directions, verse and commentary weigh little: a model this
# small imitates their form first. Zero leaves a source out.
DEFAULT_WEIGHTS: dict[str, float] = {
    "alice": 3.0,
    "austen": 1.8,
    "bible_kjv": 0.0,
    "bible_web": 0.3,
    "cia_factbook": 1.0,
    "lcet_workshop": 1.0,
    "matthew_henry": 0.3,
    "meditations": 4.0,
    "milton": 0.2,
    "moby_dick": 1.6,
    "newton_opticks": 0.5,
    "postgres_docs": 0.0,
    "python_docs": 0.0,
    "rust_book": 0.0,
    "shakespeare": 0.15,
    "sotu": 1.3,
    "spurgeon_treasury": 0.3,
    "sqlite_docs": 0.0,
    "us_constitution": 1.0,
    "walden_excerpt": 4.0,
}


class ProseError(ValueError):
    """The prose folder or its weights can't be used; the message says which file and why."""


@dataclass(frozen=True)
class Source:
    """One text file as tokens."""

    name: str
    weight: float
    sha256: str  # of the file
    train: NDArray[np.int32]  # [tokens]
    held_out: NDArray[np.int32]  # [tokens], what follows `train` in the file; never trained on


def find_sources(folder: Path, overrides: Mapping[str, float]) -> dict[str, float]:
    """Name -> weight of every `NAME.txt` in `folder` that is to be used.

    Raises ProseError where there is no text file, a file has no weight, or an override names no file.
    """
    if not folder.is_dir():
        raise ProseError(f"{folder} is no folder")
    names = sorted(path.stem for path in folder.glob("*.txt"))
    if not names:
        raise ProseError(f"{folder} has no .txt file")
    for name, weight in overrides.items():
        if name not in names:
            raise ProseError(
                f"--weight {name}: there is no {name}.txt in {folder}; it has {', '.join(names)}"
            )
        if not 0 <= weight < float("inf"):
            raise ProseError(f"--weight {name}: {weight} is not a weight; 0 leaves the source out")
    weights = {**DEFAULT_WEIGHTS, **overrides}
    unknown = [name for name in names if name not in weights]
    if unknown:
        raise ProseError(
            f"unknown source {unknown[0]}.txt: give it a weight, e.g. --weight {unknown[0]}=1, or 0 to leave it out"
        )
    used = {name: weights[name] for name in names if weights[name] > 0}
    if not used:
        raise ProseError(f"every source in {folder} has weight 0")
    return used


def read_documents(path: Path) -> list[str]:
    """The documents of one file, stripped; empty ones are left out. Raises ProseError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProseError(f"{path} is not UTF-8: {error}") from error
    documents = [piece.strip() for piece in text.split(DOCUMENT_END)]
    documents = [piece for piece in documents if piece]
    if not documents:
        raise ProseError(f"{path} is empty")
    return documents


def tokenize(
    documents: Iterable[str], encode: Callable[[list[str]], list[list[int]]], eos: int
) -> NDArray[np.int32]:
    """All documents after one another, each followed by `eos`. [tokens]"""
    ids: list[int] = []
    for document in encode(list(documents)):
        ids.extend(document)
        ids.append(eos)
    return np.asarray(ids, dtype=np.int32)


def split(tokens: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(training tokens, held-out tokens): the held-out slice is the end of the source, see HELD_OUT_DEFINITION."""
    held_out = max(int(len(tokens) * HELD_OUT_SHARE), HELD_OUT_LEAST)
    return tokens[:-held_out], tokens[-held_out:]


def load_sources(
    folder: Path,
    weights: Mapping[str, float],
    encode: Callable[[list[str]], list[list[int]]],
    eos: int,
    window: int,
) -> list[Source]:
    """Read, tokenise and split every source in `weights`.

    `window` is the number of tokens in one training example. Raises ProseError where a source is too short for one.
    """
    sources: list[Source] = []
    for name, weight in weights.items():
        path = folder / f"{name}.txt"
        tokens = tokenize(read_documents(path), encode, eos)
        train, held_out = split(tokens)
        if len(train) < window:
            raise ProseError(
                f"{path} has {len(tokens)} tokens; after {len(held_out)} held-out ones there must be {window} to train on"
            )
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        sources.append(Source(name, weight, sha256, train, held_out))
    return sources


class Mixture:
    """Draws training windows: a source by weight times size, then a place in it uniformly. Seeded."""

    def __init__(self, sources: list[Source], window: int, seed: int) -> None:
        self.sources = sources
        self.window = window
        mass = np.array([source.weight * len(source.train) for source in sources], dtype=np.float64)
        self.shares = mass / mass.sum()  # [sources]
        self._random = np.random.default_rng(seed)

    def draw(self, batch: int) -> NDArray[np.int64]:
        """The next `batch` windows. [batch, window]"""
        rows: list[NDArray[np.int64]] = []
        for index in self._random.choice(len(self.sources), size=batch, p=self.shares):
            tokens = self.sources[index].train
            start = int(self._random.integers(0, len(tokens) - self.window + 1))
            rows.append(tokens[start : start + self.window].astype(np.int64))
        return np.stack(rows)

    def frequencies(self, vocabulary: int) -> NDArray[np.float64]:
        """How often each token is expected in the mixture; sums to 1. [vocabulary]"""
        counts = np.zeros(vocabulary)
        for source, share in zip(self.sources, self.shares, strict=True):
            counts += share / len(source.train) * np.bincount(source.train, minlength=vocabulary)
        return counts


def held_out_windows(tokens: NDArray[np.int32], positions: int) -> list[NDArray[np.int64]]:
    """Cut held-out tokens so that each but the first is predicted once. Each is [2 .. positions + 1]."""
    starts = range(0, len(tokens) - 1, positions)
    return [tokens[start : start + positions + 1].astype(np.int64) for start in starts]
