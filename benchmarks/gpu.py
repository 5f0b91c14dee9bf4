"""Everything about the GPU path in one call: checks, then times, a short table last.

`python -m benchmarks.gpu --out DIR`. Checks: the kernels' tests as compiled (pytest and hypothesis have to be there),
and greedy tokens of the captured engine against the CPU's in fp32. Times, at gpt2-medium's sizes in --dtype (random
weights, or --model; rank 8 on c_attn and attn.c_proj, prompts of 32 tokens): the two ceilings (copy bandwidth, matrix
products), an engine step by batch size and distinct adapters (`step_ms`, all included, and `graph_ms`, the replay
alone by device events), sampling, a prompt of 512 tokens, an adapter's way to the device, and PEFT's mixed batch where
peft is installed. `to_floor` is a step over the reading of the weights, and of the distinct adapters', at the copy's
bandwidth. Rows go to DIR/gpu.csv; a part that fails is told on stderr and by the exit status.
"""

import csv
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adapters.adapter import AdapterRef
from adapters.arena import Arena
from adapters.residency import Residency
from benchmarks.common import MEDIUM, hardware, make_adapter, parser
from server.engine.config import EngineConfig
from server.engine.device_runner import DeviceRunner
from server.engine.engine import Engine, make_runner
from server.engine.types import Request, SamplingParams
from server.model.backend import choose_backend
from server.model.config import GPT2Config
from server.model.gpt2 import GPT2
from server.model.loader import build_model, expected_shapes, load_model

CUDA = torch.device("cuda")
PROMPT, STEPS = 32, 40
KERNEL_TESTS = [f"tests/kernels/test_gpu_{name}.py" for name in ("lora", "attention", "sampling", "norm")]
Row = dict[str, Any]


def random_model(fields: dict[str, int], device: torch.device, dtype: torch.dtype) -> GPT2:
    """Random weights, the same on every device."""
    config, generator = GPT2Config.parse(fields), torch.Generator().manual_seed(0)
    shapes = expected_shapes(config)

    def take(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator).mul_(0.05).to(device, dtype)

    return build_model(config, choose_backend(device, dtype), take)


def new_engine(model: GPT2, batch: int, max_len: int) -> Engine:
    """An engine over `model` on its device, captured and warm, with room for 256 adapters of rank 8."""
    arena = Arena(1 << 30, model.device, model.dtype)
    residency = Residency(lambda ref: make_adapter(ref, model), arena)
    config = EngineConfig(batch, max_len, max(512, batch), arena.nbytes)
    return Engine(config, make_runner(model, config, residency), residency, None, [])


def run_until_done(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The tokens of everything that was added."""
    done: dict[str, tuple[int, ...]] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            done[output.request_id] = output.token_ids
            if output.error is not None:
                raise RuntimeError(output.error)
    return done


def check_tests() -> list[Row]:
    """pytest over the kernels, compiled. Raises CalledProcessError with the failures."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *KERNEL_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1:]
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
        raise RuntimeError(f"kernel tests: {summary}")
    return [{"part": "check", "what": "kernel tests", "result": " ".join(summary)}]


def check_engine() -> list[Row]:
    """Greedy tokens of a small model in fp32: captured on the GPU, and by torch on the CPU."""
    small = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 1000}
    answers: list[dict[str, tuple[int, ...]]] = []
    for device in (CUDA, torch.device("cpu")):
        torch.manual_seed(1)
        engine = new_engine(random_model(small, device, torch.float32), 16, 128)
        for i in range(64):
            ref = AdapterRef(f"d{i % 7}@{(8, 16, 64)[i % 3]}", f"a{i % 7}", "") if i % 4 else None
            prompt = tuple((7 * i + 3 * j) % 1000 for j in range(1 + i))
            engine.add_request(Request(str(i), prompt, SamplingParams(max_tokens=24), ref))
        answers.append(run_until_done(engine))
        engine.close()
    ours, theirs = answers
    equal = sum(ours[key] == theirs[key] for key in theirs)
    if equal < 0.95 * len(theirs):
        raise RuntimeError(f"only {equal} of {len(theirs)} requests have the CPU's tokens")
    return [{"part": "check", "what": "greedy tokens equal the CPU's, fp32", "result": f"{equal} of {len(theirs)}"}]


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


