"""A server of its own for a benchmark: what its flags say, and nothing that the machine's settings say."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from server.settings import PREFIX

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS, STOP_SECONDS = 120, 60


@contextlib.contextmanager
def serving(flags: list[str], seconds: float = START_SECONDS) -> Iterator[str]:
    """A server with these flags on a free port of loopback, ended by its pid; its address.

    It has no `CHORUS_*` variables, and no `.env`: its working directory is an empty one. Paths have to be absolute;
    without --store-dir or --adapters-dir it has an empty one of its own. Raises RuntimeError, with the last that the
    server said, if it ends or isn't ready in so many seconds.
    """
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("w+") as log:
        for folder in ("cwd", "adapters"):
            (Path(scratch) / folder).mkdir()
        port = _free_port()
        own = ["--store-dir", f"{scratch}/store", "--adapters-dir", f"{scratch}/adapters", "--port", str(port)]
        own = [word for pair in zip(own[::2], own[1::2], strict=True) if pair[0] not in flags for word in pair]
        process = subprocess.Popen(
            [sys.executable, "-m", "server", *own, *flags],
            stdout=log, stderr=log, env=environment(), cwd=Path(scratch) / "cwd",
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + seconds
            while not answers(f"{url}/ready"):
                ended = process.poll() is not None
                if ended or time.monotonic() > deadline:
                    what = f"ended with {process.returncode}" if ended else f"was not ready after {seconds:g} s"
                    log.seek(0)
                    raise RuntimeError(f"the server {what}: {' | '.join(log.read().splitlines()[-5:])}")
                time.sleep(0.02)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def environment() -> dict[str, str]:
    """This process's, without the server's settings; modules are found in this checkout from any directory."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def answers(url: str) -> bool:
    """Whether a GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
