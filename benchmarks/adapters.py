"""Many adapters registered, more than fit, of many ranks, and loads beside running streams.

`python -m benchmarks.adapters [--json]`. Closed loop at B = 32: prompts of 16 tokens, 32 new ones, greedy, as many
requests waiting as running. The first ones are shorter, so that later about one ends and one begins in every step.
Timed once 8 have ended, for `--requests` more. `distinct` is how many adapters ran in a step, on average; `token_ms`,
`p50` and `p99` are milliseconds between two tokens of a sequence.

- registered: a request's adapter is drawn from a power law (exponent 1) over 1 to 1,000 of rank 8. The arena holds all
  of them (budget `arena_MB`); those asked for are in it before the clock starts. With one registered all rows share its
  weights; with 32 and more up to 32 distinct ones run at once. So `to_first` holds the price of distinct weights and of
  the registry together; what 1,000 lose against 32 is that of the registry, and of more distinct ones (`distinct`).
- ranks: uniform over 32 adapters. Ranks 8 to 64 do the work of rank 30, so both all 8 and all 30 stand beside them.
- working set: uniform over 64, 128 and 256 adapters of rank 8 with an arena of 64, full when the clock starts. Loads
  are the server's: PEFT folders (fp32 safetensors) inspected, hashed and read from the page cache on a loading thread.
- latency: 31 streams on resident adapters; every 8 steps one more request, of one token, in turn for an adapter that
  is resident and for one that has to be loaded. The figures are of the steps after either.

Writes 256 adapters (1.2 GB at gpt2-medium's sizes) into a temporary folder. SCHED_FIFO spoils the last two: the step's
threads wait spinning, and the loading thread, no longer their equal, finds no core.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.adapter import Adapter, AdapterRef
from adapters.lora_config import CONFIG_FILE
from adapters.validation import WEIGHTS_FILE, inspect_adapter
from adapters.weights import load_adapter
from benchmarks.common import (
    RANK,
    TARGETS,
    adapter_bytes,
    alternate,
    emit,
    make_adapter,
    make_engine,
    make_model,
    median,
    parser,
    warm,
)
from server.engine.engine import Engine
from server.engine.types import Request, SamplingParams, SequenceOutput, StepStats
from server.model.gpt2 import GPT2

BATCH, PROMPT, TOKENS = 32, 16, 32
RESIDENT = 64
MIXED_RANKS, RANKED = (8, 16, 32, 64), 32
PERIOD, PERIODS = 8, 16  # steps between the latency part's requests; how many in a run
PARTS = ("registered", "working_set", "ranks", "latency")


@dataclass
class Figures:
    """Of one timed run."""

    seconds: float = 0.0
    tokens: int = 0
    loads: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    distinct: list[int] = field(default_factory=lambda: list[int]())  # adapters of each step
    latencies: list[float] = field(default_factory=lambda: list[float]())  # seconds between a sequence's tokens

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def add(self, stats: StepStats, before: StepStats) -> None:
        """Count a step; `before` is the last one's, for what is a total."""
        self.tokens += stats.num_generated_tokens
        self.loads += stats.adapter_loads - before.adapter_loads
        self.evictions += stats.adapter_evictions - before.adapter_evictions
        self.load_seconds += stats.adapter_load_seconds - before.adapter_load_seconds
        if stats.batch_size:
            self.distinct.append(len(stats.running_adapters))
        self.latencies += stats.inter_token_latencies


class Clients:
    """Sends requests of random prompts and drops what is still under way at the end."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine, self._rng, self._sent = engine, random.Random(seed), 0
        self._in_flight: set[str] = set()

    def send(self, ref: AdapterRef | None, tokens: int, prompt: int = PROMPT) -> None:
        """Queue one request."""
        name = str(self._sent)
        ids = tuple(self._rng.randrange(50257) for _ in range(prompt))
        self._engine.add_request(Request(name, ids, SamplingParams(max_tokens=tokens), ref))
        self._sent += 1
        self._in_flight.add(name)

    def ended(self, outputs: Sequence[SequenceOutput]) -> int:
        """How many of a step's outputs are the last of their request."""
        names = {o.request_id for o in outputs if o.finish_reason is not None}
        self._in_flight -= names
        return len(names)

    def leave(self) -> None:
        """Abort what is under way."""
        for name in self._in_flight:
            self._engine.abort(name)
        self._engine.check_integrity()


