"""The TGI / LoRAX dialect: POST /generate and /generate_stream."""

import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.api.errors import ApiError
from server.api.schemas import MAX_STOP_SEQUENCES, GenerateParameters, GenerateRequest
from server.api.spec import ChorusSpec, Generation
from server.api.text import TextAssembler, TokenPiece
from server.engine.types import FinishReason, SamplingParams, SequenceOutput

logger = logging.getLogger(__name__)
DEFAULT_MAX_NEW_TOKENS = 20
_REASONS = {FinishReason.EOS: "eos_token", FinishReason.STOP: "stop_sequence", FinishReason.LENGTH: "length"}


class TgiRoutes:
    """The dialect's handlers over one spec."""

    def __init__(self, spec: ChorusSpec) -> None:
        self._spec = spec

    def register(self) -> None:
        """Add the routes."""
        self._spec.route("POST", "/generate", self.generate)
        self._spec.route("POST", "/generate_stream", self.generate_stream)
        self._spec.route("GET", "/info", self.info)

    async def generate(self, body: GenerateRequest, http: HttpRequest) -> Response:
        """Generate a text with an adapter, or with the base."""
        parameters = body.parameters or GenerateParameters()
        generation = await self._prepare(body, parameters, http, stream=False)
        return await self._spec.race(http, self._collect(body, parameters, generation))

    async def generate_stream(self, body: GenerateRequest, http: HttpRequest) -> Response:
        """The same, a server-sent event for each token."""
        parameters = body.parameters or GenerateParameters()
        generation = await self._prepare(body, parameters, http, stream=True)
        outputs = self._spec.outputs(generation)
        try:
            _, first = await self._spec.race(http, anext(outputs))  # an error before the first token keeps its status
        except BaseException:
            await outputs.aclose()
            raise
        events = self._events(body, parameters, generation, first, outputs)
        return StreamingResponse(events, media_type="text/event-stream", headers=generation.headers)

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
            "max_concurrent_requests": state.settings.max_batch_size + state.settings.max_waiting,
            "max_best_of": 1,
            "max_stop_sequences": MAX_STOP_SEQUENCES,
            "max_input_tokens": longest - 1,
            "max_input_length": longest - 1,
            "max_total_tokens": longest,
            "max_client_batch_size": 1,
            "router": "chorus",
            "version": state.version,
        }

    async def _prepare(
        self, body: GenerateRequest, parameters: GenerateParameters, http: HttpRequest, *, stream: bool
    ) -> Generation:
        wanted = parameters.adapter_id
        listed = wanted if isinstance(wanted, str | None) else [(each.ref, each.weight) for each in wanted]
        adapters = await self._spec.adapters(listed, "adapter_id", http)
        logprobs = stream or bool(parameters.details)

        def params(room: int) -> SamplingParams:
            return sampling_params(parameters, room, self._spec.state.max_model_len, logprobs=logprobs)

        prompt = self._spec.encode(body.inputs, "inputs")
        return self._spec.prepare(http, [prompt], "inputs", adapters, params, stream=stream)

    async def _collect(
        self, body: GenerateRequest, parameters: GenerateParameters, generation: Generation
    ) -> JSONResponse:
        text = self._assembler(generation)
        pieces: list[TokenPiece] = []
        last = None
        async with aclosing(self._spec.outputs(generation)) as outputs:
            async for _, last in outputs:
                pieces += text.push(last)
        if last is None:
            raise ApiError(424, "generation", "the engine ended the request without a word")
        answer: dict[str, Any] = {"generated_text": _full(body, parameters) + text.text}
        if parameters.details:
            answer["details"] = _details(generation, last, text.count) | {
                "prefill": [],
                "tokens": [_token(piece) for piece in pieces],
                "top_tokens": [],
                "best_of_sequences": [],
            }
        return JSONResponse(answer, headers=generation.headers | _timings(generation, last, text.count))

    async def _events(
        self,
        body: GenerateRequest,
        parameters: GenerateParameters,
        generation: Generation,
        first: SequenceOutput,
        outputs: AsyncGenerator[tuple[int, SequenceOutput]],
    ) -> AsyncGenerator[str]:
        text = self._assembler(generation)
        last: SequenceOutput | None = first
        try:
            while last is not None:
                pieces = text.push(last)
                for piece in pieces:
                    event: dict[str, Any] = {"index": piece.index, "token": _token(piece)}
                    event |= {"generated_text": None, "details": None}
                    if last.finish_reason is not None and piece is pieces[-1]:
                        event["generated_text"] = _full(body, parameters) + text.text
                        if parameters.details:
                            event["details"] = _details(generation, last, text.count)
                    yield _event(event)
                more = await anext(outputs, None)
                last = more and more[1]
        except ApiError as error:
            yield _event(error.body("/generate_stream"))
        except Exception:
            logger.exception("request %s failed while it was streamed", generation.client_id)
            yield _event(ApiError.internal(generation.client_id).body("/generate_stream"))
        finally:
            await outputs.aclose()

    def _assembler(self, generation: Generation) -> TextAssembler:
        state = self._spec.state
        return TextAssembler(state.vocabulary, state.tokenizer.special, generation.requests[0].sampling_params.stop)


