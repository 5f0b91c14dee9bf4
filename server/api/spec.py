"""The LitSpec: carries the routes, and what every dialect shares: keys, adapters, admission, hang-ups.

Lives in each API process; the worker gets a copy without any of its live state.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from litserve.specs.base import LitSpec

from adapters.adapter import AdapterRef, WeightedAdapter, alone, check_composition
from adapters.errors import AdapterError
from adapters.references import parse_composition
from adapters.sources import Sources
from adapters.store import AdapterStore
from server.api.errors import CONTEXT_LENGTH_EXCEEDED, ApiError, request_id_of
from server.api.in_flight import InFlight
from server.api.link import EngineLink, Overloaded, Unavailable
from server.api.processes import Peers
from server.api.request_log import RequestRecord, current_record
from server.engine.types import FinishReason, Request, SamplingParams, SequenceOutput
from server.metrics import Metrics
from server.model.config import GPT2Config
from server.settings import Settings
from server.tokenizer import Tokenizer

T = TypeVar("T")
PROOF_TOKEN = 0  # any token does


@dataclass(frozen=True)
class Served:
    """Everything the routes need of what is being served; built in main, shared with the API process by fork."""

    settings: Settings
    model_name: str
    model_config: GPT2Config
    max_model_len: int
    tokenizer: Tokenizer
    vocabulary: list[bytes]
    store: AdapterStore
    sources: Sources
    metrics: Metrics
    version: str
    created: float  # when this server started, seconds since the epoch


@dataclass(frozen=True)
class Generation:
    """One validated request of a client, ready to submit: a sequence for each text that it asks for."""

    requests: tuple[Request, ...]  # `copies` of each prompt, side by side; all with the same adapters
    copies: int
    client_id: str  # x-request-id
    prompt_only: bool = False  # what the engine adds to the prompts is nobody's

    @property
    def adapters(self) -> tuple[WeightedAdapter, ...]:
        """What it uses; none is the base."""
        return self.requests[0].adapters

    @property
    def names(self) -> list[str]:
        """Of its adapters."""
        return [each.ref.name for each in self.adapters]

    @property
    def prompt_tokens(self) -> int:
        """Of its prompts, each counted once."""
        return sum(len(request.prompt_token_ids) for request in self.requests[:: self.copies])

    @property
    def headers(self) -> dict[str, str]:
        """Response headers known before the first token."""
        headers = {"x-request-id": self.client_id, "x-prompt-tokens": str(self.prompt_tokens)}
        if self.names:
            headers["x-adapter-id"] = ",".join(self.names)
            headers["x-adapter-digest"] = ",".join(each.ref.digest for each in self.adapters)
        return headers


class ChorusSpec(LitSpec):
    """Routes and admission. `served` and `link` are set in an API process only."""

    def __init__(self) -> None:
        super().__init__()
        self.api_path = "/generate"
        self.served: Served | None = None
        self.link: EngineLink | None = None
        self.in_flight = InFlight()
        self.peers = Peers(1)

    def __getstate__(self) -> dict[str, Any]:
        live = dict.fromkeys(("served", "link", "in_flight", "peers", "response_buffer"))
        return {**super().__getstate__(), **live, "_endpoints": []}

    @property
    def stream(self) -> bool:
        """Frames arrive through LitServe's streaming path."""
        return True

    def route(self, method: str, path: str, handler: Callable[..., Awaitable[Any]]) -> None:
        """Add a route."""
        self.add_endpoint(path, handler, [method])

    def decode_request(self, request: Any, context_kwargs: Any) -> Any:
        """Not used: the routes are our own."""
        return request

    def encode_response(self, output: Any, context_kwargs: Any) -> Any:
        """Not used: the routes are our own."""
        return output

    @property
    def state(self) -> Served:
        """What is served. Raises RuntimeError outside the API process."""
        if self.served is None:
            raise RuntimeError("the routes' state exists in the API process only")
        return self.served

    @property
    def engine(self) -> EngineLink:
        """The link to the worker. Raises 503 before the application has started."""
        if self.link is None:
            raise ApiError.unavailable("the server is starting")
        return self.link

    @cached_property
    def _bytes_a_token(self) -> int:
        """The most that one token stands for, special ones by their names."""
        return max(map(len, [*self.state.vocabulary, *(s.encode() for s in self.state.tokenizer.special.values())]))

    async def adapters(
        self, wanted: str | Sequence[tuple[str, float]] | None, field: str, http: HttpRequest
    ) -> tuple[WeightedAdapter, ...]:
        """The adapters that a client named in `field`; none for the base. Raises ApiError.

        A weighted alias sends equal `x-adapter-key` headers to the same target.
        """
        if wanted is None or wanted == self.state.model_name:
            return ()
        if not wanted and not isinstance(wanted, str):
            raise ApiError.invalid(field, "is an empty list; name an adapter, or leave it out for the base")
        store, key, found = self.state.store, http.headers.get("x-adapter-key"), list[WeightedAdapter]()
        try:
            if isinstance(wanted, str):
                wanted = parse_composition(wanted) if "," in wanted or ":" in wanted else [(wanted, 1.0)]
            for reference, weight in wanted:
                known = store.known(reference, key)
                if known is None:
                    known = await asyncio.to_thread(store.get, reference, key)  # reads and hashes files
                found.append(WeightedAdapter(known.ref, weight))
            check_composition(found)
        except AdapterError as error:
            raise ApiError.of_adapter(error, field) from None
        except ValueError as error:
            raise ApiError.invalid(field, str(error)) from None
        return tuple(found)

    async def prove(self, ref: AdapterRef) -> ApiError | None:
        """Let the engine load a version and use it once; what went wrong, if anything did."""
        request = Request(
            uuid.uuid4().hex, (PROOF_TOKEN,), SamplingParams(max_tokens=1), alone(ref), time.monotonic()
        )  # fmt: skip
        try:
            async with aclosing(self.engine.generate(request)) as outputs:
                async for output in outputs:
                    if output.finish_reason is FinishReason.ERROR:
                        return ApiError.of_output(output)
        except Overloaded as error:
            return ApiError.overloaded(str(error))
        except Unavailable as error:
            return ApiError.unavailable(str(error))
        return None

    def encode(self, text: str, field: str) -> list[int]:
        """The token ids of a prompt. Raises ApiError for one that can't fit, without tokenising it."""
        self.check_size(text, field)
        return self.state.tokenizer.encode(text)

    def check_size(self, text: str, field: str) -> None:
        """Raises ApiError for a text that is more tokens than positions, whatever they are."""
        longest, size = self.state.max_model_len, len(text.encode())
        if size > longest * self._bytes_a_token:
            raise ApiError.invalid(
                field,
                f"has {size:,} bytes, which are more tokens than the model's {longest} positions hold",
                code=CONTEXT_LENGTH_EXCEEDED,
            )

    def prepare(
        self,
        http: HttpRequest,
        prompts: Sequence[Sequence[int]],
        prompt_field: str,
        adapters: tuple[WeightedAdapter, ...],
        params: Callable[[int], SamplingParams],
        *,
        stream: bool,
        copies: int = 1,
        prompt_only: bool = False,
    ) -> Generation:
        """`copies` sequences of every prompt, each with a seed of its own; `params` gets the positions left.

        Raises ApiError with both lengths.
        """
        requests: list[Request] = []
        for ids in prompts:
            room = self.state.max_model_len - len(ids)
            if room < 1:
                raise ApiError.invalid(
                    prompt_field,
                    f"has {len(ids)} tokens; the model has {self.state.max_model_len} positions for prompt and output",
                    code=CONTEXT_LENGTH_EXCEEDED,
                )
            wanted, now = params(room), time.monotonic()
            for copy in range(copies):
                own = replace(wanted, seed=(wanted.seed + copy) % 2**64) if copy else wanted
                requests.append(Request(uuid.uuid4().hex, tuple(ids), own, adapters, now, stream))
        return Generation(tuple(requests), copies, request_id_of(http), prompt_only)

    async def outputs(self, generation: Generation) -> AsyncGenerator[tuple[int, SequenceOutput]]:
        """Which of the generation's requests, and what it has put out; a failed one raises ApiError.

        Closing it early aborts those that have not ended.
        """
        metrics, requests = self.state.metrics, generation.requests
        at = {request.request_id: i for i, request in enumerate(requests)}
        generated = [0] * len(requests)
        left = set(range(len(requests)))  # those that metrics are to be told of
        record = self._begin_record(generation)
        try:
            with self.in_flight.hold(generation.names):
                async with aclosing(self.engine.generate(*requests)) as outputs:
                    async for output in outputs:
                        i = at[output.request_id]
                        output = _of_the_prompt(output) if generation.prompt_only else output
                        generated[i] += len(output.token_ids)
                        record.add(output)
                        if output.finish_reason is not None:
                            left.discard(i)
                            record.end(output.finish_reason)
                            self._observe(requests[i], generated[i], output.finish_reason, output)
                        if output.finish_reason is FinishReason.ERROR:
                            raise ApiError.of_output(output)
                        yield i, output
        except Overloaded as error:
            left.clear()
            metrics.rejected.labels(self.state.model_name, "overloaded").inc()
            raise ApiError.overloaded(str(error)) from None
        except Unavailable as error:
            left.clear()
            metrics.rejected.labels(self.state.model_name, "unavailable").inc()
            raise ApiError.unavailable(str(error)) from None
        finally:
            for i in left:
                record.end(FinishReason.ABORT)
                self._observe(requests[i], generated[i], FinishReason.ABORT, None)

    def _begin_record(self, generation: Generation) -> RequestRecord:
        record, state = current_record(), self.state
        record.begin([each.ref for each in generation.adapters], state.model_name, generation.prompt_tokens)
        if record.wants_prompts:
            texts, special = state.vocabulary, state.tokenizer.special
            prompts = [request.prompt_token_ids for request in generation.requests[:: generation.copies]]
            decoded = (b"".join(texts[id_] or special.get(id_, "").encode() for id_ in prompt) for prompt in prompts)
            record.prompts = tuple(text.decode(errors="replace") for text in decoded)
        return record

    def _observe(self, request: Request, generated: int, reason: FinishReason, last: SequenceOutput | None) -> None:
        refs = [each.ref for each in request.adapters]
        seconds, prompt = time.monotonic() - request.arrival_time, len(request.prompt_token_ids)
        self.state.metrics.observe_request(refs, prompt, generated, reason.value, seconds, last)

    async def race(self, http: HttpRequest, work: Awaitable[T]) -> T:
        """Await `work`, but cancel it as soon as the client hangs up (then raises 499, which nobody reads)."""

        async def hung_up() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ApiError(499, "client_closed", "the client closed the connection")
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


def _of_the_prompt(output: SequenceOutput) -> SequenceOutput:
    """Without the token that the engine generates at least."""
    reason = (
        FinishReason.LENGTH if output.finish_reason in (FinishReason.EOS, FinishReason.STOP) else output.finish_reason
    )
    return replace(output, token_ids=(), logprobs=(), top_logprobs=(), finish_reason=reason, stop_offset=None)
