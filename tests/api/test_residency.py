"""What the edge knows of adapters on the device, and how it takes one away."""

import asyncio
import subprocess
import time
from typing import Any

import pytest

from adapters import failures
from adapters.errors import AdapterRefused
from server.api.exchange import Exchange
from server.api.link import EngineLink
from server.api.messages import EngineInfo, Forget, Frame, Ping
from server.api.processes import Places
from server.engine.types import AdapterChange, StepStats
from server.metrics import Metrics
from tests.engine.toy import Toy


def info(pid: int = 0) -> EngineInfo:
    return EngineInfo("epoch", pid, "cpu", "float32", 0, "torch")


def frame(*changes: AdapterChange, pong: EngineInfo | None = None, **stats: int) -> Frame:
    return Frame("epoch", pong, (), (StepStats(**stats),), changes)


def test_the_link_keeps_where_adapters_stand_until_the_worker_dies() -> None:
    async def life() -> None:
        sent: list[Any] = []
        metrics = Metrics("gpt2", 8)
        link = EngineLink(sent.append, metrics, Places(8), 60.0)
        link.forget("a")
        assert sent == [], "no worker has it"
        worker = subprocess.Popen(["sleep", "60"])
        try:
            link.on_frame(frame(("a", "loading", None), ("b", "refused", "rank 0"), pong=info(worker.pid)))
            assert link.residency == {"a": ("loading", None), "b": ("refused", "rank 0")}
            figures = {"adapter_cache_hits": 3, "adapter_cache_misses": 2, "host_cache_bytes": 64}
            link.on_frame(frame(("a", "ready", None), ("b", "absent", None), **figures))
            assert link.residency == {"a": ("ready", None)}
            text = metrics.render().decode()
            for line in ("hits_total", "misses_total"):
                assert f'chorus_adapter_cache_{line}{{model_name="gpt2"}} {3.0 if line[0] == "h" else 2.0}' in text
            assert 'chorus_adapter_host_cache_bytes{model_name="gpt2"} 64.0' in text
            link.forget("a")
            assert sent == [Forget("epoch", "a")]
        finally:
            worker.kill()
            worker.wait()
        deadline = time.monotonic() + 10
        while link.up:
            assert time.monotonic() < deadline, "its death went unnoticed"
            await asyncio.sleep(0.01)
        assert link.residency == {}

    asyncio.run(life())


def test_the_worker_forgets_what_it_is_told_to() -> None:
    toy = Toy()
    toy.preload("a", "b")
    exchange = Exchange(toy.engine, info(), 1)
    for message in (Ping(), Forget("an earlier worker", "b"), Forget("epoch", "a")):
        exchange.inbox.put((0, message))
    ((process, told),) = exchange.turn()
    assert process == 0
    assert {digest: status for digest, status, _ in told.changes} == {"a": "absent", "b": "ready"}
    toy.engine.close()


def test_the_last_changes_reach_the_edge_though_nothing_runs() -> None:
    """More change at once than one step tells of: the worker takes steps until it has told of all."""
    toy = Toy()
    for i in range(1000):
        toy.engine.forget(f"gone{i}")
    told = 0
    while toy.engine.loading:
        told += len(toy.engine.step().stats.residency)
    assert told == 1000
    toy.engine.close()


def test_the_edge_remembers_no_more_adapters_than_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "REMEMBERED", 5)
    toy = Toy(resident=3)
    link = EngineLink(lambda message: None, Metrics("gpt2", 8), Places(8), 60.0)
    link.info = info()
    digests = [f"d{i}" for i in range(60)]
    for i, digest in enumerate(digests):
        if i % 2:
            toy.errors[digest] = AdapterRefused("rank 0")
        toy.preload(digest)
        while toy.engine.loading:
            stats = toy.engine.step().stats
            link.on_frame(Frame("epoch", None, (), (stats,), stats.residency))
    known = {digest: toy.residency.status(digest).value for digest in digests}
    assert {d: status for d, (status, _) in link.residency.items()} == {d: s for d, s in known.items() if s != "absent"}
    assert sorted(status for status, _ in link.residency.values()) == ["ready"] * 3 + ["refused"] * 5
    toy.engine.close()
