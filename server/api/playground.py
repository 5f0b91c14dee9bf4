"""GET /playground: the static page of server/playground/, read once and served from memory.

The page holds no secret and is reached without a key; what it asks of the other routes needs one where they do.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from server.api.errors import ApiError
from server.api.spec import ChorusSpec

FOLDER = Path(__file__).resolve().parents[1] / "playground"
PAGE = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_NAMES = frozenset(path.name for path in FOLDER.iterdir() if path.suffix in _TYPES)
PATHS = frozenset({"/playground", "/playground/"} | {f"/playground/{name}" for name in _NAMES})
HEADERS = {
    # Scripts, styles and requests from this host alone; no markup is ever made from a string.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for anew each time, and answered 304: an upgrade is seen at once
}


@dataclass(frozen=True)
class _Asset:
    content: bytes
    media_type: str
    etag: str


class PlaygroundRoutes:
    """The page and its assets; open without a key."""

    def __init__(self, spec: ChorusSpec) -> None:
        self._spec = spec
        self._assets = {name: _read(FOLDER / name) for name in _NAMES}

    def register(self) -> None:
        """Add the routes."""
        self._spec.route("GET", "/playground", self.page)
        self._spec.route("GET", "/playground/", self.moved)
        self._spec.route("GET", "/playground/{file}", self.asset)

    async def page(self, http: HttpRequest) -> Response:
        """The page."""
        return await self.asset(PAGE, http)

    async def moved(self) -> Response:
        """To the page; by a relative address, so that a proxy's path prefix stays."""
        return Response(status_code=307, headers=HEADERS | {"Location": "../playground"})

    async def asset(self, file: str, http: HttpRequest) -> Response:
        """One file of the page; 304 where the browser has it already."""
        asset = self._assets.get(file)
        if asset is None:
            raise ApiError(404, "not_found", f"the playground has no file {file[:80]!r}")
        headers = HEADERS | {"ETag": asset.etag}
        if asset.etag in http.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(asset.content, media_type=asset.media_type, headers=headers)


def keep_out_of_openapi(app: FastAPI) -> None:
    """The page is for people: the OpenAPI document does not list it."""
    for route in app.routes:
        if getattr(route, "path", "").startswith("/playground"):
            route.include_in_schema = False  # pyright: ignore[reportAttributeAccessIssue]


def _read(path: Path) -> _Asset:
    content = path.read_bytes()
    return _Asset(content, _TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
