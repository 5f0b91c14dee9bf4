"""openai-python, unchanged, against a real server."""

import json
from typing import Any

import httpx
import pytest

from tests.api.conftest import ServerProcess
from tests.clients.conftest import KEY
from tests.clients.environments import run

PROMPT = "Quote by Oscar Wilde:"


@pytest.fixture(scope="module")
def found(served: ServerProcess) -> dict[str, Any]:
    return json.loads(run("openai", "openai_client.py", served.url, KEY))


def generated(served: ServerProcess, adapter: str | None, count: int) -> str:
    body = {"inputs": PROMPT, "parameters": {"adapter_id": adapter, "max_new_tokens": count}}
    answer = httpx.post(f"{served.url}/generate", json=body, headers={"x-api-key": KEY}, timeout=60)
    return answer.json()["generated_text"]


def test_models(found: dict[str, Any]) -> None:
    assert found["models"][0] == "demo"
    assert {"wilde", "quotes", "poet"} <= set(found["models"])
    assert found["model"] == "wilde"


@pytest.mark.parametrize("model", ["demo", "wilde", "poet", "wilde:0.5,love:0.5"])
def test_a_completion_streamed_or_not_is_what_generate_gives(
    model: str, found: dict[str, Any], served: ServerProcess
) -> None:
    got = found[model]
    assert got["text"] == got["streamed"] == generated(served, model, 8)
    assert got["finish_reason"] == got["streamed_reason"] == "length"
    assert got["usage"] == got["streamed_usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13}
    assert got["object"] == "text_completion"
    assert got["id"].startswith("cmpl-")


def test_prompts_in_lists_and_several_choices(found: dict[str, Any]) -> None:
    assert [index for index, _, _ in found["choices"]] == [0, 1, 2, 3]
    assert found["choices"][0][1] != found["choices"][1][1], "each choice draws for itself"
    for _, text, logprobs in found["choices"]:
        assert "".join(logprobs["tokens"]).startswith(text)
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"])


def test_echo_with_logprobs(found: dict[str, Any]) -> None:
    echo = found["echo"]
    assert echo["text"].startswith(PROMPT)
    assert echo["logprobs"]["token_logprobs"][0] is None
    assert "".join(echo["logprobs"]["tokens"]) == echo["text"]
    assert all(logprob <= 0 for logprob in echo["logprobs"]["token_logprobs"][1:])


def test_a_bias_decides(found: dict[str, Any]) -> None:
    assert found["bias"] == ["", "stop"]


def test_chat(found: dict[str, Any]) -> None:
    text, role = found["chat"]
    assert role == "assistant"
    assert text == found["chat_streamed"] != ""


@pytest.mark.parametrize(
    ("name", "kind", "status", "param", "word"),
    [
        ("model", "NotFoundError", 404, "model", "nobody"),
        ("field", "UnprocessableEntityError", 422, "temperature", "-1"),
        ("unknown", "UnprocessableEntityError", 422, "colour", "colour"),
        ("long", "UnprocessableEntityError", 422, "prompt", "256"),
        ("key", "AuthenticationError", 401, None, "key"),
    ],
)
def test_errors_are_the_clients_own(
    name: str, kind: str, status: int, param: str | None, word: str, found: dict[str, Any]
) -> None:
    got = found["errors"][name]
    assert got[:3] == [kind, status, param]
    assert word in got[3]
