"""Two API processes before one worker: what clients see is one server."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import ServerProcess

LONG = {"max_new_tokens": 250, "ignore_eos_token": True}
ADMIN = {"authorization": "Bearer admin"}
Clients = list[httpx.Client]


def api_pids(server: ServerProcess) -> list[int]:
    """By their number."""
    found = dict(re.findall(r"API process (\d) of 2 is (\d+)", server.text()))
    return [int(found[number]) for number in ("0", "1")]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def clients(server: ServerProcess) -> Iterator[Clients]:
    """A client of each API process: it connected while the other one slept, and keeps its connection."""
    server.wait_until(lambda: len(set(re.findall(r"API process (\d) of 2", server.text()))) == 2)
    pids = api_pids(server)
    with contextlib.ExitStack() as stack:
        made = []
        for other in reversed(pids):
            limits = httpx.Limits(max_connections=1)
            client = stack.enter_context(httpx.Client(base_url=server.url, timeout=300, limits=limits))
            with stopped(other):
                assert client.get("/health").status_code in (200, 503)
            made.append(client)
        for client in made:
            server.wait_until(lambda client=client: client.get("/ready").status_code == 200)
        yield made


@pytest.fixture(scope="module")
def pair(adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = ("--adapters-dir", str(adapters_dir), "--admin-key", "admin", "--api-workers", "2")
    flags += ("--max-batch-size", "2", "--max-waiting", "2")
    process = ServerProcess(tmp_path_factory.mktemp("pair") / "log", *flags).wait_ready()
    yield process
    assert process.stop() == 0, process.text()


def generate(client: httpx.Client, **parameters: Any) -> httpx.Response:
    return client.post("/generate", json={"inputs": "a", "parameters": parameters})


def samples(client: httpx.Client) -> dict[str, float]:
    """Every sample but the times of creation, which text can't tell apart from others that are equal."""
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def total(of: dict[str, float], name: str, *labels: str) -> float:
    return sum(v for key, v in of.items() if key.startswith(f"{name}{{") and all(label in key for label in labels))


@contextlib.contextmanager
def streaming(client: httpx.Client, **parameters: Any) -> Iterator[Iterator[str]]:
    """A stream that has begun; its events, as they come."""
    body = {"inputs": "a", "parameters": LONG | parameters}
    with client.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        yield lines


def test_each_process_answers_and_both_tell_the_same_totals(pair: ServerProcess) -> None:
    with clients(pair) as (first, second):
        assert api_pids(pair)[0] != api_pids(pair)[1]
        before = samples(first)
        for client, count in ((first, 3), (second, 2)):
            for _ in range(count):
                answer = generate(client, max_new_tokens=4, ignore_eos_token=True, adapter_id="alpha")
                assert answer.status_code == 200
        one, other = samples(first), samples(second)
        assert one == other
        assert not any("pid" in name for name in one)

        def grown(name: str, *labels: str) -> float:
            return total(one, name, *labels) - total(before, name, *labels)

        assert grown("chorus_requests_finished_total", 'finish_reason="length"') == 5
        assert grown("vllm:request_success_total") == 5
        assert grown("vllm:e2e_request_latency_seconds_count") == 5
        assert grown("vllm:generation_tokens_total") == 20, "steps are counted once"
        assert grown("chorus_adapter_generation_tokens_total", 'adapter="alpha"') == 20
        assert total(one, "chorus_worker_up") == 1
        assert total(one, "chorus_worker_restarts_total") == 0
        assert total(one, "chorus_adapter_info", 'adapter="alpha"') == 1


def test_both_give_the_same_tokens(pair: ServerProcess) -> None:
    with clients(pair) as made:
        first, second = (generate(client, max_new_tokens=20, adapter_id="beta").json() for client in made)
        assert first == second


