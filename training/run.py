"""One run from its configuration to the published folder: data, training, measuring, files."""

import ctypes
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from training import report
from training.base import Base, open_base
from training.config import TrainConfig
from training.data import Corpus, load_corpus
from training.distributed import Ranks, auto_dtype, join
from training.errors import GateFailed, TrainingError
from training.evaluate import BaseCache, Evaluation, evaluate
from training.gate import Verdict, judge
from training.html_report import write_html
from training.origin import pinned
from training.output import fresh_folder, keep_aside, publish, read_run, settled
from training.recipe import write_recipe
from training.train import Job, save_adapter, train
from training.voice import History, Voice

SKIPPED_SHOWN = 10
UNSAID = "what {} was trained on isn't in its report: texts that are measured on may be among it"


@dataclass(frozen=True)
class Finished:
    """One adapter whose folder is written: published, or kept aside if it failed its gate."""

    config: TrainConfig
    corpus: Corpus
    history: History
    evaluation: Evaluation
    verdict: Verdict
    folder: Path


def run(config: TrainConfig) -> None:
    """Train, measure and publish one adapter. Raises TrainingError, OSError."""
    keep_heap()
    ranks = join(config.device)
    try:
        todo = ranks.first_does(lambda: settled(config))
        if todo is None:
            print(f"{config.folder} is there already: nothing to do")
            return
        base = ranks.everywhere(lambda: open_base(todo.model))
        wanted = resolved(todo, ranks)
        config = ranks.everywhere(lambda: pinned(wanted, base))
        job = Job(config, ranks.everywhere(lambda: load_corpus(config, base)))
        if ranks.first:
            print(summary(config, job.corpus), flush=True)
        model, (voice,) = train(base, ranks.everywhere(base.load), [job], ranks, told if ranks.first else quiet)
    finally:
        ranks.leave()
    if voice.failed:
        raise TrainingError(voice.failed)
    if ranks.first:
        try:
            finished = finish(job, voice, model, base)
        except GateFailed as error:
            print(report.side_by_side(error.finished.evaluation), flush=True)
            raise
        print(report.side_by_side(finished.evaluation))
        print(f"\nwrote {config.folder}")


def resolved(config: TrainConfig, ranks: Ranks, before: Callable[[], str | None] = lambda: None) -> TrainConfig:
    """The configuration with what `auto` was where a run goes on, or `before` says, and means on the first process."""

    def found() -> str:
        own = (read_run(config) or {}).get("dtype") if config.resume else None
        return own or before() or auto_dtype(ranks.device)

    return replace(config, dtype=ranks.first_does(found)) if config.dtype == "auto" else config


def finish(job: Job, voice: Voice, model: PeftModel, base: Base, cache: BaseCache | None = None) -> Finished:
    """Measure a trained voice beside the base, write its files and publish its folder.

    `cache` is shared by the voices of one base. Raises GateFailed, which holds what was measured, if the folder was
    kept aside instead.
    """
    config, corpus, history = job.config, job.corpus, voice.history
    print(
        f"{config.name}: trained {history.steps} steps in {history.seconds:.0f} s ({history.tokens_per_second:,.0f} "
        "tokens/s); measuring base and adapter", flush=True,
    )  # fmt: skip
    typed: Any = model
    typed.set_adapter(voice.adapter)
    typed.requires_grad_(False)
    evaluation = evaluate(model, voice.adapter, base, corpus, config, cache)
    verdict = judge(config.gate, evaluation)
    folder = fresh_folder(config)
    save_adapter(model, voice.adapter, base, folder)
    write_recipe(folder, config)
    written = report.write_report(folder, config, base, corpus, history, evaluation, verdict)
    report.write_golden(folder, model, base, corpus, config)
    report.write_loss_curve(folder, config.name, history)
    report.write_card(folder, config, base, corpus, evaluation)
    write_html(folder, written, history, evaluation)
    place = config.folder if verdict.passed else config.rejected
    finished = Finished(config, corpus, history, evaluation, verdict, place)
    if not verdict.passed:
        keep_aside(config)
        said = "; ".join(map(str, verdict.failed))
        raise GateFailed(f"{config.name} is not published: {said}. Its folder is {config.rejected}", finished)
    publish(config)
    return finished


def told(voice: Voice) -> None:
    """Print a voice's progress."""
    if voice.failed:
        print(f"{voice.config.name}: failed: {voice.failed}", flush=True)
        return
    history = voice.history
    print(
        f"{voice.config.name}: step {history.steps}/{len(voice.plan)}, held-out loss {history.valid[-1][1]:.4f}, "
        f"{history.tokens_per_second:,.0f} tokens/s", flush=True,
    )  # fmt: skip


def quiet(voice: Voice) -> None:
    """Print nothing: the first process does."""


def keep_heap() -> None:
    """Have glibc keep big buffers instead of returning them at every step: page faults cost up to half of the time."""
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)  # PEFT's
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            mallopt(option, value)


def summary(config: TrainConfig, corpus: Corpus) -> str:
    """What of the data is used and what is left out, for a person to read."""
    sizes = f"{len(corpus.train)} to train on, {len(corpus.valid)} to validate, {len(corpus.test)} to test"
    lines = [f"{config.data}: {sizes}, {len(corpus.heldout_authors)} of authors held out"]
    lines += [f"  {count} left out{_why(flag)}" for flag, count in corpus.filtered.items() if count]
    lines += [f"  {UNSAID.format(folder)}" for folder in corpus.unsaid]
    lines += skipped(corpus)
    return "\n".join(lines)


def _why(filtered: str) -> str:
    return f" by {filtered}" if filtered.startswith("--") else f": {filtered}"


def skipped(corpus: Corpus) -> Sequence[str]:
    """Lines about the rows that can't be used."""
    lines = [f"  {count} left out: {why}" for why, count in Counter(row.reason for row in corpus.skipped).most_common()]
    lines += [f"    {row.source} line {row.line}: {row.detail or row.reason}" for row in corpus.skipped[:SKIPPED_SHOWN]]
    if len(corpus.skipped) > SKIPPED_SHOWN:
        lines.append(f"    and {len(corpus.skipped) - SKIPPED_SHOWN} more; report.json lists them all")
    return lines
