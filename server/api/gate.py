"""Asks for the key before anything of a request is read: the body, the route, the documents."""

from collections.abc import Callable

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.errors import ApiError


class KeyGate:
    """ASGI middleware; passes bodies and streams on untouched."""

    def __init__(self, app: ASGIApp, authorize: Callable[[Request], None]) -> None:
        """`authorize` raises ApiError for a request that may not pass."""
        self._app, self._authorize = app, authorize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            try:
                self._authorize(Request(scope))
            except ApiError as error:
                await JSONResponse(error.body(scope["path"]), error.status, error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def passed_the_gate() -> None:
    """Stands where LitServe puts its own check of a key (LIT_SERVER_API_KEY): KeyGate has done it."""
