"""Recipe files: a run's settings as YAML or TOML, with the names of TrainConfig's fields.

Every adapter has its own beside it (`recipe.yaml`); on a CPU it gives the same weights again.
"""

import contextlib
import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from training.config import TrainConfig, resolved_path
from training.errors import ConfigError

RECIPE_FILE = "recipe.yaml"
_PATHS = ("data", "model", "init_from", "contrast")


def read_recipe(path: Path) -> dict[str, Any]:
    """Field -> value, of the types that TrainConfig has; paths of the project are resolved.

    Raises ConfigError if the file can't be read, or names a field that there isn't or a value of another type.
    """
    if path.is_dir():
        path = path / RECIPE_FILE  # an adapter's folder
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--recipe {path}: can't be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        kind = "TOML" if path.suffix == ".toml" else "YAML"
        raise ConfigError(f"--recipe {path}: not valid {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ConfigError(f"--recipe {path}: expected `field: value` lines, such as `epochs: 3`")
    types = {f.name: get_type_hints(TrainConfig)[f.name] for f in fields(TrainConfig)}
    recipe = {}
    for name, value in values.items():
        if name not in types:
            near = difflib.get_close_matches(str(name), types, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it may have {', '.join(types)}"
            raise ConfigError(f"--recipe {path}: there is no field {name!r}{hint}")
        recipe[name] = _typed(path, name, value, types[name])
    return _resolved(recipe)


def known(file: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of what another version may have recorded in `file`: the fields that there are, checked as a recipe's."""
    types = get_type_hints(TrainConfig)
    return _resolved({name: _typed(file, name, value, types[name]) for name, value in values.items() if name in types})


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: resolved_path(value) if name in _PATHS and value else value for name, value in values.items()}


def write_recipe(folder: Path, config: TrainConfig) -> None:
    """Write recipe.yaml: every field that decides the weights, with its value."""
    text = yaml.safe_dump(config.recorded(), sort_keys=False, allow_unicode=True, width=120)
    head = f"# python -m training --recipe {RECIPE_FILE} makes this adapter again, given the same base and data.\n"
    (folder / RECIPE_FILE).write_text(head + text, encoding="utf-8")


def _typed(path: Path, name: str, value: Any, kind: Any) -> Any:
    options = [option for option in get_args(kind) if option is not type(None)]
    if value is None and len(options) < len(get_args(kind)):
        return None
    plain = options[0] if len(options) == 1 and type(None) in get_args(kind) else kind
    if plain is float and isinstance(value, str):  # YAML reads 2e-3 as text: it wants 2.0e-3
        with contextlib.suppress(ValueError):  # told below
            value = float(value)
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if plain == tuple[str, ...] and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if plain == dict[str, str] and isinstance(value, dict) and all(isinstance(v, str) for v in value.values()):
        return dict(value)
    if plain == dict[str, float] and isinstance(value, dict):
        return {str(key): _typed(path, f"{name}.{key}", number, float) for key, number in value.items()}
    if plain in (str, int, float, bool) and type(value) is plain:
        return value
    wanted = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    raise ConfigError(f"--recipe {path}: {name} is {value!r}; give {wanted.get(plain, 'a list or a mapping of texts')}")
