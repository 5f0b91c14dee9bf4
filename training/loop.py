"""Trains voices together on one frozen base: each pass holds rows of every voice that still has steps to take.

A single adapter is a choir of one; there is no other loop. What one voice does never reaches another: its loss, its
gradients and its optimizer are its own, and one that fails leaves the others where they were.
"""

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from training.data import Example
from training.distributed import Ranks
from training.forward import Lane, token_losses
from training.packing import pack
from training.voice import Voice

EVALUATION_ROWS = 32
Progress = Callable[[Voice], None]  # called when a voice's held-out loss was taken, and when it has failed


def train_together(
    model: Any, voices: Sequence[Voice], ranks: Ranks, dtype: torch.dtype, folders: Sequence[Path], progress: Progress
) -> None:
    """Train until every voice is done or failed; checkpoints go to each voice's folder. All have one `accumulate`."""
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for voice, folder in zip(voices, folders, strict=True):
        _evaluate(model, voice, ranks, dtype, folder, progress)
    while active := [voice for voice in voices if not voice.done]:
        _step(model, active, ranks, dtype)
        for voice, folder in zip(voices, folders, strict=True):
            if voice in active:
                if voice.failed:
                    progress(voice)
                else:
                    _evaluate(model, voice, ranks, dtype, folder, progress)


def _step(model: Any, voices: Sequence[Voice], ranks: Ranks, dtype: torch.dtype) -> None:
    """One optimizer step of each voice. Its loss is the mean over the step's learned tokens, however they are split."""
    start = time.perf_counter()
    first = voices[0].config
    learned = [voice.learned() for voice in voices]
    losses = torch.zeros(len(voices), device=ranks.device)
    tokens = [0] * len(voices)
    paddings: list[float] = []
    for part in range(first.accumulate):
        rows = [voice.rows(part) for voice in voices]
        packed = pack(rows, ranks.rank, ranks.world)
        tokens = [n + share.whole for n, share in zip(tokens, packed.shares, strict=True)]
        if not len(packed.ids):
            continue  # fewer rows than processes
        paddings.append(packed.padding)
        packed = packed.to(ranks.device)
        lanes = [voice.lane(part) for voice in voices]
        of_tokens = token_losses(model, packed, lanes, dtype, first.checkpointing)
        of_voices = torch.stack([part.sum() / max(1, n) for part, n in zip(of_tokens, learned, strict=True)])
        of_voices.sum().backward()
        losses += of_voices.detach()
    ranks.add_up([losses, *(gradient for voice in voices for gradient in voice.gradients())])
    for voice, loss in zip(voices, losses.tolist(), strict=True):
        voice.take_step(loss)
    seconds = time.perf_counter() - start
    for voice, n in zip(voices, tokens, strict=True):
        history, steps = voice.history, max(1, voice.history.steps)
        history.tokens += n
        history.seconds += seconds * n / sum(tokens)
        history.padding += (sum(paddings) / max(1, len(paddings)) - history.padding) / steps
        history.peak_bytes = peak_bytes(ranks.device)


def _evaluate(model: Any, voice: Voice, ranks: Ranks, dtype: torch.dtype, folder: Path, progress: Progress) -> None:
    if voice.done or not voice.due():
        return
    mine = voice.valid_set[ranks.rank :: ranks.world]
    losses = example_losses(model, mine, Lane(voice.adapter), ranks.device, dtype)
    totals = torch.tensor([[total, count] for total, count in losses] or [[0.0, 0.0]], dtype=torch.float64).sum(0)
    totals = totals.to(ranks.device)
    ranks.add_up([totals])
    voice.judge(float(totals[0] / totals[1]))
    if ranks.first and not voice.failed:
        voice.save(folder)
    progress(voice)


@torch.no_grad()
def example_losses(
    model: Any, examples: Sequence[Example], lane: Lane, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[tuple[float, int]]:
    """Of each example, in order: the sum of its learned tokens' losses in nats, and their number."""
    found: dict[int, tuple[float, int]] = {}
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].token_ids))
    for start in range(0, len(order), EVALUATION_ROWS):
        part = order[start : start + EVALUATION_ROWS]
        packed = pack([[examples[i] for i in part]]).to(device)
        (losses,) = token_losses(model, packed, [lane], dtype)
        counts = [len(examples[i].token_ids) - max(1, examples[i].bare_length) for i in part]
        for i, of_row, count in zip(part, losses.split(counts), counts, strict=True):
            found[i] = (float(of_row.sum()), count)
    return [found[i] for i in range(len(examples))]


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: by torch on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
