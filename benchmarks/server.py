"""HTTP to token against the engine alone: `python -m benchmarks.server [--json] [--api-workers 1 2]`.

32 streams of 48 greedy tokens on one model (random weights at gpt2-medium's sizes, or --model DIR), started together:
through `POST /generate_stream` of a server on loopback, and in the engine in this process. The rate is tokens over the
time from the first request to the last answer, prompts included on both sides.
"""

import asyncio
import json
import shutil
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common import (
    MEDIUM,
    STEP_TOKENS,
    advance,
    alternate,
    count,
    emit,
    make_engine,
    make_model,
    median,
    parser,
    require_positions,
)
from benchmarks.serving import serving
from server.engine.engine import Engine
from server.engine.types import Request, SamplingParams
from server.model.source import DEMO_MODEL

STREAMS, TOKENS = 32, 48
PROMPT = "Quote by Oscar Wilde:"
PROMPT_IDS = (25178, 416, 15694, 46754, 25)
LENGTH = len(PROMPT_IDS) + TOKENS
DTYPE, KERNELS = "float32", "auto"


def checkpoint(folder: Path) -> Path:
    """A checkpoint of random weights at gpt2-medium's sizes with GPT-2's tokenizer."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config.from_dict(MEDIUM)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder)
    return folder


def server_flags(model: Path) -> list[str]:
    """Of a server that computes as the engine beside it does, whatever its defaults."""
    sizes = ["--max-batch-size", str(STREAMS), "--max-batch-tokens", str(STEP_TOKENS)]
    return ["--model", str(model.resolve()), "--device", "cpu", "--dtype", DTYPE, "--kernels", KERNELS, *sizes]


def over_http(url: str) -> float:
    """Tokens a second of STREAMS streams."""
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": TOKENS, "ignore_eos_token": True}}

    async def stream(client: httpx.AsyncClient) -> int:
        async with client.stream("POST", f"{url}/generate_stream", json=body) as response:
            response.raise_for_status()
            events = [json.loads(line[5:]) async for line in response.aiter_lines() if line.startswith("data:")]
            if events and "error" in events[-1]:
                raise RuntimeError(events[-1]["error"])
            return len(events)

    async def everything() -> int:
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(timeout=300, limits=limits) as client:
            return sum(await asyncio.gather(*(stream(client) for _ in range(STREAMS))))

    start = time.perf_counter()
    events = asyncio.run(everything())
    assert events == STREAMS * TOKENS, f"{events} events"
    return events / (time.perf_counter() - start)


def alone(engine: Engine) -> float:
    """Tokens a second of the same requests in this process. Raises RuntimeError for one that failed."""
    start = time.perf_counter()
    for i in range(STREAMS):
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=True)
        engine.add_request(Request(f"{start}-{i}", PROMPT_IDS, params, stream=True))
    while engine.has_work:
        advance(engine)
    return STREAMS * TOKENS / (time.perf_counter() - start)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--api-workers", type=count, nargs="+", default=[1], help="a server for each of these numbers")
    args = p.parse_args()
    require_positions(p, args.model, LENGTH, "--model")
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or checkpoint(Path(scratch))
        engine = make_engine(make_model(folder, getattr(torch, DTYPE), KERNELS), STREAMS, LENGTH)
        with ExitStack() as stack:
            variants = {"engine": partial(alone, engine)}
            for workers in args.api_workers:
                url = stack.enter_context(serving([*server_flags(folder), "--api-workers", str(workers)]))
                variants["server" if workers == 1 else f"server, {workers} API processes"] = partial(over_http, url)
            rates = alternate(variants, args.repeats)
        engine.close()
    for name, values in rates.items():
        row = {"benchmark": "server", "streams": STREAMS, "dtype": DTYPE, "system": name}
        row |= {"tokens_per_second": median(values), "to_engine": round(median(values) / median(rates["engine"]), 3)}
        emit(row, args.json)


if __name__ == "__main__":
    main()
