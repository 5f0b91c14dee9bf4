"""A benchmark's server: what it inherits, and what is said of one that does not start."""

from pathlib import Path

import pytest

from benchmarks import server, serving

PROGRAM = """
import os, sys, time
print(os.getcwd(), sorted(os.listdir()), [k for k in os.environ if k.upper().startswith("CHORUS_")], *sys.argv[1:])
sys.exit(3) if "--end" in sys.argv else time.sleep(60)
"""


@pytest.fixture
def fake_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `python -m server` that tells where it runs, instead of ours."""
    (tmp_path / "server.py").write_text(PROGRAM)
    monkeypatch.setattr(serving, "ROOT", tmp_path)
    monkeypatch.setenv("CHORUS_DTYPE", "bfloat16")
    monkeypatch.setenv("chorus_kernels", "off")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("CHORUS_API_KEY=secret\n")


@pytest.mark.usefixtures("fake_server")
def test_it_inherits_no_settings_and_its_end_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the server ended with 3: ") as told, serving.serving(["--end"]):
        pass
    directory, rest = str(told.value).removeprefix("the server ended with 3: ").split(" ", 1)
    assert Path(directory) != tmp_path
    assert rest.startswith("[] [] "), "an empty directory and no variables"
    scratch = Path(directory).parent
    assert f"--store-dir {scratch}/store --adapters-dir {scratch}/adapters" in rest
    assert not scratch.exists()


@pytest.mark.usefixtures("fake_server")
def test_one_that_is_not_ready_in_time_is_ended_and_told() -> None:
    with (
        pytest.raises(RuntimeError, match=r"not ready after 2 s: .* --store-dir /mine$"),
        serving.serving(["--store-dir", "/mine"], seconds=2),
    ):
        pass


def test_the_server_computes_as_the_engine_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = server.server_flags(Path("model"))
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert given["--model"] == str(tmp_path / "model")
    assert (given["--device"], given["--dtype"], given["--kernels"]) == ("cpu", "float32", "auto")
    assert given["--max-batch-size"] == str(server.STREAMS)
