"""Errors as clients see them: a status, a type, a message, in the shape of the dialect that was spoken."""

import logging
import reprlib
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import AdapterConflict, AdapterError, AdapterNotFound, AdapterRefused
from server.api.request_log import current_record, usable_request_id
from server.engine.types import ErrorKind, SequenceOutput

logger = logging.getLogger(__name__)
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
_CODES = {  # OpenAI's words for our types
    "unauthorized": "invalid_api_key",
    "overloaded": "rate_limit_exceeded",
    "rate_limited": "rate_limit_exceeded",
}
_MAX_TOLD = 8  # problems of one body
_BY_STATUS = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "validation", 422: "validation"}


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        error_type: str,
        message: str,
        headers: Mapping[str, str] | None = None,
        *,
        param: str = "",
        code: str = "",
    ) -> None:
        """`param` and `code` are told under /v1 only: the field that is wrong, OpenAI's word for what is."""
        super().__init__(message)
        self.status, self.error_type, self.message = status, error_type, message
        self.param, self.code = param, code or _CODES.get(error_type, "")
        self.headers = dict(headers or {})

    @classmethod
    def invalid(cls, field: str, problem: str, *, code: str = "") -> "ApiError":
        """422: a field's value is wrong; `problem` says what and what is expected."""
        return cls(422, "validation", f"`{field}` {problem}", param=field, code=code)

    @classmethod
    def unavailable(cls, message: str) -> "ApiError":
        """503 with Retry-After."""
        return cls(503, "unavailable", message, {"Retry-After": "2"})

    @classmethod
    def overloaded(cls, message: str) -> "ApiError":
        """429 with Retry-After."""
        return cls(429, "overloaded", message, {"Retry-After": "1"})

    @classmethod
    def internal(cls, request_id: str) -> "ApiError":
        """500: a defect of ours; the log has the traceback under this id."""
        message = f"the server failed on this request; its log says more under {request_id}"
        return cls(500, "internal", message, {"x-request-id": request_id})

    @classmethod
    def of_adapter(cls, error: AdapterError, field: str) -> "ApiError":
        """404, 409, 422 or 503, by the kind of failure."""
        if isinstance(error, AdapterNotFound):
            return cls(404, "not_found", str(error), param=field, code="model_not_found")
        if isinstance(error, AdapterRefused):
            return cls(422, "adapter_refused", str(error), param=field)
        if isinstance(error, AdapterConflict):
            return cls(409, "conflict", str(error), {"x-should-retry": "false"}, param=field)
        return cls.unavailable(str(error))

    @classmethod
    def of_output(cls, output: SequenceOutput) -> "ApiError":
        """A failed generation."""
        message = output.error or "generation failed"
        if output.error_kind is ErrorKind.ADAPTER_REFUSED:
            return cls(422, "adapter_refused", message)
        if output.error_kind in (ErrorKind.ADAPTER_UNAVAILABLE, ErrorKind.WORKER_LOST):
            return cls.unavailable(message)
        return cls(424, "generation", message)

    def body(self, path: str) -> dict[str, Any]:
        """The JSON body: OpenAI's shape under /v1, TGI's elsewhere."""
        message = self.message.encode(errors="backslashreplace").decode()  # it may quote half a surrogate pair
        if path.startswith("/v1/"):
            error = {
                "message": message,
                "type": self.error_type,
                "param": self.param or None,
                "code": self.code or None,
            }
            return {"error": error}
        return {"error": message, "error_type": self.error_type}

    def response(self, path: str) -> JSONResponse:
        """The answer to the request of that path; the request's log line gets its type."""
        current_record().error_type = self.error_type
        return JSONResponse(self.body(path), self.status, self.headers)


def request_id_of(request: Request) -> str:
    """Its x-request-id: the client's if that is usable, else one that RequestLog has put in, else a new one."""
    return usable_request_id(request.headers.get("x-request-id", ""))


class CatchAll:
    """Answers an exception that nobody handled with a 500 of that shape, and logs it under the request's id.

    Not an exception handler for `Exception`: Starlette raises on after calling that one, so that uvicorn logs it again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if scope["type"] != "http" or started:
                raise  # the connection has to break: what was sent is no whole answer
            request_id = request_id_of(Request(scope))
            logger.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            await ApiError.internal(request_id).response(scope["path"])(scope, receive, send)


def install_handlers(app: FastAPI) -> None:
    """Give every error of the application that shape."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response(request.url.path)

    async def on_adapter_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, AdapterError)
        return await on_api_error(request, ApiError.of_adapter(error, ""))

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        problems = error.errors()
        if any(tuple(problem["loc"]) == ("body",) for problem in problems) and (told := _wrong_content_type(request)):
            return await on_api_error(request, ApiError(422, "validation", told))
        explained, param = "; ".join(map(_explain, problems[:_MAX_TOLD])), _where(problems[0]) if problems else ""
        return await on_api_error(request, ApiError(422, "validation", explained, param=param))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # FastAPI's own, for a body that json.loads gives up on
            return await on_api_error(request, ApiError(422, "validation", _unreadable(error.__cause__)))
        status = error.status_code
        kind = _BY_STATUS.get(status, "error")
        return await on_api_error(request, ApiError(status, kind, str(error.detail), error.headers))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(AdapterError, on_adapter_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_middleware(CatchAll)


def _wrong_content_type(request: Request) -> str | None:
    sent = request.headers.get("content-type")
    if sent is None:
        return "the `Content-Type` header is missing; expected application/json"
    kind = sent.partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return None
    return f"the `Content-Type` header is {sent[:80]!r}; expected application/json"


def _unreadable(cause: BaseException | None) -> str:
    match cause:
        case RecursionError():
            why = "it is nested too deeply"
        case UnicodeDecodeError():
            why = "it is not UTF-8 text"
        case ValueError():
            why = "it holds a number with too many digits"
        case _:
            why = "it could not be parsed"
    return f"the body is not readable JSON: {why}"


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def brief(value: Any) -> str:
    """`repr` of what a client sent, short and however deeply it is nested."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _where(problem: Mapping[str, Any]) -> str:
    """The field that a pydantic error is about, dotted; nothing for the body as a whole."""
    if problem["type"] == "json_invalid":
        return ""
    parts = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] != "extra_forbidden":  # that one ends in the client's word, whatever it is
        parts = [part for part in parts if not set(part) & set("[(-")]  # branches of a union, such as `list[str]`
    return ".".join(parts)


def _explain(problem: Mapping[str, Any]) -> str:
    """One pydantic error as `field` message, got value."""
    where = _where(problem) or "body"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem.get('ctx', {}).get('error', message)}"
    if problem["type"] in ("missing", "value_error"):
        return f"`{where}`: {message}"
    return f"`{where}`: {message}, got {brief(problem.get('input'))}"
