"""A mixed batch on PEFT and on our engine, alternated: `python -m benchmarks.peft [--json]`.

The same work on both sides: gpt2-medium's sizes (random weights, or --model), fp32, 32 prompts of 32 tokens, greedy
without stopping, rank 8 on c_attn and attn.c_proj. PEFT in two ways: one `generate` with `adapter_names`, and
`set_adapter` with one `generate` for each adapter. A decode step is the time of 17 tokens less that of one, over 16.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from adapters.adapter import AdapterRef, alone
from benchmarks.common import (
    MEDIUM,
    RANK,
    advance,
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
from server.engine.engine import Engine
from server.engine.types import Request, SamplingParams

BATCH, PROMPT, TOKENS = 32, 32, 17
Run = Callable[[int], float]  # number of tokens -> seconds


def peft_model(adapters: int, folder: Path | None = None) -> Any:
    """PEFT on transformers' GPT-2, with `adapters` adapters of random weights named a0, a1, ..."""
    model: Any
    if folder is None:
        model = GPT2LMHeadModel(GPT2Config.from_dict(MEDIUM)).eval()
    else:
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()  # whatever it was saved in
    config = LoraConfig(
        r=RANK, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, config, adapter_name="a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    return model.eval()


@torch.inference_mode()
def peft_mixed(model: Any, prompts: torch.Tensor, names: list[str], tokens: int) -> float:
    """Seconds of one `generate` with `adapter_names`."""
    start = time.perf_counter()
    _generate(model, prompts, tokens, adapter_names=names)
    return time.perf_counter() - start


@torch.inference_mode()
def peft_grouped(model: Any, prompts: torch.Tensor, names: list[str], tokens: int) -> float:
    """Seconds of one `generate` for each adapter."""
    start = time.perf_counter()
    for name in sorted(set(names)):
        model.set_adapter(name)
        _generate(model, prompts[[i for i, n in enumerate(names) if n == name]], tokens)
    return time.perf_counter() - start


def ours(engine: Engine, prompts: torch.Tensor, names: list[str], tokens: int) -> float:
    """Seconds until the engine has finished all of them. Raises RuntimeError for one that failed."""
    start = time.perf_counter()
    for i, (prompt, name) in enumerate(zip(prompts.tolist(), names, strict=True)):
        engine.add_request(
            Request(f"{start}-{i}", tuple(prompt), SamplingParams(max_tokens=tokens), alone(AdapterRef(name, name, "")))
        )
    while engine.has_work:
        advance(engine)
    return time.perf_counter() - start


def _generate(model: Any, prompts: torch.Tensor, tokens: int, **more: Any) -> None:
    model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=tokens,
        max_new_tokens=tokens, pad_token_id=0, **more,
    )  # fmt: skip


def step_milliseconds(run: Run) -> float:
    """A decode step's time without the prompt's."""
    return 1000 * (run(TOKENS) - run(1)) / (TOKENS - 1)


def main() -> None:
    p = parser(__doc__ or "")
    p.add_argument("--adapters", type=count, nargs="+", default=[1, 8, 32], help=f"at most {BATCH}")
    args = p.parse_args()
    if (most := max(args.adapters)) > BATCH:
        p.error(f"argument --adapters: {most}, expected at most {BATCH}, the sequences of the batch")
    require_positions(p, args.model, PROMPT + TOKENS, "--model")
    ours_model = make_model(args.model, torch.float32)
    engine = make_engine(ours_model, BATCH, PROMPT + TOKENS)
    prompts = torch.randint(0, ours_model.config.vocab_size, (BATCH, PROMPT))
    for adapters in args.adapters:
        model = peft_model(adapters, args.model)
        names = [f"a{i % adapters}" for i in range(BATCH)]
        warm(engine, [AdapterRef(name, name, "") for name in names[:adapters]])
        runs: dict[str, Run] = {
            "chorus": partial(ours, engine, prompts, names),
            "peft_mixed": partial(peft_mixed, model, prompts, names),
            "peft_grouped": partial(peft_grouped, model, prompts, names),
        }
        times = alternate({name: partial(step_milliseconds, run) for name, run in runs.items()}, args.repeats)
        for name in runs:
            ms = median(times[name])
            row = {"benchmark": "peft", "dtype": "float32", "batch": BATCH, "adapters": adapters, "system": name}
            row |= {"ms_per_step": ms, "tokens_per_second": round(1000 * BATCH / ms, 1)}
            emit(row | {"to_chorus": round(ms / median(times["chorus"]), 2)}, args.json)
    engine.close()


if __name__ == "__main__":
    main()
