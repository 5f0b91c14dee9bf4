"""Spans of requests, and the whole way of a request through JSON logs and an OTLP collector."""

import http.server
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from adapters.adapter import AdapterRef
from server import __main__ as cli
from server.api.errors import ApiError, install_handlers
from server.api.gate import install_middleware
from server.api.request_log import RequestLog, current_record
from server.api.tracing import Tracing, otlp_provider
from server.engine.types import FinishReason, SequenceOutput
from server.settings import SettingsError, read_settings, traces_asked_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL", "TRACES_PROTOCOL"):
        monkeypatch.delenv(f"OTEL_EXPORTER_OTLP_{name}", raising=False)
    for name in ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def app(exporter: InMemorySpanExporter) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/completions")
    @app.get("/health")
    async def generate() -> None:
        record = current_record()
        record.begin([AdapterRef("d" * 64, "wilde", "")], "demo", 5)
        record.add(SequenceOutput("a", (1, 2), (), FinishReason.EOS, queue_time=0.25, time_to_first_token=0.5))
        record.end(FinishReason.EOS)

    @app.post("/refused/{name}")
    async def refused(name: str) -> None:
        raise ApiError(503 if name == "x" else 422, "unavailable", "no")

    def provider() -> TracerProvider:
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        return provider

    install_handlers(app)
    app.add_middleware(Tracing, make_provider=provider)
    app.add_middleware(RequestLog)
    return app


def sent(app: FastAPI, exporter: InMemorySpanExporter, path: str, **headers: str) -> ReadableSpan:
    exporter.clear()
    TestClient(app).post(path, headers=headers)
    [span] = exporter.get_finished_spans()
    return span


def test_a_span_follows_the_callers_trace_and_tells_of_the_generation(app: Any, exporter: InMemorySpanExporter) -> None:
    span = sent(app, exporter, "/v1/completions", traceparent=f"00-{TRACE}-{PARENT}-01", **{"x-request-id": "mine"})
    context = span.get_span_context()
    assert context is not None
    assert format(context.trace_id, "032x") == TRACE
    assert span.parent is not None
    assert format(span.parent.span_id, "016x") == PARENT
    assert (span.name, span.kind) == ("POST /v1/completions", SpanKind.SERVER)
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "chorus.request_id": "mine",
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "chorus",
        "gen_ai.request.model": "wilde",
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("eos",),
        "gen_ai.response.time_to_first_chunk": 0.5,
        "chorus.queue_time": 0.25,
        "chorus.adapter.names": ("wilde",),
        "chorus.adapter.digests": ("d" * 64,),
    }


