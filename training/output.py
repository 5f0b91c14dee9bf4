"""Where a run's files go: checkpoints and unfinished files aside, the adapter's folder whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.config import TrainConfig
from training.errors import ConfigError

RUN_FILE = "run.json"  # what the unfinished run in a folder is
REPLACES = "replaces"  # in RUN_FILE: whether it is to replace an adapter
_MARK = {REPLACES: True}
REPLACED = "replaced"  # in the run's own folder, for as long as replacing takes


def settled(config: TrainConfig) -> TrainConfig | None:
    """The configuration with --ensure made --resume or --overwrite; None: the adapter is there. Raises ConfigError."""
    if config.ensure:
        if config.folder.exists():
            return None
        unfinished = begun(config)
        config = replace(config, ensure=False, resume=unfinished, overwrite=not unfinished)
    check_output(config)
    return config


def check_output(config: TrainConfig) -> None:
    """Raises ConfigError if an adapter or an unfinished run of this name is there and no flag says what to do."""
    config.folder.parent.mkdir(parents=True, exist_ok=True)
    if (config.partial / REPLACED).is_dir() and not config.folder.exists():
        os.rename(config.partial / REPLACED, config.folder)
    if config.folder.exists() and not (config.overwrite or (config.resume and replaces(config))):
        raise ConfigError(f"{config.folder} exists: choose another --name, or --overwrite to replace it")
    if config.partial.exists() and not (config.resume or config.overwrite):
        raise ConfigError(
            f"an unfinished run of {config.name!r} is in {config.output}: --resume to go on with it, or --overwrite to "
            "start anew"
        )


def read_run(config: TrainConfig) -> dict[str, Any] | None:
    """What RUN_FILE says of the unfinished run; empty if it can't be read, None if there is none."""
    try:
        found = json.loads((config.partial / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def replaces(config: TrainConfig) -> bool:
    """Whether the unfinished run in `config.partial` began with --overwrite, to replace the adapter that is there."""
    return bool((read_run(config) or {}).get(REPLACES))


def begun(config: TrainConfig) -> bool:
    """Whether an unfinished run of this name has begun: one that is only marked to replace an adapter has not."""
    return read_run(config) not in (None, _MARK)


def mark(config: TrainConfig) -> None:
    """Note that a run that has yet to begin is to replace what is there; an unfinished run goes."""
    shutil.rmtree(config.partial, ignore_errors=True)
    if config.folder.exists():
        _write_run(config, _MARK)


def start(config: TrainConfig, recorded: Mapping[str, Any]) -> None:
    """Begin an unfinished run in `config.partial`; whatever was there goes."""
    shutil.rmtree(config.partial, ignore_errors=True)
    _write_run(config, {**recorded, REPLACES: config.folder.exists()})


def _write_run(config: TrainConfig, values: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    config.partial.mkdir(parents=True)
    whole = config.partial / f"{RUN_FILE}.new"
    whole.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(whole, config.partial / RUN_FILE)


def fresh_folder(config: TrainConfig) -> Path:
    """Where the finished adapter's files are written before it is published; nothing is there yet."""
    finished = config.partial / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    return finished


def publish(config: TrainConfig) -> None:
    """Put the finished folder in its place by renaming, so that a running server sees all of it or nothing.

    An adapter that it replaces is moved away first; if the run dies in between, `check_output` puts it back.
    """
    if config.folder.exists():
        shutil.rmtree(config.partial / REPLACED, ignore_errors=True)  # of a run that died while it cleaned up
        os.rename(config.folder, config.partial / REPLACED)
    os.rename(config.partial / "finished", config.folder)
    shutil.rmtree(config.partial)
    shutil.rmtree(config.rejected, ignore_errors=True)


def keep_aside(config: TrainConfig) -> None:
    """Keep the finished folder as `config.rejected`: it failed its gate. What it was to replace stays."""
    shutil.rmtree(config.rejected, ignore_errors=True)
    os.rename(config.partial / "finished", config.rejected)
    shutil.rmtree(config.partial)
