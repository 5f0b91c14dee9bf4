"""Time of a decode step by batch size and number of distinct adapters: `python -m benchmarks.decode [--json]`.

The engine alone, random weights at gpt2-medium's sizes (or --model DIR), rank 8 on c_attn and attn.c_proj; prompts of
32 tokens. Variants alternate within one run; medians over the repeats and ratios to the base of the same size are told.
"""

import argparse
import json
import platform
import statistics
from pathlib import Path

import torch

from adapters.adapter import Adapter, AdapterRef, LoraPair, ModuleKey
from adapters.residency import Residency
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.kv_cache import KVCache
from server.engine.model_runner import ModelRunner
from server.engine.types import Request, SamplingParams
from server.model.backend import choose_backend
from server.model.config import GPT2Config
from server.model.gpt2 import GPT2
from server.model.loader import build_model, expected_shapes, load_model

MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024}
PROMPT, RANK = 32, 8


def random_model(dtype: torch.dtype, kernels: str = "auto") -> GPT2:
    """GPT-2 at gpt2-medium's sizes with random weights."""
    config = GPT2Config.parse(MEDIUM)
    shapes = expected_shapes(config)
    backend = choose_backend(torch.device("cpu"), dtype, kernels)
    return build_model(config, backend, lambda name: torch.randn(shapes[name]).mul_(0.02).to(dtype))


def random_adapter(ref: AdapterRef, model: GPT2) -> Adapter:
    """Rank 8 on c_attn and attn.c_proj."""
    shape, dtype = model.config.adapter_shape, model.dtype
    pairs: dict[ModuleKey, LoraPair] = {}
    for layer in range(shape.n_layer):
        for target in ("attn.c_attn", "attn.c_proj"):
            n_in, n_out = shape.in_out(target)
            pair = LoraPair(torch.randn(RANK, n_in).to(dtype) * 0.02, torch.randn(RANK, n_out).to(dtype) * 0.02)
            pairs[ModuleKey(layer, target)] = pair
    return Adapter(ref.digest, pairs)


def step_milliseconds(model: GPT2, batch: int, distinct: int, steps: int) -> float:
    """The median time of a decode step with `batch` sequences on `distinct` adapters (0: the base)."""
    residency = Residency(lambda ref: random_adapter(ref, model), 2 * max(batch, distinct))
    kv_cache = KVCache(model.config, batch, PROMPT + steps + 8, torch.device("cpu"), model.dtype)
    config = EngineConfig(batch, PROMPT + steps + 8, max(512, batch * PROMPT), 2 * max(batch, distinct))
    engine = Engine(config, ModelRunner(model, kv_cache, residency), residency, None, [])
    for i in range(batch):
        ref = AdapterRef(f"digest{i % distinct}", f"a{i % distinct}", "") if distinct else None
        prompt = torch.randint(0, model.config.vocab_size, (PROMPT,)).tolist()
        engine.add_request(Request(str(i), tuple(prompt), SamplingParams(max_tokens=steps + 6), ref))
    times: list[float] = []
    while engine.has_work:
        stats = engine.step().stats
        if stats.batch_size == batch and not stats.num_prompt_tokens:
            times.append(1000 * stats.step_seconds)
    engine.close()
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint directory instead of random weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--kernels", choices=["auto", "off"], default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON line per row")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = (
        load_model(args.model, torch.device("cpu"), dtype, args.kernels)
        if args.model
        else random_model(dtype, args.kernels)
    )
    hardware = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for batch in args.batch:
        counts = [0, *(n for n in (1, 8, 32) if n <= batch)]
        times: dict[int, list[float]] = {n: [] for n in counts}
        for _ in range(args.repeats):
            for n in counts:
                times[n].append(step_milliseconds(model, batch, n, args.steps))
        base = statistics.median(times[0])
        for n in counts:
            ms = statistics.median(times[n])
            row = {"batch": batch, "adapters": n, "dtype": args.dtype, "ms_per_step": round(ms, 2)}
            row |= {"tokens_per_second": round(1000 * batch / ms, 1), "ratio_to_base": round(ms / base, 3)}
            print(
                json.dumps(row | {"hardware": hardware}) if args.json else "  ".join(f"{k} {v}" for k, v in row.items())
            )


if __name__ == "__main__":
    main()
