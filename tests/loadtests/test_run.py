"""The whole run, in a process of its own: Locust replaces parts of the standard library where it is imported."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from loadtests.run import ROOT, LoadTestError, judge, read_rows, table
from server.model.source import DEMO_MODEL
from tests.loadtests.fake import fake_server
from tests.oracle import make_adapter


def run(output: Path, *flags: str, seconds: int = 2) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "loadtests.run",
        "--users",
        "4",
        "--seconds",
        str(seconds),
        "--output",
        str(output),
    ]
    return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, timeout=240)


def counts(output: Path) -> dict[str, tuple[int, int]]:
    rows = read_rows(output / "requests.csv")
    return {row["Name"]: (int(row["Request Count"]), int(row["Failure Count"])) for row in rows}


def test_right_answers_pass_and_every_row_is_there(tmp_path: Path) -> None:
    with fake_server() as url:
        result = run(tmp_path, "--url", url)
    assert result.returncode == 0, result.stderr + (tmp_path / "locust.log").read_text()
    rows = counts(tmp_path)
    assert set(rows) == {"/generate", "/generate_stream", "TTFT", "inter-token"}
    assert all(count > 0 and failed == 0 for count, failed in rows.values())
    assert rows["TTFT"][0] == rows["/generate_stream"][0]
    assert "inter-token" in result.stdout
    assert "TTFT" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("500", ["status 500"]), ("short", ["truncated stream", "ChunkedEncodingError"])],
)
def test_wrong_answers_fail_the_run(tmp_path: Path, wrong: str, said: list[str]) -> None:
    with fake_server(wrong) as url:
        result = run(tmp_path, "--url", url)
    assert result.returncode == 1, result.stdout
    assert "requests failed" in result.stderr
    failures = (tmp_path / "failures.csv").read_text()
    assert all(text in failures for text in said), failures
    count, failed = counts(tmp_path)["/generate_stream"]
    assert count == failed > 0


def test_a_server_that_is_not_ready_fails_the_run(tmp_path: Path) -> None:
    with fake_server("unready") as url:
        result = run(tmp_path, "--url", url)
    assert result.returncode == 1
    assert "/ready is not 200 after 3 s: status 503" in result.stderr


def test_a_server_that_does_not_start_fails_the_run(tmp_path: Path) -> None:
    result = run(tmp_path, "--", "--model", str(tmp_path / "nothing"))
    assert result.returncode == 1
    assert "the server did not start" in result.stderr
    assert "does not exist" in result.stderr  # the server's own words


def test_a_run_without_requests_or_with_an_error_exit_fails() -> None:
    row = {"Type": "POST", "Request Count": "3", "Failure Count": "0"}
    judge([row], 0)
    for rows, code in (
        ([], 0),
        ([row | {"Request Count": "0"}], 0),
        ([row | {"Failure Count": "1"}], 0),
        ([row], 1),
        ([row | {"Type": "stream"}], 0),
    ):
        with pytest.raises(LoadTestError):
            judge(rows, code)


def test_the_table_is_aligned() -> None:
    row = {"Name": "TTFT", "Request Count": "12", "Failure Count": "0", "50%": "110", "95%": "250", "99%": "260"}
    lines = table([row | {"Max Response Time": "261.25"}]).splitlines()
    assert lines[0].split() == ["count", "failed", "p50", "ms", "p95", "ms", "p99", "ms", "max", "ms"]
    assert lines[1].split() == ["TTFT", "12", "0", "110", "250", "260", "261"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.slow
def test_the_real_server_is_started_loaded_and_stopped(tmp_path: Path) -> None:
    for seed in range(3):
        make_adapter(DEMO_MODEL, tmp_path / f"adapters/voice{seed}", seed, ["c_attn"], size=0.1)
    result = run(tmp_path, "--", "--adapters-dir", str(tmp_path / "adapters"), seconds=5)
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(count > 0 and failed == 0 for count, failed in counts(tmp_path).values())
    url = result.stdout.partition(" on ")[2].split()[0]
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/ready")
