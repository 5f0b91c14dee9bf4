"""GPT-2's byte-level BPE: text to ids, ids to bytes, bytes to text as they arrive. Works without torch."""

import codecs
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import pre_tokenizers
from tokenizers.models import BPE

from server.model.config import ModelError


class Tokenizer:
    """The tokenizer of a checkpoint directory: `tokenizer.json`, or `vocab.json` with `merges.txt`."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError when the files are missing or unreadable."""
        try:
            if (folder / "tokenizer.json").is_file():
                self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            else:
                self._tokenizer = tokenizers.Tokenizer(
                    BPE.from_file(  # pyright: ignore[reportUnknownMemberType]
                        str(folder / "vocab.json"), str(folder / "merges.txt")
                    )
                )
                self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
                self._tokenizer.add_special_tokens(["<|endoftext|>"])  # pyright: ignore[reportUnknownMemberType]
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(
                f"{folder}: no readable tokenizer.json, or vocab.json with merges.txt ({error})"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {id_: token.content for id_, token in added.items() if token.special}

    @property
    def size(self) -> int:
        """One more than the largest id that a text can be encoded to."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, no special token added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def places(self, text: str) -> list[tuple[int, int, int]]:
        """The same ids, each with the characters of `text` that it has a part of: the first, and the one after."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return [(id_, start, stop) for id_, (start, stop) in zip(encoded.ids, encoded.offsets, strict=True)]

    def vocabulary(self, size: int) -> list[bytes]:
        """The bytes of every id below `size`, none for special ones: text is the concatenation of its tokens' bytes."""
        to_byte = {char: byte for byte, char in _byte_alphabet().items()}
        table = [b""] * size
        for token, id_ in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if id_ < size and id_ not in self.special:
                known = all(char in to_byte for char in token)
                table[id_] = bytes(to_byte[c] for c in token) if known else token.encode()
        return table


class Detokenizer:
    """Turns one request's tokens into text as they arrive.

    A character is given out once all its bytes are there; text that may be the beginning of a stop string is held back
    until it is clear that it isn't. The pieces, joined, are the generated text.
    """

    def __init__(self, vocabulary: Sequence[bytes], stop: Sequence[bytes] = ()) -> None:
        self._vocabulary, self._stop = vocabulary, stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = b""
        self._given = 0  # bytes passed on to the decoder
        self.limit: int | None = None  # once a stop string is found: the bytes before it

    @property
    def holding(self) -> bool:
        """Whether bytes are kept back that a later token may complete."""
        return bool(self._held or self._decoder.getstate()[0])

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        data = self._held + self._vocabulary[token_id]
        keep = max((n for stop in self._stop for n in range(1, len(stop)) if data.endswith(stop[:n])), default=0)
        self._held = data[len(data) - keep :]
        return self._give(data[: len(data) - keep])

    def finish(self) -> str:
        """What is left at the end."""
        data, self._held = self._held, b""
        text = self._give(data) + self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text

    def _give(self, data: bytes) -> str:
        if self.limit is not None:
            data = data[: max(0, self.limit - self._given)]
        self._given += len(data)
        return self._decoder.decode(data)


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte (Radford et al. 2019, `encoder.py`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
