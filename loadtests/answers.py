"""Reads what the server answers and says what is wrong with it. Pure; no HTTP."""

import json
from collections.abc import Mapping
from typing import Any

from loadtests.workload import Job

FINISH_REASONS = ("eos_token", "length", "stop_sequence")


class AnswerError(Exception):
    """An answer that the API document does not allow."""


class EventParser:
    """Server-sent events from bytes cut anywhere: in an event, in a line, in a character."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The events that are complete now. Raises AnswerError for anything but `data: {...}`."""
        *blocks, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        return [_event(block) for block in blocks]

    def close(self) -> None:
        """The stream has ended. Raises AnswerError if that was in the middle of an event."""
        if self._rest.strip():
            raise AnswerError(f"truncated stream: it ends inside an event, {self._rest[:80]!r}")


class StreamCheck:
    """Holds the events of one /generate_stream answer to the API document."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._text = ""
        self._last: dict[str, Any] | None = None
        self.tokens = 0

    def push(self, event: dict[str, Any]) -> None:
        """The next event. Raises AnswerError: an error event, a gap, an event after the last."""
        if "error" in event:
            raise AnswerError(f"error event {event.get('error_type')!r}: {event['error']}")
        if self._last is not None:
            raise AnswerError("an event follows the last one")
        self.tokens += 1
        if event.get("index") != self.tokens:
            raise AnswerError(f"event {self.tokens} has the index {event.get('index')!r}")
        self._text += _token_text(event.get("token"))
        if event.get("generated_text") is not None:
            self._last = event

    def finish(self) -> None:
        """The stream has ended. Raises AnswerError if it was cut short or its parts don't agree."""
        if self._last is None:
            raise AnswerError(f"truncated stream: it ends after {self.tokens} events, none of them the last")
        _check_details(self._job, self._last.get("details"), self.tokens)
        _check_text(self._last["generated_text"], self._text)


def check_answer(job: Job, body: Any) -> None:
    """Hold the parsed answer of /generate to the API document. Raises AnswerError."""
    if not isinstance(body, dict) or not isinstance(details := body.get("details"), dict):
        raise AnswerError("the answer has no details")
    tokens = details.get("tokens")
    if not isinstance(tokens, list):
        raise AnswerError("the details hold no tokens")
    _check_details(job, details, len(tokens))
    _check_text(body.get("generated_text"), "".join(_token_text(token) for token in tokens))


def check_headers(job: Job, headers: Mapping[str, str]) -> None:
    """The answer comes from the adapter that was asked for, or from the base. Raises AnswerError."""
    if (adapter := headers.get("x-adapter-id")) != job.adapter:
        raise AnswerError(f"asked for the adapter {job.adapter!r}, x-adapter-id is {adapter!r}")
    if job.adapter is not None and not headers.get("x-adapter-digest"):
        raise AnswerError("x-adapter-digest is missing")


def _event(block: bytes) -> dict[str, Any]:
    prefix, _, data = block.partition(b":")
    try:
        event = json.loads(data) if prefix == b"data" else None
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise AnswerError(f"malformed event {block[:80]!r}")
    return event


def _token_text(token: Any) -> str:
    """What a token adds to the text. Raises AnswerError."""
    if not isinstance(token, dict) or not isinstance(text := token.get("text"), str):
        raise AnswerError(f"malformed token {str(token)[:80]}")
    return "" if token.get("special") else text


def _check_details(job: Job, details: Any, tokens: int) -> None:
    if not isinstance(details, dict):
        raise AnswerError("the answer has no details")
    reason, count = details.get("finish_reason"), details.get("generated_tokens")
    if reason not in FINISH_REASONS:
        raise AnswerError(f"finish_reason is {reason!r}")
    if count != tokens or not 1 <= tokens <= job.max_new_tokens:
        raise AnswerError(f"{tokens} tokens, {count!r} in the details, at most {job.max_new_tokens} asked for")
    if reason == "length" and tokens != job.max_new_tokens:
        raise AnswerError(f"finish_reason is length after {tokens} of {job.max_new_tokens} tokens")
    if reason == "eos_token" and job.ignore_eos:
        raise AnswerError("finish_reason is eos_token, though the request ignores it")


def _check_text(text: Any, joined: str) -> None:
    if text != joined:
        raise AnswerError(f"generated_text {str(text)[:80]!r} is not the tokens' text {joined[:80]!r}")
