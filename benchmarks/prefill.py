"""Time to take in a prompt, alone and beside running streams: `python -m benchmarks.prefill [--json]`.

Prompts of 128 and 896 tokens (or --prompt), each on a new engine that has answered a short one, in steps of at most
128 (the server's on a CPU) and 512 tokens; `stall` is the longest step of 8 running streams meanwhile.
"""

import time
from functools import partial

import torch

from benchmarks.common import (
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
from server.engine.types import Request, SamplingParams
from server.model.gpt2 import GPT2

BEGUN, STREAM = 32, 92  # tokens of a stream: its prompt, and in all


def first_token(model: GPT2, length: int, streams: int, step_tokens: int) -> tuple[float, float]:
    """Milliseconds until the prompt's first token, and of the longest step until then.

    Raises RuntimeError for a failed request, ValueError for more positions than the model has.
    """
    engine = make_engine(model, streams + 1, max(length + 1, STREAM), max_batch_tokens=step_tokens)
    engine.add_request(Request("warm", (1,) * BEGUN, SamplingParams(max_tokens=2)))
    while engine.has_work:
        advance(engine)
    for i in range(streams):
        engine.add_request(Request(f"s{i}", (i + 1,) * BEGUN, SamplingParams(max_tokens=STREAM - BEGUN), stream=True))
    for _ in range(4 if streams else 0):
        advance(engine)
    prompt = torch.randint(0, model.config.vocab_size, (length,)).tolist()
    engine.add_request(Request("prompt", tuple(prompt), SamplingParams(max_tokens=1), stream=True))
    start, longest = time.perf_counter(), 0.0
    while True:
        begin = time.perf_counter()
        outputs = advance(engine).outputs
        longest = max(longest, time.perf_counter() - begin)
        if any(output.request_id == "prompt" for output in outputs):
            break
    engine.close()
    return 1000 * (time.perf_counter() - start), 1000 * longest


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--prompt", type=count, nargs="+", default=[128, 896], help="tokens of each prompt")
    args = p.parse_args()
    for length in args.prompt:
        require_positions(p, args.model, max(length + 1, STREAM), f"--prompt {length}")
    model = make_model(args.model, getattr(torch, args.dtype))
    for length in args.prompt:
        variants = {
            (streams, tokens): partial(first_token, model, length, streams, tokens)
            for streams in (0, 8)
            for tokens in (128, 512)
        }
        for (streams, tokens), values in alternate(variants, args.repeats).items():
            total, longest = (median(list(figures)) for figures in zip(*values, strict=True))
            row = {"benchmark": "prefill", "dtype": args.dtype, "prompt": length, "streams": streams}
            row |= {"step_tokens": tokens, "ms_to_first_token": total}
            emit(
                row | {"prompt_tokens_per_second": round(1000 * length / total), "stall_ms": longest},
                args.json,
            )


if __name__ == "__main__":
    main()
