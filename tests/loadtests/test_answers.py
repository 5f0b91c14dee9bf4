"""What the load test takes for a right answer, and what it calls wrong."""

import json
from typing import Any

import pytest

from loadtests.answers import AnswerError, EventParser, StreamCheck, check_answer, check_headers
from loadtests.workload import Job
from tests.loadtests.fake import answer, events

JOB = Job("Quote by Oscar Wilde:", "wilde", max_new_tokens=6, ignore_eos=False, sampling={})
NEVER_EOS = Job("Quote by Oscar Wilde:", "wilde", max_new_tokens=6, ignore_eos=True, sampling={})


def read(data: bytes, size: int, job: Job = JOB) -> StreamCheck:
    """Feed a whole stream in pieces of `size` bytes."""
    parser, check = EventParser(), StreamCheck(job)
    for start in range(0, len(data), size):
        for event in parser.feed(data[start : start + size]):
            check.push(event)
    parser.close()
    check.finish()
    return check


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_a_stream_is_read_however_it_is_cut(size: int, newline: bytes) -> None:
    assert read(b"".join(events(6)).replace(b"\n", newline), size).tokens == 6


def test_events_come_out_as_soon_as_they_are_complete() -> None:
    parser = EventParser()
    first, second = events(2)
    assert [event["index"] for event in parser.feed(first + second[:-1])] == [1]
    assert [event["index"] for event in parser.feed(second[-1:])] == [2]
    parser.close()


@pytest.mark.parametrize("events_left", range(6))
def test_a_stream_without_its_last_event_is_truncated(events_left: int) -> None:
    with pytest.raises(AnswerError, match="truncated stream"):
        read(b"".join(events(6)[:events_left]), 100)


def test_a_stream_that_ends_inside_an_event_is_truncated() -> None:
    whole = b"".join(events(3))
    with pytest.raises(AnswerError, match="ends inside an event"):
        read(whole[:-1], 100)
    with pytest.raises(AnswerError, match="ends inside an event"):
        read(whole + b"data: {", 100)


@pytest.mark.parametrize("block", [b"event: x", b"data: {", b"data: [1]", b"data:", b"", b": comment"])
def test_malformed_events_are_refused(block: bytes) -> None:
    with pytest.raises(AnswerError, match="malformed event"):
        EventParser().feed(block + b"\n\n")


def changed(number: int, **fields: Any) -> bytes:
    """A stream of three events, one with other fields."""
    made = [json.loads(event.removeprefix(b"data: ")) for event in events(3)]
    details = fields.pop("details", {})
    made[number] |= fields
    if details:
        made[number]["details"] |= details
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in made)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(1, error="gone", error_type="unavailable"), "error event 'unavailable': gone"),
        (changed(1, index=3), "event 2 has the index 3"),
        (changed(1, token={"id": 1}), "malformed token"),
        (changed(1, generated_text="x"), "follows the last"),
        (changed(2, generated_text="something else"), "is not the tokens' text"),
        (changed(2, details={"finish_reason": None}), "finish_reason is None"),
        (changed(2, details={"generated_tokens": 2}), "3 tokens, 2 in the details"),
        (changed(2, details={"finish_reason": "length"}), "length after 3 of 6"),
        (b"".join(events(7)), "7 tokens, 7 in the details, at most 6"),
    ],
)
def test_wrong_streams_are_named(data: bytes, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        read(data, 1000)


def test_right_answers_pass() -> None:
    check_answer(JOB, answer(3))
    check_answer(JOB, answer(6, "length"))
    check_answer(NEVER_EOS, answer(6, "length"))
    check_headers(JOB, {"x-adapter-id": "wilde", "x-adapter-digest": "d"})


@pytest.mark.parametrize(
    ("job", "body", "message"),
    [
        (JOB, [], "no details"),
        (JOB, {"generated_text": "x"}, "no details"),
        (JOB, {"generated_text": "x", "details": {"finish_reason": "length"}}, "no tokens"),
        (JOB, answer(3) | {"generated_text": None}, "is not the tokens' text"),
        (JOB, answer(3, "error"), "finish_reason is 'error'"),
        (JOB, answer(7), "at most 6"),
        (NEVER_EOS, answer(6), "though the request ignores it"),
    ],
)
def test_wrong_answers_are_named(job: Job, body: Any, message: str) -> None:
    with pytest.raises(AnswerError, match=message):
        check_answer(job, body)


def test_an_answer_of_another_adapter_is_wrong() -> None:
    base = Job("x", None, 6, False, {})
    check_headers(base, {})
    for job, headers in (
        (JOB, {}),
        (JOB, {"x-adapter-id": "twain", "x-adapter-digest": "d"}),
        (JOB, {"x-adapter-id": "wilde"}),
        (base, {"x-adapter-id": "wilde", "x-adapter-digest": "d"}),
    ):
        with pytest.raises(AnswerError, match="x-adapter-"):
            check_headers(job, headers)
