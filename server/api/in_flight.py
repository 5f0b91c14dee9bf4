"""How many requests use each adapter, and who waits for none to."""

import asyncio
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager


class InFlight:
    """Counts by adapter name. Lives on one event loop."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    def count(self, name: str) -> int:
        """Requests that use the adapter of this name, whatever its version."""
        return self._counts[name]

    @contextmanager
    def hold(self, names: Iterable[str]) -> Generator[None]:
        """Count a request that uses these adapters."""
        held = list(names)
        self._counts.update(held)
        try:
            yield
        finally:
            self._counts.subtract(held)
            for name in held:
                if not self._counts[name]:
                    del self._counts[name]
                    for waiter in self._waiting.pop(name, ()):
                        if not waiter.done():
                            waiter.set_result(None)

    async def idle(self, name: str, seconds: float) -> bool:
        """Wait until no request uses the adapter; False if some still do after so many seconds."""
        if not self._counts[name]:
            return True
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(name, []).append(waiter)
        done, _ = await asyncio.wait((waiter,), timeout=seconds)
        if not done:
            self._waiting[name].remove(waiter)
        return bool(done)
