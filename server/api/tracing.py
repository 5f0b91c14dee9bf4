"""OpenTelemetry: a server span for each request, below the caller's `traceparent`. Needs the `otel` extra.

Names are those of OpenTelemetry's semantic conventions where they have one (http.*, gen_ai.*), else chorus.*.
"""

import asyncio
from collections.abc import Callable

from opentelemetry import propagate
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.gate import OPEN_PATHS
from server.api.request_log import RequestRecord, current_record

SERVICE = "chorus"


def otlp_provider(endpoint: str | None, version: str) -> TracerProvider:
    """Sends spans by OTLP over HTTP; what is not told here, OpenTelemetry's own variables say.

    `endpoint` is the collector's base address, as in OTEL_EXPORTER_OTLP_ENDPOINT; None leaves it to that.
    """
    own = Resource.create({"service.name": SERVICE, "service.version": version})
    provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
    url = endpoint and endpoint.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    return provider


class Tracing:
    """ASGI middleware, inside RequestLog, whose record it reads when the request has ended."""

    def __init__(self, app: ASGIApp, make_provider: Callable[[], TracerProvider]) -> None:
        """`make_provider` is called here, in the API process: its thread would not survive a fork."""
        self._app, self._provider = app, make_provider()
        self._tracer = self._provider.get_tracer(SERVICE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's whole life, at whose end spans that are left are sent."""
        if scope["type"] == "lifespan":
            try:
                await self._app(scope, receive, send)
            finally:
                await asyncio.to_thread(self._provider.shutdown)
            return
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(scope["method"], propagate.extract(carrier), SpanKind.SERVER)
        record = current_record()
        if span.get_span_context().is_valid:
            record.trace_id = format(span.get_span_context().trace_id, "032x")
        try:
            await self._app(scope, receive, send)
        except BaseException as error:
            span.set_attribute("error.type", type(error).__qualname__)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            _describe(span, scope, record)
            span.end()


def _describe(span: Span, scope: Scope, record: RequestRecord) -> None:
    route = getattr(scope.get("route"), "path", None)  # the router's; None: no such path, or refused before it
    span.update_name(f"{record.method} {route}" if route else record.method)
    known = {
        "http.request.method": record.method,
        "http.route": route,
        "http.response.status_code": record.status,
        "url.path": scope["path"],
        "url.scheme": scope["scheme"],
        "error.type": record.error_type,
        "chorus.request_id": record.request_id,
        "chorus.key": record.key or None,
        "chorus.client_gone": record.client_gone or None,
    }
    if record.prompt_tokens is not None:
        known |= {
            "gen_ai.operation.name": "chat" if "/chat/" in scope["path"] else "text_completion",
            "gen_ai.provider.name": SERVICE,
            "gen_ai.request.model": record.model,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.generated_tokens,
            "gen_ai.response.finish_reasons": tuple(record.finish_reasons),
            "gen_ai.response.time_to_first_chunk": record.time_to_first_token,
            "chorus.queue_time": record.queue_time,
            "chorus.adapter.names": tuple(ref.name for ref in record.adapters),
            "chorus.adapter.digests": tuple(ref.digest for ref in record.adapters),
        }
    for name, value in known.items():
        if value is not None:
            span.set_attribute(name, value)
    if record.status is None or record.status >= 500 or "error" in record.finish_reasons:
        span.set_status(StatusCode.ERROR)
