"""The TGI / LoRAX dialect: POST /, /generate, /generate_stream and /tokenize, GET /info."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.api import sse, tgi_answers
from server.api.errors import ApiError
from server.api.schemas import (
    MAX_BEST_OF,
    MAX_STOP_SEQUENCES,
    CompatGenerateRequest,
    GenerateParameters,
    GenerateRequest,
    TokenizeRequest,
)
from server.api.spec import ChorusSpec, Generation
from server.api.tgi_answers import SequenceText
from server.engine.types import SamplingParams, SequenceOutput

logger = logging.getLogger(__name__)


class TgiRoutes:
    """The dialect's handlers over one spec."""

    def __init__(self, spec: ChorusSpec) -> None:
        self._spec = spec

    def register(self) -> None:
        """Add the routes."""
        self._spec.route("POST", "/", self.compat)
        self._spec.route("POST", "/generate", self.generate)
        self._spec.route("POST", "/generate_stream", self.generate_stream)
        self._spec.route("POST", "/tokenize", self.tokenize)
        self._spec.route("GET", "/info", self.info)

    async def compat(self, body: CompatGenerateRequest, http: HttpRequest) -> Response:
        """Generate as /generate does, answered in a list of one; or, with `stream`, as /generate_stream does."""
        return await (self._stream(body, http) if body.stream else self._answer(body, http, listed=True))

    async def generate(self, body: GenerateRequest, http: HttpRequest) -> Response:
        """Generate a text with an adapter, or with the base."""
        return await self._answer(body, http, listed=False)

    async def generate_stream(self, body: GenerateRequest, http: HttpRequest) -> Response:
        """The same, a server-sent event for each token."""
        return await self._stream(body, http)

    async def tokenize(self, body: TokenizeRequest, http: HttpRequest) -> Response:
        """The tokens of a text: TGI's answer to `inputs`, vLLM's to `prompt`."""
        if body.prompt is not None:
            await self._spec.adapters(body.model, "model", http)
            ids = await asyncio.to_thread(self._spec.encode, body.prompt, "prompt")
            return JSONResponse({"count": len(ids), "max_model_len": self._spec.state.max_model_len, "tokens": ids})
        text, parameters = body.inputs or "", body.parameters or GenerateParameters()
        self._spec.check_size(text, "inputs")

        def answer() -> JSONResponse:
            places = self._spec.state.tokenizer.places(text)[-(parameters.truncate or 0) :]
            return JSONResponse([{"id": i, "text": text[a:b], "start": a, "stop": b} for i, a, b in places])

        return await asyncio.to_thread(answer)

    async def info(self) -> dict[str, Any]:
        """What is served, in TGI's terms."""
        state, worker = self._spec.state, self._spec.engine.info
        longest = state.max_model_len
        return {
            "model_id": state.model_name,
            "model_sha": None,
            "model_pipeline_tag": "text-generation",
            "model_dtype": worker.dtype if worker else None,
            "model_device_type": worker.device if worker else None,
            "backend": worker.backend if worker else None,
            "max_concurrent_requests": self._max_concurrent,
            "max_best_of": min(MAX_BEST_OF, self._max_concurrent),
            "max_stop_sequences": MAX_STOP_SEQUENCES,
            "max_input_tokens": longest - 1,
            "max_input_length": longest - 1,
            "max_total_tokens": longest,
            "max_client_batch_size": 1,
            "router": "chorus",
            "version": state.version,
        }

    @property
    def _max_concurrent(self) -> int:
        settings = self._spec.state.settings
        return settings.max_batch_size + settings.max_waiting

    async def _answer(self, body: GenerateRequest, http: HttpRequest, *, listed: bool) -> Response:
        parameters = body.parameters or GenerateParameters()
        generation = await self._prepare(body.inputs, parameters, http, stream=False)
        best, *others = await self._spec.race(http, self._collect(generation))
        answer = tgi_answers.answer(parameters, _before(body), [best, *others])
        headers = generation.headers | tgi_answers.timings(best)
        return JSONResponse([answer] if listed else answer, headers=headers)

    async def _stream(self, body: GenerateRequest, http: HttpRequest) -> Response:
        parameters = body.parameters or GenerateParameters()
        for field, neutral in (("best_of", 1), ("decoder_input_details", False)):
            value = getattr(parameters, field)
            if value is not None and value != neutral:
                raise ApiError.invalid(field, f"{value!r} is not for streams: leave it out, or ask without streaming")
        generation = await self._prepare(body.inputs, parameters, http, stream=True)
        outputs = self._spec.outputs(generation)
        try:
            _, first = await self._spec.race(http, anext(outputs))  # an error before the first token keeps its status
        except BaseException:
            await outputs.aclose()
            raise
        events = self._events(body, parameters, generation, first, outputs)
        headers = generation.headers | sse.HEADERS
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    async def _prepare(
        self, inputs: str, parameters: GenerateParameters, http: HttpRequest, *, stream: bool
    ) -> Generation:
        wanted, copies = parameters.adapter_id, parameters.best_of or 1
        if copies > self._max_concurrent:
            raise ApiError.invalid("best_of", f"{copies} is too many: this server runs {self._max_concurrent} requests")
        listed = wanted if isinstance(wanted, str | None) else [(each.ref, each.weight) for each in wanted]
        adapters = await self._spec.adapters(listed, "adapter_id", http)

        def params(room: int) -> SamplingParams:
            return tgi_answers.sampling_params(parameters, room, self._spec.state.max_model_len, stream=stream)

        if parameters.truncate is None:
            prompt = self._spec.encode(inputs, "inputs")
        else:  # as long as a body may be
            prompt = await asyncio.to_thread(self._spec.state.tokenizer.encode, inputs)
            prompt = prompt[-parameters.truncate :]
        return self._spec.prepare(http, [prompt], "inputs", adapters, params, stream=stream, copies=copies)

    async def _collect(self, generation: Generation) -> list[SequenceText]:
        texts = [self._text(generation, i) for i in range(len(generation.requests))]
        async with aclosing(self._spec.outputs(generation)) as outputs:
            async for i, output in outputs:
                texts[i].push(output)
        return tgi_answers.best_first(texts)

    async def _events(
        self,
        body: GenerateRequest,
        parameters: GenerateParameters,
        generation: Generation,
        first: SequenceOutput,
        outputs: AsyncGenerator[tuple[int, SequenceOutput]],
    ) -> AsyncGenerator[str]:
        text = self._text(generation, 0)
        output: SequenceOutput | None = first
        try:
            while output is not None:
                pieces = text.push(output)
                for piece in pieces:
                    event: dict[str, Any] = {"index": piece.index, "token": tgi_answers.token(piece)}
                    if parameters.top_n_tokens:
                        event["top_tokens"] = text.top_tokens(piece.top)
                    event |= {"generated_text": None, "details": None}
                    if output.finish_reason is not None and piece is pieces[-1]:
                        event["generated_text"] = _before(body) + text.text
                        if parameters.details:
                            event["details"] = text.counts()
                    yield sse.event(event)
                more = await anext(outputs, None)
                output = more and more[1]
        except ApiError as error:
            yield sse.event(error.body("/generate_stream"))
        except Exception:
            logger.exception("request %s failed while it was streamed", generation.client_id)
            yield sse.event(ApiError.internal(generation.client_id).body("/generate_stream"))
        finally:
            await outputs.aclose()

    def _text(self, generation: Generation, index: int) -> SequenceText:
        state = self._spec.state
        return SequenceText(generation.requests[index], state.vocabulary, state.tokenizer.special)


def _before(body: GenerateRequest) -> str:
    """What goes before generated_text."""
    return body.inputs if body.parameters is not None and body.parameters.return_full_text else ""
