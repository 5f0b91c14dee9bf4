"""Reads PEFT's `adapter_config.json`: which modules are adapted, their ranks and scalings. Works without torch.

Every field is either honoured, known not to change the forward pass, or refused by name.
Source: `peft.LoraConfig` and its matching rules (`check_target_module_exists`, `get_pattern_key`).
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from adapters.adapter import TARGETS, BaseShape, ModuleKey
from adapters.errors import AdapterRefused
from adapters.expressions import compile_all
from adapters.tensorfile import open_regular, parse_json, shown

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 512
MAX_BASE_CHARS = 1024
MAX_LISTED = 1024
"""Names or layers in one list; more than any GPT-2 has projections."""

_HONOURED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights",
}  # fmt: skip
_INERT = {
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "auto_mapping",
    "peft_version", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config",
    "ensure_weight_tying", "eva_config",
}  # fmt: skip
_OUTSIDE = ("lm_head", "transformer.wte", "transformer.wpe")
_NEUTRAL_INIT = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LoraSpec:
    """The part of an adapter's configuration that decides its forward pass."""

    modules: dict[ModuleKey, tuple[int, float]]  # what is adapted -> (rank, scaling)
    base_model: str | None


def read_lora_spec(folder: Path, shape: BaseShape, roots: Collection[Path] | None = None) -> LoraSpec:
    """Read and check `folder/adapter_config.json` against a base of `shape`. `roots`: where it may lie, or anywhere.

    Raises AdapterRefused naming the field, its value and what is expected; AdapterUnavailable on I/O errors.
    """
    config = _read_json(folder / CONFIG_FILE, roots)
    _refuse_unsupported(config)
    rank, alpha = _integer(config, "r", 8), _number(config.get("lora_alpha", 8), "lora_alpha")
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise AdapterRefused(f"use_rslora is {shown(rslora)}: expected true or false")
    targets = _Targets(config)
    if (whole := targets.beyond()) is not None:
        raise AdapterRefused(
            f"target_modules {shown(config.get('target_modules'))} name {whole}, which is not adapted here; "
            f"expected some of {', '.join(TARGETS)}"
        )
    rank_pattern, alpha_pattern = _pattern(config, "rank_pattern"), _pattern(config, "alpha_pattern")
    modules: dict[ModuleKey, tuple[int, float]] = {}
    for layer in range(shape.n_layer):
        for target in TARGETS:
            key = ModuleKey(layer, target)
            if not targets.include(f"transformer.{key}"):
                continue
            r = _matched(rank_pattern, f"transformer.{key}", rank)
            if not (type(r) is int and 1 <= r <= MAX_RANK):
                raise AdapterRefused(f"rank {shown(r)} of {key} is not an integer from 1 to {MAX_RANK}")
            a = _number(_matched(alpha_pattern, f"transformer.{key}", alpha), "alpha_pattern")
            modules[key] = (r, a / math.sqrt(r) if rslora else a / r)
    if not modules:
        raise AdapterRefused(
            f"target_modules {shown(config.get('target_modules'))} name no projection of this GPT-2 "
            f"({shape.n_layer} layers); expected some of {', '.join(TARGETS)}"
        )
    base = config.get("base_model_name_or_path")
    if isinstance(base, str) and len(base) > MAX_BASE_CHARS:
        raise AdapterRefused(f"base_model_name_or_path has {len(base):,} characters; at most {MAX_BASE_CHARS}")
    return LoraSpec(modules, base if isinstance(base, str) else None)


