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
- latency: 31 streams on resident adapters; every 4 steps one more request, of one token, in turn for an adapter that
  is resident and for one that has to be loaded, 100 of each. The figures are of the steps after either.

Writes 256 adapters (1.2 GB at gpt2-medium's sizes) into a temporary folder. SCHED_FIFO spoils the last two: the step's
threads wait spinning, and the loading thread, no longer their equal, finds no core.
"""

import argparse
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapters.adapter import Adapter, AdapterRef
from adapters.lora_config import CONFIG_FILE
from adapters.validation import WEIGHTS_FILE, inspect_adapter
from adapters.weights import load_adapter
from benchmarks.closed_loop import BATCH, PROMPT, TOKENS, Clients, Figures, closed_loop
from benchmarks.common import (
    RANK,
    TARGETS,
    adapter_bytes,
    advance,
    alternate,
    count,
    emit,
    make_adapter,
    make_engine,
    make_model,
    median,
    parser,
    require_positions,
    warm,
)
from server.engine.engine import Engine
from server.model.gpt2 import GPT2

RESIDENT = 64
MIXED_RANKS, RANKED = (8, 16, 32, 64), 32
PERIOD, PERIODS = 4, 200  # steps between the latency part's requests; how many in a run
STREAM = PROMPT + PERIOD * (PERIODS + 1)  # tokens of a stream of the latency part, its prompt included
PARTS = ("registered", "working_set", "ranks", "latency")


def beside_loads(
    engine: Engine, vocab_size: int, streams: Sequence[AdapterRef], cold: Iterator[AdapterRef]
) -> tuple[Figures, Figures]:
    """The streams' figures after requests for resident adapters, and after ones for adapters from `cold`."""
    clients, beside = Clients(engine, vocab_size, seed=0), (Figures(), Figures())
    for ref in streams:
        clients.send(ref, STREAM - PROMPT)
    for _ in range(2):
        advance(engine)
    before = advance(engine).stats
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


def write_adapters(root: Path, model: GPT2, number: int) -> list[AdapterRef]:
    """Folders as PEFT saves them, of random fp32 weights at rank RANK."""
    shape, refs = model.config.adapter_shape, list[AdapterRef]()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(TARGETS)}
    config |= {"fan_in_fan_out": True}
    for i in range(number):
        folder = root / f"a{i}"
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(json.dumps(config))
        tensors: dict[str, torch.Tensor] = {}
        for key, pair in make_adapter(AdapterRef(folder.name, "", ""), model, dtype=torch.float32).pairs.items():
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

    return make_engine(model, BATCH, STREAM, RESIDENT * adapter_bytes(model), load)


def power_law(refs: Sequence[AdapterRef], requests: int) -> list[AdapterRef]:
    """A run's order. Exponent 1: the first is asked for twice as often as the second."""
    number = 2 * BATCH + BATCH // 4 + requests
    return random.Random(0).choices(refs, [1 / (i + 1) for i in range(len(refs))], k=number)


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
    engine = make_engine(model, BATCH, PROMPT + TOKENS, memory)
    refs = [AdapterRef(f"d{i}", f"a{i}", "") for i in range(most)]
    orders = {str(n): power_law(refs[:n], args.requests) for n in args.registered}
    warm(engine, {ref for order in orders.values() for ref in order})
    run = partial(closed_loop, engine, model.config.vocab_size)
    runs = alternate({name: partial(run, order) for name, order in orders.items()}, args.repeats)
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
    engine = make_engine(model, BATCH, PROMPT + TOKENS, sum(map(sum, kinds.values())) * adapter_bytes(model, 1))
    warm(engine, {ref for order in orders.values() for ref in order})
    run = partial(closed_loop, engine, model.config.vocab_size)
    runs = alternate({name: partial(run, order) for name, order in orders.items()}, args.repeats)
    engine.close()
    report(args, "ranks", "ranks", runs, adapters=RANKED)


def working_set(model: GPT2, args: argparse.Namespace, refs: Sequence[AdapterRef]) -> None:
    """One, two and four times what the arena holds."""
    engine = disk_engine(model)

    def run(number: int) -> Figures:
        warm(engine, refs[:RESIDENT])
        return closed_loop(engine, model.config.vocab_size, uniform(refs[:number], args.requests))

    runs = alternate({str(n * RESIDENT): partial(run, n * RESIDENT) for n in (1, 2, 4)}, args.repeats)
    engine.close()
    report(args, "working set", "working_set", runs, resident=RESIDENT)


def latency(model: GPT2, args: argparse.Namespace, refs: Sequence[AdapterRef]) -> None:
    """Streams beside loads, and beside the same requests without loads."""
    engine, streams, cold = disk_engine(model), refs[: BATCH - 1], itertools.cycle(refs[RESIDENT:])
    runs: dict[str, list[Figures]] = {"resident": [], "cold": []}
    for _ in range(args.repeats):
        warm(engine, refs[:RESIDENT])
        both = beside_loads(engine, model.config.vocab_size, streams, cold)
        for figures, each in zip(runs.values(), both, strict=True):
            figures.append(each)
    engine.close()
    for name, figures in runs.items():
        row = {"benchmark": "adapters, latency", "dtype": args.dtype, "streams": len(streams), "requests": name}
        emit(row | summary(figures), args.json)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--registered", type=count, nargs="+", default=[1, 8, 32, 256, 1000])
    p.add_argument("--requests", type=count, default=48, help=f"that a run times, at least {BATCH}")
    p.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    args = p.parse_args()
    if args.requests < BATCH:
        p.error(f"argument --requests: {args.requests}, expected at least {BATCH}: fewer may all end in one step")
    from_disk = {"working_set", "latency"} & set(args.only)
    require_positions(p, args.model, STREAM if from_disk else PROMPT + TOKENS, f"--only {' '.join(args.only)}")
    model = make_model(args.model, getattr(torch, args.dtype))
    if "registered" in args.only:
        registered(model, args)
    if "ranks" in args.only:
        ranks(model, args)
    if from_disk:
        with tempfile.TemporaryDirectory() as root:
            refs = write_adapters(Path(root), model, 4 * RESIDENT)
            if "working_set" in args.only:
                working_set(model, args, refs)
            if "latency" in args.only:
                latency(model, args, refs)


if __name__ == "__main__":
    main()
