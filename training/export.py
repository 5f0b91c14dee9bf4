"""`python -m training export ADAPTER --output DIR`: a full checkpoint, W + s (B A)^T in place of each W.

Transformers and our server load it as any GPT-2. It is for where adapters can't be: one voice, the size of the base.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training import made
from training.base import Base, open_base
from training.config import resolved_path
from training.errors import ConfigError, TrainingError
from training.made import Made

DTYPES = ("float32", "float16", "bfloat16")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
_PROBED = 256  # token ids whose logits are compared


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="python -m training export",
        description="Merge an adapter into its base: a full checkpoint that transformers and the server load.",
    )
    flags.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder")
    flags.add_argument("--output", required=True, metavar="DIR", help="where the checkpoint is written")
    flags.add_argument("--model", metavar="DIR|ID", help="the base (default: as recorded beside the adapter)")
    flags.add_argument(
        "--dtype", choices=DTYPES, default="float32",
        help="of the file (default: float32, in which it is merged); the others are half the size, and rounded",
    )  # fmt: skip
    flags.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    return flags


def main(argv: Sequence[str]) -> None:
    """Merge, compare, and put the folder in its place, whole. Raises TrainingError, OSError."""
    flags = parser().parse_args(argv)
    output = Path(flags.output).absolute()
    if output.exists() and not flags.overwrite:
        raise ConfigError(f"{flags.output} exists: choose another --output, or --overwrite to replace it")
    if output.exists() and not _is_checkpoint(output):
        raise ConfigError(f"{flags.output} is no checkpoint's folder, which alone --overwrite replaces: choose another")

    (adapter,) = made.find([flags.adapter])
    base = open_base(resolved_path(flags.model or adapter.model))
    digest = adapter.digest(base)
    if output.resolve() in (base.folder.resolve(), adapter.folder.resolve()):
        raise ConfigError(f"--output {flags.output} is what is merged: choose another")
    model, ids = made.attach(base.load(), [adapter]), _probe(base)
    expected = _logits(model, ids)
    merged: Any = model.merge_and_unload()
    merged = merged.to(getattr(torch, flags.dtype))
    apart, largest = float((_logits(merged.float(), ids) - expected).abs().max()), float(expected.abs().max())
    if not apart <= largest:  # nor is it where a weight is too large for the dtype
        raise TrainingError(f"--dtype {flags.dtype} doesn't hold these weights: choose another")
    said = f"{apart:.2g} at most, of logits up to {largest:.3g}, over {_PROBED} tokens"
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_name(f".{output.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        merged.to(getattr(torch, flags.dtype)).save_pretrained(fresh)  # what was rounded once stays as it is
        for name in _TOKENIZER:
            if (base.folder / name).is_file():
                shutil.copyfile(base.folder / name, fresh / name)
        (fresh / "README.md").write_text(_card(adapter, base, digest, flags.dtype, said), encoding="utf-8")
        for file in fresh.iterdir():
            file.chmod(0o644)  # a server may run as another user
        _put(fresh, output)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"wrote {flags.output}: {adapter.name} merged into {base.name}, {flags.dtype}, {size / 2**20:,.1f} MiB")
    print(f"its logits differ from the unmerged adapter's by {said}")


def _is_checkpoint(folder: Path) -> bool:
    """Whether it holds a model and nothing that a person would miss: no folder."""
    return (
        folder.is_dir() and (folder / "config.json").is_file() and not any(file.is_dir() for file in folder.iterdir())
    )


def _probe(base: Base) -> torch.Tensor:
    """Token ids that reach over the vocabulary and the positions: [rows, T]."""
    length = min(_PROBED, base.context)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(base.config.vocab_size, (_PROBED // length, length), generator=generator)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()  # [rows, T, V]


def _card(adapter: Made, base: Base, digest: str, dtype: str, said: str) -> str:
    lines = [
        "---", f"base_model: {base.name}", "base_model_relation: merge", "library_name: transformers",
        "pipeline_tag: text-generation", "tags: [gpt2]", "---", "",
        f"# {adapter.name}", "",
        f"The LoRA adapter {adapter.name} merged into the GPT-2 `{base.name}`, as {dtype}:", "",
        f"- base: weights' sha256 `{base.weights_sha256()}`",
        f"- adapter: digest `{digest}`",
        f"- logits: they differ from the unmerged adapter's in fp32 by {said}", "",
        "Made by `python -m training export`. The adapter's own card says what it was trained on.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _put(fresh: Path, output: Path) -> None:
    """Rename `fresh` to `output`; what was there goes when the new one stands."""
    replaced = output.with_name(f".{output.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        os.rename(output, replaced)
    try:
        os.rename(fresh, output)
    except OSError:
        if replaced.exists():
            os.rename(replaced, output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
