"""An OpenAI answer, whole or as server-sent events, for completions and for chat."""

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi.responses import JSONResponse

from server.api.errors import ApiError
from server.api.openai_choice import Choice, Delta, ScoredToken, TokenNames
from server.api.spec import ChorusSpec, Generation
from server.api.sse import event
from server.api.text import TextAssembler
from server.engine.types import SequenceOutput

logger = logging.getLogger(__name__)
Outputs = AsyncGenerator[tuple[int, SequenceOutput]]
_PATH = "/v1/"  # whose shape errors have
_MANY_TOKENS = 4096  # the logprobs of so many are put into words beside the event loop


@dataclass(frozen=True)
class Wanted:
    """What a client asked for beyond its sequences."""

    model: str
    n: int = 1  # choices for each prompt
    logprobs: bool = False
    echo: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


class Shape(Protocol):
    """How a dialect's choices look."""

    prefix: str  # of the id
    whole: str  # what `object` says
    chunk: str

    def choice(self, index: int, delta: Delta, logprobs: bool) -> dict[str, Any]:
        """A choice of a whole answer."""
        ...

    def part(self, index: int, delta: Delta, logprobs: bool, *, first: bool) -> dict[str, Any]:
        """A choice of a chunk; `first` of its index."""
        ...


class CompletionShape:
    """Of /v1/completions."""

    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, names: TokenNames) -> None:
        self._names = names

    def choice(self, index: int, delta: Delta, logprobs: bool) -> dict[str, Any]:
        """With its text."""
        told = self._logprobs(delta.tokens) if logprobs else None
        return {"index": index, "text": delta.text, "logprobs": told, "finish_reason": delta.finish_reason}

    def part(self, index: int, delta: Delta, logprobs: bool, *, first: bool) -> dict[str, Any]:
        """The same, of a piece."""
        return self.choice(index, delta, logprobs)

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        return {
            "tokens": [self._names[token.id] for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: ScoredToken) -> dict[str, float] | None:
        """The best ones and, wherever it stands, the token itself."""
        if token.logprob is None:
            return None
        return {self._names[id_]: logprob for id_, logprob in token.top} | {self._names[token.id]: token.logprob}


class ChatShape:
    """Of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, names: TokenNames) -> None:
        self._names = names

    def choice(self, index: int, delta: Delta, logprobs: bool) -> dict[str, Any]:
        """With its message."""
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        told = self._logprobs(delta.tokens) if logprobs else None
        return {"index": index, "message": message, "logprobs": told, "finish_reason": delta.finish_reason}

    def part(self, index: int, delta: Delta, logprobs: bool, *, first: bool) -> dict[str, Any]:
        """With what its message gains."""
        gain = {"role": "assistant", "content": delta.text} if first else {"content": delta.text} if delta.text else {}
        told = self._logprobs(delta.tokens) if logprobs and delta.tokens else None
        return {"index": index, "delta": gain, "logprobs": told, "finish_reason": delta.finish_reason}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        content = [
            self._entry(token.id, token.logprob) | {"top_logprobs": [self._entry(*best) for best in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, id_: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self._names[id_], "logprob": logprob, "bytes": list(self._names.data(id_))}


class Answer:
    """Puts a generation's outputs into a dialect's shape."""

    def __init__(
        self, spec: ChorusSpec, generation: Generation, names: TokenNames, shape: Shape, wanted: Wanted
    ) -> None:
        self._generation, self._shape, self._wanted = generation, shape, wanted
        vocabulary, special = spec.state.vocabulary, spec.state.tokenizer.special
        self._choices = [
            Choice(
                names,
                TextAssembler(vocabulary, special, request.sampling_params.stop),
                echo=request.prompt_token_ids if wanted.echo else (),
                scored=wanted.logprobs,
            )
            for request in generation.requests
        ]
        self._created, self._fingerprint = int(time.time()), fingerprint(spec, generation)

    async def whole(self, outputs: Outputs) -> JSONResponse:
        """Everything in one answer. Raises ApiError."""
        async with aclosing(outputs):
            everything = [item async for item in outputs]
        if self._wanted.logprobs and self._generation.prompt_tokens > _MANY_TOKENS:
            return await asyncio.to_thread(self._render, everything)
        return self._render(everything)

    def _render(self, outputs: Iterable[tuple[int, SequenceOutput]]) -> JSONResponse:
        deltas = [Delta() for _ in self._choices]
        for i, output in outputs:
            deltas[i].extend(self._choices[i].push(output))
        choices: list[dict[str, Any]] = []
        for start in range(0, len(deltas), self._generation.copies):
            best = list(range(start, start + self._generation.copies))
            if len(best) > self._wanted.n:
                best.sort(key=lambda i: -self._choices[i].mean_logprob)
            for i in best[: self._wanted.n]:
                choices.append(self._shape.choice(len(choices), deltas[i], self._wanted.logprobs))
        body = self._body(self._shape.whole, choices) | {"usage": self._usage()}
        headers = self._generation.headers | {"x-generated-tokens": str(self._usage()["completion_tokens"])}
        return JSONResponse(body, headers=headers)

    async def events(self, item: tuple[int, SequenceOutput] | None, outputs: Outputs) -> AsyncGenerator[str]:
        """The same in chunks, `item` first. `[DONE]` tells that nothing is missing: none follows an error."""
        wanted, begun = self._wanted, set[int]()
        try:
            while item is not None:
                i, output = item
                delta = self._choices[i].push(output)
                if not delta.empty:
                    part = self._shape.part(i, delta, wanted.logprobs, first=i not in begun)
                    begun.add(i)
                    yield self._chunk([part], self._usage() if wanted.continuous_usage else None)
                item = await anext(outputs, None)
            if wanted.include_usage:
                yield self._chunk([], self._usage())
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event(error.body(_PATH))
        except Exception:
            logger.exception("request %s failed while it was streamed", self._generation.client_id)
            yield event(ApiError.internal(self._generation.client_id).body(_PATH))
        finally:
            await outputs.aclose()

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> str:
        told = {"usage": usage} if self._wanted.include_usage or self._wanted.continuous_usage else {}
        return event(self._body(self._shape.chunk, choices) | told)

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._shape.prefix + self._generation.requests[0].request_id,
            "object": kind,
            "created": self._created,
            "model": self._wanted.model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
        }

    def _usage(self) -> dict[str, int]:
        """Every sequence counts, those that best_of leaves out too."""
        prompt, completion = self._generation.prompt_tokens, sum(choice.count for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def fingerprint(spec: ChorusSpec, generation: Generation) -> str:
    """The same for the same base, adapters with weights, version and way of computing."""
    state, worker = spec.state, spec.engine.info
    parts = [state.model_name, repr(state.model_config), state.version]
    parts += [worker.dtype, worker.backend] if worker else []
    parts += sorted(f"{each.ref.digest}:{each.weight!r}" for each in generation.adapters)
    return "fp_" + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
