"""Time of choosing a step's tokens at B = 32 over 50,257: `python -m benchmarks.sampler [--json]`.

Two kinds of logits, peaked as a trained model's and flat as a small one's; every way of sampling, and a mix of all.
"""

import time
from functools import partial

import torch

from benchmarks.common import CPU, alternate, emit, median, parser
from server.engine.penalties import SamplingRow
from server.engine.sampler import sample
from server.engine.types import SamplingParams
from server.model.backend import choose_backend

BATCH, VOCAB = 32, 50257
WAYS = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "top_k 1000, top_p 0.5": {"temperature": 1.0, "top_k": 1000, "top_p": 0.5},
    "penalty, top_p 0.9, logprobs": {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": True},
}


def milliseconds(logits: torch.Tensor, rows: list[SamplingRow], kernels: str) -> float:
    """One call."""
    native = choose_backend(CPU, torch.float32, kernels).native if kernels == "auto" else None
    start = time.perf_counter()
    sample(logits, rows, native)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    args = parser(__doc__ or "", model=False).parse_args()
    torch.manual_seed(0)
    logits = {"peaked": 6 * torch.randn(BATCH, VOCAB), "flat": 1.5 * torch.randn(BATCH, VOCAB)}
    params = {name: [SamplingParams(**fields, seed=i) for i in range(BATCH)] for name, fields in WAYS.items()}
    params["mixed"] = [SamplingParams(**list(WAYS.values())[i % len(WAYS)], seed=i) for i in range(BATCH)]
    for kind, values in logits.items():
        for way, each in params.items():
            rows = [SamplingRow(p, list(range(40)), i) for i, p in enumerate(each)]
            variants = {k: partial(milliseconds, values, rows, k) for k in ("auto", "off")}
            times = alternate(variants, 3 * args.repeats)
            for kernels in variants:
                row = {"benchmark": "sampler", "logits": kind, "way": way, "batch": BATCH}
                emit(row | {"kernels": kernels, "ms": median(times[kernels])}, args.json)


if __name__ == "__main__":
    main()
