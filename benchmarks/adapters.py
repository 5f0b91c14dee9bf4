"""Throughput with many adapters registered and requested: `python -m benchmarks.adapters [--json]`.

256 requests (prompts of 16 tokens, 16 new ones) at B = 32, four times as many in flight; each draws its adapter from a
power law (exponent 1) over the registered ones. At most 64 adapters are resident, so 256 and more are beyond the cache.
A load makes random weights anew; it reads no files.
"""

import random
import time
from functools import partial

import torch

from adapters.adapter import AdapterRef
from benchmarks.common import alternate, emit, make_engine, make_model, median, parser
from server.engine.types import Request, SamplingParams
from server.model.gpt2 import GPT2

BATCH, REQUESTS, TOKENS, RESIDENT = 32, 256, 16, 64


def tokens_per_second(model: GPT2, registered: int, ranks: tuple[int, ...]) -> float:
    """Of one run; engine and residency are new."""
    engine = make_engine(model, BATCH, 64, RESIDENT)
    rng = random.Random(0)
    weights = [1 / (i + 1) for i in range(registered)]
    chosen = rng.choices(range(registered), weights, k=REQUESTS)
    waiting = [
        Request(
            str(n), tuple(rng.randrange(50257) for _ in range(16)), SamplingParams(max_tokens=TOKENS),
            AdapterRef(f"d{i}@{ranks[i % len(ranks)]}", f"a{i}", ""),
        )
        for n, i in enumerate(chosen)
    ]  # fmt: skip
    start, finished = time.perf_counter(), 0
    for request in waiting[: 4 * BATCH]:
        engine.add_request(request)
    rest = iter(waiting[4 * BATCH :])
    while engine.has_work:
        step = engine.step()
        for output in step.outputs:
            finished += output.finish_reason is not None
            if output.finish_reason is not None and (request := next(rest, None)):
                engine.add_request(request)
        if not step.stats.batch_size:
            time.sleep(0.0005)
    seconds = time.perf_counter() - start
    engine.close()
    assert finished == REQUESTS
    return REQUESTS * TOKENS / seconds


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--registered", type=int, nargs="+", default=[1, 32, 256, 1000])
    args = p.parse_args()
    model = make_model(args.model, getattr(torch, args.dtype))
    variants = {f"{n} rank 8": partial(tokens_per_second, model, n, (8,)) for n in args.registered}
    variants["32 ranks 8 to 64"] = partial(tokens_per_second, model, 32, (8, 16, 32, 64))
    rates = alternate(variants, args.repeats)
    first = median(next(iter(rates.values())))
    for name, values in rates.items():
        row = {"benchmark": "adapters", "dtype": args.dtype, "registered": name, "resident": RESIDENT, "batch": BATCH}
        emit(row | {"tokens_per_second": median(values), "to_first": round(median(values) / first, 3)}, args.json)


if __name__ == "__main__":
    main()
