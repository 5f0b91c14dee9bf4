"""`python -m loadtests.run`: load a server for a bounded time, keep the figures, fail on any wrong answer.

Starts a server of its own on a free loopback port and stops it again, or loads the one that `--url` names. Everything
lands in `runs/loadtest/`. What stands after `--` goes to the server: `-- --adapters-dir DIR --max-batch-size 8`.
"""

import argparse
import contextlib
import csv
import http.client
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

FILES = {
    "requests": "requests.csv",
    "failures": "failures.csv",
    "exceptions": "exceptions.csv",
    "report": "report.html",
    "locust": "locust.log",
    "server": "server.log",
}
ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "runs" / "loadtest"
READY_SECONDS = 180
ANSWER_SECONDS = 3  # for a server that should be ready already
STOP_SECONDS = 90  # more than the server's own drain
FINISH_SECONDS = 60  # for requests in flight when the time is up
COLUMNS = {
    "Request Count": "count",
    "Failure Count": "failed",
    "50%": "p50 ms",
    "95%": "p95 ms",
    "99%": "p99 ms",
    "Max Response Time": "max ms",
}


class LoadTestError(Exception):
    """The run could not be made, or did not hold; the message says why."""


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit code is 0 only if requests were made and all of them were answered well."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped on the way out
    options.output.mkdir(parents=True, exist_ok=True)
    for name in FILES.values():
        (options.output / name).unlink(missing_ok=True)
    try:
        with _server(options) as url:
            code = _locust(options, url)
        rows = read_rows(options.output / FILES["requests"])
        print(table(rows), f"CSV, HTML and logs: {options.output}", sep="\n\n")
        judge(rows, code)
    except LoadTestError as error:
        print(f"load test failed: {error}", file=sys.stderr)
        return 1
    print("load test passed: every answer was right")
    return 0


def read_rows(path: Path) -> list[dict[str, str]]:
    """Locust's rows but the sum over unlike ones. Raises LoadTestError if there are none."""
    try:
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["Name"] != "Aggregated"]
    except OSError as error:
        raise LoadTestError(f"Locust wrote no figures: {error}") from None


def judge(rows: list[dict[str, str]], code: int) -> None:
    """Raises LoadTestError for a failure, or when nothing was asked."""
    requests = [row for row in rows if row["Type"] == "POST"]
    if not sum(int(row["Request Count"]) for row in requests):
        raise LoadTestError("no request was made")
    if failed := sum(int(row["Failure Count"]) for row in requests):
        raise LoadTestError(f"{failed} requests failed: {FILES['failures']} says how")
    if code:
        raise LoadTestError(f"Locust ended with {code}: {FILES['locust']} says why")


def table(rows: list[dict[str, str]]) -> str:
    """The rows as text."""
    lines = [["", *COLUMNS.values()]]
    lines += [[row["Name"], *(row[column].split(".")[0] for column in COLUMNS)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    name, *others = widths
    return "\n".join(
        line[0].ljust(name) + "".join(f"  {cell:>{width}}" for cell, width in zip(line[1:], others, strict=True))
        for line in lines
    )


def _locust(options: argparse.Namespace, url: str) -> int:
    log = options.output / FILES["locust"]
    command = [
        sys.executable, "-m", "locust", "--locustfile", str(Path(__file__).with_name("locustfile.py")),
        "--headless", "--host", url, "--users", str(options.users), "--spawn-rate", str(options.users),
        "--run-time", f"{options.seconds}s", "--stop-timeout", str(FINISH_SECONDS), "--exit-code-on-error", "1",
        "--figures", str(options.output), "--html", str(options.output / FILES["report"]),
        "--workload-seed", str(options.seed), "--skew", str(options.skew), "--only-summary",
    ]  # fmt: skip
    print(f"{options.users} users for {options.seconds} s, seed {options.seed}, on {url}", flush=True)
    with log.open("wb") as file, _child(subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file), 5) as process:
        try:
            return process.wait(options.seconds + FINISH_SECONDS + 60)
        except subprocess.TimeoutExpired:
            raise LoadTestError(f"Locust did not end in time: {log} says what it did") from None


@contextlib.contextmanager
def _server(options: argparse.Namespace) -> Iterator[str]:
    """The address of a server that is ready: `--url`, or one that lives as long as this context."""
    if options.url:
        _wait_ready(options.url, None, ANSWER_SECONDS)
        yield options.url
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", options.output / FILES["server"]
    command = [sys.executable, "-m", "server", "--host", "127.0.0.1", "--port", str(port), *options.server]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
        with _child(process, STOP_SECONDS):
            try:
                _wait_ready(url, process, READY_SECONDS)
            except LoadTestError as error:
                raise LoadTestError(f"{error}\n{log.read_text(errors='replace')[-2000:]}") from None
            yield url
            if process.poll() is not None:
                raise LoadTestError(f"the server ended by itself with {process.returncode}: {log}")
    if process.returncode:
        raise LoadTestError(f"the server stopped with {process.returncode}: {log}")


@contextlib.contextmanager
def _child(process: subprocess.Popen[bytes], seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that does not outlive this context: SIGTERM, and SIGKILL after `seconds`."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_ready(url: str, process: subprocess.Popen[bytes] | None, seconds: float) -> None:
    deadline, problem = time.monotonic() + seconds, "no answer"
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise LoadTestError(f"the server did not start, it ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5):
                return
        except urllib.error.HTTPError as error:
            problem = f"status {error.code}"
            error.close()
        except (OSError, http.client.HTTPException) as error:
            problem = str(error)
        time.sleep(0.2)
    raise LoadTestError(f"{url}/ready is not 200 after {seconds:.0f} s: {problem}")


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.run",
        description="Load a server with streaming and plain requests; what stands after -- goes to the server.",
    )
    own, mark, server = arguments, "", []
    if "--" in arguments:
        at = arguments.index("--")
        own, mark, server = arguments[:at], "--", arguments[at + 1 :]
    parser.add_argument("--users", type=_positive, default=16, help="half of them stream (default: %(default)s)")
    parser.add_argument("--seconds", type=_positive, default=30, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests (default: %(default)s)")
    parser.add_argument("--skew", type=float, default=1.0, help="the adapters' power law (default: %(default)s)")
    parser.add_argument("--url", help="load this server instead of starting one")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the results (default: runs/loadtest)")
    options = parser.parse_args(own)
    if mark and options.url:
        parser.error("--url loads a server that runs already: it takes no flags after --")
    options.server, options.url = server, (options.url or "").rstrip("/")
    options.output = options.output.resolve()
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
