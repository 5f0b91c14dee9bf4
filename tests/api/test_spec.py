"""What reads files stays off the event loop; what is known already doesn't wait for it."""

import asyncio
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters.errors import AdapterNotFound
from server.api.errors import ApiError
from server.api.openai import OpenAIRoutes
from server.api.spec import ChorusSpec

MANIFEST = SimpleNamespace(ref=SimpleNamespace(name="poe"), created=0.0)


@dataclass
class Store:
    """Reads until it is told to go on."""

    go_on: threading.Event = field(default_factory=threading.Event)

    def known(self, name: str) -> Any:
        return MANIFEST if name == "poe" else None

    def get(self, name: str) -> Any:
        assert self.go_on.wait(5), "the event loop was blocked"
        if name == "nobody":
            raise AdapterNotFound(name, ["poe"])
        return MANIFEST

    def all(self) -> list[Any]:
        assert self.go_on.wait(5), "the event loop was blocked"
        return [MANIFEST]


def test_a_slow_disk_does_not_stop_the_event_loop() -> None:
    async def scenario() -> None:
        store, spec = Store(), ChorusSpec()
        spec.served = cast("Any", SimpleNamespace(store=store, model_name="demo", created=0.0, max_model_len=8))
        slow = [
            asyncio.ensure_future(spec.adapter("new", "adapter_id")),
            asyncio.ensure_future(spec.adapter("nobody", "adapter_id")),
            asyncio.ensure_future(OpenAIRoutes(spec).models()),
        ]
        await asyncio.sleep(0.05)
        assert await spec.adapter("poe", "adapter_id") is MANIFEST, "known: not behind what reads"
        assert await spec.adapter("demo", "adapter_id") is await spec.adapter(None, "adapter_id") is None
        assert not any(task.done() for task in slow)
        store.go_on.set()
        assert await slow[0] is MANIFEST
        with pytest.raises(ApiError, match="nobody"):
            await slow[1]
        assert [card["id"] for card in (await slow[2])["data"]] == ["demo", "poe"]

    asyncio.run(scenario())
