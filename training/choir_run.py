"""The choir's work: groups to jobs, jobs to voices, batch by batch."""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.base import Base, open_base
from training.choir import Outcome, configs, groups
from training.choir_report import HTML_FILE, write_choir
from training.config import TrainConfig
from training.data import load_corpus
from training.distributed import Ranks, join
from training.errors import ConfigError, DataError, GateFailed, TrainingError
from training.evaluate import BaseCache, evaluate
from training.gate import judge
from training.origin import pinned
from training.output import begun, check_output, mark, read_run, replaces
from training.recipe import read_recipe
from training.report import history_of
from training.run import Finished, finish, keep_heap, quiet, resolved, told
from training.sources import RawRow, read_source
from training.train import Job, check_resumed, fresh, name_in_model, train


def run_choir(config: TrainConfig, by: str, minimum: int, limit: int | None, together: int) -> Outcome:
    """Train every group's voice that isn't there yet, and measure and publish each. Raises TrainingError."""
    keep_heap()
    ranks = join(config.device)
    outcome = Outcome()
    try:
        base = ranks.everywhere(lambda: open_base(config.model))
        raw = ranks.everywhere(lambda: read_source(config.data))
        found = ranks.everywhere(lambda: groups(config, by, raw, minimum)[:limit])
        values = [value for value, _ in found]
        config = resolved(config, ranks, lambda: _dtype_before(configs(config, by, values).values()))
        config = ranks.everywhere(lambda: pinned(config, base))
        voices = configs(config, by, values)
        wanted, there = ranks.first_does(lambda: _wanted(voices, outcome))
        jobs = _jobs(wanted, base, raw, minimum, outcome)
        broken = ranks.first_does(lambda: _broken(jobs, base))
        outcome.failed |= broken
        jobs = [job for job in jobs if job.config.name not in broken]
        ranks.agree([job.config.name for job in jobs], "the processes see other data: give all one --data")
        if ranks.first:
            print(f"{config.data}: {len(found)} voices by {by}; {len(jobs)} to train", flush=True)
        weights = ranks.everywhere(base.load)
        members: list[Finished] = []
        cache = BaseCache()
        for start in range(0, len(jobs), together):
            members += _batch(jobs[start : start + together], base, weights, ranks, outcome, cache)

        def conclude() -> None:
            measured = _measured(_jobs(there, base, raw, minimum, outcome, True), base, weights, ranks, outcome, cache)
            order = list(voices)
            whole = sorted([*members, *measured], key=lambda member: order.index(member.config.name))
            print("\n" + write_choir(Path(config.output), base.name, whole, list(outcome.failed.items())))
            print(f"\nwrote {Path(config.output) / HTML_FILE}")

        ranks.first_does(conclude)  # the others wait: the first that ends makes a launcher end all
    finally:
        ranks.leave()
    return outcome


def _batch(
    jobs: Sequence[Job], base: Base, weights: Any, ranks: Ranks, outcome: Outcome, cache: BaseCache
) -> list[Finished]:  # fmt: skip
    """Train some voices together, then measure and publish one after the other."""
    model, voices = train(base, weights, jobs, ranks, told if ranks.first else quiet)
    members: list[Finished] = []
    for job, voice in zip(jobs, voices, strict=True):
        name = job.config.name
        if voice.failed:
            outcome.failed[name] = voice.failed
        elif ranks.first:
            try:
                members.append(finish(job, voice, model, base, cache))
                outcome.published.append(name)
            except GateFailed as error:
                members.append(error.finished)
                outcome.rejected[name] = str(error)
            except (TrainingError, OSError) as error:
                outcome.failed[name] = str(error)
    ranks.wait()
    model.unload()  # take the adapters from the base's modules again, which the next ones share
    return members


def _broken(jobs: Sequence[Job], base: Base) -> dict[str, str]:
    """The jobs whose unfinished run can't be gone on with, and why: they would end the others' batch."""
    found: dict[str, str] = {}
    for job in jobs:
        try:
            if job.config.resume:
                check_resumed(job, base)
        except (TrainingError, OSError) as error:
            found[job.config.name] = str(error)
    return found


