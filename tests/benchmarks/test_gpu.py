"""The GPU's benchmark without a GPU: what it times and what it keeps, through Triton's interpreter."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_checks, gpu_steps
from benchmarks.gpu_checks import Row, new_engine, random_model
from kernels.gpu.lora import LoraMeta
from server.engine import cuda_graph
from server.engine.device_runner import DeviceRunner
from server.model.gpt2 import GPT2
from server.model.triton_backend import TritonBackend
from tests.engine.test_device_runner import FakeCapture

TINY = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 50}
CPU = torch.device("cpu")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> GPT2:
    monkeypatch.setattr(gpu_checks, "choose_backend", lambda *_: TritonBackend())
    monkeypatch.setattr(cuda_graph, "CudaCapture", FakeCapture)
    monkeypatch.setattr(gpu_steps, "PROMPT", 4)
    monkeypatch.setattr(gpu_steps, "STEPS", 1)
    return random_model(TINY, CPU, torch.float32)


def test_the_replay_is_timed_over_a_full_batch_of_warm_adapters(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(model, 3, gpu_steps.positions(3))
    runner: Any = engine._runner
    assert isinstance(runner, DeviceRunner)
    seen: dict[str, Any] = {}

    def timed(work: Callable[[], object]) -> float:
        seen.update({name: runner._decode.host[name][:4].tolist() for name in ("rows", "positions")})
        seen["tile_slot"] = LoraMeta.of(runner._decode.host_meta(0, 4)).tile_slot.tolist()
        seen["slots"] = {runner._residency.slot(f"step{i}") for i in range(3)}
        running = engine._scheduler.running.values()
        seen["next"] = [s.num_computed for s in sorted(running, key=lambda s: s.row or 0)]
        captured = len(runner._graphs)
        work()
        seen["captured"] = len(runner._graphs) - captured
        return 1.0

    monkeypatch.setattr(gpu_steps, "device_seconds", timed)
    row = gpu_steps.step_row(engine, model, 3, 3, bandwidth=1e9)
    assert (row["batch"], row["adapters"], row["graph_ms"]) == (3, 3, 1000.0)
    assert seen["rows"] == [0, 1, 2, 3], "all three, and the padding of the bucket of four"
    assert seen["positions"][:3] == seen["next"], "what was written is the step that comes next"
    assert seen["slots"] <= set(seen["tile_slot"]), "each of the adapters is read"
    assert seen["captured"] == 0, "the graph is the one that the steps ran"
    assert not engine.has_work, "the sequences went on to their end"
    engine.check_integrity()
    engine.close()


def test_rows_measured_before_a_failure_stay(
    model: GPT2, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = gpu_steps.step_row

    def step_row(engine: Any, of: GPT2, batch: int, distinct: int, bandwidth: float | None) -> Row:
        if batch == distinct == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried a lot")
        return real(engine, of, batch, distinct, bandwidth)

    monkeypatch.setattr(gpu_steps, "device_seconds", lambda work: work() or 1.0)
    monkeypatch.setattr(gpu_steps, "step_row", step_row)
    file = tmp_path / "gpu.csv"
    report = gpu.Report(lambda rows: gpu.tell(rows, {"gpu": "none"}, file, as_json=True))
    for batch in (2, 1):
        report.part(f"steps of {batch}", lambda batch=batch: gpu_steps.step_rows(model, batch, 1e9))
    assert [(r["part"], r.get("batch"), r.get("adapters")) for r in report.rows] == [
        ("step", 2, 0), ("step", 2, 1), ("steps of 2", None, None), ("step", 1, 0), ("step", 1, 1),
    ]  # fmt: skip
    assert report.rows[2]["error"] == "OutOfMemoryError: CUDA out of memory. Tried a lot"
    assert report.failed == ["steps of 2"]
    assert report.rows[0]["to_base"] == report.rows[1]["to_identical"] == 1.0
    with file.open() as written:
        assert [row["error"] for row in csv.DictReader(written)].count("") == 4
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["part"] for line in lines] == [row["part"] for row in report.rows]
    assert all((line["benchmark"], line["gpu"]) == ("gpu", "none") for line in lines)
    assert gpu.our_step(report.rows, 2, 1) == report.rows[1]["step_ms"]


def test_peft_has_a_row_without_our_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import peft

    class Model:
        config = type("config", (), {"vocab_size": 50})

        def to(self, *to: object) -> "Model":
            assert to == (CPU, torch.float16)
            return self

    monkeypatch.setattr(peft, "peft_model", lambda *_: Model())
    monkeypatch.setattr(peft, "peft_mixed", lambda *_: 1.0)
    monkeypatch.setattr(peft, "step_milliseconds", lambda _: 12.0)
    monkeypatch.setattr(gpu, "CUDA", CPU)
    failed: list[Row] = [{"part": "steps of 32", "error": "out of memory"}]
    step: Row = {"part": "step", "batch": 32, "adapters": 32, "step_ms": 4.0}
    assert gpu.peft(failed, None, torch.float16)[0] == {
        "part": "peft", "dtype": "float16", "batch": 32, "adapters": 32, "step_ms": 12.0, "to_chorus": "",
    }  # fmt: skip
    assert gpu.peft([*failed, step], None, torch.float16)[0]["to_chorus"] == 3.0


def test_what_needs_a_part_that_failed_does_without_it(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise torch.OutOfMemoryError("no room")

    seen: list[float | None] = []
    for name in ("check_tests", "check_engine", "products", "sampler", "others", "peft"):
        monkeypatch.setattr(gpu, name, lambda *_, name=name: [{"part": name}])
    monkeypatch.setattr(gpu, "BATCHES", (1,))
    monkeypatch.setattr(gpu, "step_rows", lambda _model, _batch, bandwidth: seen.append(bandwidth) or [{"part": "s"}])
    monkeypatch.setattr(gpu, "copy_bandwidth", fail)
    monkeypatch.setattr(gpu, "random_model", lambda *_: model)
    report = gpu.Report(lambda _: None)
    gpu.measure(report, None, torch.float32)
    assert (report.failed, seen) == (["copy"], [None])
    parts = ["check_tests", "check_engine", "copy", "products", "s", "sampler", "others", "peft"]
    assert [row["part"] for row in report.rows] == parts
    monkeypatch.setattr(gpu, "random_model", fail)
    report = gpu.Report(lambda _: None)
    gpu.measure(report, None, torch.float32)
    assert report.failed == ["copy", "model"]
    assert [row["part"] for row in report.rows][-3:] == ["model", "sampler", "peft"]


def test_a_step_has_no_floor_without_a_bandwidth(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "device_seconds", lambda work: work() or 1.0)
    rows = list(gpu_steps.step_rows(model, 1, None))
    assert [(row["to_floor"], row["dtype"]) for row in rows] == [("", "float32")] * 2


def test_the_runner_is_among_the_checks() -> None:
    assert "tests/engine/test_device_runner.py" in gpu_checks.TESTS
    assert all((Path(__file__).parents[2] / file).is_file() for file in gpu_checks.TESTS)
