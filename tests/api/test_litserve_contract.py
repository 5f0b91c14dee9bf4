"""The names of LitServe 0.2.19 that we build on beyond its documentation. A new LitServe has to pass this first."""

import inspect

import litserve as ls
from litserve import server as module
from litserve.loops import LitLoop
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, LoopResponseType, ResponseBufferItem, WorkerSetupStatus

Server = ls.LitServer


def source(function: object) -> str:
    return inspect.getsource(function)  # type: ignore[arg-type]


def test_the_version_is_the_one_that_was_read() -> None:
    assert ls.__version__ == "0.2.19"


def test_what_app_overrides_is_called_where_we_think() -> None:
    run = source(Server.run)
    assert "self.verify_worker_status()" in run
    assert "self._start_server(" in run
    assert "self._perform_graceful_shutdown(" in run
    assert "except KeyboardInterrupt" in run
    monitor = source(Server._start_worker_monitoring)
    assert "self.launch_single_inference_worker(lit_api, worker_id)" in monitor
    assert "self._shutdown_event.is_set()" in monitor
    assert "time.sleep(self.monitor_internal)" in monitor
    assert "self.inference_workers" in source(Server._perform_graceful_shutdown)
    assert "iw.terminate()" in source(Server._perform_graceful_shutdown)
    assert "timeout_graceful_shutdown=self.uvicorn_graceful_timeout" in source(Server._start_server)


def test_frames_reach_the_entry_of_their_uid() -> None:
    receive = source(module.response_queue_to_buffer)
    assert "response_buffer.get(uid)" in receive
    assert "response_item.response_queue.append(response)" in receive
    assert "response_item.event.set()" in receive
    assert {"event", "response_queue"} <= set(ResponseBufferItem.__dataclass_fields__)


def test_the_spec_gets_its_queues_and_the_worker_its_arguments() -> None:
    assert "self.request_queue" in source(LitSpec.setup)
    assert "lit_api.spec.response_queue_id = response_queue_id" in source(Server._start_server)
    assert list(inspect.signature(LitLoop.put_response).parameters)[1:] == [
        "transport", "response_queue_id", "uid", "response_data", "status", "response_type",
    ]  # fmt: skip
    assert {"OK"} <= set(LitAPIStatus.__dict__)
    assert {"STREAMING"} <= set(LoopResponseType.__members__)
    assert {"READY", "ERROR"} <= set(WorkerSetupStatus.__dict__)


def test_authorize_guards_every_route_of_a_spec() -> None:
    assert "target.authorize" in source(Server.setup_auth)
    assert "Depends(self.setup_auth(lit_api))" in source(Server._register_spec_endpoints)
