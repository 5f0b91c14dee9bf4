"""Where the kernels can't be built, that is said and nothing fails: the server computes with torch alone."""

import platform
import shutil
from pathlib import Path

import pytest

from kernels import build


@pytest.fixture(autouse=True)
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The compilers that were called, on a machine where nothing is built yet."""
    called = list[str]()

    def compile_with(compiler: str) -> Path:
        called.append(compiler)
        return tmp_path / "built.so"

    monkeypatch.setattr(build, "library", lambda: tmp_path / "none.so")
    monkeypatch.setattr(build, "build", compile_with)
    monkeypatch.setenv("CXX", "some-compiler")
    return called


@pytest.mark.parametrize("machine", ["x86_64", "AMD64", "aarch64", "arm64"])
def test_a_processor_with_kernels_compiles_them(
    machine: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert build.main() == 0
    assert compiled == ["some-compiler"]


@pytest.mark.parametrize("machine", ["riscv64", "i686", "ppc64le", ""])
def test_another_processor_is_told_and_skipped(
    machine: str, compiled: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert build.main() == 0
    assert compiled == []
    assert f"none for {machine}" in (words := capsys.readouterr().out)
    assert "torch alone" in words


def test_no_compiler_is_told_and_skipped(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert build.main() == 0
    assert compiled == []
    assert "no C++ compiler" in capsys.readouterr().out
