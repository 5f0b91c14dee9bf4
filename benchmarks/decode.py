"""Time of a decode step by batch size and number of distinct adapters: `python -m benchmarks.decode [--json]`.

The engine alone, rank 8 on c_attn and attn.c_proj, prompts of 32 tokens, greedy. `floor` is what the hardware allows,
measured in the same run: the larger of the weights' bytes over the bandwidth and the products over the peak.
"""

import statistics
from functools import partial

import torch

from adapters.adapter import AdapterRef
from benchmarks.common import alternate, emit, make_engine, make_model, median, parser, warm
from benchmarks.floor import Machine, floor_milliseconds
from server.engine.types import Request, SamplingParams
from server.model.gpt2 import GPT2

PROMPT = 32


def step_milliseconds(model: GPT2, batch: int, distinct: int, steps: int, prompt: int = PROMPT) -> float:
    """The median time of a decode step with `batch` sequences on `distinct` adapters (0: the base)."""
    engine = make_engine(model, batch, prompt + steps + 8)
    refs = [AdapterRef(f"digest{i}", f"a{i}", "") for i in range(distinct)]
    warm(engine, refs)
    for i in range(batch):
        ref = refs[i % distinct] if distinct else None
        tokens = torch.randint(0, model.config.vocab_size, (prompt,)).tolist()
        engine.add_request(Request(str(i), tuple(tokens), SamplingParams(max_tokens=steps + 6), ref))
    times: list[float] = []
    while engine.has_work:
        stats = engine.step().stats
        if stats.batch_size == batch and not stats.num_prompt_tokens:
            times.append(1000 * stats.step_seconds)
    engine.close()
    return statistics.median(times[1:])


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--kernels", choices=["auto", "off"], default="auto")
    args = p.parse_args()
    for name in args.dtype:
        dtype = getattr(torch, name)
        model = make_model(args.model, dtype, args.kernels)
        machine = Machine.measure(dtype)
        for batch in args.batch:
            counts = [0, *(n for n in (1, 8, 32) if n <= batch)]
            variants = {str(n): partial(step_milliseconds, model, batch, n, args.steps) for n in counts}
            times = alternate(variants, args.repeats)
            for n in counts:
                ms = median(times[str(n)])
                row = {
                    "benchmark": "decode",
                    "backend": model.backend.name,
                    "dtype": name,
                    "batch": batch,
                    "adapters": n,
                }
                row |= {"ms_per_step": ms, "tokens_per_second": round(1000 * batch / ms, 1)}
                row |= {"to_base": round(ms / median(times["0"]), 3)}
                row |= {"to_floor": round(ms / floor_milliseconds(model, batch, machine), 2)}
                emit(row, args.json)


if __name__ == "__main__":
    main()
