"""What every request passes on its way in, from outside: its id, trace and log line, CORS, the key, limits, its size.

The key is asked for before anything of a request is read: body, route and documents.
"""

import hashlib
from collections.abc import Callable
from functools import partial

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import playground
from server.api.errors import ApiError, install_handlers
from server.api.keys import Key, Keys
from server.api.limits import CallerLimits
from server.api.request_log import RequestLog, current_record
from server.settings import Settings, SettingsError, traces_asked_for

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"}) | playground.PATHS
ANONYMOUS = "anonymous"
EXPOSED_HEADERS = (
    "retry-after", "x-request-id", "x-adapter-id", "x-adapter-digest", "x-prompt-tokens", "x-generated-tokens",
    "x-total-time", "x-queue-time", "x-time-to-first-token", "x-time-per-token", "x-should-retry",
)  # fmt: skip
_ADMIN_POSTS = ("/v1/adapters", "/v1/aliases", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
MAX_BODY_BYTES = 1 << 20


def install_middleware(app: FastAPI, settings: Settings, version: str, on_limited: Callable[[], None]) -> None:
    """Put all of it around the application, and its handlers of errors; call it before API processes are forked.

    `on_limited` is called for each request that is one too many of its caller. Raises SettingsError.
    """
    limits = CallerLimits(settings.key_concurrency, settings.key_rate)
    app.add_middleware(BodyLimit, archive_bytes=int(settings.max_adapter_bytes))
    app.add_middleware(KeyGate, keys=Keys(settings), limits=limits, on_limited=on_limited)
    install_handlers(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )
    if traces_asked_for(settings):
        try:
            from server.api.tracing import Tracing, otlp_provider
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"traces are asked for (--otel-endpoint or OTEL_EXPORTER_OTLP_ENDPOINT), but {error.name} is not "
                "installed: pip install 'chorus-serve[otel]', or leave the setting out"
            ) from None
        app.add_middleware(Tracing, make_provider=partial(otlp_provider, settings.otel_endpoint, version))
    app.add_middleware(RequestLog, prompts=settings.log_prompts)


def takes_archive(method: str, path: str) -> bool:
    """Whether a request's body may be an adapter."""
    return (method == "PUT" and path.startswith("/v1/adapters/")) or path == "/v1/adapters:validate"


def changes_adapters(method: str, path: str) -> bool:
    """Whether a request needs an admin key."""
    return method in ("PUT", "DELETE", "PATCH") or (method == "POST" and path.startswith(_ADMIN_POSTS))


def authorize(request: Request, keys: Keys) -> Key | None:
    """The key that a request came with, if any. Raises 401 or 403 for one that may not pass."""
    method, path = request.method, request.url.path
    if path in OPEN_PATHS:
        return None
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    sent = bearer.strip() if scheme.lower() == "bearer" else ""
    key = keys.find(sent or request.headers.get("x-api-key", ""))
    if changes_adapters(method, path):
        if keys.changing_closed:
            problem = "changing adapters is closed: start the server with --admin-key (CHORUS_ADMIN_KEY) to open it"
            raise ApiError(403, "forbidden", problem)
        if key is None or not key.admin:
            raise _unauthorized("ADMIN_KEY")
    elif key is None and not keys.inference_open:
        raise _unauthorized("KEY")
    return key


class KeyGate:
    """ASGI middleware: keys, and how much a caller may ask for; passes bodies and streams on untouched.

    A POST request that needs no admin key counts as under way until its answer has ended or its client is gone.
    Without a key callers are told apart by their remote address.
    """

    def __init__(self, app: ASGIApp, keys: Keys, limits: CallerLimits, on_limited: Callable[[], None]) -> None:
        self._app, self._keys, self._limits, self._on_limited = app, keys, limits, on_limited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        caller = 0  # nobody
        try:
            key = authorize(Request(scope), self._keys)
            current_record().key = key.label if key else ANONYMOUS
            if self._limits.on and scope["method"] == "POST" and not changes_adapters("POST", scope["path"]):
                number = _number(key, scope)
                self._limits.take(number)
                caller = number
        except ApiError as error:
            if error.status == 429:
                self._on_limited()
            await error.response(scope["path"])(scope, receive, send)
            return

        def give_back() -> None:
            nonlocal caller
            if caller:
                self._limits.give_back(caller)
            caller = 0

        async def told(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                give_back()  # before the client knows that this one has ended, and may send the next
            await send(message)

        try:
            await self._app(scope, receive, told)
        finally:
            give_back()


def _number(key: Key | None, scope: Scope) -> int:
    """By what CallerLimits knows a caller."""
    client = scope.get("client")
    digest = key.digest if key else hashlib.sha256((client[0] if client else "").encode()).digest()
    return int.from_bytes(digest[:8]) or 1


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


def _unauthorized(kind: str) -> ApiError:
    return ApiError(
        401, "unauthorized", f"missing or wrong key: send `Authorization: Bearer {kind}` or `X-API-Key: {kind}`"
    )
