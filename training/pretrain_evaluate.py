"""What a base is worth: its loss on the held-out end of every source, and a few samples of what it writes."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import GPT2LMHeadModel

from training.pretrain_data import Source, held_out_windows
from training.sampling import SamplingSettings, sample

PROMPTS = ("The first duty of a man is", "It is a truth", "Once upon a time", "Quote by Oscar Wilde:")
SAMPLE_TOKENS = 48
_ROWS = 8  # windows in one forward


@dataclass(frozen=True)
class HeldOut:
    """Cross-entropy in nats per predicted token; see pretrain_data.HELD_OUT_DEFINITION."""

    loss: float  # over all sources, every predicted token counting once
    tokens: int  # predicted tokens
    by_source: dict[str, float]


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, sources: list[Source], windows_per_source: int | None = None) -> HeldOut:
    """Held-out loss in the model's own precision; of the first `windows_per_source` windows only, if given."""
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for source in sources:
        sums[source.name], counts[source.name] = 0.0, 0
        windows = held_out_windows(source.held_out, model.config.n_positions)[:windows_per_source]
        for batch in _batches(windows):
            ids = batch.to(model.device)  # [rows, length]
            logits = model(ids[:, :-1], use_cache=False).logits  # [rows, length - 1, V]
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            sums[source.name] += loss.item()
            counts[source.name] += ids[:, 1:].numel()
    model.train(was_training)
    total = sum(counts.values())
    by_source = {name: sums[name] / counts[name] for name in sums}
    return HeldOut(loss=sum(sums.values()) / total, tokens=total, by_source=by_source)


def _batches(windows: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """Windows of equal length together, `_ROWS` at a time; only a source's last one can be shorter."""
    for length in sorted({len(window) for window in windows}, reverse=True):
        same = [window for window in windows if len(window) == length]
        for start in range(0, len(same), _ROWS):
            yield torch.from_numpy(np.stack(same[start : start + _ROWS]))  # [rows, length]


def write_samples(model: GPT2LMHeadModel, tokenizer: Any, seed: int) -> list[str]:
    """Each of PROMPTS with a continuation at temperature 0.8 and top-p 0.95, the i-th from seed + i; EOS is shown."""
    was_training = model.training
    model.eval()
    eos = int(tokenizer.eos_token_id)
    texts: list[str] = []
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer.encode(prompt)[: model.config.n_positions - 1]
        room = min(SAMPLE_TOKENS, model.config.n_positions - len(ids))
        settings = SamplingSettings(temperature=0.8, top_p=0.95, max_tokens=room)
        continuation = sample(model, [ids], eos, settings, seed + i)[0]
        texts.append(str(tokenizer.decode(ids + continuation.token_ids + [eos] * continuation.stopped)))
    model.train(was_training)
    return texts
