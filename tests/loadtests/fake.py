"""A little HTTP server that answers like Chorus, well or wrongly on purpose."""

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {
    "data": [
        {"id": "demo", "parent": None, "max_model_len": 256},
        {"id": "wilde", "parent": "demo", "max_model_len": 256},
        {"id": "twain", "parent": "demo", "max_model_len": 256},
    ]
}


def tokens(count: int) -> list[dict[str, Any]]:
    """Tokens that end with an EOS, or `count` of them if it is 1."""
    plain = [{"id": i, "text": f" é{i}", "logprob": -0.5, "special": False, "skipped": False} for i in range(count - 1)]
    return [*plain, {"id": 50256, "text": "<|endoftext|>", "logprob": -0.1, "special": True, "skipped": False}]


def answer(count: int, reason: str = "eos_token") -> dict[str, Any]:
    """The body of /generate."""
    made = tokens(count)
    text = "".join(token["text"] for token in made if not token["special"])
    details = {"finish_reason": reason, "generated_tokens": count, "tokens": made}
    return {"generated_text": text, "details": details}


def events(count: int, reason: str = "eos_token") -> list[bytes]:
    """The events of /generate_stream."""
    whole = answer(count, reason)
    made: list[dict[str, Any]] = [
        {"index": i, "token": token, "generated_text": None, "details": None}
        for i, token in enumerate(tokens(count), start=1)
    ]
    made[-1] |= {"generated_text": whole["generated_text"], "details": whole["details"]}
    return [f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode() for event in made]


class FakeServer(ThreadingHTTPServer):
    """`wrong` is None, "unready", "500", or "short": by turns a stream without its last event and a cut connection."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, wrong: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.wrong = wrong
        self.turns = itertools.cycle(("truncated", "cut"))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no matter here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def do_GET(self) -> None:
        if self.path == "/ready":
            self._send(503 if self.server.wrong == "unready" else 200, {})
        else:
            self._send(200, MODELS)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        parameters, wrong = body["parameters"], self.server.wrong
        time.sleep(0.02)
        if wrong == "500":
            self._send(500, {"error": "on purpose", "error_type": "test"})
            return
        adapter = parameters.get("adapter_id")
        headers = {"x-adapter-id": adapter, "x-adapter-digest": "d" * 64} if adapter else {}
        count = parameters["max_new_tokens"]
        reason = "length" if parameters.get("ignore_eos_token") else "eos_token"
        if self.path == "/generate":
            self._send(200, answer(count, reason), headers)
        else:
            self._stream(events(count, reason), headers)

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self._head(status, {"content-length": str(len(data))} | (headers or {}))
        self.wfile.write(data)

    def _stream(self, made: list[bytes], headers: dict[str, str]) -> None:
        wrong = next(self.server.turns) if self.server.wrong == "short" else None
        if wrong == "truncated":
            made = made[:-1]
        self._head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"} | headers)
        for event in made:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            if wrong == "cut":
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def fake_server(wrong: str | None = None) -> Iterator[str]:
    """The address of a FakeServer that lives as long as this context."""
    server = FakeServer(wrong)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
