"""LoRA on a frozen GPT-2: PEFT's adapters, our loop. Seeded, checkpointed, resumable; one adapter or several."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel, set_seed

from training.base import Base
from training.config import TrainConfig
from training.data import Corpus
from training.distributed import Ranks
from training.errors import ConfigError, TrainingError
from training.loop import Progress, train_together
from training.origin import put_weights
from training.output import RUN_FILE, begun, read_run, start
from training.voice import Voice, read_state


@dataclass(frozen=True)
class Job:
    """One adapter to be made: what it is to be, and its data."""

    config: TrainConfig
    corpus: Corpus


def train(
    base: Base, weights: GPT2LMHeadModel, jobs: Sequence[Job], ranks: Ranks, progress: Progress
) -> tuple[PeftModel, list[Voice]]:
    """Train the jobs' adapters together on `weights`, or go on from their checkpoints.

    The voices come back in the order of the jobs, each done or `failed`; the model is in evaluation mode.
    Raises ConfigError if an unfinished run isn't this one, TrainingError if its checkpoint can't be read or a GPU's
    memory is too small.
    """
    model: Any = fresh(weights, [job.config for job in jobs], base)
    model.to(ranks.device)
    voices = []
    for number, job in enumerate(jobs):
        voice = Voice(model, name_in_model(number), job.config, job.corpus.train, job.corpus.valid)
        texts = _texts_sha256(job.corpus)
        ranks.first_does(partial(_prepare, job, base))
        ranks.everywhere(partial(voice.load, job.config.partial))
        ranks.agree((texts, voice.history.steps), "the processes see other data or checkpoints: give all one --data "
                    "and one --output folder")  # fmt: skip
        voices.append(voice)
    dtype = getattr(torch, jobs[0].config.dtype)
    try:
        train_together(model, voices, ranks, dtype, [job.config.partial for job in jobs], progress)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU's memory is too small for {len(jobs)} x --batch-size {jobs[0].config.batch_size} rows: give a "
            f"smaller one with a larger --accumulate, --checkpointing{', a smaller --together' * (len(jobs) > 1)}"
        ) from error
    return model, voices


def fresh(weights: GPT2LMHeadModel, configs: Sequence[TrainConfig], base: Base) -> PeftModel:
    """`weights`, frozen, with an adapter for each configuration, as it is before the first step."""
    model: Any = None
    for number, config in enumerate(configs):
        set_seed(config.seed)  # each starts as it would alone
        if model is None:
            model = get_peft_model(weights, _lora(config), adapter_name=name_in_model(number))
        else:
            model.add_adapter(name_in_model(number), _lora(config))
        put_weights(model, name_in_model(number), config, base)
    model.eval()  # the forward pass draws its own dropout
    model.requires_grad_(False)
    return model


def name_in_model(number: int) -> str:
    """PEFT's name of a job's adapter; a user's name may hold what PEFT's may not."""
    return f"voice{number}"


def save_adapter(model: PeftModel, adapter: str, base: Base, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, free of paths and of hash order."""
    folder.mkdir(parents=True)
    weights = get_peft_model_state_dict(model, adapter_name=adapter)
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in weights.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_model.safetensors").chmod(0o644)  # a server may run as another user
    config = model.peft_config[adapter]
    config.save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    values |= {"base_model_name_or_path": base.name, "inference_mode": True}
    values["target_modules"] = sorted(values["target_modules"])
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _lora(config: TrainConfig) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=list(config.targets),
        fan_in_fan_out=True,  # GPT-2's Conv1D keeps its weights as (in, out)
        task_type="CAUSAL_LM",
    )


def _texts_sha256(corpus: Corpus) -> str:
    """Of all that decides the weights and the losses on the way."""
    ids = [[example.token_ids for example in rows] for rows in (corpus.train, corpus.valid, corpus.test)]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def check_resumed(job: Job, base: Base) -> None:
    """Raises ConfigError if the unfinished run that the job is to go on with isn't this one or isn't there,
    TrainingError if its checkpoint can't be read."""
    config, recorded = job.config, _recorded(job, base)
    file = config.partial / RUN_FILE
    before = read_run(config)
    if before is None or not begun(config):
        raise ConfigError(f"--resume: there is no unfinished run of {config.name!r} in {config.output}")
    if not before:
        raise ConfigError(f"--resume: {file} can't be read; start anew with --overwrite")
    changed = [key for key in recorded if before.get(key) != recorded[key]]
    if changed:
        changed = [key for key in changed if not key.endswith("_sha256")] or changed  # name the cause
        listed = ", ".join(f"{key} was {before.get(key)!r}, is {recorded[key]!r}" for key in changed)
        raise ConfigError(f"--resume: this is another run ({listed}); give the same flags, or --overwrite")
    read_state(config.partial, torch.device("cpu"))


def _recorded(job: Job, base: Base) -> dict[str, Any]:
    """What run.json holds a run against, as it reads back."""
    what = {"base_sha256": base.weights_sha256(), "texts_sha256": _texts_sha256(job.corpus)}
    return json.loads(json.dumps(job.config.recorded() | what))


def _prepare(job: Job, base: Base) -> None:
    """Set up the folder of a run that begins, or check that the unfinished one in it is this one."""
    config = job.config
    if config.resume:
        check_resumed(job, base)
    else:
        start(config, _recorded(job, base))
