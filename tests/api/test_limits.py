"""How much one caller may ask for, counted over processes."""

import asyncio
import multiprocessing
from typing import Any

import pytest

from server import __main__ as cli
from server.api import limits as limits_module
from server.api.errors import ApiError
from server.api.gate import KeyGate
from server.api.keys import Keys
from server.api.limits import PROBES, SLOTS, CallerLimits
from server.settings import read_settings
from tests.api.gated import Call, Gated


class Clock:
    now = 1_000_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits_module, "time", clock)
    return clock


def asked(limits: CallerLimits, caller: int) -> int:
    """0 if it may, which ends it at once, else the seconds of Retry-After."""
    try:
        limits.take(caller)
    except ApiError as error:
        return int(error.headers["Retry-After"])
    limits.give_back(caller)
    return 0


@pytest.mark.parametrize("rate", ["1/second", "5/second", "7/minute", "600/minute", "999999/minute"])
def test_a_burst_of_the_rate_and_then_evenly(clock: Clock, rate: str) -> None:
    count, period = int(rate.split("/")[0]), 60.0 if rate.endswith("minute") else 1.0
    limits, burst = CallerLimits(None, rate), min(count, 1000)
    for _ in range(3):
        if burst == count:
            assert [asked(limits, 7) for _ in range(count)] == [0] * count
            assert asked(limits, 7) == max(1, -(-int(period) // count)), "until one more is due"
            assert asked(limits, 8) == 0, "another caller"
            clock.now += period / count * 0.99
            assert asked(limits, 7) == 1
            clock.now += period / count * 0.02
            assert asked(limits, 7) == 0
            assert asked(limits, 7) > 0, "what was refused has not counted, but the one before has"
        clock.now += 2 * period


def test_concurrency_counts_what_is_under_way(clock: Clock) -> None:
    limits = CallerLimits(2, "3/minute")
    limits.take(1)
    limits.take(1)
    assert asked(limits, 1) == 1
    assert asked(limits, 2) == 0
    limits.give_back(1)
    limits.take(1)
    limits.give_back(1)
    limits.give_back(1)
    assert asked(limits, 1) == 20, "the one refused for concurrency did not count towards the rate"


def test_callers_whose_slots_collide_are_told_apart_and_idle_slots_are_used_again(clock: Clock) -> None:
    limits = CallerLimits(1, "1/minute")
    callers = [5 + SLOTS * i for i in range(1, PROBES + 1)]
    for caller in callers:
        limits.take(caller)
    assert [asked(limits, caller) for caller in callers] == [1] * PROBES
    late = 5 + SLOTS * (PROBES + 1)
    assert asked(limits, late) == 1, "no place to count it"
    limits.give_back(callers[3])
    assert asked(limits, late) == 1, "not idle before its rate is forgotten"
    clock.now += 60.5
    limits.take(late)
    with pytest.raises(ApiError, match="too many callers"):
        limits.take(callers[3])
    for caller in [*callers[:3], *callers[4:], late]:
        limits.give_back(caller)
    assert asked(limits, callers[3]) == 0


def test_processes_forked_later_count_together() -> None:
    limits, fork = CallerLimits(3, "5/minute"), multiprocessing.get_context("fork")

    def work(counts: Any) -> None:
        for _ in range(200):
            limits.take(99)
            limits.give_back(99)
        limits.take(1)
        counts.put(asked(limits, 2))

    limits._interval = 0.0  # concurrency alone, for the loops
    counts = fork.SimpleQueue()
    processes = [fork.Process(target=work, args=(counts,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [counts.get() for _ in processes] == [0, 0, 0]
    assert asked(limits, 1) == 1, "three of other processes are under way"
    assert asked(limits, 99) == 0, "and none of these is left"


def test_a_rate_is_written_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("5", "0/second", "5/hour", "5 / second", "a/minute", "1.5/second"):
        assert cli.main(["--key-rate", wrong]) == 2
        assert capsys.readouterr().err.startswith("--key-rate: is no rate; write N/second or N/minute")


def test_a_place_is_held_until_the_stream_has_ended_or_the_client_is_gone() -> None:
    async def scenario() -> None:
        gated = Gated("--key-concurrency", "1", "--api-key", "one,two")
        one, two = {"x-api-key": "one"}, {"x-api-key": "two"}
        stream = await Call(gated.app, "/generate_stream", one).begun()
        refused = await Call(gated.app, "/v1/completions", one).ended()
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert b'"type":"rate_limited"' in refused.sent, "in the dialect's shape"
        assert b'"error_type":"rate_limited"' in (await Call(gated.app, "/generate", one).ended()).sent
        assert gated.limited == 2
        assert (await Call(gated.app, "/generate", two).ended()).status == 200, "another key"
        await stream.hang_up()
        stream = await Call(gated.app, "/generate_stream", one).begun()
        assert (await Call(gated.app, "/generate", one).ended()).status == 429
        gated.go_on.set()
        await stream.ended()
        assert stream.sent == b"data: 1\n\ndata: 2\n\n"
        assert (await Call(gated.app, "/generate", one).ended()).status == 200
        for path in ("/broken", "/nowhere", "/generate"):
            await Call(gated.app, path, one).ended()
        assert (await Call(gated.app, "/generate", one).ended()).status == 200, "whatever way they ended"

    asyncio.run(scenario())


def test_a_client_that_has_all_of_an_answer_may_send_the_next_request() -> None:
    limits, sent = CallerLimits(1, None), list[str]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more_body in (True, False):
            await send({"type": "http.response.body", "body": b"a", "more_body": more_body})

    async def send(message: Any) -> None:
        try:
            await KeyGate(app, Keys(read_settings([])), limits, lambda: None)(scope, receive, ended)
        except AssertionError:
            sent.append("refused")
        else:
            sent.append("served")

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def ended(message: Any) -> None:
        assert message.get("status") != 429

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "client": ("10.0.0.1", 1)}
    asyncio.run(KeyGate(app, Keys(read_settings([])), limits, lambda: None)(scope, receive, send))
    assert sent == ["refused", "refused", "served"], "at its head, in its middle, with its last bytes"


def test_without_keys_callers_are_their_addresses() -> None:
    async def scenario() -> None:
        gated = Gated("--key-rate", "1/minute")
        for key in ({}, {"x-api-key": "stray"}):
            headers = {"x-forwarded-for": "10.9.9.9", **key}
            statuses = [
                (await Call(gated.app, "/generate", headers, address).ended()).status
                for address in (f"10.0.0.{len(key)}", f"10.0.0.{len(key)}", f"10.0.1.{len(key)}")
            ]
            assert statuses == [200, 429, 200], "a stray key makes no new caller"

    asyncio.run(scenario())


def test_what_does_not_generate_is_not_limited() -> None:
    client = Gated("--key-rate", "1/minute", "--admin-key", "root").client
    assert [client.post("/generate").status_code for _ in range(2)] == [200, 429]
    assert [client.get(path).status_code for path in ("/health", "/v1/models") for _ in range(3)] == [200] * 6
    put = [client.put("/v1/adapters/x", headers={"x-api-key": "root"}).status_code for _ in range(3)]
    assert put == [200] * 3
