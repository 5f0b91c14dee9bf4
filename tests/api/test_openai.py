"""The OpenAI dialect over a real server: shapes, models, what is refused and how."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from server.model.source import DEMO_MODEL
from server.tokenizer import Tokenizer
from tests.api.conftest import ServerProcess

PROMPT = "Quote by Oscar Wilde:"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": PROMPT}]


def post(server: ServerProcess, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
    if path == COMPLETIONS:
        body = {"prompt": PROMPT} | body
    content = json.dumps(body)  # ASCII: half a surrogate pair passes
    return httpx.post(f"{server.url}{path}", content=content, headers={"content-type": "application/json"}, timeout=60)


def text(server: ServerProcess, **body: Any) -> str:
    response = post(server, **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_the_answer_has_the_documented_shape(server: ServerProcess) -> None:
    response = post(server, model="beta", max_tokens=6, temperature=0)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "beta")
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    (choice,) = answer["choices"]
    assert list(choice) == ["index", "text", "logprobs", "finish_reason"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert response.headers["x-adapter-id"] == "beta"
    assert response.headers["x-generated-tokens"] == "6"
    other = post(server, model="alpha", max_tokens=6, temperature=0).json()
    assert other["system_fingerprint"] != answer["system_fingerprint"], "another adapter"
    assert other["id"] != answer["id"]


def test_it_says_what_the_other_dialect_says(server: ServerProcess) -> None:
    for model in ("demo", "alpha:0.5,beta:0.5"):
        parameters = {"adapter_id": model, "max_new_tokens": 8, "do_sample": True, "temperature": 0.8, "seed": 3}
        asked = {"inputs": PROMPT, "parameters": parameters}
        expected = httpx.post(f"{server.url}/generate", json=asked, timeout=60).json()["generated_text"]
        sampled = {"model": model, "max_tokens": 8, "temperature": 0.8, "seed": 3}
        assert text(server, **sampled) == expected
        ids = Tokenizer(DEMO_MODEL).encode(PROMPT)
        assert text(server, prompt=ids, **sampled) == text(server, prompt=[ids], **sampled) == expected
        chat = post(server, CHAT, messages=USER, **sampled).json()["choices"][0]["message"]
        assert chat == {"role": "assistant", "content": expected, "refusal": None}
        assert text(server, echo=True, **sampled) == PROMPT + expected


def test_defaults_are_those_of_openai(server: ServerProcess) -> None:
    answer = post(server, model="alpha").json()
    assert answer["usage"]["completion_tokens"] == 16
    assert text(server, seed=1, max_tokens=6) != text(server, seed=2, max_tokens=6), "temperature is 1"
    greedy = {"temperature": 0, "max_tokens": 6}
    assert text(server, seed=1, **greedy) == text(server, seed=2, **greedy)
    assert len({text(server, max_tokens=4) for _ in range(3)}) > 1, "a seed is drawn"


def test_choices_differ_and_repeat(server: ServerProcess) -> None:
    body = {"prompt": [PROMPT, "Once"], "n": 3, "max_tokens": 8, "seed": 4, "model": "alpha"}
    choices = post(server, **body).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert len({choice["text"] for choice in choices}) == 6
    assert post(server, **body).json()["choices"] == choices
    alone = [text(server, prompt=p, seed=s, max_tokens=8, model="alpha") for p in body["prompt"] for s in (4, 5, 6)]
    assert [choice["text"] for choice in choices] == alone, "alone or side by side"


def test_a_crowd_of_streams_gets_what_each_gets_alone(server: ServerProcess) -> None:
    models = ["demo", "alpha", "beta"] * 2

    def streamed(i: int) -> str:
        body = {"prompt": PROMPT, "stream": True, "seed": i, "max_tokens": 12, "model": models[i]}
        with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=body, timeout=60) as response:
            events = b"".join(response.iter_raw()).decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["length"]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    alone = [text(server, seed=i, max_tokens=12, model=models[i]) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(streamed, range(6))) == alone


def test_a_stop_string_ends_the_text(server: ServerProcess) -> None:
    sampled = {"max_tokens": 40, "seed": 5, "model": "beta"}
    full = text(server, **sampled)
    stop = full[17:24]
    assert full.index(stop) == 17, "choose another seed"
    for wanted in (stop, [stop], ["never in there", stop]):
        choice = post(server, stop=wanted, **sampled).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (full[:17], "stop")
    assert text(server, stop=[], **sampled) == text(server, stop=None, **sampled) == full


def test_a_model_by_its_name(server: ServerProcess) -> None:
    cards = httpx.get(f"{server.url}/v1/models").json()["data"]
    for card in cards:
        assert httpx.get(f"{server.url}/v1/models/{card['id']}").json() == card
    mixed = httpx.get(f"{server.url}/v1/models/alpha:0.5,beta:0.5").json()
    assert (mixed["id"], mixed["parent"]) == ("alpha:0.5,beta:0.5", "demo")
    missing = httpx.get(f"{server.url}/v1/models/alpah")
    assert missing.status_code == 404
    error = missing.json()["error"]
    assert (error["param"], error["code"], error["type"]) == ("model", "model_not_found", "not_found")
    assert "'alpha'" in error["message"]
    assert httpx.get(f"{server.url}/v1/models/misfit").status_code == 422


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_unknown_model_is_404(server: ServerProcess, path: str) -> None:
    for stream in (False, True):
        response = post(server, path, model="alpah", stream=stream, **({"messages": USER} if path == CHAT else {}))
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("model", "model_not_found")


REFUSED = [
    ({"max_tokens": 252}, "max_tokens", ["252", "5 tokens", "256", "251"]),
    ({"max_tokens": 0}, "max_tokens", ["0", "echo"]),
    ({"max_completion_tokens": 0}, "max_completion_tokens", ["0", "echo"]),
    ({"max_tokens": -1}, "max_tokens", ["-1"]),
    ({"max_tokens": "5"}, "max_tokens", ["'5'"]),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", ["5", "6"]),
    ({"prompt": "word " * 300}, "prompt", ["301 tokens", "256"]),
    ({"prompt": []}, "prompt", ["[]"]),
    ({"prompt": [[]]}, "prompt", ["item 0"]),
    ({"prompt": {"text": "x"}}, "prompt", ["text"]),
    ({"prompt": ["a", 5]}, "prompt", ["item 1", "5"]),
    ({"prompt": [True, 1]}, "prompt", ["item"]),
    ({"prompt": [-1]}, "prompt", ["-1"]),
    ({"prompt": [50257]}, "prompt", ["50257"]),
    ({"prompt": ["a"] * 257}, "prompt", ["257", "256"]),
    ({"prompt": ["a"] * 200, "n": 2}, "n", ["400", "256"]),
    ({"prompt": "\ud800"}, "prompt", ["surrogate"]),
    ({"prompt": ["ok", "\udfff"]}, "prompt", ["item 1", "surrogate"]),
    ({"n": 129}, "n", ["129", "128"]),
    ({"n": 0}, "n", ["0"]),
    ({"n": 2, "best_of": 1}, "best_of", ["1", "2"]),
    ({"best_of": 2, "stream": True}, "best_of", ["stream"]),
    ({"logprobs": 21}, "logprobs", ["21", "20"]),
    ({"logprobs": True}, "logprobs", ["True"]),
    ({"stop": ["x"] * 17}, "stop", ["17", "16"]),
    ({"stop": ""}, "stop", ["''"]),
    ({"stop": ["x" * 257]}, "stop", ["256"]),
    ({"stop": [5]}, "stop", ["5"]),
    ({"stop": "\ud800"}, "stop", ["surrogate"]),
    ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", ["usage"]),
    ({"temperature": -1}, "temperature", ["-1"]),
    ({"temperature": float("nan")}, "temperature", ["nan"]),
    ({"top_p": 1.5}, "top_p", ["1.5"]),
    ({"top_k": 10**30}, "top_k", ["top_k"]),
    ({"seed": 2**64}, "seed", ["seed"]),
    ({"frequency_penalty": 2.5}, "frequency_penalty", ["2.5"]),
    ({"presence_penalty": -2.5}, "presence_penalty", ["-2.5"]),
    ({"logit_bias": {"50257": 1}}, "logit_bias", ["50257"]),
    ({"logit_bias": {"x": 1}}, "logit_bias", ["'x'"]),
    ({"logit_bias": {"5": 101}}, "logit_bias", ["101", "100"]),
    ({"logit_bias": {"5": float("inf")}}, "logit_bias", ["inf"]),
    ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", ["300"]),
    ({"logit_bias": [1]}, "logit_bias", ["[1]"]),
    ({"min_tokens": 17}, "min_tokens", ["17", "16"]),
    ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", ["1 is", "the 0 tokens"]),
    ({"suffix": "the end"}, "suffix", ["the end", "not supported"]),
    ({"use_beam_search": True}, "use_beam_search", ["not supported"]),
    ({"min_p": 0.1}, "min_p", ["0.1", "not supported"]),
    ({"colour": "red"}, "colour", ["colour"]),
    ({"messages": USER}, "messages", ["messages"]),
]


@pytest.mark.parametrize(("body", "param", "told"), REFUSED)
def test_what_is_wrong_is_refused_by_name(server: ServerProcess, body: dict, param: str, told: list[str]) -> None:
    response = post(server, **body)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["param"], error["type"]) == (param, "validation")
    assert param in error["message"]
    assert all(word in error["message"] for word in told), error["message"]
    assert len(error["message"]) < 400


def test_a_prompt_that_is_too_long_has_openais_code(server: ServerProcess) -> None:
    for body in ({"prompt": "word " * 300}, {"max_tokens": 252}):
        assert post(server, **body).json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": {"type": "text", "text": "x"}}]}, "messages.0.content"),
        ({"messages": USER * 257}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "messages"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": USER, "tool_choice": "required"}, "tool_choice"),
        ({"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": USER, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": USER, "logprobs": 3}, "logprobs"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens"),
        ({"messages": USER, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": USER, "echo": True}, "echo"),
        ({"messages": USER, "best_of": 2}, "best_of"),
    ],
)
def test_chat_refuses_by_name_too(server: ServerProcess, body: dict, param: str) -> None:
    response = post(server, CHAT, **body)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param


def test_what_changes_nothing_is_accepted(server: ServerProcess) -> None:
    neutral = {
        "suffix": None, "metadata": {}, "response_format": {"type": "text"}, "min_p": 0, "use_beam_search": False,
        "length_penalty": 1.0, "stop_token_ids": [], "skip_special_tokens": True, "logit_bias": {}, "user": "me",
        "stream_options": {"include_usage": False}, "best_of": 1, "echo": False, "top_k": 0, "guided_json": None,
    }  # fmt: skip
    assert text(server, seed=1, **neutral) == text(server, seed=1)
    chat = {
        "tools": None, "tool_choice": "auto", "parallel_tool_calls": True, "functions": [], "modalities": ["text"],
        "service_tier": "auto", "store": False, "top_logprobs": 0, "reasoning_effort": None,
    }  # fmt: skip
    asked = {"messages": [USER[0] | {"refusal": None, "tool_calls": None, "audio": None}], "seed": 1, "max_tokens": 16}
    assert post(server, CHAT, **asked, **chat).json()["choices"][0]["message"]["content"] == text(server, seed=1)


@pytest.mark.parametrize("content", [b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_request_is_refused(server: ServerProcess, content: bytes) -> None:
    for path in (COMPLETIONS, CHAT):
        response = httpx.post(f"{server.url}{path}", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 422
        assert response.json()["error"] | {"message": ""} == {
            "message": "", "type": "validation", "param": None, "code": None
        }  # fmt: skip


def test_a_refused_adapter_says_why(server: ServerProcess) -> None:
    response = post(server, model="misfit")
    assert response.status_code == 422
    assert response.json()["error"]["type"] == "adapter_refused"
    assert "IA3" in response.json()["error"]["message"]


def test_the_openapi_document_knows_the_fields(server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"type": "array", "items": {"type": "string"}, "maxItems": 256, "minItems": 1} in fields["prompt"]["anyOf"]
    assert fields["suffix"]["enum"] == [None]
    assert fields["use_beam_search"]["enum"] == [None, False]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}"} <= set(document["paths"])
    told = document["paths"]["/v1/completions"]["post"]["responses"]["422"]["content"]["application/json"]["schema"]
    refused = document["components"]["schemas"][told["$ref"].rpartition("/")[2]]
    assert set(refused["properties"]["error"]["properties"]) == {"message", "type", "param", "code"}
