"""The id of each request in every answer, and its line in the log."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters.adapter import AdapterRef
from server.api.loop import EngineLoop
from server.api.request_log import RequestRecord, _current, _fields, current_record
from server.api.spec import ChorusSpec, Generation
from server.engine.types import ErrorKind, FinishReason, Request, SamplingParams, SequenceOutput
from server.logs import JsonFormatter
from server.metrics import Metrics
from tests.api.gated import Call, Gated

REFS = (AdapterRef("d" * 64, "wilde", ""), AdapterRef("e" * 64, "poe", ""))


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The request lines so far, as JSON tells them."""
    caplog.set_level(logging.INFO, "server.api.request_log")

    def read() -> list[dict[str, Any]]:
        formatter = JsonFormatter("server")
        records = [record for record in caplog.records if record.name == "server.api.request_log"]
        return [json.loads(formatter.format(record)) for record in records]

    return read


def test_every_answer_has_the_clients_id_if_it_is_usable_else_a_new_one() -> None:
    client = Gated("--api-key", "one", "--cors-origins", "https://a.example").client
    key, seen = {"x-api-key": "one"}, set[str]()
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    for method, path, headers, status in [
        ("POST", "/generate", key, 200), ("POST", "/generate", {}, 401), ("POST", "/nowhere", key, 404),
        ("DELETE", "/generate", key, 403), ("GET", "/generate", key, 405), ("POST", "/broken", key, 500),
        ("GET", "/health", {}, 200), ("OPTIONS", "/generate", preflight, 200),
    ]:  # fmt: skip
        answer = client.request(method, path, headers=headers | {"x-request-id": "mine-1"})
        assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, ["mine-1"]), (method, path)
        for sent in ({}, {"x-request-id": "a b"}, {"x-request-id": "x" * 129}, {"x-request-id": "é".encode()}):
            [given] = client.request(method, path, headers=headers | sent).headers.get_list("x-request-id")
            assert re.fullmatch("[0-9a-f]{32}", given)
            seen.add(given)
    assert len(seen) == 8 * 4


