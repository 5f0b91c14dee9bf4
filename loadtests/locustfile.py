"""Locust users of a running server: `python -m locust -f loadtests/locustfile.py --host URL`, or `make loadtest`.

Half of the users stream, half don't, and none pauses. Beside the rows of the two routes (whole answers) the streams
report two rows of their own: `TTFT`, from sending the request to the first token's event, and `inter-token`, between
the events of one stream. A wrong answer is a failure as much as an error status is.
"""

import csv
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gevent
import requests
from locust import HttpUser, constant, events, task
from locust.clients import ResponseContextManager
from locust.env import Environment
from locust.exception import StopUser
from locust.stats import StatsCSV

from loadtests.answers import AnswerError, EventParser, StreamCheck, check_answer, check_headers
from loadtests.workload import Job, Served, Workload

TIMEOUT = (5.0, 60.0)  # seconds to connect, and of silence
_numbers = itertools.count()
_workload: Workload | None = None


@events.init_command_line_parser.add_listener
def _flags(parser: Any) -> None:
    parser.add_argument("--workload-seed", type=int, default=0, help="seed of adapters, prompts and sampling")
    parser.add_argument("--skew", type=float, default=1.0, help="exponent of the adapters' power law; 0 is uniform")
    parser.add_argument("--figures", default="", metavar="DIR", help="write the final figures there, as CSV")


@events.test_start.add_listener
def _read_served(environment: Environment, **_: object) -> None:
    global _workload
    options = environment.parsed_options
    assert options is not None
    answer = requests.get(f"{environment.host}/v1/models", headers=_key(), timeout=TIMEOUT)
    answer.raise_for_status()
    _workload = Workload(Served.read(answer.json()), options.workload_seed, options.skew)


@events.quitting.add_listener
def _judge(environment: Environment, **_: object) -> None:
    """Fails a run that asked for nothing; Locust itself fails one with errors."""
    runner = environment.runner
    if runner is None or runner.stats.total.num_requests == 0 or runner.exceptions:
        environment.process_exit_code = 1


@events.init.add_listener
def _set_the_clock(**_: object) -> None:
    """The run time counts from gevent's cached clock, which stood still during the imports, for seconds at times."""
    gevent.get_hub().loop.update_now()


@events.init.add_listener
def _write_figures(environment: Environment, **_: object) -> None:
    """At the end, when no request is left: Locust's own --csv writes once a second and loses the last ones."""
    options = environment.parsed_options
    if options is None or not options.figures:
        return

    def write(**_: object) -> None:
        figures = StatsCSV(environment, [0.5, 0.9, 0.95, 0.99, 1.0])
        for name in ("requests", "failures", "exceptions"):
            with (Path(options.figures) / f"{name}.csv").open("w", newline="") as file:
                getattr(figures, f"{name}_csv")(csv.writer(file))

    environment.events.quit.add_listener(write)


def _key() -> dict[str, str]:
    key = os.environ.get("CHORUS_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _meta(response: ResponseContextManager) -> dict[str, Any]:
    """What Locust will report of this answer; a dict, though it is declared as a Mapping."""
    return cast("dict[str, Any]", response.request_meta)


class ChorusUser(HttpUser):
    """What both users share: the seeded requests, and the judgement of an answer."""

    abstract = True
    wait_time = constant(0)
    jobs: Iterator[Job]

    def on_start(self) -> None:
        """Take a number, and with it a stream of requests."""
        if _workload is None:  # test_start failed and was logged
            raise StopUser
        self.jobs = _workload.jobs(next(_numbers))

    def ask(self, path: str, *, stream: bool) -> None:
        """Send the next request and report its whole answer under `path`."""
        job = next(self.jobs)
        begin = time.perf_counter()
        with self.client.post(
            path, json=job.body(), headers=_key(), stream=stream, timeout=TIMEOUT, catch_response=True
        ) as response:
            try:
                if response.status_code != 200:
                    raise AnswerError(f"status {response.status_code}: {response.text[:200] or response.error}")
                check_headers(job, response.headers)
                self.read(job, response, begin)
            except (AnswerError, ValueError, requests.RequestException) as error:
                response.failure(f"{type(error).__name__}: {error}")
            _meta(response)["response_time"] = 1000 * (time.perf_counter() - begin)

    def read(self, job: Job, response: ResponseContextManager, begin: float) -> None:
        """Read and check the body of a 200; `begin` is when it was asked for. Raises AnswerError."""
        raise NotImplementedError


class PlainUser(ChorusUser):
    """POST /generate."""

    @task
    def generate(self) -> None:
        """One text."""
        self.ask("/generate", stream=False)

    def read(self, job: Job, response: ResponseContextManager, begin: float) -> None:
        """Check the one answer."""
        check_answer(job, response.json())


class StreamingUser(ChorusUser):
    """POST /generate_stream, read event by event as it arrives."""

    @task
    def generate_stream(self) -> None:
        """One text, token by token."""
        self.ask("/generate_stream", stream=True)

    def read(self, job: Job, response: ResponseContextManager, begin: float) -> None:
        """Check the events, and report when each came."""
        parser, check, before = EventParser(), StreamCheck(job), begin
        size = 0
        for data in response.iter_content(chunk_size=None):
            size += len(data)
            now = time.perf_counter()
            for event in parser.feed(data):
                check.push(event)
                self._report("TTFT" if check.tokens == 1 else "inter-token", now - before)
                before = now
        parser.close()
        check.finish()
        _meta(response)["response_length"] = size

    def _report(self, name: str, seconds: float) -> None:
        milliseconds = 1000 * seconds
        self.environment.events.request.fire(
            request_type="stream", name=name, response_time=milliseconds, response_length=0, exception=None, context={}
        )