def _read_json(path: Path, roots: Collection[Path] | None) -> dict[str, Any]:
    try:
        with open_regular(path, MAX_CONFIG_BYTES, roots) as file:
            text = file.read(MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise AdapterRefused(f"no {CONFIG_FILE} in {path.parent.name}: not a PEFT adapter folder") from None
    value = parse_json(text, CONFIG_FILE)
    if not isinstance(value, dict):
        raise AdapterRefused(f"{CONFIG_FILE} holds {type(value).__name__}, expected an object")
    return cast("dict[str, Any]", value)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise AdapterRefused(f"peft_type is {shown(kind)}; only LORA adapters are served")
    if config.get("use_dora"):
        raise AdapterRefused("use_dora is true: DoRA rescales the base weights and can't be mixed in one batch")
    if config.get("modules_to_save"):
        raise AdapterRefused(
            f"modules_to_save is {shown(config['modules_to_save'])}: whole modules replace the frozen base's"
        )
    if config.get("trainable_token_indices"):
        raise AdapterRefused("trainable_token_indices is set: new or retrained tokens change the frozen base")
    if config.get("bias", "none") != "none":
        raise AdapterRefused(f"bias is {shown(config['bias'])}: trained biases are not supported, only 'none'")
    if (init := config.get("init_lora_weights", True)) not in _NEUTRAL_INIT:
        raise AdapterRefused(f"init_lora_weights is {shown(init)}: that initialisation also changes the base weights")
    for field, value in config.items():
        if field not in _HONOURED and field not in _INERT and value not in (None, False, 0, "", [], {}):
            raise AdapterRefused(f"{field[:80]} is {shown(value)}: this field is not supported")


class _Targets:
    """Which modules PEFT would adapt; the fields are checked and compiled once."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._wanted = _listed(config, "target_modules")
        self._excluded = _listed(config, "exclude_modules")
        self._layers = _layers(config)
        self._patterns = _layers_patterns(config)

    def include(self, name: str) -> bool:
        """Whether the module called `name`, e.g. `transformer.h.0.attn.c_attn`, is adapted."""
        wanted, excluded = self._wanted, self._excluded
        if excluded is not None and _names(excluded, name):
            return False
        if wanted == "all-linear":
            return True
        if wanted is None or not _names(wanted, name):
            return False
        if not self._layers or not isinstance(wanted, list) or name in wanted:  # a full name skips the layers
            return True
        if self._patterns:
            matches = (pattern.match(name) for pattern in self._patterns)
            found = next((match for match in matches if match), None)
        else:
            found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
        return found is not None and found["idx"] is not None and int(found["idx"]) in self._layers

    def beyond(self) -> str | None:
        """A module outside the blocks that PEFT would adapt, too."""
        if self._wanted == "all-linear":  # PEFT leaves the output layer out of it
            return None
        return next((name for name in _OUTSIDE if self.include(name)), None)


def _layers(config: Mapping[str, Any]) -> list[int]:
    """The layers that `layers_to_transform` names; empty for all of them."""
    value: Any = config.get("layers_to_transform")
    layers = _as_list([] if value is None else value, "layers_to_transform")
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise AdapterRefused(f"layers_to_transform is {shown(value)}: expected a layer's number or a list of them")
    return layers


def _layers_patterns(config: Mapping[str, Any]) -> list[re.Pattern[str]]:
    value: Any = config.get("layers_pattern") or []
    patterns = _as_list(value, "layers_pattern")
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise AdapterRefused(f"layers_pattern is {shown(value)}: expected a name or a list of names")
    return compile_all(patterns, "layers_pattern", r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\.")


def _as_list(value: Any, field: str) -> list[Any]:
    values = cast("list[Any]", value) if isinstance(value, list) else [value]
    if len(values) > MAX_LISTED:
        raise AdapterRefused(f"{field} lists {len(values):,} entries; at most {MAX_LISTED:,} are taken")
    return values


_Names = str | list[str] | re.Pattern[str]  # a str is "all-linear"


def _listed(config: Mapping[str, Any], field: str) -> _Names | None:
    """The names or the expression in `field`; None if there are none."""
    value: Any = config.get(field)
    if not value:
        return None
    if value == "all-linear" and field == "target_modules":
        return "all-linear"
    if isinstance(value, str):
        return compile_all([value], field)[0]
    if isinstance(value, list) and all(isinstance(name, str) for name in cast("list[Any]", value)):
        return _as_list(value, field)
    raise AdapterRefused(f"{field} is {shown(value)}: expected a list of names or a regular expression")


def _names(names: _Names, name: str) -> bool:
    if isinstance(names, list):
        return any(name == listed or name.endswith(f".{listed}") for listed in names)
    return isinstance(names, re.Pattern) and names.fullmatch(name) is not None


_Pattern = list[tuple[re.Pattern[str], Any]]


def _pattern(config: Mapping[str, Any], field: str) -> _Pattern:
    value: Any = config.get(field) or {}
    if not isinstance(value, dict):
        raise AdapterRefused(f"{field} is {shown(value)}: expected an object of module name to number")
    pattern = cast("dict[str, Any]", value)
    return list(zip(compile_all(list(pattern), field, r"(.*\.)?(", r")$"), pattern.values(), strict=True))


def _matched(patterns: _Pattern, name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(name)), default)


def _integer(config: Mapping[str, Any], field: str, default: int) -> int:
    value = config.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise AdapterRefused(f"{field} is {shown(value)}: expected an integer")
    return value


def _number(value: Any, field: str) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer that no float holds
        pass
    raise AdapterRefused(f"{field} is {shown(value)}: expected a finite number")
