"""Settings and checkpoints that can't be served are refused before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from server import __main__ as cli
from server.model.source import DEMO_MODEL
from tests.oracle import make_adapter


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ChorusServer", lambda *_: pytest.fail("a server was made"))


def test_the_adapters_memory_is_read_as_a_size_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.read_settings(["--adapter-memory", "1.5GiB"]).adapter_memory == 3 << 29
    for value in ("12", "lots"):
        assert cli.main(["--adapter-memory", value]) == 2
        line = capsys.readouterr().err
        assert line.startswith("--adapter-memory: ")
        assert f"'{value}'" in line


def test_fewer_tokens_a_step_than_requests_run_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--max-batch-tokens", "31"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("--max-batch-tokens: must be at least 32, --max-batch-size")
    assert cli.main(["--max-batch-tokens", "31", "--max-batch-size", "0"]) == 2
    assert capsys.readouterr().err.startswith("--max-batch-size: "), "the wrong one is named, not the one beside it"


def test_more_positions_than_the_model_has_exits_2(caplog: pytest.LogCaptureFixture) -> None:
    assert cli.main(["--max-model-len", "5000"]) == 2
    assert "--max-model-len 5000 exceeds the model's 256 positions" in caplog.text


def test_a_tokenizer_of_another_model_exits_1(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(DEMO_MODEL / "tokenizer.json", base)
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 50256, "eos_token_id": 0, "bos_token_id": 0}))
    assert cli.main(["--model", str(base)]) == 1
    assert "the tokenizer has 50257 tokens, the model's vocab_size is 50256" in caplog.text
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 50304}))
    served = cli._served(cli.read_settings(["--model", str(base), "--store-dir", str(tmp_path / "store")]), base)
    assert len(served.vocabulary) == 50304, "a vocabulary padded for speed is fine"


def test_names_with_a_meaning_of_their_own_are_no_adapters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("base", "demo", "other", "mine"):
        make_adapter(DEMO_MODEL, tmp_path / name, 1, ["c_attn"], rank=2, size=0.2)
    flags = ["--adapters-dir", str(tmp_path), "--store-dir", str(tmp_path / ".store")]
    served = cli._served(cli.read_settings(flags), DEMO_MODEL)
    assert [found.ref.name for found in served.store.all()] == ["mine"]
    assert caplog.text.count("the name is reserved") == 3
