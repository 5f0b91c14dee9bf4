"""Prose to tokens: reads a folder of text files, splits off what is held out, draws windows by weight.

Knows nothing about models. A source is one `NAME.txt` (UTF-8); a line `<|endoftext|>` ends a document in it,
and so does the end of the file. Every document ends with the EOS token.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.errors import ConfigError, DataError

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

    Raises DataError where there is no text file, ConfigError where a file has no weight or an override names no file.
    """
    if not folder.is_dir():
        raise DataError(f"--prose {folder}: there is no such folder")
    names = sorted(path.stem for path in folder.glob("*.txt"))
    if not names:
        raise DataError(f"--prose {folder}: no .txt file in it")
    for name in overrides:
        if name not in names:
            raise ConfigError(f"--weight {name}: there is no {name}.txt in {folder}; it has {', '.join(names)}")
    weights = {**DEFAULT_WEIGHTS, **overrides}
    for name in names:
        if name not in weights:
            raise ConfigError(f"{folder / name}.txt has no weight: add --weight {name}=1, or =0 to leave it out")
    used = {name: weights[name] for name in names if weights[name] > 0}
    if not used:
        raise ConfigError(f"--weight: every source in {folder} has weight 0")
    return used


def load_sources(
    folder: Path, weights: Mapping[str, float], encode: Callable[[list[str]], list[list[int]]], eos: int, window: int
) -> list[Source]:
    """Read, tokenise and split every source in `weights`.

    `window` is the number of tokens in one training example. Raises DataError where a file isn't UTF-8 or is too short
    for one.
    """
    sources: list[Source] = []
    for name, weight in weights.items():
        path = folder / f"{name}.txt"
        content = path.read_bytes()
        tokens = tokenize(documents(content, path), encode, eos)
        train, held_out = split(tokens)
        if len(train) < window:
            raise DataError(
                f"{path} has {len(tokens)} tokens: {max(len(held_out), HELD_OUT_LEAST)} are held out and {window} more "
                "are needed to train on; leave it out with weight 0"
            )
        sources.append(Source(name, weight, hashlib.sha256(content).hexdigest(), train, held_out))
    return sources


def documents(content: bytes, path: Path) -> list[str]:
    """The documents of one file, stripped, without empty ones. Raises DataError, which names `path`."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    pieces = (piece.strip() for piece in text.split(DOCUMENT_END))
    return [piece for piece in pieces if piece]


def tokenize(texts: list[str], encode: Callable[[list[str]], list[list[int]]], eos: int) -> NDArray[np.int32]:
    """All texts after one another, each followed by `eos`. [tokens]"""
    ids = [token for document in encode(texts) for token in (*document, eos)]
    return np.asarray(ids, dtype=np.int32)


def split(tokens: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(training tokens, held-out tokens): the held-out slice is the end of the source, see HELD_OUT_DEFINITION."""
    held_out = max(int(len(tokens) * HELD_OUT_SHARE), HELD_OUT_LEAST)
    return tokens[:-held_out], tokens[-held_out:]


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
