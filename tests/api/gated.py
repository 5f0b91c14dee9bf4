"""A small application behind all of the gate, without an engine."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient

from server.api.gate import install_middleware
from server.settings import read_settings


class Gated:
    """`app` streams on POST /generate_stream until `go_on` is set, or its client leaves."""

    def __init__(self, *flags: str) -> None:
        self.app, self.limited, self.go_on = FastAPI(), 0, asyncio.Event()

        @self.app.post("/generate")
        @self.app.post("/v1/completions")
        @self.app.put("/v1/adapters/{name}")
        @self.app.get("/v1/models")
        @self.app.get("/health")
        async def fine() -> str:
            return "fine"

        @self.app.post("/broken")
        async def broken() -> None:
            raise KeyError("a defect")

        @self.app.post("/generate_stream")
        async def stream() -> StreamingResponse:
            async def events() -> AsyncGenerator[str]:
                yield "data: 1\n\n"
                await self.go_on.wait()
                yield "data: 2\n\n"

            return StreamingResponse(events(), media_type="text/event-stream")

        install_middleware(self.app, read_settings(list(flags)), "0", self._count)
        self.client = TestClient(self.app, raise_server_exceptions=False)

    def _count(self) -> None:
        self.limited += 1


class Call:
    """One request spoken in ASGI, so that it can be looked at while it runs, and its client can hang up."""

    def __init__(self, app: Any, path: str, headers: dict[str, str] | None = None, address: str = "10.0.0.1") -> None:
        self.status, self.sent, self.headers = 0, b"", dict[str, str]()
        self._first, self._gone, self._asked = asyncio.Event(), asyncio.Event(), False
        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": raw,
            "scheme": "http", "server": ("test", 80), "client": (address, 1),
        }  # fmt: skip
        self._task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def begun(self) -> "Call":
        """Once it has answered its first bytes."""
        await asyncio.wait_for(self._first.wait(), 5)
        return self

    async def ended(self) -> "Call":
        await asyncio.wait_for(self._task, 5)
        return self

    async def hang_up(self) -> None:
        self._gone.set()
        await self.ended()

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.sent += message.get("body", b"")
            if self.sent:
                self._first.set()
