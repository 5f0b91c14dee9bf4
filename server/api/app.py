"""The LitServer: start-up, supervision and shutdown of main, the API processes and the worker.

What LitServe leaves out is added here: a worker that dies while it loads ends the start; one that keeps crashing is
restarted with growing pauses and then ends the process non-zero; SIGTERM lets what is in flight finish; no process
outlives main. The names marked * are LitServe's own, held by tests/api/test_litserve_contract.py.
"""

import asyncio
import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import litserve as ls
from fastapi import FastAPI
from litserve.utils import ResponseBufferItem, WorkerSetupStatus

from server import metric_totals
from server.api.gate import install_middleware, passed_the_gate
from server.api.lifecycle import LifecycleRoutes
from server.api.link import EngineLink, Message
from server.api.loop import ChorusAPI, EngineLoop
from server.api.messages import FRAMES, OBSERVER
from server.api.openai import OpenAIRoutes
from server.api.openapi import document
from server.api.playground import PlaygroundRoutes, keep_out_of_openapi
from server.api.probes import ProbeRoutes
from server.api.processes import IN_FLIGHT, METRICS, Peers, Places
from server.api.spec import ChorusSpec, Served
from server.api.tgi import TgiRoutes

logger = logging.getLogger(__name__)
MAX_CRASHES = 5
CRASH_WINDOW_SECONDS = 120.0
EXIT_SECONDS = 5.0  # an API process may take to end, once it has drained
_PR_SET_PDEATHSIG = 1


class StartupError(Exception):
    """The worker could not load the model; the reason is in the log lines before this."""