def closed_loop(engine: Engine, order: Sequence[AdapterRef]) -> Figures:
    """The figures of the requests of `order` (all but the first 2.25 B) in the steady state."""
    clients, figures = Clients(engine, seed=0), Figures()
    for i, ref in enumerate(order[: 2 * BATCH]):
        clients.send(ref, i % TOKENS + 1 if i < BATCH else TOKENS)
    rest, ended, before = iter(order[2 * BATCH :]), 0, StepStats()
    start = time.perf_counter()
    while True:
        step = engine.step()
        warming = ended < BATCH // 4
        for _ in range(new := clients.ended(step.outputs)):
            if (ref := next(rest, None)) is None:
                figures.seconds = time.perf_counter() - start
                clients.leave()
                return figures
            clients.send(ref, TOKENS)
        ended += new
        if not warming:
            figures.add(step.stats, before)
        elif ended >= BATCH // 4:
            start = time.perf_counter()
        before = step.stats
        if not step.stats.batch_size:
            time.sleep(0.0005)  # nothing but loads is under way


def beside_loads(engine: Engine, streams: Sequence[AdapterRef], cold: Iterator[AdapterRef]) -> tuple[Figures, Figures]:
    """The streams' figures after requests for resident adapters, and after ones for adapters from `cold`."""
    clients, beside = Clients(engine, seed=0), (Figures(), Figures())
    for ref in streams:
        clients.send(ref, PERIOD * (PERIODS + 1))
    before = engine.step().stats
    for _ in range(2):
        before = engine.step().stats
    for period in range(PERIODS):
        clients.send(next(cold) if period % 2 else streams[period % len(streams)], tokens=1, prompt=1)
        figures = beside[period % 2]
        for _ in range(PERIOD):
            step = engine.step()
            clients.ended(step.outputs)
            figures.add(step.stats, before)
            before = step.stats
    clients.leave()
    return beside


def write_adapters(root: Path, model: GPT2, count: int) -> list[AdapterRef]:
    """Folders as PEFT saves them, of random fp32 weights at rank RANK."""
    shape, refs = model.config.adapter_shape, list[AdapterRef]()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(TARGETS)}
    config |= {"fan_in_fan_out": True}
    for i in range(count):
        folder = root / f"a{i}"
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        tensors: dict[str, torch.Tensor] = {}
        for key, pair in make_adapter(AdapterRef("", "", ""), model, dtype=torch.float32).pairs.items():
            name = f"base_model.model.transformer.{key}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = pair.a, pair.b.T.contiguous()
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        refs.append(inspect_adapter(folder, folder.name, shape).ref)
    return refs


def disk_engine(model: GPT2) -> Engine:
    """An engine whose arena holds RESIDENT adapters of rank RANK and that loads them as the server does."""
    torch.get_num_threads()  # settled for this thread, before the loading one takes a single one for itself

    def load(ref: AdapterRef) -> Adapter:
        torch.set_num_threads(1)
        return load_adapter(ref, model.config.adapter_shape, model.dtype)

    return make_engine(model, BATCH, 256, RESIDENT * adapter_bytes(model), load)


def power_law(refs: Sequence[AdapterRef], requests: int) -> list[AdapterRef]:
    """A run's order. Exponent 1: the first is asked for twice as often as the second."""
    count = 2 * BATCH + BATCH // 4 + requests
    return random.Random(0).choices(refs, [1 / (i + 1) for i in range(len(refs))], k=count)


def uniform(refs: Sequence[AdapterRef], requests: int) -> list[AdapterRef]:
    """A run's order, each as often as another."""
    return random.Random(0).choices(refs, k=2 * BATCH + BATCH // 4 + requests)


def summary(runs: Sequence[Figures]) -> dict[str, Any]:
    """Columns of a row: the rate is the median of the runs, latencies and counts are those of all of them."""
    loads, latencies = sum(run.loads for run in runs), [1000 * s for run in runs for s in run.latencies]
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "distinct": round(statistics.mean(n for run in runs for n in run.distinct), 1),
        "loads": loads, "evictions": sum(run.evictions for run in runs),
        "ms_per_load": round(1000 * sum(run.load_seconds for run in runs) / loads, 1) if loads else 0.0,
        "token_ms": round(statistics.mean(latencies), 1), "p50": round(cuts[49], 1), "p99": round(cuts[98], 1),
    }  # fmt: skip


