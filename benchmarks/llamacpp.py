"""llama.cpp's own batched bench and our engine, alternated: `python -m benchmarks.llamacpp [--json]`.

Optional: `make llamacpp` builds the tool. gpt2-medium's sizes, random weights in the same type on both sides, as many
threads, prompts of 32 tokens of their own, decode steps only. llama.cpp runs the base, we run the base and 32 distinct
adapters (as many as there are sequences in a smaller batch), rank 8 on c_attn and attn.c_proj.

- A step of llama.cpp is `t_tg / tg` of `llama-batched-bench`, the mean of a run's steps, and the median of RUNS runs in
  one process; ours is the median of a run's steps (`benchmarks.decode`). Its tool doesn't sample: tokens are random
  numbers. Ours samples greedily and that time counts, in llama.cpp's favour.
- llama.cpp runs in three ways: K and V in the weights' type, as ours are, without and with flash attention (which is
  faster depends on the type), and as it does by default (K and V in fp16, flash attention). `to_llamacpp` compares with
  the fastest of the three in that batch: its milliseconds over the row's, above 1 where the row is faster.
- llama.cpp attends over K and V padded to a multiple of 256 positions a sequence, we over those that there are: with
  `--prompt 200` both do nearly the same.
- Its threads wait for each other spinning. Where others use the processor as well, some of its runs take ten times as
  long, hence the medians.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.build_llamacpp import BUILD, TOOL
from benchmarks.common import MEDIUM, alternate, count, emit, make_model, median, parser
from benchmarks.decode import PROMPT, check_lengths, step_milliseconds
from benchmarks.gguf_model import write_gguf
from server.model.config import GPT2Config

ADAPTERS = 32
RUNS = 3
SHORT = {"float32": "f32", "bfloat16": "bf16"}
LIMIT_SECONDS = 600


class LlamaCppError(Exception):
    """The tool is missing, failed or said something else than expected; the message says what to do."""


def find_tool(path: Path) -> Path:
    """The tool's absolute path. Raises LlamaCppError if it can't be run."""
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise LlamaCppError(
            f"no program {path}: `make llamacpp` builds it (it needs cmake, g++ and make, and takes minutes); "
            f"--tool names one that lies elsewhere"
        )
    return path.resolve()


def find_gguf(folder: Path) -> ModuleType:
    """The package `gguf`: an installed one, or that beside the tool. Raises LlamaCppError."""
    sys.path.append(str(folder))
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise LlamaCppError(
            f"{error}: `make llamacpp` puts the package gguf beside the tool; or pip install gguf"
        ) from error
    finally:
        sys.path.remove(str(folder))


def parse(output: str, batch: int, steps: int) -> float:
    """Milliseconds of a step, the median of the runs in the tool's JSON lines. Raises LlamaCppError.

    `output` may hold other lines; a run is {"pl": sequences, "tg": steps, "t_tg": seconds of all steps, ...}.
    """
    runs: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if len(runs) != RUNS:
        raise LlamaCppError(f"{TOOL} gave {len(runs)} results instead of {RUNS}: {output.strip()[-500:] or 'nothing'}")
    for run in runs:
        if (run.get("pl"), run.get("tg")) != (batch, steps) or "t_tg" not in run:
            raise LlamaCppError(f"{TOOL} gave {run}, expected pl {batch}, tg {steps} and t_tg")
    return 1000 * statistics.median(run["t_tg"] for run in runs) / steps


def tool_milliseconds(command: list[str], batch: int, prompt: int, steps: int) -> float:
    """Run the tool once with `batch` sequences. Raises LlamaCppError, subprocess.TimeoutExpired."""
    sizes = {"-npp": prompt, "-ntg": steps, "-npl": ",".join([str(batch)] * RUNS), "-c": batch * (prompt + steps)}
    flags = [str(word) for pair in sizes.items() for word in pair]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
    if done.returncode:
        raise LlamaCppError(f"{TOOL} exited with {done.returncode}: {done.stderr.strip()[-500:]}")
    return parse(done.stdout, batch, steps)


def ways(tool: Path, model: Path, dtype: str, threads: int) -> dict[str, list[str]]:
    """The commands that llama.cpp runs with, by the name of the row."""
    command = [str(tool), "-m", str(model), "-t", str(threads), "-tb", str(threads), "--output-format", "jsonl"]
    same = ["-ctk", SHORT[dtype], "-ctv", SHORT[dtype]]
    return {
        f"llama.cpp base, {SHORT[dtype]} kv": [*command, *same, "-fa", "off"],
        f"llama.cpp base, {SHORT[dtype]} kv, flash": [*command, *same, "-fa", "on"],
        "llama.cpp base, f16 kv, flash": [*command, "-ctk", "f16", "-ctv", "f16", "-fa", "on"],
    }


def ready_model(tool: Path, dtype: str) -> Path:
    """The GGUF file beside the tool, written if it isn't there. Raises LlamaCppError."""
    file = tool.with_name(f"gpt2-medium-{dtype}.gguf")
    if not file.is_file():
        write_gguf(find_gguf(tool.parent), GPT2Config.parse(MEDIUM), getattr(torch, dtype), file)
    return file


def compare(dtype: str, tool: Path, args: Any) -> None:
    """Print the rows of one type. Raises LlamaCppError, subprocess.TimeoutExpired."""
    theirs = ways(tool, ready_model(tool, dtype), dtype, args.threads)
    model = make_model(None, getattr(torch, dtype))
    for batch in args.batch:
        adapters = min(ADAPTERS, batch)
        sizes = {"batch": batch, "prompt": args.prompt, "steps": args.steps}
        times = alternate(
            {name: partial(tool_milliseconds, command, **sizes) for name, command in theirs.items()}
            | {"chorus base": partial(step_milliseconds, model, distinct=0, **sizes)}
            | {f"chorus {adapters} adapters": partial(step_milliseconds, model, distinct=adapters, **sizes)},
            args.repeats,
        )
        fastest = min(median(times[name]) for name in theirs)
        for name, values in times.items():
            ms = median(values)
            row = {"benchmark": "llamacpp", "dtype": dtype, "batch": batch, "prompt": args.prompt, "system": name}
            row |= {"ms_per_step": ms, "tokens_per_second": round(1000 * batch / ms, 1)}
            emit(row | {"to_llamacpp": round(fastest / ms, 2)}, args.json)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--tool", type=Path, default=BUILD / TOOL, help="llama-batched-bench; models are kept beside it")
    p.add_argument("--dtype", choices=list(SHORT), nargs="+", default=list(SHORT))
    p.add_argument("--batch", type=count, nargs="+", default=[1, 8, 32])
    p.add_argument("--prompt", type=count, default=PROMPT, help="tokens of each prompt")
    p.add_argument("--steps", type=count, default=16, help="decode steps of a run")
    p.add_argument("--threads", type=count, default=2, help="of llama.cpp and of ours")
    args = p.parse_args()
    if args.model is not None:
        p.error("--model: this benchmark has random weights only, on both sides")
    check_lengths(p, None, args.batch, args.steps, args.prompt)
    try:
        tool = find_tool(args.tool)
        torch.set_num_threads(args.threads)
        for dtype in args.dtype:
            compare(dtype, tool, args)
    except (LlamaCppError, subprocess.TimeoutExpired) as error:
        sys.exit(f"llamacpp: {error}")


if __name__ == "__main__":
    main()
