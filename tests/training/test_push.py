"""Pushing goes to a hub of our own, in a process that knows no other."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel

from training.__main__ import main

TOKEN = "hf_writer"
SENT = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


class Hub(ThreadingHTTPServer):
    """Takes what is sent: `received` holds each file by its path, with the repository and the branch."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: dict[tuple[str, str, str], bytes] = {}
        self.created: list[dict] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        self._answer(404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = self.path.strip("/").split("/")  # api/models/OWNER/NAME/ACTION/BRANCH
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials"})
        if parts == ["api", "repos", "create"]:
            self.server.created.append(json.loads(body))
            if json.loads(body).get("organization") == "others":
                return self._answer(403, {"error": "You don't have the rights"})
            return self._answer(200, {"url": f"{self.server.url}/me/voice", "name": "me/voice"})
        if parts[:2] == ["api", "validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        if parts[4:5] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        if parts[4:5] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    where = ("/".join(parts[2:4]), parts[5], line["value"]["path"])
                    self.server.received[where] = base64.b64decode(line["value"]["content"])
            return self._answer(200, {"commitUrl": f"{self.server.url}/me/voice/commit/1", "commitOid": "1"})
        return self._answer(200, {})  # a branch

    def _answer(self, status: int, value: dict) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with more in it than an adapter's own files."""
    folder = tmp_path_factory.mktemp("push") / "voice"
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_base), config).save_pretrained(str(folder))
    (folder / "README.md").write_text("# voice\n")
    (folder / ".env").write_text("SECRET=1\n")
    (folder / "notes.txt").write_text("private\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "report.json").write_text("{}")
    return folder


def test_only_an_adapters_own_files_are_sent(hub: Hub, adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    """In a process of its own, several calls in one: the hub's address is read once, at import."""
    script = (
        "import json, os, sys; from training.__main__ import main\n"
        "for token, argv in json.loads(sys.argv[1]):\n"
        "    os.environ['HF_TOKEN'] = token\n"
        "    print('status', main(argv), flush=True)\n"
    )
    run = ["push", str(adapter), "--model", str(tiny_base)]
    calls = [
        (TOKEN, [*run, "me/voice", "--private"]),
        (TOKEN, [*run, "me/voice", "--revision", "next"]),
        (TOKEN, [*run, "others/voice"]),
        ("hf_wrong", [*run, "me/voice"]),
        ("", [*run, "me/dry", "--dry-run"]),
    ]
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(calls)],
        env=environment, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 0", "status 0", "status 2", "status 2", "status 0"], done.stderr
    assert set(hub.received) == {("me/voice", branch, name) for branch in ("main", "next") for name in SENT}
    for (_, _, name), content in hub.received.items():
        assert content == (adapter / name).read_bytes()
    assert hub.created[0].get("visibility") == "private" or hub.created[0].get("private") is True  # by its version
    assert "private" not in hub.created[1].values()
    assert "stays here: .env, checkpoints, notes.txt" in done.stdout
    forbidden, unknown = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "push to others/voice: the token in HF_TOKEN may not write there" in forbidden
    assert "push to me/voice: the hub doesn't take the token in HF_TOKEN" in unknown
    assert not any("dry" in repo for repo, _, _ in hub.received)
    assert TOKEN not in done.stdout + done.stderr


def test_what_cannot_be_sent_is_told_before_anything_is(
    adapter: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*flags: str) -> str:
        assert main(["push", *flags, "--model", str(tiny_base)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "HF_TOKEN is not set: put a token with write access" in refused(str(adapter), "me/voice")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "REPO_ID 'me/voice/x'" in refused(str(adapter), "me/voice/x", "--dry-run")
    (tmp_path / "elsewhere.json").write_text("{}")
    (adapter / "recipe.yaml").symlink_to(tmp_path / "elsewhere.json")
    try:
        assert "recipe.yaml is a link; only files of the folder itself are sent" in refused(
            str(adapter), "me/voice", "--dry-run"
        )
    finally:
        (adapter / "recipe.yaml").unlink()
