"""The whole path: a running server, an adapter trained beside it, its first request, no restart."""

import json
import subprocess
import sys
from pathlib import Path

import httpx

from tests.api.conftest import ROOT, ServerProcess


def test_an_adapter_trained_beside_a_running_server_is_served(tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    rows = [{"author": f"A{i % 3}", "quote": f"Number {i} is the best of all."} for i in range(80)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server = ServerProcess(tmp_path / "log", "--adapters-dir", str(adapters))
    try:
        server.wait_ready()
        body = {
            "inputs": "Quote by A1:",
            "parameters": {"adapter_id": "numbers", "max_new_tokens": 24, "details": True},
        }
        assert httpx.post(f"{server.url}/generate", json=body, timeout=60).status_code == 404
        subprocess.run(
            [
                sys.executable, "-m", "training", "--name", "numbers", "--data", str(tmp_path / "data.jsonl"),
                "--output", str(adapters), "--epochs", "6", "--batch-size", "8", "--eval-samples", "4",
            ],
            cwd=ROOT, check=True, timeout=280, capture_output=True,
        )  # fmt: skip
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["details"]["finish_reason"] == "eos_token"
        assert " is the best of all" in answer.json()["generated_text"]
        listed = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert "numbers" in {model["id"] for model in listed}
    finally:
        assert server.stop() == 0
