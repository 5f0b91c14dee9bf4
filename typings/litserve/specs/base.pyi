from collections.abc import Callable
from queue import Queue
from typing import Any

class LitSpec:
    api_path: str
    response_queue_id: int
    request_queue: Queue[Any]
    @property
    def stream(self) -> bool: ...
    @property
    def endpoints(self) -> list[tuple[str, Callable[..., Any], list[str]]]: ...
    def __getstate__(self) -> dict[str, Any]: ...
    def add_endpoint(self, path: str, endpoint: Callable[..., Any], methods: list[str]) -> None: ...
