"""The worker process: loads the model, then runs the engine on its main thread, one frame of answers per step."""

import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import litserve as ls
from litserve.loops import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from server.api.messages import FRAMES, Abort, EngineInfo, Forget, Frame, Ping, Submit
from server.engine.types import ErrorKind, FinishReason, SequenceOutput, StepStats
from server.logs import configure_logging
from server.model.config import ModelError
from server.settings import Settings

logger = logging.getLogger(__name__)
STATS_SECONDS = 0.05  # how long figures may wait for a frame when no request has anything to say
CONSUMER = 0  # the one API process


class ChorusAPI(ls.LitAPI):
    """Carries the settings into the worker and builds the engine there."""

    def __init__(self, settings: Settings, model_dir: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings, self.model_dir = settings, model_dir

    def setup(self, device: str) -> None:
        """Load everything; LitServe calls this in the worker and marks it ready when it returns."""
        _survive_signals()
        configure_logging(self.settings.log_level, self.settings.log_format, "worker")
        # torch stays out of the API process, which imports this module too.
        from server.api.build import build

        try:
            self.engine, self.info = build(self.settings, self.model_dir)
        except (ModelError, ValueError, OSError) as error:
            logger.error("%s", error)
            raise SystemExit(1) from None


class EngineLoop(LitLoop):
    """LitServe's place for a loop of our own: owns the worker's main thread."""

    def __call__(self, *args: Any) -> None:
        """Run until the process ends; what makes it fail is logged as all else is."""
        try:
            self._serve(*args)
        except Exception:
            logger.critical("the worker failed", exc_info=True)
            raise SystemExit(1) from None

    def _serve(
        self,
        lit_api: Any,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """Run until the process ends."""
        engine, info = lit_api.engine, lit_api.info
        inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        outbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        _thread(_ingress, request_queue, inbox)
        _thread(self._egress, transport, outbox)
        stats: list[StepStats] = []
        last_sent = time.monotonic()
        while True:
            outputs, ponged, told = self._receive(engine, info, inbox)
            # A step after an abort tells that nothing runs any more, one after a load that it has ended.
            if engine.has_work or engine.loading or told:
                step = engine.step()
                outputs += step.outputs
                stats.append(step.stats)
                if not step.stats.batch_size:
                    time.sleep(0.001)  # only loads are under way
            idle = not engine.has_work and not engine.loading
            if outputs or ponged or (stats and (idle or time.monotonic() - last_sent > STATS_SECONDS)):
                outbox.put(Frame(info.epoch, info if ponged else None, tuple(outputs), tuple(stats)))
                stats, last_sent = [], time.monotonic()

    def _receive(self, engine: Any, info: EngineInfo, inbox: Any) -> tuple[list[SequenceOutput], bool, bool]:
        """Take every message that has come; with nothing to do, wait for one."""
        outputs: list[SequenceOutput] = []
        ponged = told = False
        while True:
            try:
                busy = engine.has_work or engine.loading or outputs or ponged or told
                message = inbox.get_nowait() if busy else inbox.get()
            except queue.Empty:
                return outputs, ponged, told
            match message:
                case Ping():
                    ponged = True
                case Submit(epoch, requests) if epoch == info.epoch:
                    for request in requests:
                        try:
                            engine.add_request(request)
                        except ValueError as error:
                            outputs.append(_refusal(request.request_id, str(error)))
                case Abort(epoch, request_id) if epoch == info.epoch:
                    engine.abort(request_id)
                    told = True
                case Forget(epoch, digest) if epoch == info.epoch:
                    engine.forget(digest)
                    told = True
                case _:
                    logger.debug("dropped a message for an earlier worker: %r", message)

    def _egress(self, transport: Any, outbox: "queue.SimpleQueue[Frame]") -> None:
        while True:
            frame = outbox.get()
            self.put_response(transport, CONSUMER, FRAMES, frame, LitAPIStatus.OK, LoopResponseType.STREAMING)  # pyright: ignore[reportUnknownMemberType]


def _ingress(request_queue: Any, inbox: Any) -> None:
    # A short timeout: a get that still blocks in the manager when this process dies would swallow a request.
    while True:
        try:
            _, _, _, message = request_queue.get(timeout=0.25)
        except queue.Empty:
            continue
        inbox.put(message)


def _refusal(request_id: str, why: str) -> SequenceOutput:
    return SequenceOutput(request_id, (), (), FinishReason.ERROR, error=why, error_kind=ErrorKind.GENERATION)


def _survive_signals() -> None:
    """Ctrl-C and a signal to the whole group must not cut off requests in flight: main ends this process.

    LitServe's own `terminate()` at the very end is SIGTERM too, so main follows it with SIGKILL (see app.py). When main
    is gone without a word, so is this process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        _thread(lambda: (wait([parent.sentinel]), os._exit(1)))


def _thread(target: Any, *args: Any) -> None:
    def run() -> None:
        try:
            target(*args)
        except BaseException:
            # Without its threads the worker is deaf or mute: end, so that it is started anew.
            logger.exception("worker thread failed")
            os._exit(1)

    threading.Thread(target=run, daemon=True).start()
