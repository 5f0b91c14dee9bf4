from typing import Any

class LitLoop:
    def __call__(
        self,
        lit_api: Any,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: Any,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None: ...
    def put_response(
        self, transport: Any, response_queue_id: int, uid: str, response_data: Any, status: Any, response_type: Any
    ) -> None: ...
