"""Streams and answers of the OpenAI dialect, byte by byte, over a fake link."""

import asyncio
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.api import openai, openai_answer
from server.engine.types import ErrorKind, FinishReason, Request, SequenceOutput
from tests.api.fake import EOS
from tests.api.fake_link import TOKENIZER, VOCABULARY, FakeLink, Script, failure, one_by_one, serve

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def says(text: str, reason: FinishReason = FinishReason.LENGTH, **last: Any) -> Script:
    ids = TOKENIZER.encode(text) + ([EOS] if reason is FinishReason.EOS else [])
    return lambda _, request: one_by_one(request, ids, reason, **last)


def stream(client: TestClient, path: str = COMPLETIONS, **body: Any) -> tuple[str, list[dict]]:
    """The raw text, and what its events hold; `[DONE]` is checked and left out."""
    response = client.post(path, json={"stream": True} | body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, end, empty = response.content.decode().split("\n\n")
    assert (end, empty) == ("data: [DONE]", "")
    assert all(line.startswith("data: {") for line in lines)
    return response.text, [json.loads(line.removeprefix("data: ")) for line in lines]


def whole(client: TestClient, path: str = COMPLETIONS, **body: Any) -> dict:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def texts(chunks: list[dict], index: int = 0) -> list[str]:
    return [choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]


def test_a_stream_of_completions_is_exactly_this() -> None:
    client, link = serve(says("Hello world", FinishReason.EOS))
    raw, chunks = stream(client, prompt="Hi", model="demo", temperature=0)
    head = {"id": f"cmpl-{link.asked[0].request_id}", "object": "text_completion", "created": chunks[0]["created"]}
    head |= {"model": "demo", "system_fingerprint": chunks[0]["system_fingerprint"]}

    def event(text: str, reason: str | None) -> str:
        choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]
        return f"data: {json.dumps(head | {'choices': choices})}\n\n"

    assert raw == event("Hello", None) + event(" world", None) + event("", "stop") + "data: [DONE]\n\n"


def test_a_stream_of_chat_begins_with_the_role() -> None:
    client, link = serve(says("Hello world"))
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    _, chunks = stream(client, CHAT, messages=messages)
    assert TOKENIZER.encode("Be short.\na\nb") == list(link.asked[0].prompt_token_ids)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{link.asked[0].request_id}"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "Hello"},
        {"content": " world"},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]
    assert all("usage" not in chunk for chunk in chunks)
    answer = whole(client, CHAT, messages=messages)
    assert answer["object"] == "chat.completion"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert link.asked[0].sampling_params.max_tokens == 256 - len(link.asked[0].prompt_token_ids)


def test_usage_comes_last_in_a_chunk_without_choices_and_only_when_asked_for() -> None:
    client, _ = serve(says("one two three"))
    usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    _, chunks = stream(client, prompt="Hi", stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks] == [None, None, None, usage]
    assert chunks[-1]["choices"] == []
    _, plain = stream(client, prompt="Hi", stream_options={"include_usage": False})
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain)
    both = {"include_usage": True, "continuous_usage_stats": True}
    _, running = stream(client, prompt="Hi", stream_options=both)
    assert [chunk["usage"]["completion_tokens"] for chunk in running] == [1, 2, 3, 3]
    assert whole(client, prompt="Hi")["usage"] == usage


@pytest.mark.parametrize("text", ["a\U0001f600\u00e9\U0001f468\u200d\U0001f469 \u2028\x85end", "\u65e5\u672c\u8a9e"])
def test_no_chunk_has_half_a_character(text: str) -> None:
    client, _ = serve(says(text))
    raw, chunks = stream(client, prompt="Hi")
    assert "".join(texts(chunks)) == text == whole(client, prompt="Hi")["choices"][0]["text"]
    assert "\ufffd" not in raw
    assert all(line == "" or line.startswith("data: ") for line in raw.splitlines()), "a client split an event in two"


def test_what_is_no_text_at_the_end_is_told_as_such() -> None:
    half = TOKENIZER.encode("\U0001f600")[:1]
    client, _ = serve(lambda _, request: one_by_one(request, half, FinishReason.LENGTH))
    _, chunks = stream(client, prompt="Hi")
    assert texts(chunks) == ["\ufffd"]


def test_a_stop_string_that_straddles_tokens_is_cut_exactly() -> None:
    text, stop = "one two three four", "wo th"
    ids = TOKENIZER.encode(text)[:3]
    script: Script = lambda _, request: one_by_one(request, ids, FinishReason.STOP, stop_offset=5)  # noqa: E731
    client, link = serve(script)
    _, chunks = stream(client, prompt="Hi", stop=["never", stop], logprobs=0)
    assert "".join(texts(chunks)) == "one t"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert link.asked[0].sampling_params.stop == (b"never", stop.encode())
    answer = whole(client, prompt="Hi", stop=stop, logprobs=0)["choices"][0]
    assert answer["text"] == "one t"
    assert answer["logprobs"]["tokens"] == ["one", " two", " three"], "every token that was generated is told"
    assert answer["logprobs"]["text_offset"] == [0, 3, 7]


