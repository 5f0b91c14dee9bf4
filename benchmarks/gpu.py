"""Everything about the GPU path in one call: checks, then times, a short table last.

`python -m benchmarks.gpu --out DIR`. Checks: the tests of kernels, compiled, and of the runner (pytest, hypothesis,
transformers and peft have to be there), and greedy tokens of the captured engine against the CPU's in fp32. Times, at
gpt2-medium's sizes in --dtype (random weights, or --model; rank 8 on c_attn and attn.c_proj, prompts of 32 tokens): the
two ceilings (copy bandwidth, matrix products), an engine step by batch size and distinct adapters (`step_ms`, all
included, and `graph_ms`, the replay alone by device events), sampling, a prompt of 512 tokens, an adapter's way to the
device, and PEFT's mixed batch where peft is installed. `to_floor` is a step over the reading of the weights, and of the
distinct adapters', at the copy's bandwidth. Rows go to DIR/gpu.csv as they are measured, and with --json to
stdout; a part that fails (each batch size is one) keeps the rows it has, gets one with its error, and is told by the
exit status.
"""

import csv
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from adapters.adapter import AdapterRef, alone
from benchmarks.common import MEDIUM, advance, hardware, parser, require_positions
from benchmarks.gpu_checks import CUDA, Row, check_engine, check_tests, new_engine, random_model, type_name
from benchmarks.gpu_steps import PROMPT, device_seconds, positions, step_rows
from server.engine.types import Request, SamplingParams
from server.model.gpt2 import GPT2
from server.model.loader import load_model

BATCHES = (1, 8, 32, 64, 128, 256)
T = TypeVar("T")
LONG, STREAM = 512, 400  # tokens of the long prompt, and that each stream beside it generates


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds(partial(target.copy_, source), 10)


def products() -> list[Row]:
    """Matrix products in bf16."""
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in "ab")
    flops = 2 * 8192**3 / device_seconds(lambda: a @ b, 10)
    return [{"part": "ceilings", "what": "products, TFLOP/s", "dtype": "bfloat16", "result": round(flops / 1e12)}]


def others(model: GPT2) -> list[Row]:
    """A prompt of 512 tokens beside 31 streams, and an adapter's way to the device beside them."""
    engine = new_engine(model, 32, max(LONG + 1, PROMPT + STREAM))
    for i in range(31):
        engine.add_request(Request(f"s{i}", (i + 1,) * PROMPT, SamplingParams(max_tokens=STREAM)))
    for _ in range(20):
        advance(engine)
    undisturbed = [advance(engine).stats.step_seconds for _ in range(50)]
    rows: list[Row] = []
    for what, prompt, ref in (
        (f"prompt of {LONG} tokens", LONG, None),
        ("adapter to its first token", 8, AdapterRef("cold", "cold", "")),
    ):
        start, longest, first = time.perf_counter(), 0.0, 0.0
        engine.add_request(Request(what, (5,) * prompt, SamplingParams(max_tokens=1), alone(ref), stream=True))
        while not first:
            step = advance(engine)
            longest = max(longest, step.stats.step_seconds)
            if any(output.request_id == what for output in step.outputs):
                first = time.perf_counter() - start
        rows.append({
            "part": "prefill", "dtype": type_name(model.dtype), "what": what,
            "first_token_ms": round(1000 * first, 3),
            "longest_step_ms": round(1000 * longest, 3), "step_ms": round(1000 * statistics.median(undisturbed), 3),
        })  # fmt: skip
    engine.close()
    return rows


def sampler() -> list[Row]:
    """The sampling kernel over flat and peaked logits."""
    from kernels.gpu.sampling import choose

    rows: list[Row] = []
    vocab = 50257
    for batch, kind, (temperature, top_k, top_p) in (
        (batch, kind, way)
        for batch in (1, 32, 256)
        for kind in ("flat", "peaked")
        for way in ((0.0, vocab, 1.0), (0.8, vocab, 1.0), (0.8, vocab, 0.95), (0.8, 50, 0.95))
    ):
        logits = (1.5 if kind == "flat" else 6.0) * torch.randn(batch, vocab, device=CUDA)
        full = partial(torch.full, (batch,), device=CUDA)
        fixed = (
            torch.zeros(batch, vocab, dtype=torch.uint8, device=CUDA), torch.arange(batch, device=CUDA), full(1.0),
            full(temperature), full(top_k), full(top_p), torch.rand(batch, dtype=torch.float64, device=CUDA), full(0),
            torch.empty(batch, vocab, device=CUDA), full(0), full(0.0),
        )  # fmt: skip
        seconds = device_seconds(partial(choose, logits, *fixed), 20)
        way = f"temperature {temperature}, top_k {top_k if top_k < vocab else 'off'}, top_p {top_p}"
        row = {"part": "sampler", "dtype": "float32", "batch": batch, "what": f"{kind}, {way}"}
        rows.append(row | {"graph_ms": round(1000 * seconds, 4)})
    return rows


