"""`python -m training.pretrain --prose DIR --output DIR`: pretrain a small base on a folder of prose.

Writes an ordinary Hugging Face GPT-2 checkpoint directory in fp16 with its tokenizer, and `pretrain.json` beside it:
recipe, sources, held-out loss, tokens, seconds, samples. docs/prose.md says where the demo base's prose comes from.
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from training.pretrain_data import (
    HELD_OUT_DEFINITION,
    Mixture,
    ProseError,
    Source,
    find_sources,
    load_sources,
)
from training.pretrain_evaluate import evaluate, sample
from training.pretrain_loop import PretrainError, Progress, Recipe, Shape, new_model, train

DEMO_BASE = Path(__file__).resolve().parents[1] / "models" / "demo"
REPORT = "pretrain.json"


def parser() -> argparse.ArgumentParser:
    """The command line; every default is the demo base's recipe."""
    recipe, shape = Recipe(), Shape()
    p = argparse.ArgumentParser(
        prog="python -m training.pretrain", description=__doc__.splitlines()[0].split(": ")[1]
    )
    p.add_argument(
        "--prose", type=Path, required=True, metavar="DIR", help="folder of NAME.txt, one a source"
    )
    p.add_argument("--output", type=Path, metavar="DIR", help="checkpoint directory to write; new or empty")
    p.add_argument("--overwrite", action="store_true", help="allow --output to hold files already")
    p.add_argument("--init-from", type=Path, metavar="DIR", help="checkpoint directory to go on from")
    p.add_argument("--eval-only", action="store_true", help="only evaluate --init-from on the held-out prose")
    p.add_argument(
        "--tokenizer", type=Path, default=DEMO_BASE, metavar="DIR", help="default: the demo base's"
    )
    p.add_argument(
        "--weight", action="append", default=[], metavar="NAME=W", help="weight of a source; 0 leaves it out"
    )
    p.add_argument("--minutes", type=float, help="budget of time; 30 if neither is given")
    p.add_argument("--tokens", type=int, help="budget of training tokens; repeatable on a CPU")
    p.add_argument("--layers", type=int, default=shape.layers)
    p.add_argument("--heads", type=int, default=shape.heads)
    p.add_argument("--width", type=int, default=shape.width)
    p.add_argument("--positions", type=int, default=shape.positions)
    p.add_argument("--batch-size", type=int, default=recipe.batch_size, help="windows in a step")
    p.add_argument("--lr", type=float, default=recipe.lr, help="peak of AdamW: embeddings, biases, norms")
    p.add_argument("--muon-lr", type=float, default=recipe.muon_lr, help="peak of Muon: matrices")
    p.add_argument("--warmup-steps", type=int, default=recipe.warmup_steps)
    p.add_argument("--dropout", type=float, default=recipe.dropout)
    p.add_argument(
        "--frequent", type=int, default=recipe.frequent, help="tokens that are scored in every step"
    )
    p.add_argument("--sampled", type=int, default=recipe.sampled, help="rare tokens drawn for each step")
    p.add_argument(
        "--full-share", type=float, default=recipe.full_share, help="last part with the full softmax"
    )
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where it is fast"
    )
    p.add_argument(
        "--compile", action="store_true", help="compile the model first; needs a C++ compiler on a CPU"
    )
    p.add_argument("--eval-every", type=float, default=5.0, metavar="MIN", help="minutes between checkpoints")
    p.add_argument("--seed", type=int, default=recipe.seed)
    return p


def parse_weights(entries: list[str]) -> dict[str, float]:
    """NAME=W entries. Raises ProseError."""
    weights: dict[str, float] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        try:
            weights[name] = float(value)
        except ValueError as error:
            raise ProseError(f"--weight {entry}: expected NAME=W, e.g. austen=1.8") from error
    return weights