def test_choices_of_several_prompts_interleave_by_index() -> None:
    words = ["one two", "three four five", "six", "seven eight"]
    client, link = serve(lambda i, request: says(words[i])(i, request))
    body = {"prompt": [[17250], [17, 18, 19]], "n": 2, "seed": 5}
    _, chunks = stream(client, **body, stream_options={"include_usage": True})
    assert ["".join(texts(chunks, i)) for i in range(4)] == words
    order = [chunk["choices"][0]["index"] for chunk in chunks[:-1]]
    assert order == [0, 1, 2, 3, 0, 1, 3, 1]
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in chunks[:-1]) == 4
    assert chunks[-1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 8, "total_tokens": 12}
    assert [request.prompt_token_ids for request in link.asked] == [(17250,)] * 2 + [(17, 18, 19)] * 2
    assert [request.sampling_params.seed for request in link.asked] == [5, 6, 5, 6]
    answer = whole(client, **body)
    assert [choice["text"] for choice in answer["choices"]] == words
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == chunks[-1]["usage"]


def test_echo_and_logprobs_of_a_stream_join_to_those_of_the_answer() -> None:
    client, _ = serve(says("caf\u00e9 \U0001f600 au lait", FinishReason.EOS))
    body = {"prompt": "Un \U0001f600 grand", "echo": True, "logprobs": 1}
    single = whole(client, **body)["choices"][0]
    _, chunks = stream(client, **body)
    assert "".join(texts(chunks)) == single["text"] == "Un \U0001f600 grandcaf\u00e9 \U0001f600 au lait"
    joined: dict[str, list] = {}
    for chunk in chunks:
        for name, values in chunk["choices"][0]["logprobs"].items():
            joined.setdefault(name, []).extend(values)
    assert joined == single["logprobs"]
    ids = TOKENIZER.encode(body["prompt"]) + TOKENIZER.encode("caf\u00e9 \U0001f600 au lait")
    assert joined["tokens"][-1] == "<|endoftext|>"
    assert joined["token_logprobs"][0] is joined["top_logprobs"][0] is None
    assert len({len(values) for values in joined.values()}) == 1
    for id_, name, offset in zip(ids, joined["tokens"], joined["text_offset"], strict=False):
        if name.startswith("bytes:"):
            start = single["text"][offset:].encode()  # half a character stands where the character does
            assert start.startswith((VOCABULARY[id_], "\U0001f600".encode()))
            assert bytes.fromhex(name.removeprefix("bytes:").replace("\\x", "")) == VOCABULARY[id_]
        else:
            assert single["text"][offset:].startswith(name)


