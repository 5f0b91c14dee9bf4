"""The pretraining loop: Muon for matrices, AdamW for the rest, sampled softmax until the last part of the budget.

Muon (Jordan 2024) orthogonalises the momentum of each weight matrix; embeddings, biases and norms stay with AdamW.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from training.errors import ConfigError, TrainingError
from training.pretrain_data import Mixture
from training.pretrain_loss import SampledSoftmax, full_loss


@dataclass(frozen=True)
class Shape:
    """A GPT-2 to be made."""

    layers: int = 6
    heads: int = 8
    width: int = 256
    positions: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"--{name} is {value}: give at least 1")
        if self.width % self.heads:
            raise ConfigError(f"--heads {self.heads} doesn't divide --width {self.width}")


@dataclass(frozen=True)
class Recipe:
    """How to train, within a budget: the first of `minutes` and `tokens` to be spent ends the run.

    A budget in tokens alone gives the same weights again on a CPU; one in minutes can't.
    """

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

    def __post_init__(self) -> None:
        if self.minutes is None and self.tokens is None:
            raise ConfigError("a run needs a budget: give --minutes or --tokens")
        for name in ("batch_size", "minutes", "tokens", "lr", "muon_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout is {self.dropout}: give a number from 0 up to, not including, 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}: give at least 0")


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
    """A GPT-2 with random weights from torch's seed, fp32."""
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


def train(
    model: GPT2LMHeadModel,
    mixture: Mixture,
    recipe: Recipe,
    after_step: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train in place until the budget is spent; the last state. Raises TrainingError where the loss isn't finite."""
    device, vocabulary = model.device, model.config.vocab_size
    body: Any = torch.compile(model.transformer) if recipe.compile else model.transformer
    embedding = model.transformer.wte.weight  # [V, D]
    sampled_loss = full_loss
    if recipe.frequent + recipe.sampled < vocabulary:
        frequencies = mixture.frequencies(vocabulary)
        sampled_loss = SampledSoftmax(frequencies, recipe.frequent, recipe.sampled, recipe.seed + 1, device)
    both = optimizers(model, recipe)
    peaks = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in both]
    model.train()
    start = time.monotonic()
    progress = Progress(step=0, tokens=0, seconds=0.0, fraction=0.0, loss=math.nan, full=False)
    while progress.fraction < 1:
        full = progress.fraction >= 1 - recipe.full_share
        scale = learning_rate_scale(progress.step, progress.fraction, recipe.warmup_steps)
        for optimizer, peak in zip(both, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = lr * scale
        ids = torch.from_numpy(mixture.draw(recipe.batch_size)).to(device)  # [B, T + 1]
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            hidden = body(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)  # [B T, D]
            loss = (full_loss if full else sampled_loss)(hidden, embedding, ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress = _advance(progress, recipe, ids[:, 1:].numel(), time.monotonic() - start, loss.item(), full)
        after_step(progress)
    return progress


def _advance(before: Progress, recipe: Recipe, tokens: int, seconds: float, loss: float, full: bool) -> Progress:
    step, tokens = before.step + 1, before.tokens + tokens
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is {loss} in step {step}: lower --lr and --muon-lr")
    by_tokens = tokens / recipe.tokens if recipe.tokens is not None else 0.0
    by_time = seconds / (60 * recipe.minutes) if recipe.minutes is not None else 0.0
    smoothed = loss if before.step == 0 else 0.97 * before.loss + 0.03 * loss
    return Progress(step, tokens, seconds, min(1.0, max(by_tokens, by_time)), smoothed, full)