def ceilings() -> dict[str, float]:
    """Bytes a second of a large copy (read and written), bf16 products a second."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / device_seconds(partial(target.copy_, source), 10)
    a, b = (torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16) for _ in "ab")
    return {"bandwidth": bandwidth, "flops": 2 * 8192**3 / device_seconds(lambda: a @ b, 10)}


def step_row(engine: Engine, model: GPT2, batch: int, distinct: int, bandwidth: float) -> Row:
    """A decode step of `batch` sequences over `distinct` adapters (0: the base)."""
    refs = [AdapterRef(f"step{i}", f"a{i}", "") for i in range(distinct)]
    start_time = time.perf_counter()
    for i in range(batch):
        ref = refs[i % distinct] if distinct else None
        prompt = tuple(torch.randint(0, model.config.vocab_size, (PROMPT,)).tolist())
        # Enough for the last to begin before the first ends.
        tokens = STEPS + 4 + 3 * batch * PROMPT // 512 + 64 * bool(distinct)
        engine.add_request(Request(f"{start_time}-{i}", prompt, SamplingParams(max_tokens=tokens), ref))
    times: list[float] = []
    while engine.has_work:
        stats = engine.step().stats
        if stats.batch_size == batch and not stats.num_prompt_tokens:
            times.append(stats.step_seconds)
    runner: Any = engine._runner
    assert isinstance(runner, DeviceRunner)
    size = next(size for size in runner._buckets if size >= batch)
    shape = (frozenset(("attn.c_attn", "attn.c_proj")), 16) if distinct else (frozenset[str](), 0)
    graph = device_seconds(partial(runner._run_decode, size, *shape))
    adapter = make_adapter(AdapterRef("size", "size", ""), model).nbytes
    floor = (model.nbytes + distinct * adapter) / bandwidth
    step = statistics.median(times[2:])
    return {
        "part": "step", "batch": batch, "adapters": distinct, "step_ms": round(1000 * step, 4),
        "graph_ms": round(1000 * graph, 4), "tokens_per_second": round(batch / step),
        "to_floor": round(step / floor, 2), "graph_to_floor": round(graph / floor, 2),
    }  # fmt: skip


def steps(model: GPT2, bandwidth: float) -> list[Row]:
    """Steps by batch and adapters; `to_base` and `to_identical` compare within a batch size."""
    engine = new_engine(model, 256, PROMPT + 256)
    rows: list[Row] = []
    for batch in (1, 8, 32, 64, 128, 256):
        counts = sorted({0, 1, min(batch, 32), batch})
        mine = {n: step_row(engine, model, batch, n, bandwidth) for n in counts}
        for n, row in mine.items():
            row["to_base"] = round(row["step_ms"] / mine[0]["step_ms"], 3)
            row["to_identical"] = round(row["step_ms"] / mine[1]["step_ms"], 3) if n else ""
            rows.append(row)
    engine.close()
    return rows


def others(model: GPT2) -> list[Row]:
    """A prompt of 512 tokens beside 31 streams, and an adapter's way to the device beside them."""
    engine = new_engine(model, 32, 1024)
    for i in range(31):
        engine.add_request(Request(f"s{i}", (i + 1,) * PROMPT, SamplingParams(max_tokens=400)))
    for _ in range(20):
        engine.step()
    alone = [engine.step().stats.step_seconds for _ in range(50)]
    rows: list[Row] = []
    for what, prompt, ref in (
        ("prompt of 512 tokens", 512, None),
        ("adapter to its first token", 8, AdapterRef("cold", "cold", "")),
    ):
        start, longest, first = time.perf_counter(), 0.0, 0.0
        engine.add_request(Request(what, (5,) * prompt, SamplingParams(max_tokens=1), ref, stream=True))
        while not first:
            step = engine.step()
            longest = max(longest, step.stats.step_seconds)
            if any(output.request_id == what for output in step.outputs):
                first = time.perf_counter() - start
        rows.append({
            "part": "prefill", "what": what, "first_token_ms": round(1000 * first, 3),
            "longest_step_ms": round(1000 * longest, 3), "step_ms": round(1000 * statistics.median(alone), 3),
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
        rows.append({"part": "sampler", "batch": batch, "what": f"{kind}, {way}", "graph_ms": round(1000 * seconds, 4)})
    return rows


def peft(steps_done: list[Row], folder: Path | None) -> list[Row]:
    """PEFT's mixed batch, B = 32 with 32 adapters, against our step of the same."""
    from benchmarks.peft import BATCH, peft_mixed, peft_model, step_milliseconds

    model = peft_model(32, folder).to(CUDA, torch.bfloat16)
    prompts = torch.randint(0, model.config.vocab_size, (BATCH, PROMPT), device=CUDA)
    run = partial(peft_mixed, model, prompts, [f"a{i}" for i in range(BATCH)])
    run(2)
    theirs = step_milliseconds(lambda tokens: (run(tokens), torch.cuda.synchronize())[0])
    ours = next(r["step_ms"] for r in steps_done if (r["batch"], r["adapters"]) == (32, 32))
    return [{"part": "peft", "batch": 32, "adapters": 32, "step_ms": round(theirs, 2), "to_chorus": theirs / ours}]


def main() -> int:
    p = parser(__doc__ or "")
    p.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    p.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = p.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    rows: list[Row] = []
    failed: list[str] = []

    def part(name: str, work: Callable[[], list[Row]]) -> list[Row]:
        start = time.perf_counter()
        try:
            mine = work()
        except Exception:  # noqa: BLE001  the other parts' figures are worth having
            traceback.print_exc()
            failed.append(name)
            mine = []
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        rows.extend(mine)
        return mine

    part("kernel tests", check_tests)
    part("engine", check_engine)
    limits = ceilings()
    rows.append({"part": "ceilings", "what": "copy, GB/s", "result": round(limits["bandwidth"] / 1e9)})
    rows.append({"part": "ceilings", "what": "products, TFLOP/s", "result": round(limits["flops"] / 1e12)})
    dtype = getattr(torch, args.dtype)
    model = random_model(MEDIUM, CUDA, dtype) if args.model is None else load_model(args.model, CUDA, dtype)
    taken = part("steps", partial(steps, model, limits["bandwidth"]))
    part("sampler", sampler)
    part("prefill", partial(others, model))
    part("peft", partial(peft, taken, args.model))
    machine = hardware() | {"gpu": torch.cuda.get_device_name(), "dtype": args.dtype}
    args.out.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row)) + list(machine)
    with (args.out / "gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row | machine for row in rows)
    for row in rows:
        print("  ".join(f"{k} {v}" for k, v in row.items() if v != ""))
    print(f"{machine['gpu']}, torch {torch.__version__}; failed: {', '.join(failed) or 'nothing'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
