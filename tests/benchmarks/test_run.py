"""`make bench`: what of a benchmark that fails, hangs or prints something else is kept, told and ended."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run

ROW = '{"benchmark": "b", "x": 1}'


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_rows_before_a_failure_are_kept() -> None:
    assert run.run(python(f"print('{ROW}')")) == ([{"benchmark": "b", "x": 1}], None)
    rows, problem = run.run(python(f"print('{ROW}', flush=True); raise SystemExit(3)"))
    assert (rows, problem) == ([{"benchmark": "b", "x": 1}], "exit status 3")


def test_what_is_not_a_row_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["loading\n", ROW + "\n", "\n", "3\n", '{"other": 1}\n', '{"benchmark": "b", "x"']
    assert run.read_rows(lines) == [{"benchmark": "b", "x": 1}]
    assert capsys.readouterr().err.splitlines() == [
        "not a row: loading", "not a row: 3", 'not a row: {"other": 1}', 'not a row: {"benchmark": "b", "x"',
    ]  # fmt: skip


@pytest.mark.parametrize("deaf", [False, True], ids=["SIGTERM", "SIGKILL"])
def test_one_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool) -> None:
    monkeypatch.setattr(run, "GRACE_SECONDS", 2)
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " if deaf else ""
    file = tmp_path / "child"
    child = f"{ignore}import os, time; print(os.getpid(), file=open({str(file)!r}, 'w'), flush=True); time.sleep(60)"
    parent = f"""
{ignore}
import subprocess, sys, time
print({ROW!r}, flush=True)
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(60)
"""

    def wait(process: "subprocess.Popen[bytes]", limit: float) -> int:
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
        raise subprocess.TimeoutExpired(process.args, limit)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    assert run.run(python(parent)) == ([{"benchmark": "b", "x": 1}], "not done after 900 s")
    assert_gone(int(file.read_text()))


def test_a_child_left_behind_is_ended(tmp_path: Path) -> None:
    text = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, file=open({!r}, 'w'))"
    assert run.run(python(text.format(str(tmp_path / "child")))) == ([], None)
    assert_gone(int((tmp_path / "child").read_text()))


def assert_gone(pid: int) -> None:
    """No such process, or one that nobody has waited for yet."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is there")


def test_the_rows_of_one_that_failed_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, Any] = {"benchmark": "floor", "x": 1} | dict.fromkeys(run.HARDWARE, "")
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "run", lambda _: ([row], "not done after 900 s"))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["run", "--only", "floor"])
    assert run.main() == 1
    assert '"x": 1' in (tmp_path / "cpu.jsonl").read_text()
    assert "floor: not done after 900 s, 1 rows are kept" in capsys.readouterr().err


@pytest.mark.parametrize("name", run.SELECTION)
def test_each_takes_the_flags_that_it_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--help` after them: flags are read in order."""
    monkeypatch.setattr(sys, "argv", [name, "--json", *run.SELECTION[name], "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main()
    assert stopped.value.code == 0
