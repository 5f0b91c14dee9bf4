"""POST /generate and /generate_stream over a real server: the wire format of docs/api.md, statuses included."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.api.conftest import ServerProcess

PROMPT = "Quote by Oscar Wilde:"


def post(server: ServerProcess, path: str = "/generate", inputs: Any = PROMPT, **parameters: Any) -> httpx.Response:
    content = json.dumps({"inputs": inputs, "parameters": parameters})  # ASCII: half a surrogate pair passes
    return httpx.post(f"{server.url}{path}", content=content, headers={"content-type": "application/json"}, timeout=60)


def events(server: ServerProcess, **parameters: Any) -> Iterator[dict]:
    body = {"inputs": PROMPT, "parameters": parameters}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                yield json.loads(line.removeprefix("data: "))


def test_the_answer_has_the_documented_shape(server: ServerProcess) -> None:
    response = post(server, max_new_tokens=6, details=True, adapter_id="beta")
    assert response.status_code == 200, response.text
    details = response.json()["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == 6
    assert details["prompt_tokens"] == details["input_length"] == 5
    assert details["seed"] is None
    assert set(details["tokens"][0]) == {"id", "text", "logprob", "special", "skipped"}
    assert "".join(token["text"] for token in details["tokens"]) == response.json()["generated_text"]
    assert all(token["logprob"] < 0 for token in details["tokens"])
    assert response.headers["x-adapter-id"] == "beta"
    assert len(response.headers["x-adapter-digest"]) == 64
    assert response.headers["x-generated-tokens"] == "6"
    assert "details" not in post(server, max_new_tokens=2).json()


def test_adapters_and_base_differ_and_names_of_the_base_mean_the_base(server: ServerProcess) -> None:
    texts = {
        name: post(server, max_new_tokens=16, adapter_id=name).json()["generated_text"] for name in ("alpha", "beta")
    }
    base = post(server, max_new_tokens=16).json()["generated_text"]
    assert len({base, *texts.values()}) == 3, "each voice has its own text"
    assert post(server, max_new_tokens=16, adapter_id="demo").json()["generated_text"] == base
    assert post(server, max_new_tokens=16, adapter_id=None).json()["generated_text"] == base


def test_a_seed_repeats_a_sampled_text_and_is_reported(server: ServerProcess) -> None:
    sampled = {"do_sample": True, "max_new_tokens": 16, "details": True}
    first = post(server, seed=7, **sampled).json()
    assert first["details"]["seed"] == 7
    assert post(server, seed=7, **sampled).json() == first
    assert post(server, seed=8, **sampled).json()["generated_text"] != first["generated_text"]
    drawn = post(server, **sampled).json()
    assert post(server, seed=drawn["details"]["seed"], **sampled).json()["generated_text"] == drawn["generated_text"]


def test_the_same_request_gives_the_same_text_in_a_crowd(server: ServerProcess) -> None:
    def one(i: int) -> str:
        name = (None, "alpha", "beta")[i % 3]
        return post(server, max_new_tokens=24, do_sample=True, seed=i, adapter_id=name).json()["generated_text"]

    alone = [one(i) for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(one, range(24))) == alone


def test_a_stream_carries_what_the_single_answer_holds(server: ServerProcess) -> None:
    parameters = {"max_new_tokens": 20, "do_sample": True, "seed": 3, "adapter_id": "alpha", "details": True}
    single = post(server, **parameters).json()
    streamed = list(events(server, **parameters))
    assert [event["index"] for event in streamed] == list(range(1, 21))
    assert [event["token"] for event in streamed] == single["details"]["tokens"]
    assert all(event["generated_text"] is None and event["details"] is None for event in streamed[:-1])
    assert streamed[-1]["generated_text"] == single["generated_text"]
    assert streamed[-1]["details"]["finish_reason"] == "length"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_that_straddles_tokens_is_cut_exactly(server: ServerProcess, streamed: bool) -> None:
    parameters = {"max_new_tokens": 40, "do_sample": True, "seed": 5, "adapter_id": "beta"}
    text = post(server, **parameters).json()["generated_text"]
    stop = text[17:24]
    assert text.index(stop) == 17, "choose another seed"
    parameters |= {"stop": ["never in there", stop], "details": True}
    if streamed:
        got = list(events(server, **parameters))
        last = got[-1]
        assert "".join(e["token"]["text"] for e in got) == text[:17], "no part of the stop string is ever sent"
    else:
        last = post(server, **parameters).json()
    assert last["generated_text"] == text[:17]
    assert last["details"]["finish_reason"] == "stop_sequence"


def test_full_text_and_request_id(server: ServerProcess) -> None:
    body = {"inputs": PROMPT, "parameters": {"return_full_text": True, "max_new_tokens": 3}}
    response = httpx.post(f"{server.url}/generate", json=body, headers={"x-request-id": "mine-1"})
    assert response.json()["generated_text"].startswith(PROMPT)
    assert response.headers["x-request-id"] == "mine-1"


def test_defaults_and_null_are_the_same(server: ServerProcess) -> None:
    nothing = httpx.post(f"{server.url}/generate", json={"inputs": PROMPT}, timeout=60)
    nulls = dict.fromkeys(
        ["adapter_id", "adapter_source", "merged_adapters", "api_token", "response_format", "return_k_alternatives",
         "max_new_tokens", "temperature", "top_k", "top_p", "typical_p", "do_sample", "repetition_penalty",
         "frequency_penalty", "presence_penalty", "stop", "seed", "best_of", "truncate", "return_full_text", "details",
         "decoder_input_details", "top_n_tokens", "ignore_eos_token", "grammar"]
    )  # fmt: skip
    assert post(server, **nulls, watermark=False).json() == nothing.json()
    neutral = {
        "best_of": 1,
        "typical_p": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "decoder_input_details": False,
    }
    assert post(server, **neutral).json() == nothing.json()
    assert nothing.headers["x-generated-tokens"] == "20"


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
        ({"max_new_tokens": 252}, ["max_new_tokens", "252", "5 tokens", "256", "251"]),
        ({"temperature": 0.7}, ["temperature", "0.7", "do_sample"]),
        ({"do_sample": True, "temperature": 0}, ["temperature", "0"]),
        ({"do_sample": True, "top_p": 1.5}, ["top_p", "1.5"]),
        ({"top_k": 5}, ["top_k", "do_sample"]),
        ({"do_sample": True, "top_k": 2**63}, ["top_k", str(2**63)]),
        ({"best_of": 2}, ["best_of", "2"]),
        ({"watermark": True}, ["watermark"]),
        ({"top_n_tokens": -1}, ["top_n_tokens", "-1"]),
        ({"grammar": {"type": "json"}}, ["grammar"]),
        ({"colour": "red"}, ["colour"]),
        ({"stop": [""]}, ["stop"]),
        ({"stop": ["x"] * 17}, ["stop"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": True}, ["seed"]),
        ({"max_new_tokens": "5"}, ["max_new_tokens", "5"]),
        ({"repetition_penalty": 1e-40}, ["repetition_penalty", "0.01", "1e-40"]),
        ({"repetition_penalty": 101}, ["repetition_penalty", "100", "101"]),
        ({"stop": ["ok", "\ud800"]}, ["parameters.stop.1", "\\ud800", "surrogate"]),
        ({"\ud800": 1}, ["\\ud800"]),
        ({"adapter_id": "misfit"}, ["IA3"]),
    ],
)
def test_a_bad_parameter_is_refused_by_name(server: ServerProcess, parameters: dict, told: list[str]) -> None:
    for path in ("/generate", "/generate_stream"):
        response = post(server, path, **parameters)
        assert response.status_code == 422, response.text
        kind = "adapter_refused" if parameters.get("adapter_id") == "misfit" else "validation"
        assert response.json()["error_type"] == kind
        assert all(word in response.json()["error"] for word in told), response.json()["error"]


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'"x"', b'{"inputs": ""}', b'{"inputs": 5}', b'{"prompt": "x"}', b"\xff"]
)
def test_a_body_that_is_no_request_is_refused(server: ServerProcess, content: bytes) -> None:
    response = httpx.post(f"{server.url}/generate", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert response.json()["error_type"] == "validation"


def test_unknown_adapters_paths_and_methods(server: ServerProcess) -> None:
    response = post(server, adapter_id="alpah")
    assert response.status_code == 404
    assert response.json()["error_type"] == "not_found"
    assert "'alpha'" in response.json()["error"]
    for name in ("../alpha", "a,b", "/etc", "alpha/", "x" * 65, ""):
        assert post(server, adapter_id=name).status_code == 404
    assert httpx.get(f"{server.url}/nowhere").json()["error_type"] == "not_found"
    assert httpx.get(f"{server.url}/generate").status_code == 405


def test_an_overlong_prompt_names_both_lengths(server: ServerProcess) -> None:
    response = post(server, inputs="word " * 300)
    assert response.status_code == 422
    assert "301 tokens" in response.json()["error"]
    assert "256" in response.json()["error"]
    assert post(server, inputs="x" * 2_000_000).status_code == 413


def test_odd_text_survives(server: ServerProcess) -> None:
    for inputs in ("\u00e9t\u00e9 \U0001f600 \x00 \u202e", "<|endoftext|>", "\n\n"):
        response = post(server, inputs=inputs, max_new_tokens=3, return_full_text=True)
        assert response.status_code == 200, response.text
        assert response.json()["generated_text"].startswith(inputs)


def test_models_info_and_probes(server: ServerProcess) -> None:
    models = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [card["id"] for card in models] == ["demo", "alpha", "beta"]
    assert models[0]["parent"] is None
    assert models[1]["parent"] == models[1]["root"] == "demo"
    info = httpx.get(f"{server.url}/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["model_dtype"]) == ("demo", 256, "float32")
    assert httpx.get(f"{server.url}/health").content == b""
    assert httpx.get(f"{server.url}/ready").json() == {"ready": True, "missing": []}


def test_the_openapi_document_shows_errors_as_they_are_sent(server: ServerProcess) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    schemas = document["components"]["schemas"]
    told = document["paths"]["/generate"]["post"]["responses"]["422"]["content"]["application/json"]["schema"]
    schema = schemas[told["$ref"].rpartition("/")[2]]
    assert set(schema["properties"]) == set(post(server, top_k=-1).json()) == {"error", "error_type"}
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path in ("/info", "/v1/models"):
        assert not {"422", "429"} & document["paths"][path]["get"]["responses"].keys(), "nothing to refuse, no limit"
    assert "422" in document["paths"]["/v1/adapters"]["get"]["responses"]


def test_metrics_count_what_was_done(server: ServerProcess) -> None:
    before = server.metric("chorus_adapter_generation_tokens_total", adapter="alpha")
    finished = server.metric("chorus_requests_finished_total", finish_reason="length")
    post(server, adapter_id="alpha", max_new_tokens=9)
    assert server.metric("chorus_adapter_generation_tokens_total", adapter="alpha") == before + 9
    assert server.metric("chorus_requests_finished_total", finish_reason="length") == finished + 1
    server.wait_until(lambda: server.metric("vllm:num_requests_running") == 0, 5)
    assert server.metric("vllm:time_to_first_token_seconds_count") > 0
    assert server.metric("vllm:inter_token_latency_seconds_count") > 0
    assert server.metric("chorus_adapters_resident") == 2
