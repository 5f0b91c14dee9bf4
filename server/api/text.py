"""Assembles a request's tokens into pieces of text, the same for a stream and for one answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.engine.types import SequenceOutput, TopTokens
from server.tokenizer import Detokenizer


@dataclass
class TokenPiece:
    """One token and the text that became certain with it; joined, the texts of the non-special ones are the output."""

    index: int  # from 1
    id: int
    text: str
    logprob: float | None
    special: bool
    top: TopTokens = ()  # the likeliest tokens in its place, where asked for


def token_text(id_: int, vocabulary: Sequence[bytes], special: Mapping[int, str]) -> str:
    """A token by itself; U+FFFD stands for bytes that are no whole character."""
    return special[id_] if id_ in special else vocabulary[id_].decode(errors="replace")


class TextAssembler:
    """Feeds a request's outputs through a Detokenizer, piece by piece.

    A piece whose text is not certain yet (half a character, the beginning of a stop string) is kept back until the next
    token, so that what is left at an EOS still goes to a piece that clients show. Special tokens have no bytes: what is
    kept back stays so across them, and they wait behind it.
    """

    def __init__(self, vocabulary: Sequence[bytes], special: Mapping[int, str], stop: Sequence[bytes]) -> None:
        """`special`: ids whose text is shown with the token but is no part of the output."""
        self._detokenizer = Detokenizer(vocabulary, stop)
        self._special = special
        self._kept: list[TokenPiece] = []  # one whose text is not certain, and special ones after it
        self.count = 0
        self.text = ""

    def push(self, output: SequenceOutput) -> list[TokenPiece]:
        """The pieces that `output` makes certain."""
        self._detokenizer.limit = output.stop_offset
        pieces: list[TokenPiece] = []
        for i, token in enumerate(output.token_ids):
            self.count += 1
            logprob = output.logprobs[i] if output.logprobs else None
            top = output.top_logprobs[i] if output.top_logprobs else ()
            if token in self._special:
                shown = TokenPiece(self.count, token, self._special[token], logprob, True, top)
                (self._kept or pieces).append(shown)
                continue
            piece = TokenPiece(self.count, token, self._detokenizer.push(token), logprob, False, top)
            self._release(pieces, "")
            if self._detokenizer.holding:
                self._kept = [piece]
            else:
                pieces.append(piece)
        if output.finish_reason is not None:
            self._release(pieces, self._detokenizer.finish())
        self.text += "".join(piece.text for piece in pieces if not piece.special)
        return pieces

    def _release(self, pieces: list[TokenPiece], rest: str) -> None:
        if self._kept:
            self._kept[0].text += rest
            pieces += self._kept
            self._kept = []
