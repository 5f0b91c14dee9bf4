"""What reads files stays off the event loop; what is known already doesn't wait for it."""

import asyncio
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from adapters.adapter import AdapterRef, alone
from adapters.errors import AdapterNotFound
from server.api.errors import ApiError
from server.api.openai import OpenAIRoutes
from server.api.spec import ChorusSpec

REF = AdapterRef("d", "poe", "")
FOUND = SimpleNamespace(ref=REF)
HTTP = cast("Any", SimpleNamespace(headers={}))


@dataclass
class Store:
    """Reads until it is told to go on."""

    go_on: threading.Event = field(default_factory=threading.Event)

    def known(self, name: str, key: str | None) -> Any:
        return FOUND if name == "poe" else None

    def get(self, name: str, key: str | None) -> Any:
        assert self.go_on.wait(5), "the event loop was blocked"
        if name == "nobody":
            raise AdapterNotFound(name, ["poe"])
        return FOUND

    def servable(self, refused: set[str]) -> list[Any]:
        assert self.go_on.wait(5), "the event loop was blocked"
        return [SimpleNamespace(name="poe", value="d", created=0.0)]


def test_a_slow_disk_does_not_stop_the_event_loop() -> None:
    async def scenario() -> None:
        store, spec = Store(), ChorusSpec()
        spec.served = cast("Any", SimpleNamespace(store=store, model_name="demo", created=0.0, max_model_len=8))
        slow = [
            asyncio.ensure_future(spec.adapters("new", "adapter_id", HTTP)),
            asyncio.ensure_future(spec.adapters("nobody", "adapter_id", HTTP)),
            asyncio.ensure_future(OpenAIRoutes(spec).models()),
        ]
        await asyncio.sleep(0.05)
        assert await spec.adapters("poe", "adapter_id", HTTP) == alone(REF), "known: not behind what reads"
        assert await spec.adapters("demo", "adapter_id", HTTP) == await spec.adapters(None, "adapter_id", HTTP) == ()
        assert not any(task.done() for task in slow)
        store.go_on.set()
        assert await slow[0] == alone(REF)
        with pytest.raises(ApiError, match="nobody"):
            await slow[1]
        assert [card["id"] for card in (await slow[2])["data"]] == ["demo", "poe"]

    asyncio.run(scenario())
