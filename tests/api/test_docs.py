"""Generated documents are up to date, and the API process stays light."""

import subprocess
import sys
from pathlib import Path

import pytest

from adapters.adapter import AdapterRef
from server import metrics, settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("path", "made"),
    [
        ("docs/settings.md", settings.document),
        ("docs/metrics.md", lambda: metrics.Metrics("gpt2", 128).document()),
    ],
)
def test_generated_documents_are_up_to_date(path: str, made) -> None:
    assert (ROOT / path).read_text() == made(), f"run `make docs`: {path} is out of date"


def test_main_and_the_api_process_do_not_import_torch() -> None:
    code = "import sys, server.__main__; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_flags_beat_variables_beat_dotenv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("CHORUS_PORT=2001\nCHORUS_MAX_WAITING=7\nCHORUS_DTYPE=float16\nOTHER=1\n")
    monkeypatch.setenv("CHORUS_PORT", "2002")
    monkeypatch.setenv("CHORUS_MAX_WAITING", "8")
    read = settings.read_settings(["--port", "2003"])
    assert (read.port, read.max_waiting, read.dtype) == (2003, 8, "float16")


def test_a_variable_that_names_no_setting_is_told_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHORUS_PROT", "1")
    assert settings.unknown_variables() == ["CHORUS_PROT names no setting; did you mean CHORUS_PORT?"]
    (tmp_path / ".env").write_text("CHORUS_MAX_WATING=3\nchorus_dtpye=float16\nOTHER=1\nchorus_port=2001\n")
    assert settings.unknown_variables()[1:] == [
        ".env: CHORUS_MAX_WATING names no setting; did you mean CHORUS_MAX_WAITING?",
        ".env: chorus_dtpye names no setting; did you mean CHORUS_DTYPE?",
    ]


def test_adapter_labels_are_bounded() -> None:
    made = metrics.Metrics("gpt2", 8)
    for i in range(metrics.MAX_ADAPTER_LABELS + 50):
        made.observe_request([AdapterRef(f"d{i}", f"a{i}", "")], 1, 2, "eos", 0.1, None)
    text = made.render().decode()
    assert text.count("chorus_adapter_requests_total{") == metrics.MAX_ADAPTER_LABELS + 1
    assert 'chorus_adapter_generation_tokens_total{adapter="other",model_name="gpt2"} 100.0' in text


def test_the_version_that_answered_last_is_told() -> None:
    made = metrics.Metrics("gpt2", 8)
    for digest in ("d1", "d2"):
        made.observe_request([AdapterRef(digest, "poe", "")], 1, 2, "eos", 0.1, None)
    lines = [line for line in made.render().decode().splitlines() if line.startswith("chorus_adapter_info{")]
    assert lines == ['chorus_adapter_info{adapter="poe",digest="d2",model_name="gpt2"} 1.0']


def test_a_composition_counts_for_each_of_its_adapters() -> None:
    made = metrics.Metrics("gpt2", 8)
    made.observe_request([AdapterRef("d1", "poe", ""), AdapterRef("d2", "twain", "")], 1, 2, "eos", 0.1, None)
    text = made.render().decode()
    for name in ("poe", "twain"):
        assert f'chorus_adapter_requests_total{{adapter="{name}",model_name="gpt2"}} 1.0' in text
    assert 'chorus_requests_finished_total{finish_reason="eos",model_name="gpt2"} 1.0' in text


def test_lora_info_keeps_only_what_is_true_now() -> None:
    from server.engine.types import StepStats

    made = metrics.Metrics("gpt2", 8)
    made.observe_step(StepStats(running_adapters=("a", "b"), waiting_adapters=("c",)))
    made.observe_step(StepStats(running_adapters=("b",)))
    lines = [line for line in made.render().decode().splitlines() if line.startswith("vllm:lora_requests_info{")]
    assert len(lines) == 1
    assert 'running_lora_adapters="b"' in lines[0]
    assert 'waiting_lora_adapters=""' in lines[0]


def test_the_info_series_tells_only_of_versions_that_answered() -> None:
    made = metrics.Metrics("gpt2", 8)
    made.observe_request([AdapterRef("d1", "poe", "")], 1, 0, "error", 0.1, None)
    assert "chorus_adapter_info{" not in made.render().decode()
    made.observe_request([AdapterRef("d2", "poe", "")], 1, 2, "eos", 0.1, None)
    made.observe_request([AdapterRef("d3", "poe", "")], 1, 0, "error", 0.1, None)
    lines = [line for line in made.render().decode().splitlines() if line.startswith("chorus_adapter_info{")]
    assert lines == ['chorus_adapter_info{adapter="poe",digest="d2",model_name="gpt2"} 1.0']
