"""The configuration of one training run. It knows nothing about command lines or files: see `cli` and `recipe`."""

import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from training.errors import ConfigError
from training.gate import check_gate
from training.template import Template

ROOT = Path(__file__).resolve().parents[1]
DEMO_BASE = ROOT / "models" / "demo"
QUOTES = ROOT / "training" / "corpora" / "quotes"
TARGETS = ("c_attn", "c_proj", "c_fc", "attn.c_proj", "mlp.c_proj")
SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# What doesn't change the weights, and so belongs to a run but not to its recipe.
_OF_THE_RUN = ("resume", "overwrite", "ensure", "output", "device", "gate")


@dataclass(frozen=True)
class TrainConfig:
    """One run. Building it checks every value; ConfigError names the flag, its value and the way out."""

    name: str
    data: str = str(QUOTES)  # a file, a folder of splits, or a hub data set id
    columns: dict[str, str] = field(default_factory=dict)  # template field -> column, where they differ
    authors: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    template: str = 'Quote by {author}: "{quote}"'
    prompt: str | None = None  # where the template's prompt ends; None: before its last field
    max_chars: int = 200  # of the text to be written; 200 characters are about 50 tokens
    limit: int | None = None  # training rows
    model: str = str(DEMO_BASE)  # a directory or a hub id
    init_from: str | None = None  # an adapter folder to go on from; its rank, alpha and targets are taken
    init_digest: str | None = None  # what init_from holds; filled in when a run begins, and held against it
    output: str = "runs/adapters"  # the parent; the adapter is output/name
    rank: int = 8
    alpha: int | None = None  # None: twice the rank
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")
    dropout: float = 0.05
    epochs: float = 2.0
    max_tokens: int | None = None  # a budget of real tokens; the run ends at it or after the epochs
    patience: int | None = None  # stop after so many evaluations in a row without a better held-out loss
    seed: int = 0
    lr: float = 2e-3
    schedule: str = "cosine"
    warmup: int | None = None  # steps; None: a tenth of the run, 50 at most
    weight_decay: float = 0.0
    clip: float = 1.0  # the gradient's largest norm
    batch_size: int = 16  # rows in one pass
    accumulate: int = 1  # passes in one step
    checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them
    dtype: str = "auto"
    device: str = "auto"
    eval_samples: int = 200  # per prompt form
    contrast: str | None = None  # what the style is told apart from; None: the rows that the filters left out
    gate: dict[str, float] | None = None  # figure -> what it has to reach; None: everything is published
    resume: bool = False
    overwrite: bool = False
    ensure: bool = False

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ConfigError(
                f"--name {self.name!r}: use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
            )
        for name, minimum in {
            "rank": 1, "alpha": 1, "batch_size": 1, "accumulate": 1, "eval_samples": 1, "max_chars": 1, "seed": 0,
            "limit": 1, "max_tokens": 1, "patience": 1, "warmup": 0,
        }.items():  # fmt: skip
            _at_least(name, getattr(self, name), minimum)
        if self.seed >= 2**32 - 1000:
            raise ConfigError(f"--seed is {self.seed}: give at most {2**32 - 1001}")
        if self.rank > 512:
            raise ConfigError(f"--rank is {self.rank}: give at most 512")
        for name in ("epochs", "lr", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{flag_of(name)} is {value}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout is {self.dropout}: give a number from 0 up to, not including, 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"--weight-decay is {self.weight_decay}: give 0 or more")
        for name, choices in (("schedule", SCHEDULES), ("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{flag_of(name)} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"--targets {','.join(self.targets)!r}: choose some of {', '.join(TARGETS)}")
        if self.init_digest is not None and self.init_from is None:
            raise ConfigError("--init-digest says what --init-from holds: give that one, too")
        if self.resume and self.overwrite:
            raise ConfigError("--resume goes on with a run and --overwrite starts anew: give one of them")
        if self.ensure and (self.resume or self.overwrite):
            raise ConfigError(
                "--ensure resumes by itself and never overwrites: give it without --resume and --overwrite"
            )
        check_gate(self.gate or {})
        known = {*self.parsed_template().fields, "author", "tags"}
        if surplus := sorted(set(self.columns) - known):
            raise ConfigError(
                f"--column {surplus[0]}=...: there is no such field; it may be {', '.join(sorted(known))}"
            )

    def parsed_template(self) -> Template:
        """The template, split into prompt and completion."""
        return Template.parse(self.template, self.prompt)

    @property
    def lora_alpha(self) -> int:
        """LoRA's alpha; the update is scaled by alpha / rank."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def folder(self) -> Path:
        """Where the finished adapter will be."""
        return Path(self.output) / self.name

    @property
    def partial(self) -> Path:
        """Where the run keeps checkpoints and unfinished files: hidden, on the file system of `folder`."""
        return Path(self.output) / f".{self.name}.partial"

    @property
    def rejected(self) -> Path:
        """Where an adapter that failed its gate is kept aside: hidden, so that no server lists it."""
        return Path(self.output) / f".{self.name}.rejected"

    def recorded(self) -> dict[str, Any]:
        """What decides the result, as plain JSON; paths inside the project are relative to it."""
        values = {name: value for name, value in asdict(self).items() if name not in _OF_THE_RUN}
        paths = {name: stable_path(values[name]) for name in ("data", "model", "init_from", "contrast") if values[name]}
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return values | paths | lists | {"alpha": self.lora_alpha}


def stable_path(name: str) -> str:
    """`name` as it is written into adapters: relative to the project if it lies in it, otherwise as given."""
    path = Path(name)
    if path.exists() and path.resolve().is_relative_to(ROOT):
        return path.resolve().relative_to(ROOT).as_posix()
    return name


def resolved_path(name: str) -> str:
    """The inverse of `stable_path`, from any working directory."""
    inside = ROOT / name
    return str(inside) if not Path(name).exists() and inside.exists() else name


def flag_of(name: str) -> str:
    """A field's flag on the command line."""
    return {"authors": "--author", "tags": "--tag", "columns": "--column"}.get(name, "--" + name.replace("_", "-"))


def _at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise ConfigError(f"{flag_of(name)} is {value}: give at least {minimum}")