def test_a_stream_has_it_too_and_the_routes_and_errors_see_the_same_one(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        gated = Gated()
        gated.go_on.set()
        stream = await Call(gated.app, "/generate_stream").ended()
        assert re.fullmatch("[0-9a-f]{32}", stream.headers["x-request-id"])
        broken = await Call(gated.app, "/broken").ended()
        assert broken.headers["x-request-id"] in broken.sent.decode()
        assert f"request {broken.headers['x-request-id']} failed" in caplog.text

    asyncio.run(scenario())


def test_a_line_for_each_request_but_reads(lines: Any) -> None:
    gated = Gated("--api-key", "one", "--key-rate", "3/minute")
    key = {"x-api-key": "one", "x-request-id": "mine"}
    gated.client.post("/generate?secret=1", headers=key)
    gated.client.post("/generate")
    gated.client.post("/no where", headers=key)
    gated.client.post("/broken", headers=key)
    gated.client.post("/generate", headers=key)
    gated.client.put("/v1/adapters/x", headers=key)
    for path in ("/health", "/v1/models", "/nowhere"):
        gated.client.get(path, headers=key)
    told = [[line[name] for name in ("method", "path", "status", "key", "error_type")] for line in lines()]
    assert told == [
        ["POST", "/generate", 200, "api-1", None],
        ["POST", "/generate", 401, "", "unauthorized"],
        ["POST", "/no%20where", 404, "api-1", "not_found"],
        ["POST", "/broken", 500, "api-1", "internal"],
        ["POST", "/generate", 429, "api-1", "rate_limited"],
        ["PUT", "/v1/adapters/x", 403, "", "forbidden"],
    ]
    assert lines()[0]["request_id"] == "mine"
    assert lines()[0]["total_ms"] >= 0
    assert "prompts" not in lines()[0]
    assert not any(line["client_gone"] for line in lines())


def test_a_client_that_hangs_up_is_told_and_one_that_stays_is_not(lines: Any) -> None:
    async def scenario() -> None:
        gated = Gated()
        await (await Call(gated.app, "/generate_stream").begun()).hang_up()
        stream = await Call(gated.app, "/generate_stream").begun()
        gated.go_on.set()
        await stream.ended()
        await stream.hang_up()

    asyncio.run(scenario())
    assert [(line["status"], line["client_gone"]) for line in lines()] == [(200, True), (200, False)]


def test_the_record_sums_up_the_sequences_of_a_generation() -> None:
    def out(name: str, *ids: int, reason: FinishReason | None = None, **more: Any) -> SequenceOutput:
        return SequenceOutput(name, ids, (), reason, **more)

    record = RequestRecord("id", "POST", "/generate", status=200, key="web")
    record.begin(REFS, "demo", 7)
    assert record.model == "wilde,poe"
    record.add(out("a", 1))
    first = record.time_to_first_token
    assert first is not None
    assert first > 0, "the edge's own, until the engine tells"
    record.time_to_first_token = None
    for output in (
        out("a", 2, 3, reason=FinishReason.EOS, queue_time=0.2, time_to_first_token=0.5),
        out("b", 4, 5, reason=FinishReason.LENGTH, queue_time=0.1, time_to_first_token=0.6),
    ):
        record.add(output)
        record.end(output.finish_reason or FinishReason.ERROR)
    fields = _fields(record)
    assert fields.pop("total_ms") >= 0
    assert fields == {
        "request_id": "id", "method": "POST", "path": "/generate", "status": 200, "key": "web",
        "adapters": ["wilde", "poe"], "digests": ["d" * 64, "e" * 64], "prompt_tokens": 7, "generated_tokens": 5,
        "finish_reasons": ["eos", "length"], "queue_ms": 100.0, "ttft_ms": 500.0, "client_gone": False,
        "error_type": None, "trace_id": None,
    }  # fmt: skip
    record = RequestRecord()
    record.begin((), "demo", 7)
    record.add(out("a", reason=FinishReason.ERROR, error="no", error_kind=ErrorKind.WORKER_LOST))
    assert (record.model, record.queue_time, record.time_to_first_token) == ("demo", None, None)


def test_a_generation_that_is_closed_early_is_told_as_aborted_and_prompts_only_when_asked_for() -> None:
    class Link:
        async def generate(self, *requests: Request) -> AsyncGenerator[SequenceOutput]:
            for request in requests:
                yield SequenceOutput(request.request_id, (1,), ())
            yield SequenceOutput("a", (2,), (), FinishReason.STOP, queue_time=0.1, time_to_first_token=0.2)
            await asyncio.Event().wait()

    async def scenario(wants_prompts: bool) -> RequestRecord:
        spec, metrics = ChorusSpec(), Metrics("demo", 1)
        vocabulary, tokenizer = [b"H", b"\xc3", b"\xa9", b""], SimpleNamespace(special={3: "<|end|>"})
        served = {"metrics": metrics, "model_name": "demo", "vocabulary": vocabulary, "tokenizer": tokenizer}
        spec.served, spec.link = cast("Any", SimpleNamespace(**served)), cast("Any", Link())
        requests = tuple(Request(name, prompt, SamplingParams()) for name, prompt in (("a", (0, 1, 2)), ("b", (3, 0))))
        record = RequestRecord(wants_prompts=wants_prompts)
        token = _current.set(record)
        async with aclosing(spec.outputs(Generation(requests, 1, "id"))) as outputs:
            for _ in range(3):
                await anext(outputs)
        _current.reset(token)
        return record

    record = asyncio.run(scenario(wants_prompts=True))
    assert (record.prompt_tokens, record.generated_tokens) == (5, 3)
    assert record.finish_reasons == ["stop", "abort"]
    assert record.prompts == ("Hé", "<|end|>H")
    assert asyncio.run(scenario(wants_prompts=False)).prompts == ()


def test_requests_do_not_share_a_record_and_outside_one_nothing_is_kept() -> None:
    seen: list[tuple[str, RequestRecord]] = []
    gated = Gated()

    @gated.app.post("/look")
    async def look() -> None:
        await asyncio.sleep(0)
        seen.append((current_record().request_id, current_record()))

    async def scenario() -> None:
        names = [f"r{i}" for i in range(20)]
        calls = [Call(gated.app, "/look", {"x-request-id": name}) for name in names]
        await asyncio.gather(*(call.ended() for call in calls))
        assert sorted(name for name, _ in seen) == sorted(names)
        assert len({id(record) for _, record in seen}) == 20

    asyncio.run(scenario())
    assert current_record() is not current_record()


def test_a_line_in_json_is_one_line_with_the_traceback_inside(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("two\nlines \ud800")
    except ValueError:
        logging.getLogger("x").exception("it %s\nso", "failed")
    line = JsonFormatter("worker").format(caplog.records[-1])
    assert "\n" not in line
    read = json.loads(line)
    assert (read["level"], read["logger"], read["process"], read["message"]) == (
        "error",
        "x",
        "worker",
        "it failed\nso",
    )
    assert "ValueError: two\nlines" in read["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", read["time"])
    assert "request_id" not in read


def test_what_makes_the_worker_fail_is_logged_before_it_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(EngineLoop, "_serve", fail)
    with pytest.raises(SystemExit, match="1"):
        EngineLoop()(None, "cpu", 0, None, None, None, None)
    assert caplog.records[-1].levelno == logging.CRITICAL
    assert "RuntimeError: CUDA error" in JsonFormatter("worker").format(caplog.records[-1])
