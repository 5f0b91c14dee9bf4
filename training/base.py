"""The frozen base that an adapter is trained on: a local directory or a hub id of GPT-2's architecture.

Its configuration and tokenizer are read first, its weights only when the data is known to be usable.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from training.config import DEMO_BASE, stable_path
from training.errors import BaseError

_FILES = ["*.json", "*.safetensors", "merges.txt", "vocab.json"]
_DEMO = stable_path(str(DEMO_BASE))
_INSTEAD = f"give --model DIR with a checkpoint on disk, or leave --model out for the demo base ({_DEMO})"


@dataclass(frozen=True)
class Base:
    """A base whose weights aren't loaded yet."""

    name: str  # as written into adapters
    folder: Path
    config: GPT2Config
    tokenizer: Any  # a transformers tokenizer; their types are too loose to be of use

    @property
    def eos(self) -> int:
        """The id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def context(self) -> int:
        """The longest sequence in tokens."""
        return int(self.config.n_positions)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def load(self) -> GPT2LMHeadModel:
        """The weights in fp32, on the CPU. Raises BaseError if the files don't hold them."""
        transformers_logging.disable_progress_bar()
        try:
            return GPT2LMHeadModel.from_pretrained(self.folder, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise BaseError(f"--model {self.name}: the weights can't be read: {error}") from error

    def weights_sha256(self) -> str:
        """sha256 of the weights file; of several shards, over all of them in order of name."""
        shards = sorted(self.folder.glob("model*.safetensors"))
        return _sha256(tuple((shard, shard.stat().st_size, shard.stat().st_mtime_ns) for shard in shards))


@lru_cache(maxsize=4)
def _sha256(shards: tuple[tuple[Path, int, int], ...]) -> str:
    """Over all files in order, each as (path, size, time of change): a choir asks once for each voice."""
    digest = hashlib.sha256()
    for shard, _, _ in shards:
        with shard.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def open_base(model: str) -> Base:
    """Find `model` (a directory, otherwise a hub id) and read its configuration and tokenizer.

    Raises BaseError if it isn't there, can't be fetched, or isn't a GPT-2 with safetensors weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _fetch(model)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise BaseError(f"--model {model}: no config.json in it; {_INSTEAD}")
    try:
        config = GPT2Config.from_pretrained(folder)
        kind = GPT2Config.get_config_dict(folder)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise BaseError(f"--model {model}: config.json can't be read: {error}") from error
    if kind != "gpt2":
        raise BaseError(f"--model {model} is a {kind!r} model; adapters are trained for GPT-2 only; {_INSTEAD}")
    if not list(folder.glob("model*.safetensors")):
        raise BaseError(f"--model {model}: no model.safetensors in it (pickled weights are not read); {_INSTEAD}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BaseError(f"--model {model}: its tokenizer can't be read: {error}") from error
    if tokenizer.eos_token_id is None:
        raise BaseError(f"--model {model}: its tokenizer has no EOS token, so that no adapter could learn to stop")
    return Base(stable_path(model), folder, config, tokenizer)


def _fetch(model: str) -> Path:
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise BaseError(f"--model {model}: there is no such directory; {_INSTEAD}")
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except (RepositoryNotFoundError, GatedRepoError, HFValidationError) as error:
        raise BaseError(
            f"--model {model}: neither a directory nor a readable hub model ({_first_line(error)}); {_INSTEAD}"
        ) from error
    except Exception as error:
        raise BaseError(f"--model {model}: the hub can't be reached ({_first_line(error)}); {_INSTEAD}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
