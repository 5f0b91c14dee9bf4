"""The LitSpec: carries the routes, and what every dialect shares: keys, adapters, admission, hang-ups.

Lives in the API process; the worker gets a copy without any of its live state.
"""

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from litserve.specs.base import LitSpec

from adapters.adapter import AdapterManifest, alone
from adapters.errors import AdapterError
from adapters.store import AdapterStore
from server.api.errors import ApiError, request_id_of
from server.api.link import EngineLink, Overloaded, Unavailable
from server.engine.types import FinishReason, Request, SamplingParams, SequenceOutput
from server.metrics import Metrics
from server.model.config import GPT2Config
from server.settings import Settings
from server.tokenizer import Tokenizer

T = TypeVar("T")
OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})


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
    metrics: Metrics
    version: str
    created: float  # when this server started, seconds since the epoch


@dataclass(frozen=True)
class Generation:
    """One validated request, ready to submit."""

    request: Request
    adapter: AdapterManifest | None
    client_id: str  # x-request-id

    @property
    def headers(self) -> dict[str, str]:
        """Response headers known before the first token."""
        headers = {"x-request-id": self.client_id, "x-prompt-tokens": str(len(self.request.prompt_token_ids))}
        if self.adapter is not None:
            headers |= {"x-adapter-id": self.adapter.ref.name, "x-adapter-digest": self.adapter.ref.digest}
        return headers


class ChorusSpec(LitSpec):
    """Routes and admission. `served` and `link` are set in the API process only."""

    def __init__(self) -> None:
        super().__init__()
        self.api_path = "/generate"
        self.served: Served | None = None
        self.link: EngineLink | None = None

    def __getstate__(self) -> dict[str, Any]:
        live: dict[str, Any] = {"served": None, "link": None, "response_buffer": None, "_endpoints": []}
        return {**super().__getstate__(), **live}

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

    def authorize(self, request: HttpRequest) -> None:
        """Raises 401 unless the path is open or the inference key was sent."""
        key = self.state.settings.api_key
        if key is None or request.url.path in OPEN_PATHS:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        sent = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not hmac.compare_digest(sent.encode(), key.get_secret_value().encode()):
            raise ApiError(
                401, "unauthorized", "missing or wrong key: send `Authorization: Bearer KEY` or `X-API-Key: KEY`"
            )

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

    async def adapter(self, name: str | None, field: str) -> AdapterManifest | None:
        """The adapter of a name a client sent in `field`; None for the base. Raises ApiError."""
        if name is None or name == self.state.model_name:
            return None
        store = self.state.store
        if (known := store.known(name)) is not None:
            return known
        try:
            return await asyncio.to_thread(store.get, name)  # reads and hashes files
        except AdapterError as error:
            raise ApiError.of_adapter(error, field) from None

    def prepare(
        self,
        http: HttpRequest,
        prompt: str,
        prompt_field: str,
        adapter: AdapterManifest | None,
        params: Callable[[int], SamplingParams],
        *,
        stream: bool,
    ) -> Generation:
        """Tokenise and check lengths; `params` gets the positions left. Raises ApiError with both lengths."""
        ids = self.state.tokenizer.encode(prompt)
        room = self.state.max_model_len - len(ids)
        if room < 1:
            raise ApiError.invalid(
                prompt_field,
                f"has {len(ids)} tokens; the model has {self.state.max_model_len} positions for prompt and output",
            )
        request = Request(
            uuid.uuid4().hex,
            tuple(ids),
            params(room),
            alone(adapter.ref if adapter else None),
            time.monotonic(),
            stream,
        )
        return Generation(request, adapter, request_id_of(http, request.request_id))

    async def outputs(self, generation: Generation) -> AsyncGenerator[SequenceOutput]:
        """The request's outputs; a failed one raises ApiError. Closing it early aborts the request."""
        metrics, request = self.state.metrics, generation.request
        last, generated, reason = None, 0, FinishReason.ABORT.value
        try:
            async with aclosing(self.engine.generate(request)) as outputs:
                async for last in outputs:
                    generated += len(last.token_ids)
                    if last.finish_reason is not None:
                        reason = last.finish_reason.value
                    if last.finish_reason is FinishReason.ERROR:
                        raise ApiError.of_output(last)
                    yield last
        except Overloaded as error:
            reason = ""
            metrics.rejected.labels(self.state.model_name, "overloaded").inc()
            raise ApiError(429, "overloaded", str(error), {"Retry-After": "1"}) from None
        except Unavailable as error:
            reason = ""
            metrics.rejected.labels(self.state.model_name, "unavailable").inc()
            raise ApiError.unavailable(str(error)) from None
        finally:
            if reason:
                name = generation.adapter.ref.name if generation.adapter else None
                seconds = time.monotonic() - request.arrival_time
                prompt = len(request.prompt_token_ids)
                metrics.observe_request(name, prompt, generated, reason, seconds, last)

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
