"""What may block stays in threads of its own, and keeps what belongs to its request."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters.objects import Objects
from server import logs
from server.api.errors import ApiError
from server.api.lifecycle import LifecycleRoutes, _call
from server.api.spec import ChorusSpec


def routes(objects: Any, fetch: Callable[..., Any] | None = None) -> LifecycleRoutes:
    spec = ChorusSpec()
    served = {"store": SimpleNamespace(objects=objects), "sources": SimpleNamespace(fetch=fetch)}
    spec.served = cast("Any", SimpleNamespace(**served))
    return LifecycleRoutes(spec)


async def fetched(lifecycle: LifecycleRoutes, source: str) -> str:
    async with lifecycle._fetched(source, "lora_path") as (_, origin):
        return origin


def test_sources_that_stall_hold_up_nothing_but_each_other(tmp_path: Path) -> None:
    go_on = threading.Event()

    def stall(source: str, folder: Path) -> Any:
        assert go_on.wait(30)
        return SimpleNamespace(folder=folder, origin=source)

    async def scenario() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        lifecycle, sources = routes(Objects(tmp_path), stall), [f"https://example.org/{i}" for i in range(8)]
        tasks = [asyncio.ensure_future(fetched(lifecycle, source)) for source in sources]
        await asyncio.sleep(0.1)
        try:
            assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 10) == "free"
        finally:
            go_on.set()
        assert await asyncio.gather(*tasks) == sources

    asyncio.run(scenario())


def test_one_source_is_fetched_once_at_a_time(tmp_path: Path) -> None:
    busy = threading.Lock()

    def alone(source: str, folder: Path) -> Any:
        assert busy.acquire(blocking=False), "two write the same files"
        busy.release()
        return SimpleNamespace(folder=folder, origin=source)

    async def scenario() -> None:
        lifecycle = routes(Objects(tmp_path), alone)
        same = ["https://example.org/a"] * 4
        assert await asyncio.gather(*(fetched(lifecycle, source) for source in same)) == same

    asyncio.run(scenario())


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    @contextmanager
    def staging() -> Generator[Path]:
        (tmp_path / "archive").symlink_to("/dev/full")
        yield tmp_path

    async def body() -> AsyncGenerator[bytes]:
        yield b"x" * (1 << 20)

    async def scenario() -> None:
        lifecycle, http = routes(SimpleNamespace(staging=staging)), cast("Any", SimpleNamespace(stream=body))
        with pytest.raises(ApiError, match="can't be stored: No space left on device") as caught:
            async with lifecycle._received(http):
                raise AssertionError("nothing was received")
        assert caught.value.status == 503

    asyncio.run(scenario())


def test_a_line_that_a_thread_logs_tells_the_request() -> None:
    async def scenario() -> None:
        logs.request_id.set("mine")
        assert await _call("name", logs.request_id.get) == "mine"

    asyncio.run(scenario())