def sampling_params(parameters: GenerateParameters, room: int, max_model_len: int, *, logprobs: bool) -> SamplingParams:
    """The engine's parameters; `room` is how many positions the prompt leaves. Raises ApiError."""
    wanted = parameters.max_new_tokens
    if wanted is not None and wanted > room:
        raise ApiError.invalid(
            "max_new_tokens",
            f"{wanted} does not fit: the prompt has {max_model_len - room} tokens and the model {max_model_len} "
            f"positions for prompt and output, so at most {room}",
        )
    sampled = bool(parameters.do_sample)
    seed = parameters.seed if parameters.seed is not None else secrets.randbits(32)
    return SamplingParams(
        max_tokens=wanted or min(DEFAULT_MAX_NEW_TOKENS, room),
        temperature=(parameters.temperature or 1.0) if sampled else 0.0,
        top_k=parameters.top_k or 0,
        top_p=parameters.top_p or 1.0,
        repetition_penalty=parameters.repetition_penalty or 1.0,
        seed=seed if sampled else 0,
        stop=tuple(stop.encode() for stop in parameters.stop or ()),
        ignore_eos=bool(parameters.ignore_eos_token),
        logprobs=logprobs,
    )


def _full(body: GenerateRequest, parameters: GenerateParameters) -> str:
    return body.inputs if parameters.return_full_text else ""


def _token(piece: TokenPiece) -> dict[str, Any]:
    return {
        "id": piece.id,
        "text": piece.text,
        "logprob": piece.logprob,
        "special": piece.special,
        "skipped": False,
    }


def _details(generation: Generation, last: SequenceOutput, count: int) -> dict[str, Any]:
    params, prompt = generation.requests[0].sampling_params, generation.prompt_tokens
    return {
        "finish_reason": _REASONS.get(last.finish_reason or FinishReason.ERROR, "error"),
        "generated_tokens": count,
        "prompt_tokens": prompt,
        "input_length": prompt,
        "skipped_tokens": 0,
        "seed": params.seed if params.temperature > 0 else None,
    }


def _timings(generation: Generation, last: SequenceOutput, count: int) -> dict[str, str]:
    """Response headers in milliseconds, as TGI counts them."""
    total = time.monotonic() - generation.requests[0].arrival_time
    seconds = {
        "x-total-time": total,
        "x-queue-time": last.queue_time,
        "x-time-to-first-token": last.time_to_first_token,
        "x-time-per-token": (total - last.queue_time) / max(1, count),
    }
    return {"x-generated-tokens": str(count)} | {name: f"{1000 * value:.1f}" for name, value in seconds.items()}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n"