def report(args: argparse.Namespace, part: str, column: str, runs: dict[str, list[Figures]], **more: Any) -> None:
    """A row for each variant; `to_first` is its rate over the first one's."""
    first = median([run.rate for run in next(iter(runs.values()))])
    for name, figures in runs.items():
        rate = median([run.rate for run in figures])
        row = {"benchmark": f"adapters, {part}", "dtype": args.dtype, "batch": BATCH, column: name} | more
        emit(row | {"tokens_per_second": rate, "to_first": round(rate / first, 3)} | summary(figures), args.json)


def registered(model: GPT2, args: argparse.Namespace) -> None:
    """From one adapter to a thousand, all of those asked for resident."""
    most = max(args.registered)
    memory = most * adapter_bytes(model)
    engine = make_engine(model, BATCH, 64, memory)
    refs = [AdapterRef(f"d{i}", f"a{i}", "") for i in range(most)]
    orders = {str(n): power_law(refs[:n], args.requests) for n in args.registered}
    warm(engine, {ref for order in orders.values() for ref in order})
    runs = alternate({name: partial(closed_loop, engine, order) for name, order in orders.items()}, args.repeats)
    engine.close()
    report(args, "registered", "registered", runs, arena_MB=memory // 10**6)


def ranks(model: GPT2, args: argparse.Namespace) -> None:
    """Mixed ranks beside one rank for all: the same number of adapters, and the same sum of ranks."""
    kinds = {
        "8": (RANK,) * RANKED,
        "8 to 64": tuple(MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(RANKED)),
        "30": (sum(MIXED_RANKS) // len(MIXED_RANKS),) * RANKED,
    }
    orders: dict[str, list[AdapterRef]] = {}
    for name, each in kinds.items():
        refs = [AdapterRef(f"d{i}@{rank}", f"r{rank}-{i}", "") for i, rank in enumerate(each)]
        orders[f"{name}, sum {sum(each)}"] = uniform(refs, args.requests)
    engine = make_engine(model, BATCH, 64, sum(map(sum, kinds.values())) * adapter_bytes(model, 1))
    warm(engine, {ref for order in orders.values() for ref in order})
    runs = alternate({name: partial(closed_loop, engine, order) for name, order in orders.items()}, args.repeats)
    engine.close()
    report(args, "ranks", "ranks", runs, adapters=RANKED)


def working_set(model: GPT2, args: argparse.Namespace, refs: Sequence[AdapterRef]) -> None:
    """One, two and four times what the arena holds."""
    engine = disk_engine(model)

    def run(count: int) -> Figures:
        warm(engine, refs[:RESIDENT])
        return closed_loop(engine, uniform(refs[:count], args.requests))

    runs = alternate({str(n * RESIDENT): partial(run, n * RESIDENT) for n in (1, 2, 4)}, args.repeats)
    engine.close()
    report(args, "working set", "working_set", runs, resident=RESIDENT)


def latency(model: GPT2, args: argparse.Namespace, refs: Sequence[AdapterRef]) -> None:
    """Streams beside loads, and beside the same requests without loads."""
    engine, streams, cold = disk_engine(model), refs[: BATCH - 1], itertools.cycle(refs[RESIDENT:])
    runs: dict[str, list[Figures]] = {"resident": [], "cold": []}
    for _ in range(args.repeats):
        warm(engine, refs[:RESIDENT])
        for figures, each in zip(runs.values(), beside_loads(engine, streams, cold), strict=True):
            figures.append(each)
    engine.close()
    for name, figures in runs.items():
        row = {"benchmark": "adapters, latency", "dtype": args.dtype, "streams": len(streams), "requests": name}
        emit(row | summary(figures), args.json)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--registered", type=int, nargs="+", default=[1, 8, 32, 256, 1000])
    p.add_argument("--requests", type=int, default=48, help="that a run times")
    p.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    args = p.parse_args()
    model = make_model(args.model, getattr(torch, args.dtype))
    if "registered" in args.only:
        registered(model, args)
    if "ranks" in args.only:
        ranks(model, args)
    if {"working_set", "latency"} & set(args.only):
        with tempfile.TemporaryDirectory() as root:
            refs = write_adapters(Path(root), model, 4 * RESIDENT)
            if "working_set" in args.only:
                working_set(model, args, refs)
            if "latency" in args.only:
                latency(model, args, refs)


if __name__ == "__main__":
    main()
