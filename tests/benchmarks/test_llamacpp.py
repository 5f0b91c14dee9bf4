"""The comparison with llama.cpp, without llama.cpp: what its bench prints, what we say where it isn't built."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import build_llamacpp, llamacpp
from benchmarks.gguf_model import gguf_name, gguf_shape
from benchmarks.llamacpp import RUNS, LlamaCppError, find_gguf, find_tool, parse, tool_milliseconds, ways
from server.model.config import GPT2Config
from server.model.loader import expected_shapes

# As the tool prints it, shortened.
LINE = '{"n_kv_max": 2048, "flash_attn": 0, "n_threads": 2, "pp": 32, "tg": 16, "pl": 8, "t_pp": 0.671911, "t_tg": %f}'


def output(*seconds: float) -> str:
    return "\n".join(["load: warming up", *(LINE % value for value in seconds), "", "perf: total = 1"])


def fake_tool(folder: Path, text: str, status: int = 0) -> Path:
    """A program that prints `text`, and its arguments on stderr."""
    file = folder / "llama-batched-bench"
    file.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\necho \"$@\" >&2\nexit {status}\n")
    file.chmod(0o755)
    return file


def test_a_step_is_the_median_run_by_its_steps() -> None:
    assert parse(output(0.96, 1.6, 0.8), 8, 16) == pytest.approx(60.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "0 results instead of 3: nothing"),
        ("n_ctx is too small", "0 results instead of 3: n_ctx is too small"),
        (output(0.96, 0.96), "2 results"),
        (output(0.96, 0.96, 0.96).replace('"pl": 8', '"pl": 1'), "expected pl 8, tg 16"),
        (output(0.96, 0.96, 0.96).replace("t_tg", "seconds"), "and t_tg"),
    ],
)
def test_other_output_is_refused_and_quoted(text: str, said: str) -> None:
    with pytest.raises(LlamaCppError, match=re.escape(said)):
        parse(text, 8, 16)


def test_the_tool_gets_both_sizes_and_room_for_them(tmp_path: Path) -> None:
    tool = fake_tool(tmp_path, output(*[0.96] * RUNS))
    assert tool_milliseconds([str(tool)], batch=8, prompt=32, steps=16) == pytest.approx(60.0)
    failing = fake_tool(tmp_path, "", status=3)
    with pytest.raises(LlamaCppError, match="exited with 3: -npp 32 -ntg 16 -npl 8,8,8 -c 384"):
        tool_milliseconds([str(failing)], batch=8, prompt=32, steps=16)


def test_every_way_has_our_threads_and_says_its_cache_type(tmp_path: Path) -> None:
    commands = ways(tmp_path / "tool", tmp_path / "model", "bfloat16", threads=2)
    assert list(commands) == [
        "llama.cpp base, bf16 kv",
        "llama.cpp base, bf16 kv, flash",
        "llama.cpp base, f16 kv, flash",
    ]
    for name, command in commands.items():
        flags = " ".join(command)
        assert "-t 2 -tb 2" in flags
        assert f"-fa {'on' if 'flash' in name else 'off'}" in flags
        assert f"-ctk {'bf16' if 'bf16' in name else 'f16'}" in flags


def test_without_the_tool_the_benchmark_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["llamacpp", "--tool", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stopped:
        llamacpp.main()
    said = f"no program {tmp_path / 'none'}: `make llamacpp` builds it (it needs cmake, g++ and make"
    assert said in str(stopped.value.code)  # a text as the code: printed on stderr, status 1


def test_a_file_that_cannot_be_run_is_no_tool(tmp_path: Path) -> None:
    file = fake_tool(tmp_path, "")
    assert find_tool(file) == file
    file.chmod(0o644)
    with pytest.raises(LlamaCppError, match="make llamacpp"):
        find_tool(file)


def test_gguf_is_taken_from_beside_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty")])
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(LlamaCppError, match="pip install gguf"):
        find_gguf(tmp_path)
    (tmp_path / "gguf.py").write_text("here = True\n")
    assert find_gguf(tmp_path).here
    sys.modules.pop("gguf")


def test_building_names_the_programs_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "argv", ["build_llamacpp", "--into", str(tmp_path / "build")])
    assert build_llamacpp.main() == 1
    assert "not found: cmake, make, g++; install them" in capsys.readouterr().err
    assert not (tmp_path / "build").exists()


def test_every_tensor_has_a_name_and_a_shape_of_llama_cpp() -> None:
    config = GPT2Config.parse({"n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 10})
    tensors = {gguf_name(name): gguf_shape(name, shape) for name, shape in expected_shapes(config).items()}
    assert json.loads(json.dumps(tensors)) == {
        "token_embd.weight": [10, 4], "position_embd.weight": [8, 4],
        "blk.0.attn_norm.weight": [4], "blk.0.attn_norm.bias": [4],
        "blk.0.attn_qkv.weight": [12, 4], "blk.0.attn_qkv.bias": [12],
        "blk.0.attn_output.weight": [4, 4], "blk.0.attn_output.bias": [4],
        "blk.0.ffn_norm.weight": [4], "blk.0.ffn_norm.bias": [4],
        "blk.0.ffn_up.weight": [16, 4], "blk.0.ffn_up.bias": [16],
        "blk.0.ffn_down.weight": [4, 16], "blk.0.ffn_down.bias": [4],
        "output_norm.weight": [4], "output_norm.bias": [4],
    }  # fmt: skip
