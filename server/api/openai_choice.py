"""One choice of an OpenAI answer: text, logprobs and reason of one sequence, piece by piece. Knows no JSON shape."""

import codecs
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from server.api.text import TextAssembler
from server.engine.types import FinishReason, SequenceOutput, TopTokens

_REASONS = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class TokenNames:
    """What each token is called in `logprobs`: no two of a vocabulary alike, since clients use the names as keys.

    Its text; `bytes:\\xe2\\x80` if it is no whole text; `token_id:50300` if its bytes are none or those of another.
    """

    def __init__(self, vocabulary: Sequence[bytes], special: Mapping[int, str]) -> None:
        """`special`: ids that have a text but no bytes."""
        self._vocabulary, self.special = vocabulary, special
        self._names: list[str] = []
        seen: set[str] = set()
        for id_ in range(len(vocabulary)):
            name = _name(self.data(id_))
            if not name or name in seen:
                name = f"token_id:{id_}"
            seen.add(name)
            self._names.append(name)

    def __getitem__(self, id_: int) -> str:
        return self._names[id_]

    def data(self, id_: int) -> bytes:
        """The bytes of a token as it is shown, special ones too."""
        return self.special[id_].encode() if id_ in self.special else self._vocabulary[id_]


class ScoredToken(NamedTuple):
    """A token as `logprobs` tells of it."""

    id: int
    logprob: float | None  # None: the first of a prompt
    top: TopTokens
    offset: int  # characters before it, of the text with what a stop string cuts off


@dataclass
class Delta:
    """What has become certain of a choice; joined, they are all of it."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=lambda: list[ScoredToken]())  # none if nobody asked for logprobs
    finish_reason: str | None = None

    def extend(self, more: "Delta") -> None:
        """Put `more` behind this."""
        self.text += more.text
        self.tokens += more.tokens
        self.finish_reason = more.finish_reason

    @property
    def empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.text or self.tokens or self.finish_reason)


class Choice:
    """Follows one sequence."""

    def __init__(self, names: TokenNames, text: TextAssembler, *, echo: Sequence[int] = (), scored: bool) -> None:
        """`echo`: the prompt, if it is told too; `scored`: whether logprobs are."""
        self._names, self._assembler, self._scored, self._echo = names, text, scored, echo
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0
        self._pending: deque[ScoredToken] = deque()  # whose text is not certain yet
        self._sum = 0.0

    @property
    def count(self) -> int:
        """Tokens generated so far."""
        return self._assembler.count

    @property
    def mean_logprob(self) -> float:
        """Of the tokens generated so far."""
        return self._sum / max(1, self.count)

    def push(self, output: SequenceOutput) -> Delta:
        """Take the sequence's next output."""
        delta = self._prompt(output) if self._echo else Delta()
        self._echo = ()
        self._note(output)
        pieces = self._assembler.push(output)
        delta.text += "".join(piece.text for piece in pieces if not piece.special)
        if self._scored:
            delta.tokens += [self._pending.popleft() for _ in pieces]
        if output.finish_reason is not None:
            delta.finish_reason = _REASONS[output.finish_reason]
        return delta

    def _note(self, output: SequenceOutput) -> None:
        self._sum += sum(output.logprobs)
        if self._scored:
            data = (b"" if i in self._names.special else self._names.data(i) for i in output.token_ids)
            self._pending += self._scores(output.token_ids, output.logprobs, output.top_logprobs, data)

    def _prompt(self, output: SequenceOutput) -> Delta:
        """The prompt's text; its logprobs come with the first output."""
        ids, data = self._echo, [self._names.data(i) for i in self._echo]
        delta = Delta(b"".join(data).decode(errors="replace"))
        if self._scored:
            logprobs = (None, *output.prompt_logprobs)
            delta.tokens += self._scores(ids, logprobs, ((), *output.prompt_top_logprobs), data)
        self._decoder.reset()
        self._offset = len(delta.text)
        return delta

    def _scores(
        self, ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[TopTokens], data: Iterable[bytes]
    ) -> list[ScoredToken]:
        scored: list[ScoredToken] = []
        for i, (id_, logprob, each) in enumerate(zip(ids, logprobs, data, strict=True)):
            scored.append(ScoredToken(id_, logprob, tops[i] if i < len(tops) else (), self._offset))
            self._offset += len(self._decoder.decode(each))
        return scored


def _name(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = ""
    if data and (not text or text.startswith(("bytes:", "token_id:"))):
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return text
