"""LoRA on a frozen GPT-2: PEFT's adapter, transformers' Trainer, our loss. Seeded, checkpointed, resumable."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from training.base import Base
from training.collate import IGNORED, LengthGrouped, collate
from training.config import TrainConfig
from training.data import Example
from training.errors import ConfigError, TrainingError
from training.loss import frozen_head_loss

RUN_FILE = "run.json"
EVALUATIONS = 8  # times that a run is evaluated and checkpointed


@dataclass(frozen=True)
class History:
    """What a run's log holds: points of (step, loss in nats a token), and how it went."""

    train: list[tuple[int, float]]
    valid: list[tuple[int, float]]
    steps: int
    seconds: float  # of this process; a resumed run counts from where it went on


class LoraTrainer(Trainer):
    """Trainer with the loss of a frozen output head, and batches of like lengths."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(row["input_ids"]) for row in rows]
        return LengthGrouped(lengths, self.args.per_device_train_batch_size, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss over the batch's labels; the logits are never kept."""
        base = model.get_base_model()
        hidden = base.transformer(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state[:, :-1]  # [B, T - 1, C]
        labels = inputs["labels"][:, 1:]  # [B, T - 1]
        kept = labels != IGNORED
        loss = frozen_head_loss(hidden[kept], base.lm_head.weight, labels[kept])
        return (loss, {}) if return_outputs else loss


def adapt(model: GPT2LMHeadModel, config: TrainConfig) -> PeftModel:
    """`model` frozen, with a fresh adapter on the configured projections."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        fan_in_fan_out=True,  # GPT-2's Conv1D keeps its weights as (in, out)
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, lora)
    return adapted


def train(
    base: Base, config: TrainConfig, train_set: Sequence[Example], valid_set: Sequence[Example]
) -> tuple[PeftModel, History]:
    """Train, or go on from the last checkpoint in `config.partial`.

    Raises ConfigError if the unfinished run there isn't this one, TrainingError if the loss isn't finite.
    """
    set_seed(config.seed)
    model = adapt(base.load(), config)
    checkpoint = _prepare(config, base, train_set)
    steps = math.ceil(len(train_set) / config.batch_size) * config.epochs
    every = max(1, int(steps) // EVALUATIONS)
    arguments = TrainingArguments(
        output_dir=str(config.partial / "checkpoints"),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=32,
        num_train_epochs=config.epochs,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, max(1, int(steps) // 10)),
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=checkpoint is None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=max(1, every // 8),
        prediction_loss_only=True,
        remove_unused_columns=False,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False),
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        report_to="none",
        seed=config.seed,
    )
    trainer = LoraTrainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=_dataset(train_set),
        eval_dataset=_dataset(valid_set),
    )
    start = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    history = _history(trainer.state.log_history, trainer.state.global_step, time.monotonic() - start)
    if not all(math.isfinite(loss) for _, loss in history.train + history.valid):
        raise TrainingError(f"the loss is no longer finite: --lr {config.lr} is too high, try {config.lr / 4:g}")
    return model.eval(), history


def save_adapter(model: PeftModel, base: Base, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, free of paths and of hash order."""
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card
    (folder / "adapter_model.safetensors").chmod(0o644)  # written for its owner only; a server may run as another user
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    values["base_model_name_or_path"] = base.name
    values["target_modules"] = sorted(values["target_modules"])
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _prepare(config: TrainConfig, base: Base, train_set: Sequence[Example]) -> str | None:
    """Set up `config.partial`; the checkpoint to go on from."""
    texts = hashlib.sha256(json.dumps([example.token_ids for example in train_set]).encode()).hexdigest()
    recorded = config.recorded() | {"base_sha256": base.weights_sha256(), "texts_sha256": texts}
    recorded = json.loads(json.dumps(recorded))  # as it reads back
    file = config.partial / RUN_FILE
    if config.resume:
        if not file.is_file():
            raise ConfigError(f"--resume: there is no unfinished run of {config.name!r} in {config.output}")
        before = json.loads(file.read_text())
        changed = [key for key in recorded if before.get(key) != recorded[key]]
        if changed:
            changed = [key for key in changed if not key.endswith("_sha256")] or changed  # name the cause
            listed = ", ".join(f"{key} was {before.get(key)!r}, is {recorded[key]!r}" for key in changed)
            raise ConfigError(f"--resume: this is another run ({listed}); give the same flags, or --overwrite")
        checkpoints = config.partial / "checkpoints"
        return get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    shutil.rmtree(config.partial, ignore_errors=True)
    config.partial.mkdir(parents=True)
    file.write_text(json.dumps(recorded, indent=2) + "\n")
    return None


def _dataset(examples: Sequence[Example]) -> Any:
    # A prompt's names are not learned, so that after any name, known or not, the template goes on.
    return [{"input_ids": example.token_ids, "learn_from": example.bare_length} for example in examples]


def _history(log: list[dict[str, float]], steps: int, seconds: float) -> History:
    points = {
        key: [(int(entry["step"]), float(entry[key])) for entry in log if key in entry] for key in ("loss", "eval_loss")
    }
    return History(points["loss"], points["eval_loss"], steps, seconds)
