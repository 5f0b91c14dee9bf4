"""An API process's end of the link to the worker: sends requests, hands frames to those who wait, watches the worker.

Nothing waits on a dead worker: a pidfd tells of its end at once, a missing pong of a hang, and whatever is in flight
then ends with WORKER_LOST. Each start of a worker is an epoch; what was meant for an earlier one is dropped.
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from adapters.status import AdapterStatus
from server.api.messages import Abort, EngineInfo, Forget, Frame, Ping, Submit
from server.api.processes import Places
from server.engine.types import ErrorKind, FinishReason, Request, SequenceOutput
from server.metrics import Metrics

logger = logging.getLogger(__name__)
PING_SECONDS = 0.5
ABSENT = AdapterStatus.ABSENT.value
Message = Ping | Submit | Abort | Forget


class Unavailable(Exception):
    """There is no worker to take a request just now."""


class Overloaded(Exception):
    """As many requests are waiting as may."""


class EngineLink:
    """Requests in flight and the state of the worker, as one API process sees them. Lives on its event loop."""

    def __init__(
        self, send: Callable[[Message], None], metrics: Metrics | None, places: Places, hang_seconds: float
    ) -> None:
        """`send` puts a message on the worker's queue; `metrics` is None where another process observes the steps."""
        self._send, self._metrics, self._places, self._hang_seconds = send, metrics, places, hang_seconds
        self._live: dict[str, asyncio.Queue[SequenceOutput]] = {}
        self._last_frame = 0.0
        self.info: EngineInfo | None = None
        self.residency: dict[
            str, tuple[str, str | None]
        ] = {}  # digest -> AdapterStatus as text, why; absent ones aren't

    @property
    def up(self) -> bool:
        """Whether the worker answers."""
        return self.info is not None

    @property
    def _epoch(self) -> str | None:
        return self.info.epoch if self.info is not None else None

    async def generate(self, *requests: Request) -> AsyncGenerator[SequenceOutput]:
        """Outputs of requests, the last of each with a finish reason. Closing the iterator early aborts the others.

        Raises Unavailable or Overloaded before the first output.
        """
        if self.info is None:
            raise Unavailable("the inference worker is starting or restarting")
        left = {request.request_id for request in requests}
        if not self._places.take(len(left)):
            more = f", {len(left)} more would be too many" if len(left) > 1 else ", as many as may run and wait"
            raise Overloaded(f"{self._places.taken} requests are in flight{more}")
        epoch, queue = self.info.epoch, asyncio.Queue[SequenceOutput]()
        self._live |= dict.fromkeys(left, queue)
        try:
            self._send(Submit(epoch, requests))
            while left:
                output = await queue.get()
                if output.request_id not in left:
                    continue  # it had ended when the worker died
                if output.finish_reason is not None:
                    left.discard(output.request_id)
                    self._live.pop(output.request_id, None)
                    self._places.give_back(1)
                yield output
        finally:
            self._places.give_back(len(left))
            for request_id in left:
                del self._live[request_id]
                if self._epoch == epoch:
                    self._send(Abort(epoch, request_id))

    def forget(self, digest: str) -> None:
        """Tell the worker, if there is one, that an adapter version is gone, or is to be read and proved afresh."""
        if self.info is not None:
            self._send(Forget(self.info.epoch, digest))

    def on_frame(self, frame: Frame) -> None:
        """Take one frame of the worker."""
        if frame.pong is not None and (self.info is None or frame.epoch != self.info.epoch):
            self._worker_started(frame.pong)
        if self.info is None or frame.epoch != self.info.epoch:
            return  # from a worker that was given up
        self._last_frame = time.monotonic()
        if self._metrics is not None:
            for stats in frame.stats:
                self._metrics.observe_step(stats)
        for digest, status, reason in frame.changes:
            if status == ABSENT:
                self.residency.pop(digest, None)
            else:
                self.residency[digest] = status, reason
        for output in frame.outputs:
            if (queue := self._live.get(output.request_id)) is not None:
                queue.put_nowait(output)

    async def watch(self) -> None:
        """Ping the worker until cancelled; kill it when it is alive but silent."""
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1, "ping")  # of its own: others may be taken
        while True:
            with suppress(ConnectionError, EOFError):  # the queue's own process is gone: main is shutting down
                await loop.run_in_executor(thread, self._send, Ping())
            await asyncio.sleep(PING_SECONDS)
            silent = time.monotonic() - self._last_frame
            if self.info is not None and silent > self._hang_seconds:
                logger.error("worker %d has been silent for %.0f s: killing it", self.info.pid, silent)
                with suppress(ProcessLookupError):  # another API process was faster
                    os.kill(self.info.pid, signal.SIGKILL)
                self._worker_lost(self.info.epoch)

    def _worker_started(self, info: EngineInfo) -> None:
        if self.info is not None:
            self._worker_lost(self.info.epoch)
        try:
            pidfd = os.pidfd_open(info.pid)
        except ProcessLookupError:
            return  # it died after it sent this
        self.info, self._last_frame = info, time.monotonic()
        if self._metrics is not None:
            self._metrics.worker_started()
            logger.info("worker %d is up: %s, %s", info.pid, info.device, info.dtype)
        loop = asyncio.get_running_loop()

        def died() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._worker_lost(info.epoch)

        loop.add_reader(pidfd, died)

    def _worker_lost(self, epoch: str) -> None:
        if self.info is None or self.info.epoch != epoch:
            return
        logger.error("worker %d is gone; %d requests in flight fail", self.info.pid, len(self._live))
        self.info = None
        self.residency.clear()
        if self._metrics is not None:
            self._metrics.worker_lost()
        for request_id, queue in self._live.items():
            queue.put_nowait(
                SequenceOutput(
                    request_id, (), (), FinishReason.ERROR,
                    error="the inference worker died; it is being restarted", error_kind=ErrorKind.WORKER_LOST,
                )
            )  # fmt: skip
