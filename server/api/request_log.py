"""What is known of each HTTP request when it ends: its id in every answer, and one log line.

RequestLog makes the record; the gate, the errors and ChorusSpec fill in what they know. Text that a client sent stays
out, but for its prompts where --log-prompts asks for them.
"""

import logging
import re
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.adapter import AdapterRef
from server import logs
from server.engine.types import FinishReason, SequenceOutput

logger = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET_METHODS = ("GET", "HEAD", "OPTIONS")
_PATH_CHARACTERS = 200


@dataclass
class RequestRecord:
    """One HTTP request. Times are in seconds, from its arrival."""

    request_id: str = ""
    method: str = ""
    path: str = ""  # percent-encoded, without the query
    started: float = field(default_factory=time.monotonic)
    status: int | None = None  # None: nothing was sent
    client_gone: bool = False  # before the answer had ended
    key: str = ""  # label; set by KeyGate
    error_type: str | None = None  # set by ApiError.response
    trace_id: str | None = None  # set by Tracing
    adapters: tuple[AdapterRef, ...] = ()  # this and what follows by ChorusSpec
    model: str = ""  # the adapters' names, or the base's
    prompt_tokens: int | None = None
    generated_tokens: int | None = None
    queue_time: float | None = None  # of the sequence that began first
    time_to_first_token: float | None = None  # of the sequence that had one first
    finish_reasons: list[str] = field(default_factory=lambda: list[str]())  # in the order in which sequences ended
    wants_prompts: bool = False
    prompts: tuple[str, ...] = ()

    def begin(self, adapters: Sequence[AdapterRef], base: str, prompt_tokens: int) -> None:
        """A generation is submitted."""
        self.adapters, self.prompt_tokens, self.generated_tokens = tuple(adapters), prompt_tokens, 0
        self.model = ",".join(ref.name for ref in adapters) or base

    def add(self, output: SequenceOutput) -> None:
        """One of its sequences has put something out."""
        self.generated_tokens = (self.generated_tokens or 0) + len(output.token_ids)
        if output.token_ids:
            seconds = output.time_to_first_token or time.monotonic() - self.started
            self.time_to_first_token = min(seconds, self.time_to_first_token or seconds)
        if output.finish_reason not in (None, FinishReason.ERROR):
            self.queue_time = min(output.queue_time, self.queue_time or output.queue_time)

    def end(self, reason: FinishReason) -> None:
        """One of its sequences has ended."""
        self.finish_reasons.append(reason.value)


_current: ContextVar[RequestRecord | None] = ContextVar("record", default=None)


def current_record() -> RequestRecord:
    """Of the request that this task works for; outside one, a record that nobody reads."""
    return _current.get() or RequestRecord()


def usable_request_id(sent: str) -> str:
    """`sent` if it may go into headers and logs, else a new one."""
    return sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


class RequestLog:
    """ASGI middleware, the outermost: x-request-id in every answer; a log line at the end of all but GET requests."""

    def __init__(self, app: ASGIApp, *, prompts: bool = False) -> None:
        """`prompts`: whether the line tells them."""
        self._app, self._prompts = app, prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        sent = [value for name, value in scope["headers"] if name == b"x-request-id"]
        request_id = usable_request_id(sent[0].decode("latin-1") if len(sent) == 1 else "")
        scope["headers"] = [*headers, (b"x-request-id", request_id.encode())]  # what reads it finds the one id
        path = quote(scope["path"])[:_PATH_CHARACTERS]
        record = RequestRecord(request_id, scope["method"], path, wants_prompts=self._prompts)
        ended = False

        async def heard() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not ended:
                record.client_gone = True
            return message

        async def told(message: Message) -> None:
            nonlocal ended
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        tokens = _current.set(record), logs.request_id.set(request_id)
        try:
            await self._app(scope, heard, told)
        finally:
            if record.method not in _QUIET_METHODS:
                logger.info("%s", _text(record), extra={"fields": _fields(record)})
            _current.reset(tokens[0])
            logs.request_id.reset(tokens[1])


def _fields(record: RequestRecord) -> dict[str, Any]:
    """The line in JSON."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "key": record.key,
        "adapters": [ref.name for ref in record.adapters],
        "digests": [ref.digest for ref in record.adapters],
        "prompt_tokens": record.prompt_tokens,
        "generated_tokens": record.generated_tokens,
        "finish_reasons": record.finish_reasons,
        "queue_ms": _milliseconds(record.queue_time),
        "ttft_ms": _milliseconds(record.time_to_first_token),
        "total_ms": _milliseconds(time.monotonic() - record.started),
        "client_gone": record.client_gone,
        "error_type": record.error_type,
        "trace_id": record.trace_id,
    }
    return fields | ({"prompts": list(record.prompts)} if record.wants_prompts else {})


def _text(record: RequestRecord) -> str:
    """The line for people: what there is to say."""
    parts = [record.method, record.path, str(record.status)]
    if record.adapters:
        parts.append(",".join(f"{ref.name}@{ref.digest[:12]}" for ref in record.adapters))
    if record.prompt_tokens is not None:
        parts.append(f"{record.prompt_tokens}+{record.generated_tokens} tokens")
    if record.finish_reasons:
        parts.append(",".join(sorted(set(record.finish_reasons))))
    if record.error_type:
        parts.append(record.error_type)
    if record.client_gone:
        parts.append("client gone")
    seconds = {
        "total": time.monotonic() - record.started,
        "queue": record.queue_time,
        "first token": record.time_to_first_token,
    }
    parts.append(", ".join(f"{name} {_milliseconds(value)} ms" for name, value in seconds.items() if value is not None))
    parts += [f"key={record.key}", f"id={record.request_id}"]
    if record.trace_id:
        parts.append(f"trace={record.trace_id}")
    if record.prompts:
        parts.append(f"prompts={list(record.prompts)!r}")
    return " ".join(parts)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)
