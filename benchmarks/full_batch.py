"""Steps in which a whole batch decodes: how many tokens that takes, and their times. `decode` and `gpu` share it."""

from collections.abc import Sequence

import torch

from adapters.adapter import AdapterRef, alone
from benchmarks.common import advance
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.types import Request, SamplingParams

SKIPPED = 2  # full steps that aren't timed: buffers grow, graphs are captured


def prefill_steps(batch: int, prompt: int, step_tokens: int) -> int:
    """Steps until `batch` prompts are computed. Those that are through decode meanwhile, out of the same budget."""
    block = EngineConfig(max_batch_size=batch, max_batch_tokens=step_tokens).prompt_block
    left, steps = [prompt] * batch, 0
    while any(left):
        budget = step_tokens - left.count(0)
        for i, tokens in enumerate(left):
            chunk = min(tokens, budget)
            left[i] -= chunk if chunk == tokens else chunk - chunk % block
            budget -= tokens - left[i]
        steps += 1
    return steps


def max_tokens(batch: int, prompt: int, steps: int, step_tokens: int) -> int:
    """Of each sequence, so that `steps` full ones can be timed and the first to begin has a token left after them."""
    return prefill_steps(batch, prompt, step_tokens) + SKIPPED + steps + 1


def full_steps(
    engine: Engine, vocab: int, batch: int, prompt: int, steps: int, refs: Sequence[AdapterRef]
) -> list[float]:
    """Seconds of `steps` steps in which `batch` sequences decode, over `refs` (READY) in turn; none is the base.

    All of them still run afterwards. Raises RuntimeError for a failed request or a step that isn't full.
    """
    step_tokens = engine.config.max_batch_tokens
    params = SamplingParams(max_tokens=max_tokens(batch, prompt, steps, step_tokens))
    for i in range(batch):
        tokens = tuple(torch.randint(0, vocab, (prompt,)).tolist())
        engine.add_request(Request(f"{i} of {batch}", tokens, params, alone(refs[i % len(refs)] if refs else None)))
    for _ in range(prefill_steps(batch, prompt, step_tokens)):
        advance(engine)
    times: list[float] = []
    for _ in range(SKIPPED + steps):
        stats = advance(engine).stats
        if (stats.batch_size, stats.num_prompt_tokens) != (batch, 0):
            raise RuntimeError(
                f"a step of {stats.batch_size} sequences and {stats.num_prompt_tokens} prompt tokens, "
                f"expected {batch} that decode"
            )
        times.append(stats.step_seconds)
    return times[SKIPPED:]