class ChorusServer(ls.LitServer):
    """One or more API processes and one worker under a supervising main."""

    def __init__(self, served: Served, model_dir: Path) -> None:
        self._spec = ChorusSpec()
        self._spec.served = served
        for routes in (TgiRoutes, OpenAIRoutes, LifecycleRoutes, ProbeRoutes, PlaygroundRoutes):
            routes(self._spec).register()
        api = ChorusAPI(served.settings, model_dir, spec=self._spec, loop=EngineLoop())
        # LitServe makes it a dependency of every route; a plain function would cost a thread.
        api.authorize = passed_the_gate  # pyright: ignore[reportAttributeAccessIssue]
        super().__init__(
            api,
            accelerator="cpu",  # the worker chooses its device itself
            devices=1,
            restart_workers=True,
            timeout=False,
            healthcheck_path="/litserve/health",
            info_path="/litserve/info",
            max_payload_size=None,  # pyright: ignore[reportArgumentType] (it takes None; BodyLimit knows which body it is)
        )
        own = {handler for _, handler, _ in self._spec.endpoints}
        pages = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
        self.app.router.routes[:] = [
            route for route in self.app.router.routes
            if getattr(route, "endpoint", None) in own or getattr(route, "path", None) in pages
        ]  # fmt: skip
        self.app.title, self.app.version = "Chorus", served.version
        document(self.app)
        limited = served.metrics.rejected.labels(served.model_name, "rate_limited")
        install_middleware(self.app, served.settings, served.version, limited.inc)
        self.monitor_internal = 0.25  # * seconds between looks at the worker
        self.uvicorn_graceful_timeout = served.settings.drain_seconds  # *
        self.exit_code = 0
        self._places = Places(served.settings.max_batch_size + served.settings.max_waiting)
        self._crashes: deque[float] = deque()
        self._main_pid = os.getpid()
        keep_out_of_openapi(self.app)

    def serve(self) -> int:
        """Run until SIGTERM or SIGINT. Returns the exit code; raises StartupError when the worker can't start."""
        settings = self._spec.state.settings
        signal.signal(signal.SIGTERM, self._on_sigterm)
        os.register_at_fork(after_in_child=_die_with_parent)
        try:
            self.run(
                host=settings.host,
                port=settings.port,
                num_api_servers=settings.api_workers,
                log_level="warning" if settings.log_level == "info" else settings.log_level,
                generate_client_file=False,
                access_log=False,
                log_config=None,  # uvicorn's lines go where ours do
            )
        finally:
            for process in multiprocessing.active_children():
                process.kill()
        return self.exit_code

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncGenerator[None]:
        """Runs inside each API process."""
        spec, metrics = self._spec, self._spec.state.metrics
        answers = {METRICS: partial(metric_totals.snapshot, metrics), IN_FLIGHT: lambda: spec.in_flight.own}
        spec.in_flight.share(partial(spec.peers.ask, IN_FLIGHT))
        number = spec.response_queue_id  # *
        async with super().lifespan(app), spec.peers.answering(number, answers):
            link = self._connect(number)
            if not spec.peers.alone:
                logger.info("API process %d of %d is %d", number, spec.state.settings.api_workers, os.getpid())
            watch = asyncio.create_task(link.watch())
            try:
                yield
            finally:
                watch.cancel()
                await asyncio.gather(watch, return_exceptions=True)

    def _connect(self, number: int) -> EngineLink:
        spec = self._spec

        def send(message: Message) -> None:
            sent = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)  # the manager need not make objects of it
            spec.request_queue.put((number, FRAMES, time.monotonic(), sent))  # *

        metrics = spec.state.metrics if number == OBSERVER else None
        link = EngineLink(send, metrics, self._places, spec.state.settings.hang_seconds)
        inbox = _FrameInbox(link)
        self.response_buffer[FRAMES] = ResponseBufferItem(event=inbox, response_queue=inbox)  # *
        spec.link = link
        return link

    def verify_worker_status(self) -> None:
        """Wait for the worker to have loaded. Raises StartupError if it fails or dies. *"""
        while not any(v == WorkerSetupStatus.READY for v in self.workers_setup_status.values()):
            failed = any(v == WorkerSetupStatus.ERROR for v in self.workers_setup_status.values())
            if failed or not all(worker.is_alive() for worker in self.inference_workers):
                raise StartupError("the inference worker could not start")
            time.sleep(0.05)

    def launch_single_inference_worker(self, lit_api: Any, worker_id: int) -> Any:
        """Start a worker in the place of one that died; gives up when that keeps happening. *"""
        now = time.monotonic()
        self._crashes.append(now)
        while now - self._crashes[0] > CRASH_WINDOW_SECONDS:
            self._crashes.popleft()
        if len(self._crashes) >= MAX_CRASHES:
            logger.critical("the worker died %d times in %.0f s: giving up", MAX_CRASHES, CRASH_WINDOW_SECONDS)
            self.exit_code = 1
            self._stop_monitor()
            os.kill(self._main_pid, signal.SIGTERM)
            threading.Event().wait()  # the monitor's thread ends with main
        if len(self._crashes) > 1:
            time.sleep(min(8.0, 0.5 * 2 ** (len(self._crashes) - 2)))
        logger.warning("the worker died: starting another")
        return super().launch_single_inference_worker(lit_api, worker_id)

    def _start_server(self, *args: Any, **kwargs: Any) -> Any:
        """LitServe does not notice when an API process ends; main does, and ends too. *"""
        # Not before: the manager, a fork of main too, would keep the sockets of processes that are gone.
        self._spec.peers = Peers(self._spec.state.settings.api_workers)
        processes = super()._start_server(*args, **kwargs)
        self._spec.peers.close()

        def watch() -> None:
            wait([process.sentinel for process in processes.values()])
            if not self._stopping:
                logger.critical("an API process ended by itself")
                self.exit_code = 1
                os.kill(self._main_pid, signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()
        self._announce()
        return processes

    _stopping = False

    def _perform_graceful_shutdown(self, manager: Any, uvicorn_workers: dict[int, Any], *args: Any) -> None:
        """Drain the API processes, then end the worker, which ignores SIGTERM: a signal to the whole group drains. *"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._stopping = True
        self._stop_monitor()
        # All at once: LitServe would end one after the other, and the last would go on taking requests.
        for process in uvicorn_workers.values():
            process.terminate()
        deadline = time.monotonic() + self.uvicorn_graceful_timeout + EXIT_SECONDS
        for process in uvicorn_workers.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                logger.error("an API process did not end: killing it")
                process.kill()
        for worker in self.inference_workers:
            worker.terminate = worker.kill
        super()._perform_graceful_shutdown(manager, {}, *args)

    def _stop_monitor(self) -> None:
        # From a thread of its own: main's connection to the manager may be in the middle of a call.
        thread = threading.Thread(target=self._shutdown_event.set, daemon=True)  # *
        thread.start()
        thread.join(1)

    def _on_sigterm(self, *_: object) -> None:
        # Forked children inherit this handler; only main may act on it.
        if os.getpid() == self._main_pid:
            raise KeyboardInterrupt

    def _announce(self) -> None:
        settings, state = self._spec.state.settings, self._spec.state
        host = (
            "127.0.0.1"
            if settings.host == "0.0.0.0"
            else f"[{settings.host}]"
            if ":" in settings.host
            else settings.host
        )
        names = [entry.name for entry in state.store.servable()]
        adapter = f'"adapter_id": "{"quotes" if "quotes" in names else names[0]}", ' if names else ""
        key = '-H "Authorization: Bearer $CHORUS_API_KEY" ' if settings.asks_for_key else ""
        room = min(64, state.max_model_len // 2)
        serving = (
            f"Chorus serves {state.model_name} with {len(names)} adapters ({', '.join(names[:8])}"
            f"{', ...' if len(names) > 8 else ''}) on http://{host}:{settings.port}"
        )
        if settings.log_format == "json":
            logger.info("%s", serving)
            return
        print(
            f"{serving}\nTry:\n\n"
            f"  curl -s http://{host}:{settings.port}/generate {key}-H 'Content-Type: application/json' -d \\\n"
            f"""    '{{"inputs": "Quote by Oscar Wilde:", "parameters": {{{adapter}"do_sample": true, """
            f""""temperature": 0.8, "top_p": 0.95, "max_new_tokens": {room}, "details": false}}}}'\n\n"""
            f"or open http://{host}:{settings.port}/playground\n",
            flush=True,
        )


class _FrameInbox:
    """Stands in for the queue and the event of one entry of LitServe's response buffer."""

    def __init__(self, link: EngineLink) -> None:
        self.append: Callable[[Any], None] = lambda response: link.on_frame(pickle.loads(response[0]))

    def set(self) -> None:
        """Nobody waits on the event: `append` has delivered the frame."""


def _die_with_parent() -> None:
    """Processes forked from main (the manager, the API processes) get SIGKILL when main is gone."""
    with suppress(OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
