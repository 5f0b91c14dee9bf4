"""How many requests use each adapter, and who waits for none to."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import contextmanager

POLL_SECONDS = 0.05


class InFlight:
    """Counts by adapter name, whatever its version. Lives on one event loop."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}
        self._ask: Callable[[], Awaitable[list[Mapping[str, int]]]] | None = None

    def share(self, ask: Callable[[], Awaitable[list[Mapping[str, int]]]]) -> None:
        """`ask` tells the `own` of every API process."""
        self._ask = ask

    async def counts(self) -> Counter[str]:
        """Requests of all processes. Raises ApiError when one does not answer."""
        total: Counter[str] = Counter()
        for each in [self.own] if self._ask is None else await self._ask():
            total.update(each)
        return total

    @contextmanager
    def hold(self, names: Iterable[str]) -> Generator[None]:
        """Count a request that uses these adapters."""
        held = list(names)
        self.own.update(held)
        try:
            yield
        finally:
            self.own.subtract(held)
            for name in held:
                if not self.own[name]:
                    del self.own[name]
                    for waiter in self._waiting.pop(name, ()):
                        if not waiter.done():
                            waiter.set_result(None)

    async def idle(self, name: str, seconds: float) -> int:
        """Wait until no request uses the adapter, but not longer than so many seconds; how many still do."""
        deadline = time.monotonic() + seconds
        while True:
            await self._idle_here(name, max(0.0, deadline - time.monotonic()))
            left = (await self.counts())[name]
            if not left or time.monotonic() >= deadline:
                return left
            await asyncio.sleep(POLL_SECONDS)

    async def _idle_here(self, name: str, seconds: float) -> None:
        if not self.own[name]:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append(waiter)
        done, _ = await asyncio.wait((waiter,), timeout=seconds)
        if not done:
            self._waiting[name].remove(waiter)
