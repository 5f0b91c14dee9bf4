"""One training run by the lesson's recipe and by ours, each with the clock stopped while held-out loss is taken."""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from training.base import Base
from training.config import TrainConfig
from training.data import Corpus, Example
from training.distributed import Ranks
from training.forward import Lane
from training.loop import example_losses, peak_bytes
from training.train import Job, train
from training.voice import EVALUATIONS, Voice


@dataclass
class Run:
    """What a run did: cumulative (step, seconds, real tokens, held-out loss in nats) at its evaluations."""

    points: list[tuple[int, float, int, float]] = field(default_factory=list)
    padding: float = 0.0
    peak_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """After the first evaluation that follows a step: what is set up in the first step isn't timed."""
        (_, start, before, _), (_, end, after, _) = self.points[1], self.points[-1]
        return (after - before) / (end - start)

    @property
    def best(self) -> float:
        return min(loss for *_, loss in self.points)

    def seconds_to(self, loss: float) -> float | None:
        """When it first had `loss` or less, by the line between two evaluations; None: never."""
        for (_, start, _, above), (_, end, _, below) in zip(self.points, self.points[1:], strict=False):
            if below <= loss:
                return end if above <= below else start + (end - start) * (above - loss) / (above - below)
        return None


def held_out(model: Any, examples: Sequence[Example], adapter: str, device: torch.device) -> float:
    """Mean loss in nats a learned token, by our own loop, in fp32."""
    losses = example_losses(model, examples, Lane(adapter), device)
    return sum(total for total, _ in losses) / sum(count for _, count in losses)


def ours(base: Base, weights: GPT2LMHeadModel, job: Job, ranks: Ranks) -> Run:
    """The loop as `python -m training` runs it. `weights` come back as they were."""
    run = Run()
    adapted: Any = SimpleNamespace(get_base_model=lambda: weights)  # PEFT puts the adapter into its modules

    def note(voice: Voice) -> None:
        history = voice.history
        loss = held_out(adapted, job.corpus.valid, voice.adapter, ranks.device)
        run.points.append((history.steps, history.seconds, history.tokens, loss))

    model, (voice,) = train(base, weights, [job], ranks, note)
    run.padding, run.peak_bytes = voice.history.padding, voice.history.peak_bytes
    unload(model, [job])
    return run


def unload(model: Any, jobs: Sequence[Job]) -> None:
    """Take the adapters out of the base's modules, and the checkpoints off the disk."""
    model.unload()
    for job in jobs:
        shutil.rmtree(job.config.partial, ignore_errors=True)


class _Clock(TrainerCallback):
    """Adds up the time of the steps, and takes the held-out loss as often as ours does."""

    def __init__(self, run: Run, model: Any, valid: Sequence[Example], tokens: list[int], device: torch.device) -> None:
        self.run, self.model, self.valid, self.tokens, self.device = run, model, valid, tokens, device
        self.seconds = self.mark = 0.0

    def _evaluate(self, step: int, batch: int) -> None:
        self.model.eval()
        loss = held_out(self.model, self.valid, "default", self.device)
        self.model.train()
        self.run.points.append((step, self.seconds, sum(self.tokens[: step * batch]), loss))
        self.mark = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._evaluate(0, args.train_batch_size)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if state.global_step % max(1, state.max_steps // EVALUATIONS) == 0 or state.global_step == state.max_steps:
            self.seconds += time.perf_counter() - self.mark
            self.run.peak_bytes = peak_bytes(self.device)
            self._evaluate(state.global_step, args.train_batch_size)


def lesson(weights: GPT2LMHeadModel, job: Job, ranks: Ranks, width: int, eos: int) -> Run:
    """Trainer and PEFT in fp32: every text padded with EOS to `width` places. `weights` come back as they were."""
    config, corpus = job.config, job.corpus
    tokens: list[int] = []  # of each row that went into a batch, in order
    run = Run()

    def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [row["ids"] for row in rows]
        tokens.extend(len(ids) - 1 for ids in texts)  # the last one is only predicted, in ours too
        ids = torch.tensor([[*ids, *[eos] * (width - len(ids))] for ids in texts])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    set_seed(config.seed)
    lora = LoraConfig(r=config.rank, lora_alpha=config.lora_alpha, lora_dropout=config.dropout, task_type="CAUSAL_LM",
                      target_modules=list(config.targets), fan_in_fan_out=True)  # fmt: skip
    model: Any = get_peft_model(weights.to(ranks.device), lora)  # type: ignore[arg-type]
    steps = -(-len(corpus.train) // config.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=config.batch_size, num_train_epochs=1, learning_rate=config.lr,
            lr_scheduler_type=config.schedule, warmup_steps=min(50, max(1, steps // 10)), seed=config.seed,
            max_grad_norm=config.clip, use_cpu=ranks.device.type == "cpu", save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        clock = _Clock(run, model, corpus.valid, tokens, ranks.device)
        rows: Any = [{"ids": row.token_ids} for row in corpus.train]
        Trainer(model, settings, data_collator=collate, train_dataset=rows, callbacks=[clock]).train()
    run.padding = 1 - sum(len(row.token_ids) for row in corpus.train) / (width * len(corpus.train))
    weights = model.unload()
    return run


def part_of(corpus: Corpus, train_rows: int, valid_rows: int) -> Corpus:
    """The first rows of a corpus."""
    return replace(corpus, train=corpus.train[:train_rows], valid=corpus.valid[:valid_rows])


def job_of(config: TrainConfig, corpus: Corpus, seed: int, folder: Path, **more: Any) -> Job:
    """One repeat's run."""
    return Job(replace(config, seed=seed, output=str(folder), name="benchmark", **more), corpus)
