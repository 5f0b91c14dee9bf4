"""`--init-from`: the adapter that a run goes on from. Its shape is taken, its content pinned, its tensors put in place.

`take` fills in what the flags leave open, before torch is imported; `pinned` and `put_weights` hold the run against the
folder as it is on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.adapter import TARGETS, AdapterManifest, BaseShape, ModuleKey
from adapters.errors import AdapterError
from adapters.lora_config import CONFIG_FILE, read_lora_spec
from adapters.tensorfile import parse_json
from adapters.validation import WEIGHTS_FILE, inspect_adapter
from training.config import TrainConfig, flag_of
from training.errors import ConfigError

if TYPE_CHECKING:
    from training.base import Base

_MOST_LAYERS = 256  # how many the base has isn't known when flags are read
_DIFFER = (
    "its layers differ in rank, scaling or targets, and a run gives all of them the same: go on from an adapter whose "
    "layers are alike, or leave --init-from out for a fresh one"
)


def take(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of TrainConfig with the rank, alpha, rslora and targets of the adapter at their `init_from`.

    Raises ConfigError if it isn't one, if its layers differ, or if `values` give another shape.
    """
    own = _shape(Path(values["init_from"]))
    for name, value in own.items():
        given = values.get(name)
        same = _modules(given) == _modules(value) if name == "targets" and given else given == value
        if given is not None and not same:
            shown, has = (",".join(v) if name == "targets" else v for v in (given, value))
            raise ConfigError(
                f"{flag_of(name)} is {shown}, and the adapter of --init-from {values['init_from']} has {has}: leave "
                f"{flag_of(name)} out, or --init-from for a fresh adapter"
            )
    return dict(values) | own


def pinned(config: TrainConfig, base: Base) -> TrainConfig:
    """`config` with the digest of its `init_from`, as it is now.

    Raises ConfigError if it doesn't fit the base or the run's shape, or isn't what `init_digest` says.
    """
    if config.init_from is None:
        return config
    digest = _inspected(config, base).ref.digest
    if config.init_digest not in (None, digest):
        raise ConfigError(
            f"--init-from {config.init_from} has changed: its digest is {digest}, and the run is to go on from "
            f"{config.init_digest}; bring that back, or give --init-digest {digest[:12]}... in full for the new one"
        )
    return replace(config, init_digest=digest)


def put_weights(model: Any, adapter: str, config: TrainConfig, base: Base) -> None:
    """Copy the tensors of the run's `init_from`, whose digest is pinned, into `adapter` of the PEFT `model`.

    Raises ConfigError if they have changed since or hold a number that isn't finite.
    """
    if config.init_from is None:
        return
    import torch
    from safetensors.torch import load_file

    tensors = load_file(Path(config.init_from) / WEIGHTS_FILE)
    manifest = _inspected(config, base)
    if manifest.ref.digest != config.init_digest:
        raise ConfigError(f"--init-from {config.init_from} changed while the run began; start it again")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for module in manifest.modules:
            for side, name in (("A", module.a_name), ("B", module.b_name)):
                if not bool(tensors[name].isfinite().all()):
                    raise ConfigError(
                        f"--init-from {config.init_from}: tensor {name!r} holds values that aren't finite"
                    )
                parameter = parameters[f"base_model.model.transformer.{module.key}.lora_{side}.{adapter}.weight"]
                parameter.copy_(tensors[name])


def adapter_shape(base: Base) -> BaseShape:
    """The sizes that an adapter of `base` has to fit."""
    config = base.config
    return BaseShape(config.n_layer, config.n_embd, config.n_inner or 4 * config.n_embd)


def _shape(folder: Path) -> dict[str, Any]:
    """rank, alpha, rslora and targets, as TrainConfig has them."""
    with _told(folder):
        spec = read_lora_spec(folder, BaseShape(_MOST_LAYERS, 1, 1))
        config = parse_json((folder / CONFIG_FILE).read_bytes(), CONFIG_FILE)
    alpha, rslora = config.get("lora_alpha", 8), bool(config.get("use_rslora"))
    rank, scaling = next(iter(spec.modules.values()))
    if len(set(spec.modules.values())) > 1 or scaling != _scaling(rank, alpha, rslora):
        raise ConfigError(f"--init-from {folder}: {_DIFFER}")
    if alpha != int(alpha):
        raise ConfigError(
            f"--init-from {folder}: lora_alpha is {alpha}, and a run takes whole numbers: multiply it by a number that "
            "makes it whole and divide its lora_B tensors by the same"
        )
    present = {key.target for key in spec.modules}
    both = {"attn.c_proj", "mlp.c_proj"} <= present
    named = {"attn.c_attn": "c_attn", "mlp.c_fc": "c_fc"} | ({"attn.c_proj": "c_proj"} if both else {})
    ordered = [named.get(target, target) for target in TARGETS if target in present]
    targets = tuple(target for target in ordered if not (both and target == "mlp.c_proj"))
    return {"rank": rank, "alpha": int(alpha), "rslora": rslora, "targets": targets}


def _inspected(config: TrainConfig, base: Base) -> AdapterManifest:
    """The adapter of `init_from`, which fits the base and has the run's shape."""
    folder, shape = Path(str(config.init_from)), adapter_shape(base)
    with _told(folder):
        manifest = inspect_adapter(folder, folder.resolve().name, shape)
    targets, each = _modules(config.targets), (config.rank, _scaling(config.rank, config.lora_alpha, config.rslora))
    wanted = {ModuleKey(layer, target): each for layer in range(shape.n_layer) for target in targets}
    if {module.key: (module.rank, module.scaling) for module in manifest.modules} != wanted:
        take({**{name: getattr(config, name) for name in ("rank", "rslora", "targets")}, "alpha": config.lora_alpha,
              "init_from": config.init_from})  # fmt: skip
        raise ConfigError(f"--init-from {folder}: {_DIFFER}")
    return manifest


def _modules(targets: tuple[str, ...]) -> set[str]:
    """The projections that `targets` name: `c_proj` is two of them."""
    return {module for module in TARGETS for name in targets if module == name or module.endswith("." + name)}


def _scaling(rank: int, alpha: float, rslora: bool) -> float:
    return alpha / math.sqrt(rank) if rslora else alpha / rank


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """An adapter's own refusal, with the flag that it came from."""
    if not folder.is_dir():
        raise ConfigError(f"--init-from {folder}: there is no such folder; give an adapter's, with its {CONFIG_FILE}")
    try:
        yield
    except (AdapterError, OSError) as error:
        raise ConfigError(f"--init-from {folder}: {error}") from error