def test_a_prompt_alone_can_be_scored() -> None:
    client, link = serve(says("x"))
    body = {"prompt": "one two three", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = whole(client, **body)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one two three", "length")
    assert choice["logprobs"] == {
        "tokens": ["one", " two", " three"],
        "token_logprobs": [None, -1.0, -2.0],
        "top_logprobs": [None, {'"': -0.5, " two": -1.0}, {"#": -0.5, " three": -2.0}],
        "text_offset": [0, 3, 7],
    }
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    assert link.asked[0].sampling_params.prompt_logprobs
    metrics = link.metrics.render().decode()
    assert 'vllm:request_generation_tokens_sum{model_name="demo"} 0.0' in metrics, "nothing was generated for anybody"
    assert 'chorus_adapter_generation_tokens_total{adapter="base",model_name="demo"} 0.0' in metrics
    _, chunks = stream(client, **body)
    assert [chunk["choices"] for chunk in chunks] == [answer["choices"]]


def test_the_best_of_several_are_those_of_the_best_mean_logprob() -> None:
    scores = {0: (-3.0, -1.0), 1: (-0.5, -0.7), 2: (-0.1, -9.0), 3: (-1.0, -1.0)}

    def script(i: int, request: Request) -> list[SequenceOutput]:
        ids = tuple(TOKENIZER.encode(f" {'abcd'[i]} x"))
        return [SequenceOutput(request.request_id, ids, scores[i], FinishReason.LENGTH)]

    client, link = serve(script)
    answer = whole(client, prompt="Hi", n=2, best_of=4)
    assert [(c["index"], c["text"], c["logprobs"]) for c in answer["choices"]] == [(0, " b x", None), (1, " d x", None)]
    assert answer["usage"]["completion_tokens"] == 8, "those left out were generated too"
    assert all(request.sampling_params.logprobs for request in link.asked)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_before_the_first_token_keeps_its_status(streamed: bool) -> None:
    client, _ = serve(lambda _, request: [failure(request, ErrorKind.ADAPTER_REFUSED, "no such rank")])
    response = client.post(COMPLETIONS, json={"prompt": "Hi", "stream": streamed})
    assert response.status_code == 422
    assert response.json() == {
        "error": {"message": "no such rank", "type": "adapter_refused", "param": None, "code": None}
    }
    crowded = client.post(COMPLETIONS, json={"prompt": ["a"] * 9, "stream": streamed})
    assert crowded.status_code == 429
    assert crowded.headers["retry-after"] == "1"
    assert crowded.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_error_after_the_first_token_is_an_event_and_the_end(path: str) -> None:
    def script(_: int, request: Request) -> list[SequenceOutput]:
        first = one_by_one(request, TOKENIZER.encode("one two"), FinishReason.LENGTH)[0]
        return [first, failure(request, ErrorKind.WORKER_LOST, "the worker died")]

    client, _ = serve(script)
    prompt = {"prompt": "Hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    response = client.post(path, json={"stream": True} | prompt)
    assert response.status_code == 200
    first, error, empty = response.text.split("\n\n")
    assert empty == ""
    assert json.loads(first.removeprefix("data: "))["choices"][0]["finish_reason"] is None
    body = {"message": "the worker died", "type": "unavailable", "param": None, "code": None}
    assert error == f"data: {json.dumps({'error': body})}"


def test_chat_logprobs() -> None:
    client, link = serve(says("Hi \u65e5"))
    body = {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 1}
    content = whole(client, CHAT, **body)["choices"][0]["logprobs"]["content"]
    assert link.asked[0].sampling_params.top_logprobs == 1
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "Hi \u65e5".encode()
    assert all(entry["top_logprobs"][0]["logprob"] == entry["logprob"] for entry in content)
    _, chunks = stream(client, CHAT, **body)
    assert [e for c in chunks for e in c["choices"][0]["logprobs"]["content"]] == content


def test_the_fingerprint_is_stable_and_tells_ways_of_computing_apart() -> None:
    client, link = serve(says("x"))
    first, second = (whole(client, prompt="Hi")["system_fingerprint"] for _ in range(2))
    assert first == second
    assert first.startswith("fp_")
    link.info.dtype = "bfloat16"
    assert whole(client, prompt="Hi")["system_fingerprint"] != first


def test_params_reach_the_engine() -> None:
    client, link = serve(says("x"))
    asked: dict[str, Any] = {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": -1, "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "repetition_penalty": 1.2, "logit_bias": {"50256": -100, "7": 1.5}, "min_tokens": 2,
        "ignore_eos": True, "stop": "x", "user": "me",
    }  # fmt: skip
    whole(client, prompt="Hi", **asked)
    params = link.asked[-1].sampling_params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (9, 0.5, 0.9, 0)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (params.logit_bias, params.min_tokens, params.ignore_eos) == (((50256, -100.0), (7, 1.5)), 2, True)
    assert (params.seed, params.stop, params.logprobs) == (2**64 - 1, (b"x",), False)
    for nothing in ({}, dict.fromkeys([*asked, "n", "best_of", "echo", "logprobs", "suffix", "stream", "model"])):
        whole(client, prompt="Hi", **nothing)
        params = link.asked[-1].sampling_params
        assert (params.max_tokens, params.temperature, params.top_p, params.stop) == (16, 1.0, 1.0, ())
    whole(client, prompt="Hi", temperature=0, max_completion_tokens=3)
    assert (link.asked[-1].sampling_params.temperature, link.asked[-1].sampling_params.max_tokens) == (0.0, 3)


@pytest.mark.parametrize("body", [{}, {"prompt": None}, {"prompt": ""}, {"prompt": [""]}, {"prompt": [EOS]}])
def test_no_prompt_is_the_beginning_of_a_document(body: dict) -> None:
    client, link = serve(says("x"))
    assert whole(client, **body, echo=True)["choices"][0]["text"] == "<|endoftext|>x"
    assert link.asked[0].prompt_token_ids == (EOS,)


def test_an_engine_that_breaks_off_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    client, _ = serve(lambda _, request: [SequenceOutput(request.request_id, (1, 2), (0.0,), FinishReason.LENGTH)])
    response = client.post(COMPLETIONS, json={"prompt": "Hi", "logprobs": 0})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "internal"
    assert caplog.records


def test_long_work_beside_the_event_loop_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = serve(says("one two"))
    body = {"prompt": ["Hi there", "Once"], "echo": True, "logprobs": 2}
    at_once = whole(client, **body)
    monkeypatch.setattr(openai, "_LONG_TEXT", 0)
    monkeypatch.setattr(openai_answer, "_MANY_TOKENS", 0)
    used: list[str] = []
    to_thread = asyncio.to_thread

    async def noted(work: Any, *args: Any) -> Any:
        used.append(work.__name__)
        return await to_thread(work, *args)

    monkeypatch.setattr(asyncio, "to_thread", noted)
    assert whole(client, **body)["choices"] == at_once["choices"]
    assert used == ["<lambda>", "_render"]


def test_the_link_sees_one_call_for_all_choices() -> None:
    calls: list[int] = []

    class Counting(FakeLink):
        def generate(self, *requests: Request) -> Any:
            calls.append(len(requests))
            return super().generate(*requests)

    client, link = serve(says("x"))
    link.__class__ = Counting
    whole(client, prompt=["a", "b"], n=3)
    assert calls == [6]
