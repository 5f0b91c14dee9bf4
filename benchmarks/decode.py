"""Time of a decode step by batch size and number of distinct adapters: `python -m benchmarks.decode [--json]`.

The engine alone, rank 8 on c_attn and attn.c_proj, prompts of 32 tokens, greedy. `floor` is what the hardware allows,
measured in the same run: the larger of the weights' bytes over the bandwidth and the products over the peak.
"""

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from adapters.adapter import AdapterRef
from benchmarks.common import (
    STEP_TOKENS,
    alternate,
    count,
    emit,
    make_engine,
    make_model,
    median,
    parser,
    require_positions,
    warm,
)
from benchmarks.floor import Machine, floor_milliseconds
from benchmarks.full_batch import full_steps, max_tokens
from server.model.gpt2 import GPT2

PROMPT = 32


def step_milliseconds(model: GPT2, batch: int, distinct: int, steps: int, prompt: int = PROMPT) -> float:
    """The median time of `steps` decode steps with `batch` sequences on `distinct` adapters (0: the base).

    Raises RuntimeError for a failed request, ValueError for more positions than the model has.
    """
    engine = make_engine(model, batch, positions(batch, steps, prompt))
    refs = [AdapterRef(f"digest{i}", f"a{i}", "") for i in range(distinct)]
    warm(engine, refs)
    times = full_steps(engine, model.config.vocab_size, batch, prompt, steps, refs)
    engine.close()
    return 1000 * statistics.median(times)


def positions(batch: int, steps: int, prompt: int = PROMPT) -> int:
    """That a sequence takes in `step_milliseconds`."""
    return prompt + max_tokens(batch, prompt, steps, max(STEP_TOKENS, batch))


def check_lengths(
    p: argparse.ArgumentParser, folder: Path | None, batches: Sequence[int], steps: int, prompt: int = PROMPT
) -> None:
    """A usage error if a batch's sequences would be longer than the model's positions."""
    for batch in batches:
        what = f"--steps {steps} with --batch {batch} and prompts of {prompt} tokens"
        require_positions(p, folder, positions(batch, steps, prompt), what)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--batch", type=count, nargs="+", default=[1, 8, 32])
    p.add_argument("--steps", type=count, default=8, help="full ones that a run times")
    p.add_argument("--kernels", choices=["auto", "off"], default="auto")
    args = p.parse_args()
    check_lengths(p, args.model, args.batch, args.steps)
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
