"""The choir's work: groups to jobs, jobs to voices, batch by batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.base import Base, open_base
from training.choir import Outcome, configs, groups
from training.config import TrainConfig
from training.data import load_corpus
from training.distributed import Ranks, join
from training.errors import ConfigError, DataError, GateFailed, TrainingError
from training.origin import pinned
from training.output import RUN_FILE, check_output
from training.recipe import RECIPE_FILE, read_recipe
from training.run import finish, keep_heap, quiet, resolved, told
from training.sources import RawRow, read_source
from training.train import Job, train


def run_choir(config: TrainConfig, by: str, minimum: int, limit: int | None, together: int) -> Outcome:
    """Train every group's voice that isn't there yet, and measure and publish each. Raises TrainingError."""
    keep_heap()
    ranks = join(config.device)
    outcome = Outcome()
    try:
        base = ranks.everywhere(lambda: open_base(config.model))
        config = ranks.everywhere(lambda: pinned(resolved(config, ranks), base))
        raw = ranks.everywhere(lambda: read_source(config.data))
        found = ranks.everywhere(lambda: groups(config, by, raw, minimum)[:limit])
        voices = configs(config, by, [value for value, _ in found])
        voices = ranks.first_does(lambda: _wanted(voices, outcome))
        jobs = _jobs(voices, base, raw, minimum, outcome)
        if ranks.first:
            print(f"{config.data}: {len(found)} voices by {by}; {len(jobs)} to train", flush=True)
        weights = ranks.everywhere(base.load) if jobs else None
        for start in range(0, len(jobs), together):
            _batch(jobs[start : start + together], base, weights, ranks, outcome)
    finally:
        ranks.leave()
    return outcome


def _batch(jobs: Sequence[Job], base: Base, weights: Any, ranks: Ranks, outcome: Outcome) -> None:
    """Train some voices together, then measure and publish one after the other."""
    model, voices = train(base, weights, jobs, ranks, told if ranks.first else quiet)
    for job, voice in zip(jobs, voices, strict=True):
        name = job.config.name
        if voice.failed:
            outcome.failed[name] = voice.failed
        elif ranks.first:
            try:
                finish(job, voice, model, base)
                outcome.published.append(name)
            except GateFailed as error:
                outcome.rejected[name] = str(error)
            except (TrainingError, OSError) as error:
                outcome.failed[name] = str(error)
    ranks.wait()
    unloaded: Any = model
    unloaded.unload()  # the adapters leave the base's modules, for the next ones


def _wanted(voices: Mapping[str, TrainConfig], outcome: Outcome) -> dict[str, TrainConfig]:
    """The voices that are still to be trained; each says for itself whether it goes on from a checkpoint."""
    there = {name: c for name, c in voices.items() if c.folder.exists() or (c.partial.exists() and not c.resume)}
    first = next(iter(voices.values()))
    if there and not (first.resume or first.overwrite):
        some = ", ".join(list(there)[:5]) + ", ..." * (len(there) > 5)
        raise ConfigError(
            f"{len(there)} of the voices are in {first.output} ({some}): "
            "--resume to leave the finished ones and go on with the others, --overwrite to train them anew"
        )
    wanted: dict[str, TrainConfig] = {}
    for name, config in voices.items():
        if config.resume and config.folder.exists():
            if _recipe(config.folder) == config.recorded():
                outcome.there_before.append(name)
            else:
                outcome.failed[name] = f"{config.folder} was made by another recipe; --overwrite replaces it"
        else:
            check_output(config)
            wanted[name] = replace(config, resume=config.resume and (config.partial / RUN_FILE).is_file())
    return wanted


def _recipe(folder: Path) -> dict[str, Any] | None:
    if not (folder / RECIPE_FILE).is_file():
        return None
    return TrainConfig(**read_recipe(folder)).recorded()


def _jobs(
    voices: Mapping[str, TrainConfig], base: Base, raw: Mapping[str, list[RawRow]], minimum: int, outcome: Outcome
) -> list[Job]:
    jobs = []
    for name, config in voices.items():
        try:
            corpus = load_corpus(config, base, raw)
            usable = len(corpus.train) + len(corpus.valid) + len(corpus.test)
            if usable < minimum:
                raise DataError(f"{usable} of its rows can be used, fewer than --min-quotes {minimum}")
            jobs.append(Job(config, corpus))
        except (DataError, OSError) as error:
            outcome.failed[name] = str(error)
    return jobs
