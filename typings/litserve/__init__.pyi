# The part of LitServe 0.2.19 that server/api builds on; it ships no types of its own.
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from multiprocessing.process import BaseProcess
from threading import Event
from typing import Any

from fastapi import FastAPI
from litserve.loops import LitLoop
from litserve.specs.base import LitSpec
from litserve.utils import ResponseBufferItem

class LitAPI:
    authorize: Callable[..., None]
    def __init__(self, *, spec: LitSpec | None = ..., loop: LitLoop | None = ...) -> None: ...
    def setup(self, device: str) -> None: ...

class LitServer:
    app: FastAPI
    monitor_internal: float
    uvicorn_graceful_timeout: int
    inference_workers: list[BaseProcess]
    workers_setup_status: dict[str, str]
    response_buffer: dict[str, ResponseBufferItem]
    _shutdown_event: Event
    def __init__(
        self,
        lit_api: LitAPI,
        *,
        accelerator: str,
        devices: int,
        restart_workers: bool,
        timeout: bool,
        healthcheck_path: str,
        info_path: str,
        max_payload_size: int,
    ) -> None: ...
    def run(
        self,
        *,
        host: str,
        port: int,
        num_api_servers: int,
        log_level: str,
        generate_client_file: bool,
        access_log: bool,
        log_config: None,
    ) -> None: ...
    def lifespan(self, app: FastAPI) -> AbstractAsyncContextManager[None]: ...
    def verify_worker_status(self) -> None: ...
    def launch_single_inference_worker(self, lit_api: LitAPI, worker_id: int) -> BaseProcess: ...
    def _start_server(self, *args: Any, **kwargs: Any) -> dict[int, BaseProcess]: ...
    def _perform_graceful_shutdown(self, *args: Any, **kwargs: Any) -> None: ...
