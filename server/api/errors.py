"""Errors as clients see them: a status, a type, a message, in the shape of the dialect that was spoken."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from adapters.errors import AdapterError, AdapterNotFound, AdapterRefused
from server.engine.types import ErrorKind, SequenceOutput

_BY_STATUS = {401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 413: "validation", 422: "validation"}


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self, status: int, error_type: str, message: str, headers: Mapping[str, str] | None = None, *, param: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.error_type, self.message, self.param = status, error_type, message, param
        self.headers = dict(headers or {})

    @classmethod
    def invalid(cls, field: str, problem: str) -> "ApiError":
        """422: a field's value is wrong; `problem` says what and what is expected."""
        return cls(422, "validation", f"`{field}` {problem}", param=field)

    @classmethod
    def unavailable(cls, message: str) -> "ApiError":
        """503 with Retry-After."""
        return cls(503, "unavailable", message, {"Retry-After": "2"})

    @classmethod
    def of_adapter(cls, error: AdapterError, field: str) -> "ApiError":
        """404, 422 or 503, by the kind of failure."""
        if isinstance(error, AdapterNotFound):
            return cls(404, "not_found", str(error), param=field)
        if isinstance(error, AdapterRefused):
            return cls(422, "adapter_refused", str(error), param=field)
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
        if path.startswith("/v1/"):
            error = {"message": self.message, "type": self.error_type, "param": self.param or None, "code": self.status}
            return {"error": error}
        return {"error": self.message, "error_type": self.error_type}


def install_handlers(app: FastAPI) -> None:
    """Give every error of the application that shape."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body(request.url.path), error.status, error.headers)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return await on_api_error(request, ApiError(422, "validation", "; ".join(map(_explain, error.errors()))))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        status = 422 if error.status_code == 400 else error.status_code  # FastAPI's own: bytes that are no text
        kind = _BY_STATUS.get(status, "error")
        return await on_api_error(request, ApiError(status, kind, str(error.detail), error.headers))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)


def _explain(problem: Mapping[str, Any]) -> str:
    """One pydantic error as `field` message, got value."""
    where = ".".join(str(part) for part in problem["loc"] if part != "body") or "body"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"the body is not valid JSON: {problem.get('ctx', {}).get('error', message)}"
    if problem["type"] in ("missing", "value_error"):
        return f"`{where}`: {message}"
    value = repr(problem.get("input"))
    return f"`{where}`: {message}, got {value if len(value) <= 80 else value[:77] + '...'}"
