"""A decode step on a GPU, with all that belongs to it and the graph's replay alone; a part of `gpu`."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from adapters.adapter import AdapterRef
from benchmarks.common import adapter_bytes, advance, warm
from benchmarks.full_batch import full_steps, max_tokens
from benchmarks.gpu_checks import Row, new_engine, type_name
from server.engine.engine import Engine
from server.model.gpt2 import GPT2

PROMPT, STEPS = 32, 40


def device_seconds(work: Callable[[], object], repeats: int = 50) -> float:
    """Median by device events, after a warm-up."""
    for _ in range(5):
        work()
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def positions(batch: int) -> int:
    """That a sequence of `step_row` takes."""
    return PROMPT + max_tokens(batch, PROMPT, STEPS, max(512, batch))


def step_rows(model: GPT2, batch: int, bandwidth: float | None) -> Iterator[Row]:
    """Steps of one batch size by distinct adapters; `to_base` and `to_identical` compare them with none and with one.

    `bandwidth`: bytes a second of a copy; without one `to_floor` stays empty.
    An engine of its own: whatever one batch size fails of, the next begins anew.
    """
    engine = new_engine(model, batch, positions(batch))
    done: dict[int, Row] = {}
    try:
        for distinct in sorted({0, 1, min(batch, 32), batch}):
            row = done[distinct] = step_row(engine, model, batch, distinct, bandwidth)
            row["to_base"] = round(row["step_ms"] / done[0]["step_ms"], 3)
            row["to_identical"] = round(row["step_ms"] / done[1]["step_ms"], 3) if distinct else ""
            yield row
    finally:
        engine.close()


def step_row(engine: Engine, model: GPT2, batch: int, distinct: int, bandwidth: float | None) -> Row:
    """A decode step of `batch` sequences over `distinct` adapters (0: the base). Raises RuntimeError if one fails."""
    refs = [AdapterRef(f"step{i}", f"a{i}", "") for i in range(distinct)]
    warm(engine, refs)
    step = statistics.median(full_steps(engine, model.config.vocab_size, batch, PROMPT, STEPS, refs))
    graph = replay_seconds(engine, batch)
    while engine.has_work:
        advance(engine)
    floor = (model.nbytes + distinct * adapter_bytes(model)) / bandwidth if bandwidth else None
    return {
        "part": "step", "dtype": type_name(model.dtype), "batch": batch, "adapters": distinct,
        "step_ms": round(1000 * step, 4), "graph_ms": round(1000 * graph, 4), "tokens_per_second": round(batch / step),
        "to_floor": round(step / floor, 2) if floor else "", "graph_to_floor": round(graph / floor, 2) if floor else "",
    }  # fmt: skip


@torch.inference_mode()
def replay_seconds(engine: Engine, batch: int) -> float:
    """The graph's replay alone, over the `batch` sequences that decode now.

    It computes their next step without ending it: that step, when it comes, writes the same once more.
    """
    from server.engine.device_runner import DeviceRunner, _shape  # needs triton

    runner: Any = engine._runner
    assert isinstance(runner, DeviceRunner), f"{type(runner).__name__}: the model's backend captures no graphs"
    items = engine._scheduler.schedule()[0].items
    assert [item.prefill for item in items] == [False] * batch, "the batch isn't full, or not all of it decodes"
    size = next(size for size in runner._buckets if size >= batch)
    shape = _shape(runner._write(items, runner._decode, size))
    runner._decode.upload()
    return device_seconds(partial(runner._run_decode, size, *shape))
