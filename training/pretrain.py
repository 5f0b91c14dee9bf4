"""`python -m training.pretrain --prose DIR --output DIR`: pretrain a small GPT-2 on a folder of prose.

Writes an ordinary Hugging Face GPT-2 checkpoint directory in fp16 with its tokenizer, and `pretrain.json` beside it:
recipe, sources, held-out loss, tokens, seconds, samples. docs/prose.md says where the demo base's prose comes from.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from training.config import DEMO_BASE
from training.errors import BaseError, ConfigError, TrainingError
from training.pretrain_data import HELD_OUT_DEFINITION, Mixture, Source, find_sources, load_sources
from training.pretrain_evaluate import evaluate, write_samples
from training.pretrain_loop import Progress, Recipe, Shape, new_model, train

REPORT = "pretrain.json"
CHECKPOINT_MINUTES = 5.0
DEFAULT_MINUTES = 30.0
_SHAPE = tuple(field.name for field in dataclasses.fields(Shape))
# What says how to train, and so is refused beside --eval-only.
_TRAINING = ("output", "minutes", "tokens", "batch_size", "lr", "muon_lr", "dropout", "precision", "compile")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for what the user can mend."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        run(parser().parse_args(arguments))
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line. A flag that isn't given is None, so that one which can't be honoured is seen."""
    recipe, shape = Recipe(minutes=DEFAULT_MINUTES), Shape()
    p = argparse.ArgumentParser(
        prog="python -m training.pretrain", description="Pretrain a small GPT-2 on a folder of prose."
    )
    p.add_argument("--prose", type=Path, required=True, metavar="DIR", help="folder of NAME.txt, one a source")
    p.add_argument("--output", type=Path, metavar="DIR", help="checkpoint directory to write; new or empty")
    p.add_argument("--init-from", type=Path, metavar="DIR", help="checkpoint directory to go on from, as it is shaped")
    p.add_argument("--eval-only", action="store_true", help="only evaluate --init-from on the held-out prose")
    p.add_argument(
        "--weight", action="append", default=[], metavar="NAME=W", help="a source's weight beside its size; 0: unused"
    )
    p.add_argument(
        "--minutes", type=float, help=f"budget of time (default: {DEFAULT_MINUTES:g}, or none with --tokens)"
    )
    p.add_argument("--tokens", type=int, help="budget of training tokens; alone, it makes a run on a CPU repeatable")
    for name in _SHAPE:
        p.add_argument(f"--{name}", type=int, help=f"of a new model (default: {getattr(shape, name)})")
    p.add_argument("--batch-size", type=int, help=f"windows in a step (default: {recipe.batch_size})")
    p.add_argument("--lr", type=float, help=f"AdamW's peak: embeddings, biases, norms (default: {recipe.lr})")
    p.add_argument("--muon-lr", type=float, help=f"Muon's peak: matrices (default: {recipe.muon_lr})")
    p.add_argument("--dropout", type=float, help=f"for several passes over the prose (default: {recipe.dropout:g})")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 where the device computes in it")
    p.add_argument("--compile", action="store_true", default=None, help="faster; on a CPU it needs a C++ compiler")
    p.add_argument("--seed", type=int, default=recipe.seed, help="default: %(default)s")
    return p


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train (or only evaluate) as the options say; what `pretrain.json` holds. Raises TrainingError."""
    _check(options)
    device = pick_device(options.device)
    recipe = read_recipe(options, device)
    weights = find_sources(options.prose, parse_weights(options.weight))
    torch.manual_seed(recipe.seed)
    tokenizer = load_tokenizer(options.init_from or DEMO_BASE)
    eos = int(tokenizer.eos_token_id)
    if options.init_from is not None:
        model = load_model(options.init_from, recipe.dropout)
    else:
        model: Any = new_model(Shape(**_given(options, _SHAPE)), len(tokenizer), eos, recipe.dropout)
    model.to(device)

    print(f"reading {', '.join(weights)}", flush=True)
    window = model.config.n_positions + 1
    sources = load_sources(options.prose, weights, lambda texts: encode(tokenizer, texts), eos, window)
    if options.eval_only:
        return judge(model, tokenizer, sources, recipe.seed)

    mixture = Mixture(sources, window, recipe.seed)
    final = _train(model, tokenizer, mixture, recipe, options.output)
    save(model, tokenizer, options.output)
    report = {
        "sources": describe(mixture),
        "recipe": dataclasses.asdict(recipe),
        "shape": {name: getattr(model.config, f"n_{name}") for name in ("layer", "head", "embd", "positions")},
        "init_from_sha256": options.init_from and weights_sha256(options.init_from),
        "tokens": final.tokens,
        "steps": final.step,
        "seconds": round(final.seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        # What was saved is judged, not what was trained: fp16 rounds.
        **judge(load_model(options.output).to(device), tokenizer, sources, recipe.seed),
    }
    (options.output / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _check(options: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything is read."""
    if options.eval_only:
        if options.init_from is None:
            raise ConfigError("--eval-only evaluates a checkpoint: add --init-from DIR")
        surplus = _given(options, _TRAINING + _SHAPE)
        if surplus:
            raise ConfigError(f"{_flag(next(iter(surplus)))} has no use beside --eval-only, which trains nothing")
        return
    if options.output is None:
        raise ConfigError("--output DIR is missing: where shall the checkpoint go?")
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise ConfigError(f"--output {options.output} is not an empty folder: nothing is written over; choose another")
    if options.init_from is not None and _given(options, _SHAPE):
        flag = _flag(next(iter(_given(options, _SHAPE))))
        raise ConfigError(f"{flag} shapes a new model, and --init-from has its shape already: leave one of them out")


