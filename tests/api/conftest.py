"""A real server on the demo base, in processes of its own."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.model.source import DEMO_MODEL
from tests.oracle import make_adapter

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90


class ServerProcess:
    """`python -m server` on a free port; `url` answers once `wait_ready` returns."""

    def __init__(self, log: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CHORUS_")}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", "--port", str(port), "--store-dir", str(log.parent / "store"), *flags],
                stdout=file, stderr=file, cwd=ROOT, env=clean | (env or {}),
            )  # fmt: skip

    def wait_ready(self) -> "ServerProcess":
        self.wait_until(lambda: httpx.get(f"{self.url}/ready").status_code == 200)
        return self

    def wait_until(self, condition, seconds: float = START_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.text()}"
            with contextlib.suppress(httpx.TransportError):
                if condition():
                    return
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s:\n{self.text()}")

    def worker_pids(self) -> list[int]:
        """Process ids of every worker so far, from the log."""
        return [int(pid) for pid in re.findall(r"worker (\d+) is up", self.text())]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        found = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if (line.startswith((f"{name}{{", f"{name} "))) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                found += float(line.rsplit(" ", 1)[1])
        return found

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture(scope="session")
def adapters_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random adapters for the demo base, one that doesn't fit it, one folder that is no adapter."""
    root = tmp_path_factory.mktemp("adapters")
    make_adapter(DEMO_MODEL, root / "alpha", 1, ["c_attn"], rank=4, size=0.2)
    make_adapter(DEMO_MODEL, root / "beta", 2, ["c_attn", "c_proj", "c_fc"], rank=8, size=0.2)
    (root / "misfit").mkdir()
    (root / "misfit" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (root / "misfit" / "adapter_model.safetensors").write_bytes((root / "alpha/adapter_model.safetensors").read_bytes())
    (root / "notes").mkdir()
    return root


@pytest.fixture(scope="session")
def server(adapters_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as they find it."""
    log = tmp_path_factory.mktemp("server") / "log"
    process = ServerProcess(log, "--adapters-dir", str(adapters_dir)).wait_ready()
    yield process
    assert process.stop() == 0, process.text()


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """Starts servers that a test may harm."""
    started: list[ServerProcess] = []

    def begin(*flags: str, env: dict[str, str] | None = None) -> ServerProcess:
        started.append(ServerProcess(tmp_path / f"log{len(started)}", *flags, env=env))
        return started[-1]

    yield begin
    for process in started:
        if process.process.poll() is None:
            process.stop()
