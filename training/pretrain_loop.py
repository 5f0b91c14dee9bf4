"""The pretraining loop: Muon for matrices, AdamW for the rest, sampled softmax until the last part of the budget.

Muon (Jordan 2024) orthogonalises the momentum of each weight matrix; embeddings, biases and norms stay with AdamW.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from training.pretrain_data import Mixture
from training.pretrain_loss import SampledSoftmax, full_loss


class PretrainError(RuntimeError):
    """The run can't go on; the message says why."""


@dataclass(frozen=True)
class Shape:
    """A GPT-2 to be made."""

    layers: int = 6
    heads: int = 8
    width: int = 256
    positions: int = 256


@dataclass(frozen=True)
class Recipe:
    """How to train. A budget in tokens gives the same weights again on a CPU; one in minutes can't."""

    batch_size: int = 16  # windows in a step, each of the model's positions
    minutes: float | None = None  # budget of wall-clock time
    tokens: int | None = None  # budget of training tokens
    lr: float = 2e-3  # AdamW
    muon_lr: float = 2e-2
    warmup_steps: int = 60
    dropout: float = 0.0
    frequent: int = 8192  # tokens that the sampled softmax always scores
    sampled: int = 2048  # rare tokens drawn for each step
    full_share: float = 0.1  # last part of the budget, with the full softmax
    precision: str = "fp32"  # or bf16: autocast
    compile: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """State of a run after a step."""

    step: int
    tokens: int
    seconds: float
    fraction: float  # of the budget
    loss: float  # training loss, smoothed; of the sampled or the full softmax as `full` says
    full: bool


def new_model(shape: Shape, vocabulary: int, eos: int, dropout: float) -> GPT2LMHeadModel:
    """A GPT-2 with random weights from torch's seed, fp32. Raises PretrainError for a width that heads don't divide."""
    if shape.width % shape.heads:
        raise PretrainError(f"--heads {shape.heads} doesn't divide --width {shape.width}")
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=shape.positions,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    return GPT2LMHeadModel(config)


def optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """[Muon over the matrices of the layers, AdamW over embeddings, biases and norms]"""
    matrices: list[Tensor] = []
    embeddings: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.transformer.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        else:
            (embeddings if name in ("wte.weight", "wpe.weight") else matrices).append(parameter)
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": embeddings, "weight_decay": 0.01}]
    return [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True),
    ]


def learning_rate_scale(step: int, fraction: float, warmup_steps: int) -> float:
    """Linear warm-up in steps, then linear decay over the budget to 2 % of the peak."""
    return min(1.0, (step + 1) / max(1, warmup_steps)) * (0.02 + 0.98 * (1.0 - fraction))


@contextlib.contextmanager
def _precision(recipe: Recipe, device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        yield


def train(
    model: GPT2LMHeadModel,
    mixture: Mixture,
    recipe: Recipe,
    after_step: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train in place until the budget is spent; the last state.

    Raises PretrainError where there is no budget or the loss is no longer finite, ValueError for a sampled softmax
    that doesn't fit the vocabulary.
    """
    if recipe.minutes is None and recipe.tokens is None:
        raise PretrainError("give a budget: minutes or tokens")
    device = model.device
    body = torch.compile(model.transformer) if recipe.compile else model.transformer
    embedding = model.transformer.wte.weight
    frequencies = mixture.frequencies(model.config.vocab_size)
    sampled_loss = SampledSoftmax(frequencies, recipe.frequent, recipe.sampled, recipe.seed + 1, device)
    both = optimizers(model, recipe)
    peaks = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in both]
    model.train()
    start = time.monotonic()
    step, tokens, smoothed = 0, 0, None
    progress = Progress(0, 0, 0.0, 0.0, float("nan"), full=False)
    while progress.fraction < 1:
        full = progress.fraction >= 1 - recipe.full_share
        scale = learning_rate_scale(step, progress.fraction, recipe.warmup_steps)
        for optimizer, peak in zip(both, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * scale
        ids = torch.from_numpy(mixture.draw(recipe.batch_size)).to(device)  # [B, T + 1]
        with _precision(recipe, device):
            hidden = body(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)  # [B T, D]
            loss = (full_loss if full else sampled_loss)(hidden, embedding, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += ids[:, 1:].numel()
        value = loss.item()
        if value != value or value == float("inf"):
            raise PretrainError(f"the loss is {value} after step {step}: lower --lr and --muon-lr")
        smoothed = value if smoothed is None else 0.97 * smoothed + 0.03 * value
        seconds = time.monotonic() - start
        fraction = max(
            tokens / recipe.tokens if recipe.tokens is not None else 0.0,
            seconds / (60 * recipe.minutes) if recipe.minutes is not None else 0.0,
        )
        progress = Progress(step, tokens, seconds, min(1.0, fraction), smoothed, full)
        after_step(progress)
    return progress
