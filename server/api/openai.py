"""The OpenAI dialect: POST /v1/completions, POST /v1/chat/completions, GET /v1/models."""

import asyncio
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import Response, StreamingResponse

from server.api import sse
from server.api.errors import CONTEXT_LENGTH_EXCEEDED, ApiError
from server.api.openai_answer import Answer, ChatShape, CompletionShape, Shape, Wanted
from server.api.openai_choice import TokenNames
from server.api.schemas_openai import (
    MAX_SEQUENCES,
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    StreamOptions,
)
from server.api.spec import ChorusSpec
from server.engine.types import SamplingParams

DEFAULT_MAX_TOKENS = 16
_LONG_TEXT = 1 << 14  # characters; what is longer is tokenised beside the event loop


class OpenAIRoutes:
    """The dialect's handlers over one spec."""

    def __init__(self, spec: ChorusSpec) -> None:
        self._spec = spec

    def register(self) -> None:
        """Add the routes."""
        self._spec.route("POST", "/v1/completions", self.completions)
        self._spec.route("POST", "/v1/chat/completions", self.chat)
        self._spec.route("GET", "/v1/models", self.models)
        self._spec.route("GET", "/v1/models/{name:path}", self.model)

    async def completions(self, body: CompletionRequest, http: HttpRequest) -> Response:
        """Continue texts with an adapter, or with the base."""
        n = body.n or 1
        copies, limit = body.best_of or n, _limit(body)
        if copies < n:
            raise ApiError.invalid("best_of", f"{copies} is less than `n` {n}: so many can't be chosen from it")
        if copies > n and body.stream:
            raise ApiError.invalid(
                "best_of", f"{copies} with `n` {n} can't be streamed: which are best shows at the end"
            )
        if limit == 0 and not body.echo:
            raise ApiError.invalid(_limit_field(body), "0 needs `echo` true: without it there is nothing to answer")
        top, scored = body.logprobs or 0, body.logprobs is not None
        ids = await self._encode(body.prompt, "prompt")
        return await self._answer(
            body,
            http,
            ids,
            "prompt",
            CompletionShape(self._names),
            self._wanted(body, logprobs=scored, echo=bool(body.echo)),
            copies=copies,
            default=DEFAULT_MAX_TOKENS,
            top_logprobs=top,
            prompt_only=limit == 0,
        )

    async def chat(self, body: ChatRequest, http: HttpRequest) -> Response:
        """Continue the messages' contents, a line break between two: there is no template of roles."""
        if body.top_logprobs and not body.logprobs:
            raise ApiError.invalid("top_logprobs", f"{body.top_logprobs} needs `logprobs` true")
        if _limit(body) == 0:
            raise ApiError.invalid(_limit_field(body), "0 leaves nothing to answer; expected 1 or more")
        return await self._answer(
            body,
            http,
            await self._encode([body.prompt], "messages"),
            "messages",
            ChatShape(self._names),
            self._wanted(body, logprobs=bool(body.logprobs)),
            copies=body.n or 1,
            default=self._spec.state.max_model_len,
            top_logprobs=body.top_logprobs or 0,
        )

    async def models(self) -> dict[str, Any]:
        """The base first, then every adapter that can be served and every alias, by name."""
        state = self._spec.state
        base, longest = state.model_name, state.max_model_len
        cards = [_card(base, None, state.created, longest)]
        judged = {} if self._spec.link is None else self._spec.link.residency
        refused = {digest for digest, (status, _) in judged.items() if status == "refused"}  # its golden prompts, say
        for entry in await asyncio.to_thread(state.store.servable, refused):
            cards.append(_card(entry.name, base, entry.created, longest))
        return {"object": "list", "data": cards}

    async def model(self, name: str, http: HttpRequest) -> dict[str, Any]:
        """Whatever `model` may name: the base, an adapter or alias, `name@tag`, a composition."""
        state = self._spec.state
        if not await self._spec.adapters(name, "model", http):
            return _card(name, None, state.created, state.max_model_len)
        entry = state.store.registry.entries.get(name.partition("@")[0])
        return _card(name, state.model_name, entry.created if entry else state.created, state.max_model_len)

    @cached_property
    def _names(self) -> TokenNames:
        return TokenNames(self._spec.state.vocabulary, self._spec.state.tokenizer.special)

    def _wanted(self, body: SamplingFields, *, logprobs: bool, echo: bool = False) -> Wanted:
        options = body.stream_options or StreamOptions()
        usage, continuous = bool(options.include_usage), bool(options.continuous_usage_stats)
        if (usage or continuous) and not body.stream:
            raise ApiError.invalid("stream_options", "needs `stream` true; a whole answer always has its usage")
        return Wanted(
            body.model or self._spec.state.model_name,
            body.n or 1,
            logprobs,
            echo,
            include_usage=usage,
            continuous_usage=continuous,
        )

    async def _encode(self, prompts: Sequence[str | Sequence[int]], field: str) -> list[list[int]]:
        """Token ids. Raises ApiError for ids that the model doesn't have, and texts that can't fit."""
        if sum(len(prompt) for prompt in prompts if isinstance(prompt, str)) > _LONG_TEXT:
            return await asyncio.to_thread(lambda: [self._ids(prompt, field) for prompt in prompts])
        return [self._ids(prompt, field) for prompt in prompts]

    def _ids(self, prompt: str | Sequence[int], field: str) -> list[int]:
        state = self._spec.state
        if isinstance(prompt, str):
            begin = state.model_config.eos_token_id  # GPT-2 saw one before each document
            ids = self._spec.encode(prompt, field) or ([] if begin is None else [begin])
            if not ids:
                raise ApiError.invalid(field, "is empty, and this model has no token that begins a document")
            return ids
        if (largest := max(prompt)) >= state.model_config.vocab_size:
            size = state.model_config.vocab_size
            raise ApiError.invalid("prompt", f"holds the token id {largest}; the model has ids below {size}")
        return list(prompt)

    async def _answer(
        self,
        body: SamplingFields,
        http: HttpRequest,
        prompts: list[list[int]],
        prompt_field: str,
        shape: Shape,
        wanted: Wanted,
        *,
        copies: int,
        default: int,
        top_logprobs: int,
        prompt_only: bool = False,
    ) -> Response:
        state, stream = self._spec.state, bool(body.stream)
        adapters = await self._spec.adapters(body.model, "model", http)
        most = min(MAX_SEQUENCES, state.settings.max_batch_size + state.settings.max_waiting)
        if len(prompts) * copies > most:
            raise ApiError.invalid(
                "best_of" if copies > wanted.n else "n",
                f"{copies} for each of {len(prompts)} prompts makes {len(prompts) * copies} sequences; at most {most}",
            )
        if (largest := max((id_ for id_, _ in body.logit_bias), default=0)) >= state.model_config.vocab_size:
            size = state.model_config.vocab_size
            raise ApiError.invalid("logit_bias", f"holds the token id {largest}; the model has ids below {size}")
        ranked = copies > wanted.n

        def params(room: int) -> SamplingParams:
            return sampling_params(
                body,
                room,
                state.max_model_len,
                default=default,
                logprobs=wanted.logprobs or ranked,
                top_logprobs=top_logprobs,
                prompt_logprobs=wanted.logprobs and wanted.echo,
            )

        generation = self._spec.prepare(
            http, prompts, prompt_field, adapters, params, stream=stream, copies=copies, prompt_only=prompt_only
        )
        answer = Answer(self._spec, generation, self._names, shape, wanted)
        outputs = self._spec.outputs(generation)
        if not stream:
            return await self._spec.race(http, answer.whole(outputs))
        try:
            first = await self._spec.race(http, anext(outputs))  # an error before the first token keeps its status
        except BaseException:
            await outputs.aclose()
            raise
        events = answer.events(first, outputs)
        headers = generation.headers | sse.HEADERS
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def sampling_params(
    body: SamplingFields,
    room: int,
    max_model_len: int,
    *,
    default: int,
    logprobs: bool,
    top_logprobs: int,
    prompt_logprobs: bool,
) -> SamplingParams:
    """The engine's parameters; `room` is how many positions the prompt leaves, `default` how many tokens go if the
    client doesn't say. Raises ApiError."""
    wanted = _limit(body)
    if wanted is not None and wanted > room:
        raise ApiError.invalid(
            _limit_field(body),
            f"{wanted} does not fit: the prompt has {max_model_len - room} tokens and the model {max_model_len} "
            f"positions for prompt and output, so at most {room}",
            code=CONTEXT_LENGTH_EXCEEDED,
        )
    most, least = min(default, room) if wanted is None else wanted, body.min_tokens or 0
    if least > most:
        raise ApiError.invalid("min_tokens", f"{least} is more than the {most} tokens that are generated at most")
    temperature = 1.0 if body.temperature is None else body.temperature
    seed = secrets.randbits(32) if body.seed is None else body.seed % 2**64
    return SamplingParams(
        max_tokens=max(1, most),  # the engine has no request without a token; the answer leaves it out
        temperature=temperature,
        top_k=max(0, body.top_k or 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        repetition_penalty=body.repetition_penalty or 1.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logit_bias=body.logit_bias,
        min_tokens=least,
        seed=seed if temperature > 0 else 0,
        stop=tuple(stop.encode() for stop in body.stop),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _limit_field(body: SamplingFields) -> str:
    """The name by which it was sent."""
    return "max_tokens" if body.max_tokens is not None else "max_completion_tokens"


def _limit(body: SamplingFields) -> int | None:
    """`max_tokens` by either of its names."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError.invalid("max_completion_tokens", f"{new} contradicts `max_tokens` {old}; send one of them")
    return new if old is None else old


def _card(name: str, base: str | None, created: float, max_model_len: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(created),
        "owned_by": "chorus",
        "root": base or name,
        "parent": base,
        "max_model_len": max_model_len,
        "permission": [],
    }