def pick_device(wanted: str) -> torch.device:
    """Raises PretrainError where CUDA is asked for and isn't there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise PretrainError("--device cuda: no CUDA device here")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(wanted: str, device: torch.device) -> str:
    """bf16 where the device computes in it; on other CPUs it would be emulated, and slower than fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    able = torch.cpu.get_capabilities()
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Raises PretrainError where there is none, or it has no EOS token."""
    if not (directory / "tokenizer.json").is_file():
        raise PretrainError(f"no tokenizer.json in {directory}")
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise PretrainError(f"the tokenizer in {directory} has no EOS token")
    return tokenizer


def load_model(directory: Path, dropout: float = 0.0) -> GPT2LMHeadModel:
    """A GPT-2 checkpoint in fp32. Raises PretrainError where the directory holds none."""
    if not (directory / "config.json").is_file():
        raise PretrainError(f"no config.json in {directory}: not a checkpoint directory")
    config = GPT2Config.from_pretrained(directory, local_files_only=True)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    try:
        return GPT2LMHeadModel.from_pretrained(
            directory, config=config, dtype=torch.float32, local_files_only=True
        )
    except OSError as error:
        raise PretrainError(f"no usable weights in {directory}: {error}") from error


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write config, fp16 weights and tokenizer; the model itself stays as it is."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    kept = model.config.dtype
    model.config.dtype = torch.float16
    try:
        model.save_pretrained(directory, state_dict=weights)
    finally:
        model.config.dtype = kept
    tokenizer.save_pretrained(directory)


def describe(sources: list[Source], mixture: Mixture) -> dict[str, dict[str, Any]]:
    """What was read, for the report."""
    return {
        source.name: {
            "weight": source.weight,
            "share": round(float(share), 4),
            "training_tokens": len(source.train),
            "held_out_tokens": len(source.held_out),
            "sha256": source.sha256,
        }
        for source, share in zip(sources, mixture.shares, strict=True)
    }


def tokens_before(directory: Path | None) -> int | None:
    """Training tokens behind a checkpoint to go on from; None where its report doesn't say."""
    if directory is None:
        return 0
    report = directory / REPORT
    return json.loads(report.read_text())["tokens_in_all"] if report.is_file() else None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train (or only evaluate) as the options say; what `pretrain.json` holds.

    Raises ProseError, PretrainError or ValueError for what a user can mend.
    """
    if options.eval_only and options.init_from is None:
        raise PretrainError("--eval-only needs --init-from DIR")
    if not options.eval_only:
        if options.output is None:
            raise PretrainError("--output DIR is missing")
        if options.output.exists() and any(options.output.iterdir()) and not options.overwrite:
            raise PretrainError(f"{options.output} is not empty; --overwrite to write there all the same")
    weights = find_sources(options.prose, parse_weights(options.weight))
    device = pick_device(options.device)
    minutes = 30.0 if options.minutes is None and options.tokens is None else options.minutes
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Recipe)}
    recipe = Recipe(**{**given, "minutes": minutes, "precision": pick_precision(options.precision, device)})
    _check(recipe)
    tokenizer = load_tokenizer(options.init_from or options.tokenizer)
    eos = int(tokenizer.eos_token_id)
    torch.manual_seed(recipe.seed)
    if options.init_from is not None:
        model = load_model(options.init_from, recipe.dropout)
    else:
        shape = Shape(options.layers, options.heads, options.width, options.positions)
        model = new_model(shape, len(tokenizer), eos, recipe.dropout)
    model.to(device)

    print(f"reading {', '.join(weights)}", flush=True)
    window = model.config.n_positions + 1

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]

    sources = load_sources(options.prose, weights, encode, eos, window)
    mixture = Mixture(sources, window, recipe.seed)
    report: dict[str, Any] = {"sources": describe(sources, mixture)}
    if options.eval_only:
        return {**report, **_judge(model, tokenizer, sources, recipe.seed)}

    final = _train(model, tokenizer, mixture, recipe, options)
    save(model, tokenizer, options.output)
    before = tokens_before(options.init_from)
    report |= {
        "recipe": dataclasses.asdict(recipe),
        "shape": {
            name: getattr(model.config, f"n_{name}") for name in ("layer", "head", "embd", "positions")
        },
        "init_from": options.init_from and options.init_from.name,
        "tokens": final.tokens,
        "tokens_in_all": None if before is None else before + final.tokens,
        "steps": final.step,
        "seconds": round(final.seconds, 1),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    # What was saved is judged, not what was trained: fp16 rounds.
    report |= _judge(load_model(options.output).to(device), tokenizer, sources, recipe.seed)
    (options.output / REPORT).write_text(
        json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return report


def _check(recipe: Recipe) -> None:
    for name in ("batch_size", "lr", "muon_lr", "minutes", "tokens"):
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise PretrainError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name in ("dropout", "full_share"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise PretrainError(
                f"--{name.replace('_', '-')} {getattr(recipe, name)}: must be between 0 and 1"
            )


def _train(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    mixture: Mixture,
    recipe: Recipe,
    options: argparse.Namespace,
) -> Progress:
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
        if now - checked > 60 * options.eval_every and progress.fraction < 1:
            save(model, tokenizer, options.output)
            loss = evaluate(model, mixture.sources, windows_per_source=4).loss
            print(f"checkpoint in {options.output}; held-out loss on a part: {loss:.4f}", flush=True)
            checked = time.monotonic()

    return train(model, mixture, recipe, after_step)


def _judge(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase, sources: list[Source], seed: int
) -> dict[str, Any]:
    print("held-out loss by source:", flush=True)
    held_out = evaluate(model, sources, progress=lambda line: print(line, flush=True))
    print(f"held-out loss {held_out.loss:.4f} nats over {held_out.tokens:,} tokens", flush=True)
    samples = sample(model, tokenizer, seed)
    for text in samples.values():
        print("  " + repr(text), flush=True)
    return {
        "held_out": {**dataclasses.asdict(held_out), "definition": HELD_OUT_DEFINITION},
        "samples": samples,
    }


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for what the user can mend."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (ProseError, PretrainError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