def test_without_a_usable_parent_a_trace_begins_and_a_caller_may_leave_it_unsampled(
    app: Any, exporter: InMemorySpanExporter
) -> None:
    for headers in ({}, {"traceparent": "00-nonsense"}):
        assert sent(app, exporter, "/v1/completions", **headers).parent is None
    exporter.clear()
    TestClient(app).post("/v1/completions", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    TestClient(app).get("/health")
    assert exporter.get_finished_spans() == (), "unsampled; and probes have none"


def test_a_failure_of_the_server_is_an_error_and_one_of_the_client_is_not(
    app: Any, exporter: InMemorySpanExporter
) -> None:
    for path, status, failed in (("/refused/x", 503, True), ("/refused/y", 422, False), ("/nowhere", 404, False)):
        span = sent(app, exporter, path)
        attributes = span.attributes or {}
        assert attributes["http.response.status_code"] == status
        assert (span.status.status_code is StatusCode.ERROR) is failed
        assert attributes["error.type"] == ("not_found" if status == 404 else "unavailable")
        assert span.name == ("POST" if status == 404 else "POST /refused/{name}"), "never a name for each path"


def test_asking_for_traces_without_the_extra_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.delitem(sys.modules, "server.api.tracing")
    settings = read_settings(["--otel-endpoint", "http://127.0.0.1:4318"])
    with pytest.raises(SettingsError, match=r"pip install 'chorus-serve\[otel\]'"):
        install_middleware(FastAPI(), settings, "0", lambda: None)
    install_middleware(FastAPI(), read_settings([]), "0", lambda: None)


def test_what_asks_for_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*flags: str, **variables: str) -> bool:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            return traces_asked_for(read_settings(list(flags)))

    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}
    assert not asked()
    assert asked("--otel-endpoint", "http://c:4318")
    assert asked(**endpoint)
    assert asked(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT="http://c:4318/v1/traces")
    assert not asked(**endpoint, OTEL_TRACES_EXPORTER="none")
    assert not asked(**endpoint, OTEL_SDK_DISABLED="true")
    assert asked(**endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf")
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        asked(**endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    assert cli.main(["--otel-endpoint", "collector:4318"]) == 2


class Collector:
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        collector = self
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.headers.get("content-encoding") is None
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def spans(self) -> list[Any]:
        return [
            span for _, body in self.requests for r in body.resource_spans for s in r.scope_spans for span in s.spans
        ]

    def resource(self) -> dict[str, str]:
        return {a.key: a.value.string_value for a in self.requests[0][1].resource_spans[0].resource.attributes}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1/traces"])
def test_the_endpoint_is_the_collectors_base_address(
    collector: Collector, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    provider = otlp_provider(collector.url + suffix, "1.2.3")
    provider.get_tracer("t").start_span("one").end()
    provider.shutdown()
    assert [path for path, _ in collector.requests] == ["/v1/traces"]
    resource = collector.resource()
    assert (resource["service.name"], resource["service.version"]) == ("chorus", "1.2.3")
    assert resource["deployment.environment.name"] == "test"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "voices")
    assert otlp_provider(collector.url, "1").resource.attributes["service.name"] == "voices"


def test_the_whole_way_of_requests_through_logs_and_traces(
    start, adapters_dir: Path, tmp_path: Path, collector: Collector
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# inference\nweb s3cret\n")
    server = start(
        "--adapters-dir", str(adapters_dir), "--log-format", "json", "--api-key-file", str(keys), "--log-prompts",
        "--key-concurrency", "1", env={"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url},
    ).wait_ready()  # fmt: skip
    with httpx.Client(base_url=server.url, headers={"x-api-key": "s3cret"}) as client:
        parameters = {"max_new_tokens": 4, "ignore_eos_token": True, "adapter_id": "alpha"}
        body = {"inputs": "Héllo", "parameters": parameters}
        answer = client.post("/generate", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        assert answer.status_code == 200
        digest, ident = answer.headers["x-adapter-digest"], answer.headers["x-request-id"]
        assert client.post("/generate", json=body | {"inputs": 1}).status_code == 422
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as slow:  # never sends its body
            headers = "Host: x\r\nX-API-Key: s3cret\r\nContent-Length: 9\r\nExpect: 100-continue"
            slow.sendall(f"POST /generate HTTP/1.1\r\n{headers}\r\n\r\n".encode())
            assert slow.recv(1000).startswith(b"HTTP/1.1 100 Continue"), "it is past the gate"
            assert client.post("/generate", json=body).status_code == 429
        server.wait_until(lambda: client.post("/generate_stream", json=body).status_code == 200, 10)
    assert server.metric("chorus_requests_rejected_total", error_type="rate_limited") >= 1
    assert server.stop() == 0

    lines = [json.loads(line) for line in server.text().splitlines()]  # every one of every process is JSON
    assert {line["process"] for line in lines} == {"server", "worker"}
    assert "s3cret" not in server.text()
    requests = [line for line in lines if line["logger"] == "server.api.request_log"]
    first = requests[0]
    assert first["total_ms"] >= first["ttft_ms"] >= first["queue_ms"] >= 0
    for name in ("total_ms", "ttft_ms", "queue_ms", "time", "message"):
        del first[name]
    assert first == {
        "level": "info", "logger": "server.api.request_log", "process": "server", "request_id": ident,
        "method": "POST", "path": "/generate", "status": 200, "key": "web", "adapters": ["alpha"], "digests": [digest],
        "prompt_tokens": int(answer.headers["x-prompt-tokens"]), "generated_tokens": 4, "finish_reasons": ["length"],
        "client_gone": False, "error_type": None, "trace_id": TRACE, "prompts": ["Héllo"],
    }  # fmt: skip
    assert (requests[1]["status"], requests[1]["error_type"]) == (422, "validation")
    [gone] = [line for line in requests if line["client_gone"]]
    assert (gone["path"], gone["generated_tokens"]) == ("/generate", None)
    assert {line["error_type"] for line in requests if line["status"] == 429} == {"rate_limited"}
    assert (requests[-1]["status"], requests[-1]["generated_tokens"], requests[-1]["client_gone"]) == (200, 4, False)

    spans = {span.trace_id.hex(): span for span in collector.spans()}
    assert set(spans) == {line["trace_id"] for line in requests}, "one for each, sent at the end at the latest"
    assert spans[TRACE].parent_span_id.hex() == PARENT
    assert collector.resource()["service.name"] == "chorus"
