"""What the API processes of one server share. Made in main just before they are forked.

A process that ends takes main with it (app.py), so nobody takes over what a dead one held.
"""

import asyncio
import json
import multiprocessing
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from server.api.errors import ApiError

METRICS, IN_FLIGHT = "metrics", "in_flight"
"""What API processes ask each other."""
ANSWER_SECONDS = 5.0
POLL_SECONDS = 0.05
_fork = multiprocessing.get_context("fork")


class Places:
    """The requests in flight of all processes together: never more than `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit, self._taken = limit, _fork.Value("q", 0)

    @property
    def taken(self) -> int:
        """How many there are."""
        return self._taken.value

    def take(self, count: int) -> bool:
        """Take so many places, or none if they are too many."""
        with self._taken.get_lock():
            fits = self._taken.value + count <= self._limit
            if fits:
                self._taken.value += count
        return fits

    def give_back(self, count: int) -> None:
        """Let others have them."""
        with self._taken.get_lock():
            self._taken.value -= count


class OneAtATime:
    """`async with lock.held():` one task of all processes at a time."""

    def __init__(self) -> None:
        self._here, self._everywhere = asyncio.Lock(), _fork.Lock()

    @asynccontextmanager
    async def held(self) -> AsyncGenerator[None]:
        """Wait for one's turn, in order within a process."""
        async with self._here:
            while not self._everywhere.acquire(block=False):
                await asyncio.sleep(POLL_SECONDS)
            try:
                yield
            finally:
                self._everywhere.release()


class Peers:
    """Asks every API process, over Unix sockets that have no place in the file system.

    A question is one word; the answer is what each process says to it, as JSON.
    """

    def __init__(self, count: int) -> None:
        """`count`: of API processes; a single one has nobody to ask."""
        self._sockets = [_listening() for _ in range(count)] if count > 1 else []
        self._addresses = [each.getsockname() for each in self._sockets] or [None]
        self._own = 0
        self._answers: Mapping[str, Callable[[], Any]] = {}

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return len(self._addresses) == 1

    @asynccontextmanager
    async def answering(self, own: int, answers: Mapping[str, Callable[[], Any]]) -> AsyncGenerator[None]:
        """Be process number `own` and answer the others while the context lasts."""
        self._own, self._answers = own, answers
        listening = None if self.alone else self._sockets[own]
        self.close(but=listening)
        if listening is None:
            yield
            return
        async with await asyncio.start_unix_server(self._answer, sock=listening):
            yield

    async def ask(self, question: str) -> list[Any]:
        """What each process answers, by its number, this one too. Raises 503 when one doesn't."""

        async def answer_of(number: int) -> Any:
            if number == self._own:
                return self._answers[question]()
            return await _ask(self._addresses[number], question)

        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return list(await asyncio.gather(*map(answer_of, range(len(self._addresses)))))
        except (OSError, ValueError, TimeoutError) as error:
            problem = f"another API process did not answer ({type(error).__name__})"
            raise ApiError.unavailable(problem) from error

    def close(self, but: socket.socket | None = None) -> None:
        """Close this process's copies of the sockets, so that they end with their owners."""
        for each in self._sockets:
            if each is not but:
                each.close()
        self._sockets = []

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError):  # whoever asked is gone
                question = (await reader.readline()).decode(errors="replace").strip()
                if question in self._answers:
                    writer.write(json.dumps(self._answers[question]()).encode())
                    await writer.drain()
        finally:
            writer.close()


def _listening() -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("")  # the kernel finds a name
    listening.listen()
    return listening


async def _ask(address: Any, question: str) -> Any:
    asking = socket.socket(socket.AF_UNIX)
    asking.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(asking, address)
    except BaseException:
        asking.close()
        raise
    reader, writer = await asyncio.open_unix_connection(sock=asking)
    try:
        writer.write(f"{question}\n".encode())
        return json.loads(await reader.read())
    finally:
        writer.close()
