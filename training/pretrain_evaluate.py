"""What a base is worth: its loss on the held-out end of every source, and a few samples of what it writes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from training.pretrain_data import Source, held_out_windows

PROMPTS = ("The first duty of a man is", "It is a truth", "Once upon a time", "Quote by Oscar Wilde:")
_ROWS = 8  # windows in one forward


@dataclass(frozen=True)
class HeldOut:
    """Cross-entropy in nats per predicted token; see pretrain_data.HELD_OUT_DEFINITION."""

    loss: float  # over all sources, every predicted token counting once
    tokens: int  # predicted tokens
    by_source: dict[str, float]


def _batches(windows: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """Windows of equal length together, `_ROWS` at a time; only a source's last one can be shorter."""
    for length in sorted({len(window) for window in windows}, reverse=True):
        same = [window for window in windows if len(window) == length]
        for start in range(0, len(same), _ROWS):
            yield torch.from_numpy(np.stack(same[start : start + _ROWS]))  # [rows, length]


@torch.no_grad()
def evaluate(
    model: GPT2LMHeadModel,
    sources: list[Source],
    windows_per_source: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> HeldOut:
    """Held-out loss in the model's own precision; the first `windows_per_source` windows only, if given."""
    device = model.device
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for source in sources:
        sums[source.name], counts[source.name] = 0.0, 0
        windows = held_out_windows(source.held_out, model.config.n_positions)[:windows_per_source]
        for batch in _batches(windows):
            ids = batch.to(device)
            logits = model(ids[:, :-1], use_cache=False).logits  # [rows, length - 1, V]
            loss = functional.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
            )
            sums[source.name] += loss.item()
            counts[source.name] += ids[:, 1:].numel()
        progress(
            f"  {source.name}: {sums[source.name] / counts[source.name]:.4f} over {counts[source.name]} tokens"
        )
    model.train(was_training)
    total = sum(counts.values())
    by_source = {name: sums[name] / counts[name] for name in sums}
    return HeldOut(loss=sum(sums.values()) / total, tokens=total, by_source=by_source)


@torch.no_grad()
def sample(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, seed: int, max_new_tokens: int = 50
) -> dict[str, str]:
    """Prompt -> prompt and continuation, at temperature 0.8 and top-p 0.9. Resets torch's seed."""
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    texts: dict[str, str] = {}
    for prompt in PROMPTS:
        room = model.config.n_positions - max_new_tokens
        ids = torch.tensor([tokenizer.encode(prompt)[: max(1, room)]], device=model.device)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, model.config.n_positions - ids.shape[1]),
            do_sample=True,
            temperature=0.8,
            top_p=0.9,
            top_k=0,
            pad_token_id=model.config.eos_token_id,
        )
        texts[prompt] = str(tokenizer.decode(output[0], skip_special_tokens=False))
    model.train(was_training)
    return texts
