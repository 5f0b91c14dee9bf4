"""Adapters that are made already, by a run of ours or elsewhere: checked against a base and put onto it.

They are read only. What a run of ours recorded beside one (report.json) gives the commands their defaults.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import GPT2LMHeadModel

from adapters.errors import AdapterError
from adapters.lora_config import CONFIG_FILE
from adapters.validation import inspect_adapter
from training.base import Base
from training.config import DEMO_BASE
from training.errors import ConfigError
from training.origin import adapter_shape
from training.recipe import known
from training.train import name_in_model

REPORT_FILE = "report.json"


@dataclass(frozen=True)
class Made:
    """An adapter's folder and what its run recorded: fields of TrainConfig; none for one made elsewhere."""

    name: str
    folder: Path
    recorded: dict[str, Any]

    @property
    def model(self) -> str:
        """The base that it was made for, as far as that is recorded."""
        return self.recorded.get("model") or str(DEMO_BASE)

    def digest(self, base: Base) -> str:
        """Its content's. Raises ConfigError, with the server's own words, unless it fits `base`."""
        try:
            return inspect_adapter(self.folder, self.name, adapter_shape(base)).ref.digest
        except AdapterError as error:
            raise ConfigError(f"{self.folder} can't be put onto {base.name}: {error}") from error


def find(folders: Sequence[str]) -> list[Made]:
    """The adapters in `folders`, named after them. Raises ConfigError for what is no folder or has an odd report."""
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: there is no such folder; give an adapter's, with its {CONFIG_FILE}")
    names = [path.resolve().name for path in paths]
    names = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [Made(name, path, _recorded(path)) for name, path in zip(names, paths, strict=True)]


def attach(weights: GPT2LMHeadModel, adapters: Sequence[Made]) -> PeftModel:
    """`weights` with the adapters on them, the first active; the n-th is `name_in_model(n)`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # PEFT's
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)  # right for GPT-2 all the same
        model = None
        for number, made in enumerate(adapters):
            name = name_in_model(number)
            if model is None:
                model = PeftModel.from_pretrained(weights, str(made.folder), adapter_name=name)
            else:
                model.load_adapter(str(made.folder), adapter_name=name)
    assert model is not None
    return model.eval()


def _recorded(folder: Path) -> dict[str, Any]:
    file = folder / REPORT_FILE
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))["config"]
        return known(file, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} can't be read: {error!r}; move it away to do without what it records") from error
