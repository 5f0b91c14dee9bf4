"""The TGI / LoRAX dialect over a scripted engine: what is asked of it, and the exact bytes of the answers."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from server.engine.types import ErrorKind, FinishReason, Request, SamplingParams, SequenceOutput
from tests.api.fake import EOS, Fake, outputs, tokenizer

GRIN = "\U0001f600"


def ids(text: str) -> list[int]:
    return tokenizer().encode(text)


def says(text: str, reason: FinishReason = FinishReason.LENGTH, **fields: Any) -> Fake:
    return Fake(lambda request: outputs(request, ids(text), reason, **fields))


def token(id_: int, text: str, logprob: float, *, special: bool = False) -> dict[str, Any]:
    return {"id": id_, "text": text, "logprob": logprob, "special": special, "skipped": False}


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
def test_a_stream_is_these_bytes(path: str) -> None:
    grin, (a,) = ids(GRIN), ids("a")
    assert len(grin) > 1, "the test needs a character of several tokens"
    fake = Fake(lambda request: outputs(request, [a, *grin, EOS], FinishReason.EOS))
    response = fake.post(path, stream=True if path == "/" else None, details=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-prompt-tokens"] == "2"
    assert response.headers["x-accel-buffering"] == "no"
    events = [f'{{"index": 1, "token": {{"id": {a}, "text": "a", "logprob": -0.5, "special": false, "skipped": false}}']
    for i, part in enumerate(grin, 2):
        text = GRIN if part == grin[-1] else ""
        events.append(
            f'{{"index": {i}, "token": {{"id": {part}, "text": "{text}", "logprob": {-i / 2}, "special": false, '
            f'"skipped": false}}'
        )
    count = len(grin) + 2
    events.append(
        f'{{"index": {count}, "token": {{"id": {EOS}, "text": "<|endoftext|>", "logprob": {-count / 2}, '
        f'"special": true, "skipped": false}}'
    )
    ends = ['"generated_text": null, "details": null}'] * (count - 1)
    ends.append(
        f'"generated_text": "a{GRIN}", "details": {{"finish_reason": "eos_token", "generated_tokens": {count}, '
        f'"prompt_tokens": 2, "input_length": 2, "skipped_tokens": 0, "seed": null}}}}'
    )
    expected = "".join(f"data: {event}, {end}\n\n" for event, end in zip(events, ends, strict=True))
    assert response.content == expected.encode(), "no [DONE], no half character, nothing else"


def test_what_clients_take_for_a_line_end_is_escaped() -> None:
    text = "a\u2028b\u2029c\x85d\r\n"
    response = says(text).post("/generate_stream")
    lines = response.text.splitlines()
    assert all(line.startswith("data: {") for line in lines if line), "str.splitlines, as httpx does"
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(event["token"]["text"] for event in events) == text
    assert events[-1]["generated_text"] == text


def test_top_tokens_come_with_each_event_and_in_the_details() -> None:
    half, (a,) = ids(GRIN)[0], ids("a")
    top = (((a, -0.5), (half, -1.0)), ((EOS, -0.1), (a, -3.0)))
    fake = Fake(lambda request: outputs(request, [a, EOS], FinishReason.EOS, top=top))
    shown = [
        [token(a, "a", -0.5), token(half, "\ufffd", -1.0)],
        [token(EOS, "<|endoftext|>", -0.1, special=True), token(a, "a", -3.0)],
    ]
    assert fake.post("/generate", top_n_tokens=2).json()["details"]["top_tokens"] == shown
    streamed = fake.post("/generate_stream", top_n_tokens=2).text.splitlines()[::2]
    events = [json.loads(line.removeprefix("data: ")) for line in streamed]
    assert [event["top_tokens"] for event in events] == shown
    assert list(events[0]) == ["index", "token", "top_tokens", "generated_text", "details"]
    assert events[-1]["details"] is None, "not asked for"
    assert {request.sampling_params.top_logprobs for request in fake.link.requests} == {2}
    assert fake.post("/generate", details=True, top_n_tokens=0).json()["details"]["top_tokens"] == []


def fails(request: Request, after: int) -> Iterable[SequenceOutput]:
    for id_ in ids("ab c")[:after]:
        yield SequenceOutput(request.request_id, (id_,), (-1.0,))
    yield SequenceOutput(
        request.request_id, (), (), FinishReason.ERROR, error="the weights melted", error_kind=ErrorKind.GENERATION
    )


def test_an_error_keeps_its_status_before_the_first_token_and_is_an_event_after_it() -> None:
    wanted = {"error": "the weights melted", "error_type": "generation"}
    for path, stream in (("/generate", None), ("/generate_stream", None), ("/", True), ("/", False)):
        response = Fake(lambda request: fails(request, 0)).post(path, stream=stream)
        assert response.status_code == 424
        assert response.json() == wanted
    for path, stream in (("/generate_stream", None), ("/", True)):
        response = Fake(lambda request: fails(request, 1)).post(path, stream=stream)
        assert response.status_code == 200
        *events, last = response.text.split("\n\n")[:-1]
        assert len(events) == 1
        assert last == f"data: {json.dumps(wanted)}"
    assert Fake(lambda request: fails(request, 1)).post("/generate").status_code == 424


def test_the_compatible_route_answers_a_list() -> None:
    single = says(" yes").post("/generate", details=True).json()
    assert says(" yes").post("/", details=True).json() == [single]
    assert says(" yes").post("/", stream=False).json() == [{"generated_text": " yes"}]
    assert says(" yes").post("/", return_full_text=True).json() == [{"generated_text": "Quote by yes"}]
    last = says(" yes").post("/", stream=True, return_full_text=True).text.split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["generated_text"] == "Quote by yes"
    response = says(" yes").http.post("/", json={"inputs": "a", "stream": None})
    assert response.json() == [{"generated_text": " yes"}]
    assert response.headers["x-generated-tokens"] == "1"


def test_best_of_answers_with_the_likeliest_per_token_and_tells_of_the_others() -> None:
    texts = {5: (" long and likely", [-0.5] * 3), 6: (" short", [-0.9]), 7: (" no good", [-1.0, -3.0])}

    def say(request: Request) -> Iterable[SequenceOutput]:
        text, logprobs = texts[request.sampling_params.seed]
        return outputs(request, ids(text), logprobs=logprobs, prompt_logprobs=(-1.5,))

    asked = {"best_of": 3, "do_sample": True, "seed": 5, "return_full_text": True}
    response = Fake(say).post("/generate", details=True, decoder_input_details=True, **asked)
    answer = response.json()
    assert answer["generated_text"] == "Quote by long and likely", "though its sum is the lower one"
    assert answer["details"]["seed"] == 5
    assert response.headers["x-generated-tokens"] == "3"
    others = answer["details"]["best_of_sequences"]
    assert [other["generated_text"] for other in others] == ["Quote by short", "Quote by no good"]
    assert [other["seed"] for other in others] == [6, 7]
    assert [other["generated_tokens"] for other in others] == [1, 2]
    assert [each["logprob"] for each in others[1]["tokens"]] == [-1.0, -3.0]
    assert all(other["prefill"] == answer["details"]["prefill"] for other in others)
    assert all(other["finish_reason"] == "length" for other in others)
    plain = Fake(say).post("/generate", **asked).json()
    assert plain == {"generated_text": answer["generated_text"]}, "ranked without being asked for details"


def test_equally_likely_ones_keep_the_order_of_their_seeds() -> None:
    fake = Fake(lambda request: outputs(request, ids(f" {request.sampling_params.seed}"), logprobs=[-1.0] * 9))
    details = fake.post("/generate", best_of=4, do_sample=True, seed=2, details=True).json()["details"]
    assert [details["seed"], *(other["seed"] for other in details["best_of_sequences"])] == [2, 3, 4, 5]


def test_the_prompts_tokens_are_told_when_asked_for() -> None:
    prompt = f"by {GRIN}"
    logprobs = tuple(-float(i) for i in range(1, len(ids(prompt))))
    fake = says(" yes", prompt_logprobs=logprobs)
    details = fake.post("/generate", prompt, decoder_input_details=True).json()["details"]
    assert [each["id"] for each in details["prefill"]] == ids(prompt)
    assert [each["logprob"] for each in details["prefill"]] == [None, *logprobs]
    assert details["prefill"][0]["text"] == "by"
    assert details["prefill"][-1]["text"] == "\ufffd", "half a character by itself"
    assert fake.link.requests[0].sampling_params.prompt_logprobs
    one = Fake(lambda request: outputs(request, ids(" yes"))).post("/generate", "a", decoder_input_details=True)
    assert [each["logprob"] for each in one.json()["details"]["prefill"]] == [None]
    assert says(" yes").post("/generate", details=True).json()["details"]["prefill"] == []


@pytest.mark.parametrize(
    ("parameters", "word"),
    [({"best_of": 2, "do_sample": True}, "`best_of` 2"), ({"decoder_input_details": True}, "decoder_input_details")],
)
def test_what_is_not_for_streams_is_refused_there(parameters: dict, word: str) -> None:
    for path, stream in (("/generate_stream", None), ("/", True)):
        response = says(" yes").post(path, stream=stream, **parameters)
        assert response.status_code == 422
        assert response.json()["error_type"] == "validation"
        assert word in response.json()["error"]
        assert "stream" in response.json()["error"]
    neutral = {"best_of": 1, "decoder_input_details": False}
    assert says(" yes").post("/generate_stream", **neutral).status_code == 200


def test_truncate_keeps_the_last_tokens_of_the_prompt() -> None:
    fake = says(" yes")
    text = "one two three " * 300
    answer = fake.post("/generate", text, truncate=7, details=True, return_full_text=True).json()
    assert fake.link.requests[0].prompt_token_ids == tuple(ids(text)[-7:])
    assert answer["details"]["prompt_tokens"] == answer["details"]["input_length"] == 7
    assert answer["generated_text"] == f"{text} yes", "the whole prompt, as it was sent"
    assert fake.post("/generate", "word " * 60_000, truncate=3).status_code == 200, "longer than any prompt may be"
    fake.post("/generate", "one two", truncate=50)
    assert fake.link.requests[-1].prompt_token_ids == tuple(ids("one two"))
    response = fake.post("/generate", text, truncate=256)
    assert response.status_code == 422
    assert "has 256 tokens" in response.json()["error"]


def test_every_parameter_reaches_the_engine() -> None:
    fake = says(" yes")
    fake.post(
        "/generate", do_sample=True, temperature=0.5, top_k=7, top_p=0.9, typical_p=0.8, repetition_penalty=1.2,
        frequency_penalty=-0.5, presence_penalty=1.5, seed=3, stop=["x", "\u00e9"], ignore_eos_token=True,
        max_new_tokens=9, top_n_tokens=4, decoder_input_details=True,
    )  # fmt: skip
    assert fake.link.requests[0].sampling_params == SamplingParams(
        max_tokens=9, temperature=0.5, top_k=7, top_p=0.9, typical_p=0.8, repetition_penalty=1.2,
        frequency_penalty=-0.5, presence_penalty=1.5, seed=3, stop=(b"x", b"\xc3\xa9"), ignore_eos=True,
        logprobs=True, top_logprobs=4, prompt_logprobs=True,
    )  # fmt: skip
    fake.post("/generate")
    assert fake.link.requests[1].sampling_params == SamplingParams(max_tokens=20)


# What the clients send when they are asked for no more than a text: text-generation 0.7.0, lorax-client 0.6.3,
# huggingface_hub 2.4.0 (which leaves nulls out).
TEXT_GENERATION = {
    "do_sample": False, "max_new_tokens": 20, "repetition_penalty": None, "frequency_penalty": None,
    "return_full_text": False, "stop": [], "seed": None, "temperature": None, "top_k": None, "top_p": None,
    "truncate": None, "typical_p": None, "best_of": None, "watermark": False, "details": True,
    "decoder_input_details": False, "top_n_tokens": None, "grammar": None,
}  # fmt: skip
LORAX = {
    "adapter_id": None, "adapter_source": None, "merged_adapters": None, "api_token": None, "do_sample": False,
    "max_new_tokens": None, "ignore_eos_token": False, "repetition_penalty": None, "return_full_text": False,
    "stop": [], "seed": None, "temperature": None, "top_k": None, "top_p": None, "truncate": None, "typical_p": None,
    "best_of": None, "watermark": False, "details": True, "decoder_input_details": False,
    "return_k_alternatives": None, "response_format": None,
}  # fmt: skip


@pytest.mark.parametrize("parameters", [TEXT_GENERATION, LORAX, {}], ids=["text-generation", "lorax", "hub"])
@pytest.mark.parametrize("stream", [True, False, None])
def test_what_the_clients_send_by_default_is_taken(parameters: dict, stream: bool | None) -> None:
    response = says(" yes").post("/", stream=stream, **parameters)
    assert response.status_code == 200, response.text
    if stream:
        answer = json.loads(response.text.split("\n\n")[-2].removeprefix("data: "))
        assert answer["token"]["logprob"] == -0.5
    else:
        (answer,) = response.json()
    assert answer["generated_text"] == " yes"
    assert bool(answer.get("details")) == bool(parameters)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"watermark": True}, ["watermark", "True"]),
        ({"grammar": {"type": "regex", "value": "a"}}, ["grammar", "regex"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
        ({"schema": "{}"}, ["schema"]),
        ({"return_k_alternatives": 2}, ["return_k_alternatives", "2", "top_n_tokens"]),
        ({"apply_chat_template": True}, ["apply_chat_template", "inputs"]),
        ({"adapter_source": "hub"}, ["adapter_source", "hub"]),
        ({"merged_adapters": {"ids": ["a"], "weights": [1.0]}}, ["merged_adapters", 'adapter_id` "one:0.7,other:0.3"']),
        ({"json_schema": None}, ["json_schema"]),
        ({"best_of": 17, "do_sample": True}, ["best_of", "16", "17"]),
        ({"best_of": 0}, ["best_of", "1"]),
        ({"best_of": 2}, ["best_of", "do_sample"]),
        ({"typical_p": 0.5}, ["typical_p", "0.5", "do_sample"]),
        ({"typical_p": 0.0, "do_sample": True}, ["typical_p"]),
        ({"top_n_tokens": 21}, ["top_n_tokens", "20", "21"]),
        ({"truncate": 0}, ["truncate", "1"]),
        ({"frequency_penalty": 2.1}, ["frequency_penalty", "2"]),
        ({"presence_penalty": -2.1}, ["presence_penalty", "-2"]),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(parameters: dict, words: list[str]) -> None:
    for path in ("/generate", "/generate_stream", "/"):
        response = says(" yes").post(path, **parameters)
        assert response.status_code == 422, response.text
        assert response.json()["error_type"] == "validation"
        assert all(word in response.json()["error"] for word in words), response.json()["error"]


def test_a_key_for_private_adapters_is_refused_without_being_repeated() -> None:
    error = says(" yes").post("/generate", api_token="hf_secret").json()["error"]
    assert "api_token" in error
    assert "hf_secret" not in error


def test_more_texts_than_the_server_runs_at_once_are_refused_not_put_off() -> None:
    fake = Fake(
        lambda request: outputs(request, [1]), "--max-batch-size", "2", "--max-waiting", "1", "--max-batch-tokens", "32"
    )
    assert fake.http.get("/info").json()["max_best_of"] == 3
    assert fake.post("/generate", best_of=3, do_sample=True).status_code == 200
    response = fake.post("/generate", best_of=4, do_sample=True)
    assert response.status_code == 422
    assert "best_of" in response.json()["error"]


def test_info_tells_what_is_true() -> None:
    fake = says(" yes")
    info = fake.http.get("/info").json()
    assert info["max_best_of"] == 16
    assert info["max_stop_sequences"] == 16
    assert info["max_total_tokens"] == 256
    assert info["max_input_tokens"] == info["max_input_length"] == 255
    assert (info["model_device_type"], info["model_dtype"], info["version"]) == ("cpu", "float32", "1.2.3")
    assert fake.post("/generate", best_of=info["max_best_of"], do_sample=True).status_code == 200
    assert fake.post("/generate", best_of=info["max_best_of"] + 1, do_sample=True).status_code == 422
    assert fake.post("/generate", stop=["x"] * info["max_stop_sequences"]).status_code == 200
    assert fake.post("/generate", "a" * 8, max_new_tokens=None).status_code == 200
    words = " a" * info["max_input_tokens"]
    assert len(ids(words)) == info["max_input_tokens"]
    assert fake.post("/generate", words, details=True).status_code == 200
    assert fake.post("/generate", words + " a").status_code == 422
