"""Sampling from a transformers GPT-2, batched and seeded. For measuring; the server has its own engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class SamplingSettings:
    """How samples are drawn."""

    temperature: float = 0.8
    top_p: float = 0.95
    max_tokens: int = 64
    batch_size: int = 64


@dataclass(frozen=True)
class Sample:
    """A continuation: its token ids without EOS, and whether EOS ended it."""

    token_ids: list[int]
    stopped: bool


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[Sequence[int]], eos: int, settings: SamplingSettings, seed: int
) -> list[Sample]:
    """One continuation of each prompt (token ids), in order. On one machine the same seed gives the same samples."""
    generator = torch.Generator().manual_seed(seed)
    samples: list[Sample] = []
    for start in range(0, len(prompts), settings.batch_size):
        samples += _sample_batch(model, prompts[start : start + settings.batch_size], eos, settings, generator)
    return samples


def _sample_batch(
    model: Any, prompts: Sequence[Sequence[int]], eos: int, settings: SamplingSettings, generator: torch.Generator
) -> list[Sample]:
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)  # [B, T], padded on the left
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    position = (mask.cumsum(1) - 1).clamp(min=0)  # [B, T]
    running = list(range(len(prompts)))  # row of the batch -> index of its prompt
    tokens: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    cache = None
    for _ in range(min(settings.max_tokens, model.config.n_positions - longest)):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        cache = output.past_key_values
        chosen = _choose(output.logits[:, -1].float().cpu(), settings, generator)  # [B]
        alive = []
        for row, token in enumerate(chosen.tolist()):
            if token == eos:
                stopped[running[row]] = True
            else:
                tokens[running[row]].append(token)
                alive.append(row)
        if not alive:
            break
        if len(alive) < len(running):  # finished rows leave the batch
            keep = torch.tensor(alive, device=device)
            cache.batch_select_indices(keep)
            mask, position, chosen = mask[keep], position[keep], chosen[keep.cpu()]
            running = [running[row] for row in alive]
        ids = chosen[:, None].to(device)  # [B, 1]
        mask = torch.cat([mask, mask.new_ones(len(running), 1)], 1)
        position = position[:, -1:] + 1
    return [Sample(t, s) for t, s in zip(tokens, stopped, strict=True)]


def _choose(logits: torch.Tensor, settings: SamplingSettings, generator: torch.Generator) -> torch.Tensor:
    """Next tokens: logits [B, V] fp32 on the CPU -> [B]. Temperature first, then top-p, as `generate` does.

    Draws from the whole distribution and draws again where top-p leaves the token out, which is the same as drawing
    from what top-p keeps and needs no sort. A token is kept where the more probable ones hold less than top_p.
    """
    probabilities = (logits / settings.temperature).softmax(1)  # [B, V]
    cumulative = probabilities.double().cumsum(1)
    chosen = torch.zeros(len(logits), dtype=torch.long)
    rows = torch.arange(len(logits))  # still to draw for
    while len(rows):
        points = torch.rand(len(rows), 1, dtype=torch.float64, generator=generator) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, points).clamp(max=logits.shape[1] - 1)  # [n, 1]
        before = torch.where(probabilities > probabilities.gather(1, drawn), probabilities, 0.0).sum(1)
        chosen[rows] = drawn[:, 0]
        again = before >= settings.top_p
        rows, probabilities, cumulative = rows[again], probabilities[again], cumulative[again]
    return chosen


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], eos: int, max_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy continuation (with EOS, if it is reached) and each token's logprob under the raw fp32 logits."""
    device = next(model.parameters()).device
    ids, logprobs = list(prompt), []
    for _ in range(min(max_tokens, model.config.n_positions - len(prompt))):
        logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, -1].float()  # [V]
        token = int(logits.argmax())
        ids.append(token)
        logprobs.append(float(logits.log_softmax(0)[token]))
        if token == eos:
            break
    return ids[len(prompt) :], logprobs
