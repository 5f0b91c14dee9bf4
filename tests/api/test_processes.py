"""What API processes share, and how they ask each other."""

import asyncio
import json
import multiprocessing
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from adapters.adapter import AdapterRef
from server import metric_totals
from server.api import processes
from server.api.errors import ApiError
from server.api.in_flight import InFlight
from server.api.processes import OneAtATime, Peers, Places
from server.engine.types import SequenceOutput, StepStats
from server.metrics import Metrics


def forked(work: Any) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process  # type: ignore[return-value]


def test_places_are_counted_over_a_fork() -> None:
    places = Places(3)
    assert places.take(2)
    child = forked(lambda: places.take(1))
    child.join(10)
    assert places.taken == 3
    assert not places.take(1)
    places.give_back(3)
    assert places.taken == 0


def test_one_at_a_time_over_a_fork() -> None:
    async def life() -> None:
        lock, entered, go_on = OneAtATime(), multiprocessing.Event(), multiprocessing.Event()

        async def hold() -> None:
            async with lock.held():
                entered.set()
                go_on.wait(10)

        child = forked(lambda: asyncio.run(hold()))
        assert entered.wait(10)
        waiting = asyncio.ensure_future(lock.held().__aenter__())
        await asyncio.sleep(3 * processes.POLL_SECONDS)
        assert not waiting.done()
        go_on.set()
        await asyncio.wait_for(waiting, 10)
        child.join(10)

    asyncio.run(life())


def test_peers_tell_what_they_are_asked() -> None:
    async def other(peers: Peers) -> None:
        async with peers.answering(1, {"number": lambda: {"poe": 7}}):
            await asyncio.sleep(30)

    async def life() -> None:
        peers = Peers(2)
        address = peers._addresses[1]
        child = forked(lambda: asyncio.run(other(peers)))
        async with peers.answering(0, {"number": lambda: {"poe": 1, "twain": 2}}):
            assert await peers.ask("number") == [{"poe": 1, "twain": 2}, {"poe": 7}]
            in_flight = InFlight()
            in_flight.share(lambda: peers.ask("number"))
            assert await in_flight.counts() == Counter(poe=8, twain=2)
            assert await in_flight.idle("nobody", 0.0) == 0
            assert await in_flight.idle("twain", 0.0) == 2
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(address)
                stranger.sendall(b"what else\n")
                assert stranger.recv(1) == b"", "what it does not know it does not answer"
            child.kill()
            child.join(10)
            with pytest.raises(ApiError, match="another API process did not answer") as raised:
                await peers.ask("number")
            assert raised.value.status == 503

    asyncio.run(life())


def test_a_single_process_has_nobody_to_ask() -> None:
    async def life() -> None:
        peers = Peers(1)
        assert peers.alone
        async with peers.answering(0, {"number": lambda: 5}):
            assert await peers.ask("number") == [5]

    asyncio.run(life())


def test_waiting_for_an_adapter_waits_for_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.in_flight.POLL_SECONDS", 0.001)

    async def life() -> None:
        in_flight, elsewhere, asked = InFlight(), Counter(poe=1), 0

        async def ask() -> list[Mapping[str, int]]:
            nonlocal asked
            asked += 1
            if asked == 3:
                elsewhere.clear()
            return [in_flight.own, elsewhere]

        in_flight.share(ask)
        with in_flight.hold(["poe"]):
            waiting = asyncio.ensure_future(in_flight.idle("poe", 30))
            await asyncio.sleep(0.01)
            assert not waiting.done()
            assert asked == 0, "its own come first"
        assert await waiting == 0
        assert asked == 3

    asyncio.run(life())


def observed(adapter: str, digest: str, count: int) -> Metrics:
    made = Metrics("gpt2", 8)
    last = SequenceOutput("a", (), (), None)
    for _ in range(count):
        made.observe_request([AdapterRef(digest, adapter, "")], 3, 5, "eos", 0.2, last)
    return made


def total_of(*each: Metrics) -> list[str]:
    snapshots = [json.loads(json.dumps(metric_totals.snapshot(metrics))) for metrics in each]
    texts = [metric_totals.render(metrics, snapshots).decode() for metrics in each]
    assert texts == texts[:1] * len(each), "whoever is asked"
    return texts[0].splitlines()


def test_counters_and_histograms_are_added_and_gauges_are_the_observers() -> None:
    first, second = observed("poe", "d1", 2), observed("twain", "d2", 3)
    first.worker_started()
    first.observe_step(StepStats(num_running=4, running_adapters=("poe",), batch_size=4, num_generated_tokens=4))
    second.rejected.labels("gpt2", "overloaded").inc()
    lines = total_of(first, second)
    for line in (
        'chorus_requests_finished_total{finish_reason="eos",model_name="gpt2"} 5.0',
        'chorus_adapter_requests_total{adapter="poe",model_name="gpt2"} 2.0',
        'chorus_adapter_requests_total{adapter="twain",model_name="gpt2"} 3.0',
        'chorus_requests_rejected_total{error_type="overloaded",model_name="gpt2"} 1.0',
        'vllm:e2e_request_latency_seconds_count{model_name="gpt2"} 5.0',
        'vllm:e2e_request_latency_seconds_bucket{le="0.25",model_name="gpt2"} 5.0',
        'vllm:e2e_request_latency_seconds_bucket{le="0.1",model_name="gpt2"} 0.0',
        'vllm:num_requests_running{model_name="gpt2"} 4.0',
        'vllm:generation_tokens_total{model_name="gpt2"} 4.0',
        'chorus_worker_up{model_name="gpt2"} 1.0',
    ):
        assert line in lines
    assert len([line for line in lines if line.startswith("vllm:lora_requests_info{")]) == 1


def test_one_process_reads_as_it_did() -> None:
    made = observed("poe", "d1", 2)
    made.observe_step(StepStats(num_running=1, running_adapters=("poe",)))
    assert total_of(made) == made.render().decode().splitlines()


def test_the_version_that_answered_last_anywhere_is_told() -> None:
    old, new = observed("poe", "d1", 1), observed("poe", "d2", 1)
    old.answered["poe"], new.answered["poe"] = ("d1", 10.0), ("d2", 11.0)
    for each in ((old, new), (new, old)):
        lines = [line for line in total_of(*each) if line.startswith("chorus_adapter_info{")]
        assert lines == ['chorus_adapter_info{adapter="poe",digest="d2",model_name="gpt2"} 1.0']