def peft(steps_done: Sequence[Row], folder: Path | None, dtype: torch.dtype) -> list[Row]:
    """PEFT's mixed batch, B = 32 with 32 adapters, against our step of the same, where there is one."""
    from benchmarks.peft import BATCH, peft_mixed, peft_model, step_milliseconds

    model = peft_model(32, folder).to(CUDA, dtype)
    prompts = torch.randint(0, model.config.vocab_size, (BATCH, PROMPT), device=CUDA)
    run = partial(peft_mixed, model, prompts, [f"a{i}" for i in range(BATCH)])
    run(2)
    theirs = step_milliseconds(lambda tokens: (run(tokens), torch.cuda.synchronize())[0])
    ours = our_step(steps_done, BATCH, 32)
    row = {"part": "peft", "dtype": type_name(dtype), "batch": BATCH, "adapters": 32, "step_ms": round(theirs, 2)}
    return [row | {"to_chorus": round(theirs / ours, 2) if ours else ""}]


def our_step(rows: Sequence[Row], batch: int, adapters: int) -> float | None:
    """Milliseconds of the row of that step; None if it failed or never ran."""
    wanted = ("step", batch, adapters)
    return next((r["step_ms"] for r in rows if (r["part"], r.get("batch"), r.get("adapters")) == wanted), None)


@dataclass
class Report:
    """The rows of the parts that have run. One that fails keeps those it gave, and gets one with its error.

    `told` is called after each row with all of them, the newest last.
    """

    told: Callable[[Sequence[Row]], object]
    rows: list[Row] = field(default_factory=lambda: list[Row]())
    failed: list[str] = field(default_factory=lambda: list[str]())

    def add(self, row: Row) -> None:
        """One more row."""
        self.rows.append(row)
        self.told(self.rows)

    def part(self, name: str, work: Callable[[], Iterable[Row]]) -> None:
        """Run one that gives rows."""

        def rows() -> None:
            for row in work():
                self.add(row)

        self.attempt(name, rows)

    def attempt(self, name: str, work: Callable[[], T]) -> T | None:
        """What it gives; None if it fails, which is printed and counted: the other parts' figures are worth having."""
        start, result = time.perf_counter(), None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            self.failed.append(name)
            self.add({"part": name, "error": " ".join(f"{type(error).__name__}: {error}".split())})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the part held is the next one's
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return result


def tell(rows: Sequence[Row], machine: Row, file: Path, as_json: bool) -> None:
    """The rows so far into the CSV; the newest as a JSON line. A run that is ended leaves what it has."""
    write_csv(rows, machine, file)
    if as_json:
        print(json.dumps({"benchmark": "gpu"} | rows[-1] | machine), flush=True)


def write_csv(rows: Sequence[Row], more: Row, file: Path) -> None:
    """A line a row, with `more` in each; a column that a row lacks is empty."""
    columns = list(dict.fromkeys(key for row in (*rows, more) for key in row))
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(row | more for row in rows)


def measure(report: Report, folder: Path | None, dtype: torch.dtype) -> None:
    """All parts; those that need what another one failed to give do without it, or are left out."""
    report.part("tests", check_tests)
    report.part("engine", check_engine)
    bandwidth = report.attempt("copy", copy_bandwidth)
    if bandwidth is not None:
        report.add({"part": "ceilings", "what": "copy, GB/s", "result": round(bandwidth / 1e9)})
    report.part("products", products)
    make = partial(random_model, MEDIUM, CUDA, dtype) if folder is None else partial(load_model, folder, CUDA, dtype)
    model = report.attempt("model", make)
    if model is not None:
        for batch in BATCHES:
            report.part(f"steps of {batch}", partial(step_rows, model, batch, bandwidth))
    report.part("sampler", sampler)
    if model is not None:
        report.part("prefill", partial(others, model))
    report.part("peft", lambda: peft(report.rows, folder, dtype))


def main() -> int:
    p = parser(__doc__ or "", repeats=False)
    p.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = p.parse_args()
    require_positions(p, args.model, max(LONG + 1, PROMPT + STREAM, *map(positions, BATCHES)), "--model")
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    machine = hardware() | {"gpu": torch.cuda.get_device_name()}
    args.out.mkdir(parents=True, exist_ok=True)
    report = Report(partial(tell, machine=machine, file=args.out / "gpu.csv", as_json=args.json))
    measure(report, args.model, getattr(torch, args.dtype))
    for row in report.rows if not args.json else ():
        print("  ".join(f"{k} {v}" for k, v in row.items() if v != ""))
    failed = ", ".join(report.failed) or "nothing"
    print(f"{machine['gpu']}, torch {torch.__version__}; failed: {failed}", file=sys.stderr)
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
