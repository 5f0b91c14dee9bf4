"""One voice in training: its adapter's parameters, its optimizer, its place in its own plan of steps.

A voice knows nothing of others. All that decides its next step is its state here and its seed, so that it may be
trained alone or beside others, stopped and taken up again, with the same result.
"""

import math
import os
import random
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from training.config import TrainConfig
from training.data import Example
from training.errors import TrainingError
from training.forward import Lane

EVALUATIONS = 8  # times that a run is evaluated and checkpointed
POINTS = 8  # of the training loss for each evaluation
STATE_FILE = "state.pt"
_STATE = {"weights", "best", "optimizer", "scheduler", "history", "since"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass
class History:
    """What a run did: points of (step, loss in nats a token), and how it went."""

    train: list[tuple[int, float]] = field(default_factory=list)
    valid: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0  # real ones that went through the model; there is no padding but in attention's grid
    seconds: float = 0.0  # of its steps, without evaluations; of a shared pass, this voice's share by tokens
    padding: float = 0.0  # mean share of attention's grid that no token fills
    peak_bytes: int = 0  # the process's on a CPU, torch's on a GPU
    ended_by: str = ""  # epochs, token budget, patience
    kept_step: int = 0  # whose weights were kept

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Voice:
    """One adapter of `model` and the run that trains it. `adapter` is its name in the PEFT model."""

    def __init__(
        self, model: Any, adapter: str, config: TrainConfig, train_set: Sequence[Example], valid_set: Sequence[Example]
    ) -> None:
        self.config, self.adapter, self.train_set, self.valid_set = config, adapter, train_set, valid_set
        self.plan, self._ends_by = plan([len(row.token_ids) - 1 for row in train_set], config)
        self.every = max(1, len(self.plan) // EVALUATIONS)
        self.history = History()
        self.failed: str | None = None
        marker = f".{adapter}.weight"
        # Named without the adapter: a checkpoint may be taken up at another place of a choir.
        self.parameters = {
            n.removesuffix(marker): p for n, p in model.named_parameters() if ".lora_" in n and n.endswith(marker)
        }
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        warmup = min(50, max(1, len(self.plan) // 10)) if config.warmup is None else config.warmup
        self.scheduler = _scheduler(config, self.optimizer, warmup, len(self.plan))
        self._best: dict[str, torch.Tensor] | None = None
        self._since: list[float] = []  # losses of the steps since the last point of the curve

    @property
    def done(self) -> bool:
        return bool(self.history.ended_by) or self.failed is not None

    def rows(self, part: int) -> list[Example]:
        """The rows of the next step's pass `part`, of `accumulate` passes; maybe none."""
        size = self.config.batch_size
        return [self.train_set[i] for i in self.plan[self.history.steps][part * size : (part + 1) * size]]

    def learned(self) -> int:
        """How many tokens the next step's loss is the mean of."""
        rows = (self.train_set[i] for i in self.plan[self.history.steps])
        return sum(len(row.token_ids) - max(1, row.bare_length) for row in rows)

    def lane(self, part: int) -> Lane:
        """For the next step's pass `part`; its dropout is the voice's own."""
        draw = self.history.steps * self.config.accumulate + part
        return Lane(self.adapter, self.config.dropout, random.Random(f"{self.config.seed}/{draw}").getrandbits(48))

    def gradients(self) -> list[torch.Tensor]:
        for parameter in self.parameters.values():
            if parameter.grad is None:  # no row of this voice was here
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]

    def take_step(self, loss: float) -> None:
        """Move the parameters along the gradients that are there. A loss that isn't finite fails the voice."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            self.failed = (
                f"the loss is no longer finite at step {self.history.steps + 1}: --lr {self.config.lr:g} is too high, "
                f"try {self.config.lr / 4:g}"
            )
            return
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.history.steps += 1
        self._since.append(loss)
        if self.history.steps % max(1, self.every // POINTS) == 0:
            self.history.train.append((self.history.steps, sum(self._since) / len(self._since)))
            self._since.clear()

    def due(self) -> bool:
        """Whether the held-out loss is to be taken now."""
        steps = self.history.steps
        taken = bool(self.history.valid) and self.history.valid[-1][0] == steps
        return not taken and (steps % self.every == 0 or steps == len(self.plan))

    def judge(self, loss: float) -> None:
        """Note the held-out loss at this step, keep the best weights, and see whether the run ends here."""
        if not math.isfinite(loss):
            self.failed = f"the held-out loss is no longer finite: --lr {self.config.lr:g} is too high"
            return
        history, patience = self.history, self.config.patience
        best = min((value for _, value in history.valid), default=math.inf)
        history.valid.append((history.steps, loss))
        if patience is not None and loss < best:
            history.kept_step = history.steps
            self._best = {name: p.detach().clone() for name, p in self.parameters.items()}
        if history.steps == len(self.plan):
            history.ended_by = self._ends_by
        elif patience is not None and len(history.valid) - 1 - self._best_evaluation() >= patience:
            history.ended_by = "patience"
        if history.ended_by and self._best is not None:
            self._put(self._best)
        elif history.ended_by:
            history.kept_step = history.steps

    def _best_evaluation(self) -> int:
        losses = [value for _, value in self.history.valid]
        return losses.index(min(losses))

    def save(self, folder: Path) -> None:
        """Write the state, whole or not at all."""
        state = {
            "weights": {name: p.detach() for name, p in self.parameters.items()}, "best": self._best,
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "history": asdict(self.history), "since": self._since,
        }  # fmt: skip
        fresh = folder / f"{STATE_FILE}.new"
        torch.save(state, fresh)
        os.replace(fresh, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Go on from the state in `folder`, if there is one. Raises TrainingError if it can't be read."""
        state = read_state(folder, next(iter(self.parameters.values())).device)
        if state is None:
            return
        self._put(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._best, self._since = state["best"], state["since"]
        self.history = History(**state["history"])

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


def _scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> LambdaLR:
    """Transformers' schedule from its second value on: with its first, 0, a step would learn nothing."""
    schedule: Any = get_scheduler(_SCHEDULES[config.schedule], optimizer, warmup, steps + 1)
    (of_step,) = schedule.lr_lambdas
    return LambdaLR(optimizer, lambda step: of_step(step + 1))


def read_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """What `Voice.save` wrote into `folder`; None if it didn't. Raises TrainingError if it can't be read."""
    file = folder / STATE_FILE
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        if not isinstance(state, dict) or state.keys() != _STATE:
            raise ValueError("it is no checkpoint of this version")
    except (OSError, RuntimeError, KeyError, ValueError, EOFError, UnpicklingError, struct.error) as error:
        raise TrainingError(f"--resume: {file} can't be read ({error}); start anew with --overwrite") from error
    return state


def plan(lengths: Sequence[int], config: TrainConfig) -> tuple[list[list[int]], str]:
    """The rows (indexes into `lengths`, which counts their tokens) of each step, and what ends the run.

    Every epoch has its own order; both depend on seed and epoch alone.
    """
    size = config.batch_size * config.accumulate
    each = math.ceil(len(lengths) / size)
    total = max(1, math.ceil(each * config.epochs))
    steps: list[list[int]] = []
    tokens = 0
    while len(steps) < total:
        order = list(range(len(lengths)))
        random.Random(f"{config.seed}/{len(steps) // each}").shuffle(order)
        for start in range(0, len(order), size):
            steps.append(order[start : start + size])
            tokens += sum(lengths[i] for i in steps[-1])
            if config.max_tokens is not None and tokens >= config.max_tokens:
                return steps, "token budget"
            if len(steps) == total:
                break
    return steps, "epochs"