def _given(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parse_weights(entries: list[str]) -> dict[str, float]:
    """NAME=W entries. Raises ConfigError."""
    weights: dict[str, float] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        try:
            weights[name] = float(value)
        except ValueError as error:
            raise ConfigError(f"--weight {entry}: write NAME=W, for example austen=1.8") from error
        if not 0 <= weights[name] < math.inf:
            raise ConfigError(f"--weight {entry}: give a number of at least 0; 0 leaves the source out")
    return weights


def read_recipe(options: argparse.Namespace, device: torch.device) -> Recipe:
    """The options over Recipe's defaults. Raises ConfigError."""
    values = _given(options, tuple(field.name for field in dataclasses.fields(Recipe) if hasattr(options, field.name)))
    if options.minutes is None and options.tokens is None:
        values["minutes"] = DEFAULT_MINUTES
    return Recipe(**{"precision": fast_precision(device), **values})


def pick_device(wanted: str | None) -> torch.device:
    """Raises ConfigError where CUDA is asked for and isn't there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device here; leave it out to train on the CPU")
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def fast_precision(device: torch.device) -> str:
    """bf16 where the device computes in it; on other CPUs it would be emulated, and slower than fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def load_tokenizer(folder: Path) -> Any:
    """Raises BaseError where there is none, or it has no EOS token."""
    if not (folder / "tokenizer.json").is_file():
        raise BaseError(f"--init-from {folder}: no tokenizer.json in it")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise BaseError(f"--init-from {folder}: its tokenizer has no EOS token, which ends every document")
    return tokenizer


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added; on all cores."""
    return [each.ids for each in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)]


def load_model(folder: Path, dropout: float = 0.0) -> Any:
    """The GPT2LMHeadModel of a checkpoint folder, in fp32. Raises BaseError where the folder holds none."""
    if not (folder / "config.json").is_file():
        raise BaseError(f"--init-from {folder}: no config.json in it: not a checkpoint folder")
    config = GPT2Config.from_pretrained(folder, local_files_only=True)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    try:
        return GPT2LMHeadModel.from_pretrained(folder, config=config, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseError(f"--init-from {folder}: its weights can't be read: {error}") from error


def save(model: GPT2LMHeadModel, tokenizer: Any, folder: Path) -> None:
    """Write config, fp16 weights and tokenizer; the model itself stays as it is."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def weights_sha256(folder: Path) -> str:
    """sha256 of a checkpoint's weights: of several shards, over all of them in order of name."""
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("model*.safetensors")):
        digest.update(shard.read_bytes())
    return digest.hexdigest()


def describe(mixture: Mixture) -> dict[str, dict[str, Any]]:
    """What was read, for the report."""
    return {
        source.name: {
            "weight": source.weight,
            "share": round(float(share), 4),
            "training_tokens": len(source.train),
            "held_out_tokens": len(source.held_out),
            "sha256": source.sha256,
        }
        for source, share in zip(mixture.sources, mixture.shares, strict=True)
    }


def judge(model: GPT2LMHeadModel, tokenizer: Any, sources: list[Source], seed: int) -> dict[str, Any]:
    """Held-out loss and samples, printed and as part of the report."""
    held_out = evaluate(model, sources)
    for name, loss in held_out.by_source.items():
        print(f"  {name}: {loss:.4f}")
    print(f"held-out loss {held_out.loss:.4f} nats over {held_out.tokens:,} tokens", flush=True)
    samples = write_samples(model, tokenizer, seed)
    for text in samples:
        print(f"  {text!r}", flush=True)
    return {"held_out": {**dataclasses.asdict(held_out), "definition": HELD_OUT_DEFINITION}, "samples": samples}


def _train(model: GPT2LMHeadModel, tokenizer: Any, mixture: Mixture, recipe: Recipe, output: Path) -> Progress:
    """Train with a line every ten seconds and a checkpoint every few minutes."""
    reported = checked = time.monotonic()

    def after_step(progress: Progress) -> None:
        nonlocal reported, checked
        now = time.monotonic()
        if progress.step == 1 or now - reported > 10:
            reported = now
            kind = "full" if progress.full else "sampled"
            print(
                f"{progress.fraction:4.0%}  step {progress.step}  {progress.tokens:,} tokens  {kind} loss "
                f"{progress.loss:.3f}  {progress.tokens / progress.seconds:,.0f} tokens/s",
                flush=True,
            )
        if now - checked > 60 * CHECKPOINT_MINUTES and progress.fraction < 1:
            save(model, tokenizer, output)
            loss = evaluate(model, mixture.sources, windows_per_source=4).loss
            print(f"checkpoint in {output}; held-out loss on a part: {loss:.4f}", flush=True)
            checked = time.monotonic()

    return train(model, mixture, recipe, after_step)


if __name__ == "__main__":
    sys.exit(main())
