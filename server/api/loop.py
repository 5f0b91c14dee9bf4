"""The worker process: loads the model, then runs the engine on its main thread, one frame of answers per step."""

import logging
import multiprocessing
import os
import pickle
import queue
import signal
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import litserve as ls
from litserve.loops import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from server.api.exchange import Exchange
from server.api.messages import FRAMES, Frame
from server.logs import configure_logging
from server.model.config import ModelError
from server.settings import Settings

logger = logging.getLogger(__name__)


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
        exchange = Exchange(lit_api.engine, lit_api.info, lit_api.settings.api_workers)
        outbox: queue.SimpleQueue[list[tuple[int, Frame]]] = queue.SimpleQueue()
        _thread(_ingress, request_queue, exchange.inbox)
        _thread(self._egress, transport, outbox)
        while True:
            if frames := exchange.turn():
                outbox.put(frames)

    def _egress(self, transport: Any, outbox: "queue.SimpleQueue[list[tuple[int, Frame]]]") -> None:
        # As bytes: LitServe's manager, in between, would make objects of anything else, and bytes of them again.
        while True:
            for process, frame in outbox.get():
                sent = pickle.dumps(frame, pickle.HIGHEST_PROTOCOL)
                self.put_response(transport, process, FRAMES, sent, LitAPIStatus.OK, LoopResponseType.STREAMING)  # pyright: ignore[reportUnknownMemberType]


def _ingress(request_queue: Any, inbox: Any) -> None:
    # A short timeout: a get that still blocks in the manager when this process dies would swallow a request.
    while True:
        try:
            process, _, _, message = request_queue.get(timeout=0.25)
        except queue.Empty:
            continue
        inbox.put((process, pickle.loads(message)))


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
