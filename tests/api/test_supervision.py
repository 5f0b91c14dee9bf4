"""Hang-ups, full queues, crashes and shutdown of a real server."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.api.conftest import ServerProcess

LONG = {"max_new_tokens": 250, "ignore_eos_token": True}


def generate(server: ServerProcess, **parameters: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/generate", json={"inputs": "a", "parameters": parameters}, timeout=90)


def running(server: ServerProcess) -> float:
    return server.metric("vllm:num_requests_running")


def flood(server: ServerProcess, count: int, **parameters: Any) -> tuple[ThreadPoolExecutor, list]:
    """`count` requests in threads, all of them running or waiting when this returns."""
    pool = ThreadPoolExecutor(count)
    futures = [pool.submit(generate, server, **parameters) for _ in range(count)]
    server.wait_until(lambda: running(server) + server.metric("vllm:num_requests_waiting") == count, 20)
    return pool, futures


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_hangs_up_frees_its_row(server: ServerProcess, path: str) -> None:
    aborted = server.metric("chorus_requests_finished_total", finish_reason="abort")
    body = {"inputs": "a", "parameters": LONG}
    client = httpx.Client()
    try:
        if path == "/generate":
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{server.url}{path}", json=body, timeout=httpx.Timeout(5, read=0.3))
        else:
            with client.stream("POST", f"{server.url}{path}", json=body) as response:
                next(response.iter_lines())
    finally:
        client.close()
    server.wait_until(lambda: running(server) == 0, 2)
    assert server.metric("chorus_requests_finished_total", finish_reason="abort") == aborted + 1


def test_a_full_queue_answers_429_at_once(start, adapters_dir) -> None:
    server = start("--adapters-dir", str(adapters_dir), "--max-batch-size", "2", "--max-waiting", "1").wait_ready()
    pool, futures = flood(server, 3, **LONG)
    with pool:
        refused = generate(server, max_new_tokens=1)
        assert refused.status_code == 429
        assert refused.json()["error_type"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert [future.result().status_code for future in futures] == [200] * 3, "those admitted are served"
    assert generate(server, max_new_tokens=1).status_code == 200
    assert server.metric("chorus_requests_rejected_total", error_type="overloaded") == 1


def test_sigterm_finishes_what_is_in_flight_and_exits_0(start) -> None:
    server = start().wait_ready()
    pool, futures = flood(server, 4, **LONG, details=True)
    with pool:
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        answers = [future.result() for future in futures]
    assert [answer.json()["details"]["generated_tokens"] for answer in answers] == [250] * 4
    assert server.process.wait(20) == 0, server.text()
    assert time.monotonic() - began < 60


def test_a_signal_to_every_process_drains_too(start) -> None:
    """As a terminal's Ctrl-C or systemd's stop reach the whole group."""
    server = start().wait_ready()
    pool, futures = flood(server, 2, **LONG, details=True)
    with pool:
        for pid in [server.process.pid, *server.worker_pids()]:
            os.kill(pid, signal.SIGTERM)
        assert [f.result().json()["details"]["generated_tokens"] for f in futures] == [250] * 2
    assert server.process.wait(20) == 0, server.text()


def test_a_killed_worker_fails_what_is_in_flight_and_comes_back(start, adapters_dir) -> None:
    server = start("--adapters-dir", str(adapters_dir)).wait_ready()
    for round_ in range(2):
        pool, futures = flood(server, 4, **LONG, adapter_id="alpha")
        with pool:
            streamed: list[str] = []

            def stream(into: list[str] = streamed) -> None:
                body = {"inputs": "a", "parameters": LONG}
                with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as response:
                    into.extend(line for line in response.iter_lines() if line)

            thread = threading.Thread(target=stream)
            thread.start()
            server.wait_until(lambda: running(server) == 5, 20)
            began = time.monotonic()
            os.kill(server.worker_pids()[-1], signal.SIGKILL)
            answers = [future.result() for future in futures]
            thread.join(10)
        assert time.monotonic() - began < 2, "they fail at once, not when a timeout runs out"
        assert [answer.status_code for answer in answers] == [503] * 4
        assert answers[0].json()["error_type"] == "unavailable"
        assert "retry-after" in answers[0].headers
        assert json.loads(streamed[-1].removeprefix("data: "))["error_type"] == "unavailable"
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.get(f"{server.url}/ready").json()["ready"] is False
        assert generate(server, max_new_tokens=1).status_code == 503
        server.wait_ready()
        assert generate(server, max_new_tokens=5, adapter_id="alpha").status_code == 200
        assert server.metric("chorus_worker_restarts_total") == round_ + 1


def test_a_hung_worker_is_killed_and_comes_back(start) -> None:
    server = start("--hang-seconds", "2").wait_ready()
    os.kill(server.worker_pids()[-1], signal.SIGSTOP)
    assert generate(server, max_new_tokens=1).status_code == 503
    server.wait_ready()
    assert generate(server, max_new_tokens=1).status_code == 200
    assert len(server.worker_pids()) == 2


def test_a_worker_that_keeps_crashing_ends_the_process(start) -> None:
    """Whether it came up before it died or not."""
    server = start().wait_ready()
    killed: set[int] = set(_descendants(server.process.pid))
    os.kill(server.worker_pids()[-1], signal.SIGKILL)
    deadline = time.monotonic() + 120
    while server.process.poll() is None and time.monotonic() < deadline:
        for pid in set(_descendants(server.process.pid)) - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.1)
    assert server.process.returncode == 1, server.text()
    assert "giving up" in server.text()


def test_no_process_outlives_main(start) -> None:
    server = start().wait_ready()
    children = _descendants(server.process.pid)
    assert len(children) >= 3, "manager, worker and API process"
    server.process.kill()
    server.process.wait()
    deadline = time.monotonic() + 10
    while (left := [pid for pid in children if _alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model", "/no/such/dir"], ["/no/such/dir"]),
        (["--model", "tests"], ["config.json"]),
        (["--adapters-dir", "/no/such/dir"], ["/no/such/dir"]),
        (["--max-model-len", "5000"], ["5000", "256"]),
        (["--port", "80"], ["--port", "1024", "80"]),
        (["--device", "tpu"], ["--device", "tpu"]),
        (["--api-key", " "], ["--api-key", "blank"]),
        (["--adapter-memory", "3"], ["--adapter-memory", "3", "1048576"]),
    ],
)
def test_a_server_that_cannot_start_says_why(start, flags: list[str], told: list[str]) -> None:
    server = start(*flags)
    assert server.process.wait(60) == (1 if flags[0] in ("--model", "--adapters-dir") else 2)
    assert all(word in server.text() for word in told), server.text()
    assert "Traceback" not in server.text()


def test_keys(start) -> None:
    server = start("--api-key", "s3cret", env={"CHORUS_MODLE": "x"}).wait_ready()
    body = {"inputs": "a", "parameters": {"max_new_tokens": 1}}

    def status(path: str = "/generate", **headers: str) -> int:
        return httpx.post(f"{server.url}{path}", json=body, headers=headers).status_code

    assert status() == status(authorization="Bearer wrong") == status(**{"x-api-key": "s3cre"}) == 401
    assert status(authorization="Bearer s3cret") == status(**{"x-api-key": "s3cret"}) == 200
    assert httpx.get(f"{server.url}/v1/models").json()["error"]["type"] == "unauthorized"
    for path in ("/docs", "/openapi.json", "/nowhere", "/info", "/health/"):
        assert httpx.get(f"{server.url}{path}").status_code == 401, path
    unread = httpx.post(f"{server.url}/generate", content=b"{", headers={"content-type": "application/json"})
    assert unread.status_code == 401
    assert unread.json()["error_type"] == "unauthorized"
    assert httpx.get(f"{server.url}/openapi.json", headers={"x-api-key": "s3cret"}).status_code == 200
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(f"{server.url}{path}").status_code == 200, path
    assert "did you mean CHORUS_MODEL?" in server.text()
    assert "s3cret" not in server.text()


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:
                    parents[int(entry)] = int(file.read().rsplit(")", 1)[1].split()[1])
            except FileNotFoundError:
                continue
    found = {pid}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return sorted(found - {pid})