def _measured(
    jobs: Sequence[Job], base: Base, weights: Any, ranks: Ranks, outcome: Outcome, cache: BaseCache
) -> list[Finished]:  # fmt: skip
    """The voices that were there before, measured again for the choir's table: same seeds, same samples."""
    members = []
    for job in jobs:
        name, folder = job.config.name, job.config.folder
        try:
            history = history_of(folder)
            config = pinned(replace(job.config, init_from=str(folder), init_digest=None), base)
        except (TrainingError, OSError) as error:
            outcome.failed[name] = f"it was there before, and can't be measured: {error}"
            continue
        model: Any = fresh(weights, [config], base).to(ranks.device)
        evaluation = evaluate(model, name_in_model(0), base, job.corpus, job.config, cache)
        model.unload()
        verdict = judge(job.config.gate, evaluation)
        members.append(Finished(job.config, job.corpus, history, evaluation, verdict, folder))
        if verdict.passed:
            outcome.there_before.append(name)
        else:
            said = "; ".join(map(str, verdict.failed))
            outcome.rejected[name] = f"{said}. It was published before this gate, and still is: {folder}"
    return members


def _wanted(
    voices: Mapping[str, TrainConfig], outcome: Outcome
) -> tuple[dict[str, TrainConfig], dict[str, TrainConfig]]:
    """The voices to be trained, each of which says whether it goes on from a checkpoint, and those that are there."""
    found = {name: c for name, c in voices.items() if c.folder.exists() or (c.partial.exists() and not c.resume)}
    first = next(iter(voices.values()))
    if found and not (first.resume or first.overwrite):
        some = ", ".join(list(found)[:5]) + ", ..." * (len(found) > 5)
        raise ConfigError(
            f"{len(found)} of the voices are in {first.output} ({some}): "
            "--resume to leave the finished ones and go on with the others, --overwrite to train them anew"
        )
    wanted: dict[str, TrainConfig] = {}
    there: dict[str, TrainConfig] = {}
    for name, config in voices.items():
        if config.resume and config.folder.exists() and not replaces(config):
            try:
                recipe: dict[str, Any] = {"name": name} | read_recipe(config.folder)
                same = TrainConfig(**recipe).recorded() == config.recorded()
            except ConfigError as error:
                outcome.failed[name] = f"{error}; --overwrite replaces the adapter"
                continue
            if same:
                there[name] = config
            else:
                outcome.failed[name] = f"{config.folder} was made by another recipe; --overwrite replaces it"
        else:
            check_output(config)
            wanted[name] = replace(config, resume=config.resume and begun(config))
            if config.overwrite:
                mark(config)  # an interruption before its turn is not to leave it as it is
    return wanted, there


def _dtype_before(voices: Iterable[TrainConfig]) -> str | None:
    """What `auto` was when the choir that is gone on with began."""
    for config in voices:
        with contextlib.suppress(ConfigError):  # told of the voice itself
            found = read_run(config) or (read_recipe(config.folder) if config.folder.exists() else {})
            if config.resume and found.get("dtype"):
                return str(found["dtype"])
    return None


def _jobs(
    voices: Mapping[str, TrainConfig], base: Base, raw: Mapping[str, list[RawRow]], minimum: int, outcome: Outcome,
    finished: bool = False,
) -> list[Job]:  # fmt: skip
    """A job for each voice whose data can be used: to be trained, or, `finished`, to be measured again."""
    jobs = []
    for name, config in voices.items():
        try:
            corpus = load_corpus(config, base, raw, config.folder if finished else None)
            usable = len(corpus.train) + len(corpus.valid) + len(corpus.test)
            if usable < minimum:
                raise DataError(f"{usable} of its rows can be used, fewer than --min-quotes {minimum}")
            jobs.append(Job(config, corpus))
        except (DataError, OSError) as error:
            outcome.failed[name] = str(error)
    return jobs
