"""What is asked before anything of a request is read: the key, before body, route and documents; then the size."""

import hmac

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import playground
from server.api.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"}) | playground.PATHS
_ADMIN_POSTS = ("/v1/adapters", "/v1/aliases", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
MAX_BODY_BYTES = 1 << 20


def takes_archive(method: str, path: str) -> bool:
    """Whether a request's body may be an adapter."""
    return (method == "PUT" and path.startswith("/v1/adapters/")) or path == "/v1/adapters:validate"


class Keys:
    """Who may do what: the inference key uses and reads, the admin key changes adapters too."""

    def __init__(self, api_key: SecretStr | None, admin_key: SecretStr | None) -> None:
        """None: inference is open; changing is closed."""
        self._api, self._admin = api_key, admin_key

    def check(self, request: Request) -> None:
        """Raises 401 or 403 for a request that may not pass."""
        method, path = request.method, request.url.path
        if path in OPEN_PATHS:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        sent = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if method in ("PUT", "DELETE", "PATCH") or (method == "POST" and path.startswith(_ADMIN_POSTS)):
            if self._admin is None:
                problem = "changing adapters is closed: start the server with --admin-key (CHORUS_ADMIN_KEY) to open it"
                raise ApiError(403, "forbidden", problem)
            if not _same(sent, self._admin):
                raise _unauthorized("ADMIN_KEY")
        elif self._api is not None and not _same(sent, self._api) and not _same(sent, self._admin):
            raise _unauthorized("KEY")


class KeyGate:
    """ASGI middleware; passes bodies and streams on untouched."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            try:
                self._keys.check(Request(scope))
            except ApiError as error:
                await JSONResponse(error.body(scope["path"]), error.status, error.headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """ASGI middleware: 413 for a body that is too large, however it says how large it is."""

    def __init__(self, app: ASGIApp, archive_bytes: int) -> None:
        """`archive_bytes`: of a body that may hold an adapter; MAX_BODY_BYTES of every other."""
        self._app, self._archive_bytes = app, archive_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        archive = takes_archive(scope["method"], scope["path"])
        limit, seen = self._archive_bytes if archive else MAX_BODY_BYTES, 0
        setting = "; --max-adapter-bytes allows more" if archive else ""

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(413, f"the body is larger than {limit:,} bytes{setting}")
            return message

        await self._app(scope, limited, send)


async def passed_the_gate() -> None:
    """Stands where LitServe puts its own check of a key (LIT_SERVER_API_KEY): KeyGate has done it."""


def _same(sent: str, key: SecretStr | None) -> bool:
    return key is not None and hmac.compare_digest(sent.encode(), key.get_secret_value().encode())


def _unauthorized(kind: str) -> ApiError:
    return ApiError(
        401, "unauthorized", f"missing or wrong key: send `Authorization: Bearer {kind}` or `X-API-Key: {kind}`"
    )
