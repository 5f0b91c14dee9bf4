"""Streams byte for byte, as they go over the wire."""

import json
from typing import Any

import httpx
import pytest

from server.model.source import DEMO_MODEL
from server.tokenizer import Tokenizer
from tests.api.conftest import ServerProcess
from tests.clients.conftest import KEY
from tests.clients.test_openai import PROMPT, generated

HALVES = (47249, 222)  # "ðŁĺ" and "Ģ": three bytes of an emoji, and its last one


def raw(served: ServerProcess, path: str, body: dict[str, Any]) -> bytes:
    """The body of an event stream, as it came."""
    answer = httpx.post(f"{served.url}{path}", json=body, headers={"authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return answer.content


def events(content: bytes) -> list[bytes]:
    """The data of each event, which is all that there is."""
    assert content.endswith(b"\n\n")
    parts = content[:-2].split(b"\n\n")
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [part.removeprefix(b"data: ") for part in parts]


def emoji(count: int, **more: Any) -> dict[str, Any]:
    """A request whose tokens are the halves of an emoji in turn, `count` of them."""
    # Each use takes 2 off a token's score, so the other one is the best then.
    bias = {str(token): 100 - i for i, token in enumerate(HALVES)}
    shaped = {"frequency_penalty": 2, "temperature": 0, "logit_bias": bias, "max_tokens": count}
    return {"model": "demo", "prompt": PROMPT} | shaped | more


def completion(served: ServerProcess, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(f"{served.url}/v1/completions", json=body, headers={"x-api-key": KEY}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_the_halves_are_those_of_an_emoji() -> None:
    vocabulary = Tokenizer(DEMO_MODEL).vocabulary(50257)
    assert b"".join(vocabulary[token] for token in HALVES) == "😀".encode()


def test_openai_tells_why_in_the_last_choice_then_of_usage_then_is_done(served: ServerProcess) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "max_tokens": 6}
    *chunks, usage, done = events(raw(served, "/v1/completions", {"model": "wilde", "prompt": PROMPT, **options}))
    assert done == b"[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert "".join(choice["text"] for choice in choices) == generated(served, "wilde", 6)
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert len({json.loads(chunk)["id"] for chunk in [*chunks, usage]}) == 1


def test_openai_sends_no_empty_list_of_choices_unasked(served: ServerProcess) -> None:
    body = {"model": "wilde", "prompt": PROMPT, "stream": True, "max_tokens": 3}
    *chunks, done = events(raw(served, "/v1/completions", body))
    assert done == b"[DONE]"
    assert all(len(json.loads(chunk)["choices"]) == 1 for chunk in chunks)


def test_tgi_ends_with_the_text_and_no_done(served: ServerProcess) -> None:
    body = {"inputs": PROMPT, "parameters": {"adapter_id": "wilde", "max_new_tokens": 6, "details": True}}
    parts = [json.loads(part) for part in events(raw(served, "/generate_stream", body))]
    assert [part["index"] for part in parts] == list(range(1, 7))
    assert all(part["generated_text"] is None and part["details"] is None for part in parts[:-1])
    assert parts[-1]["generated_text"] == generated(served, "wilde", 6)
    assert parts[-1]["details"]["finish_reason"] == "length"
    assert raw(served, "/", {**body, "stream": True}) == raw(served, "/generate_stream", body)


@pytest.mark.parametrize("count", [4, 6])
def test_half_a_character_is_never_sent(count: int, served: ServerProcess) -> None:
    *chunks, _ = events(raw(served, "/v1/completions", emoji(count, stream=True)))
    texts = [json.loads(chunk)["choices"][0]["text"] for chunk in chunks]
    assert set(texts) <= {"", "😀"}
    assert "".join(texts) == completion(served, emoji(count))["text"] == "😀" * (count // 2)


def test_what_is_left_of_a_character_at_the_end_is_shown_as_such(served: ServerProcess) -> None:
    *chunks, _ = events(raw(served, "/v1/completions", emoji(3, stream=True)))
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == "😀\ufffd"
    assert completion(served, emoji(3))["text"] == "😀\ufffd"


@pytest.mark.parametrize("start", range(0, 24, 5))
def test_a_stop_string_across_tokens_is_cut_exactly(start: int, served: ServerProcess) -> None:
    whole = generated(served, "wilde", 12)
    stop = whole[start : start + 7]
    body = {"model": "wilde", "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "stop": [stop, "never"]}
    choice = completion(served, body)
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.find(stop)], "stop")
    *chunks, _ = events(raw(served, "/v1/completions", {**body, "stream": True}))
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == choice["text"]
    parameters = {"adapter_id": "wilde", "max_new_tokens": 12, "stop": [stop]}
    parts = [
        json.loads(p) for p in events(raw(served, "/generate_stream", {"inputs": PROMPT, "parameters": parameters}))
    ]
    assert "".join(p["token"]["text"] for p in parts if not p["token"]["special"]) == choice["text"]
    assert parts[-1]["generated_text"] == choice["text"]