def test_the_limit_holds_over_both(pair: ServerProcess) -> None:
    with clients(pair) as (first, second), contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(3))
        stack.enter_context(streaming(first))
        others = [pool.submit(httpx.post, f"{pair.url}/generate", json={"inputs": "a", "parameters": LONG}, timeout=300)
                  for _ in range(3)]  # fmt: skip
        pair.wait_until(lambda: total(samples(second), "vllm:num_requests_waiting") == 2, 20)
        refused = generate(second, max_new_tokens=1)
        assert refused.status_code == 429
        assert "4 requests are in flight" in refused.json()["error"]
        assert [each.result().status_code for each in others] == [200] * 3
    with clients(pair) as (first, second):
        pair.wait_until(lambda: total(samples(first), "vllm:num_requests_running") == 0, 20)
        assert generate(second, max_new_tokens=1).status_code == 200, "what a stream that was left held is free again"


def test_names_and_requests_of_one_are_known_to_the_other(pair: ServerProcess) -> None:
    with clients(pair) as (first, second):
        alias = first.put("/v1/aliases/voice", json={"targets": [{"ref": "alpha"}]}, headers=ADMIN)
        assert alias.status_code == 200
        answer = generate(second, max_new_tokens=1, adapter_id="voice")
        assert answer.headers["x-adapter-id"] == "alpha"
        with streaming(first, adapter_id="beta"):
            assert second.get("/v1/adapters/beta").json()["in_flight"] == 1
            listed = second.get("/v1/adapters").json()["data"]
            assert {record["name"]: record.get("in_flight") for record in listed}["beta"] == 1
            refused = second.delete("/v1/adapters/beta", params={"when_busy": "refuse"}, headers=ADMIN)
            assert refused.status_code == 409
            assert "1 requests in flight use 'beta'" in refused.json()["error"]["message"]
            still = second.delete("/v1/adapters/beta", params={"timeout": 0.1}, headers=ADMIN)
            assert (still.status_code, still.json()["in_flight"]) == (202, 1)
        with contextlib.closing(httpx.Client(base_url=pair.url, timeout=300)) as either:
            assert generate(either, max_new_tokens=1, adapter_id="beta").status_code == 404
        assert second.get("/v1/adapters/alpha").json()["state"] == "ready"
        assert first.get("/v1/adapters/alpha").json()["state"] == "ready"


def test_a_client_that_hangs_up_aborts_only_its_own(pair: ServerProcess) -> None:
    with clients(pair) as (first, second):
        aborted = total(samples(second), "chorus_requests_finished_total", 'finish_reason="abort"')
        with streaming(second) as kept:
            with streaming(first):
                pass
            events = list(kept)
        assert len(events) == 249
        text = samples(second)
        assert total(text, "chorus_requests_finished_total", 'finish_reason="abort"') == aborted + 1


def test_a_killed_worker_fails_both_and_both_come_back(start, adapters_dir: Path) -> None:
    server = start("--adapters-dir", str(adapters_dir), "--api-workers", "2").wait_ready()
    with clients(server) as (first, second), streaming(first) as one, streaming(second, adapter_id="alpha") as other:
        os.kill(server.worker_pids()[-1], signal.SIGKILL)
        for events in (one, other):
            assert '"error_type": "unavailable"' in list(events)[-1]
    with clients(server) as made:
        for client in made:
            assert generate(client, max_new_tokens=2, adapter_id="alpha").status_code == 200
            assert total(samples(client), "chorus_worker_restarts_total") == 1
            assert client.get("/v1/adapters/alpha").json()["state"] == "ready"


def test_sigterm_lets_both_finish(start) -> None:
    server = start("--api-workers", "2").wait_ready()
    with clients(server) as made, streaming(made[0]) as one, streaming(made[1]) as other:
        server.process.send_signal(signal.SIGTERM)
        for events in (one, other):
            assert '"generated_text": null' not in (whole := list(events))[-1]
            assert len(whole) == 249
    assert server.process.wait(20) == 0, server.text()


def test_a_process_that_dies_ends_all(start) -> None:
    server = start("--api-workers", "2").wait_ready()
    server.wait_until(lambda: server.text().count("of 2 is") == 2)
    os.kill(api_pids(server)[1], signal.SIGKILL)
    assert server.process.wait(30) == 1
    assert "an API process ended by itself" in server.text()
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in (api_pids(server)[0], server.worker_pids()[-1])):
        assert time.monotonic() < deadline, "a process stayed behind"
        time.sleep(0.05)
