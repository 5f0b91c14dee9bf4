"""`python -m training`: train one adapter, measure it beside the base, write its folder."""

import ctypes
import os
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Sequence

from training.config import TrainConfig, parse_args
from training.data import Corpus
from training.errors import ConfigError, TrainingError

SKIPPED_SHOWN = 10
REPLACED = "replaced"  # in the run's own folder, for as long as replacing takes


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 2 for what the user can mend, with one line that says what; 130 if interrupted."""
    config: TrainConfig | None = None
    try:
        config = parse_args(argv)
        run(config)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or '--output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def run(config: TrainConfig) -> None:
    """Train as `config` says. Raises TrainingError, OSError."""
    _check_output(config)
    _keep_heap()
    # Imported late: the flags are checked before torch and transformers take their seconds.
    from training import report
    from training.base import open_base
    from training.data import load_corpus
    from training.evaluate import evaluate
    from training.train import save_adapter, train

    # PEFT still asks transformers for a property that it renames.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    base = open_base(config.model)
    corpus = load_corpus(config, base)
    print(_summary(config, corpus), flush=True)
    model, history = train(base, config, corpus.train, corpus.valid)
    print(f"trained {history.steps} steps in {history.seconds:.0f} s; measuring base and adapter", flush=True)
    evaluation = evaluate(model, base, corpus, config)
    finished = config.partial / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    save_adapter(model, base, finished)
    report.write_report(finished, config, base, corpus, history, evaluation)
    report.write_golden(finished, model, base, corpus, config)
    report.write_loss_curve(finished, config.name, history)
    report.write_card(finished, config, base, corpus, evaluation)
    _publish(config)
    print(report.side_by_side(evaluation))
    print(f"\nwrote {config.folder}")


def _keep_heap() -> None:
    """Have glibc keep big buffers instead of returning them at every step: page faults cost up to half of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # MMAP_MAX, TRIM_THRESHOLD, TOP_PAD
            mallopt(option, value)


def _check_output(config: TrainConfig) -> None:
    config.folder.parent.mkdir(parents=True, exist_ok=True)
    if (config.partial / REPLACED).is_dir() and not config.folder.exists():
        os.rename(config.partial / REPLACED, config.folder)
    if config.folder.exists() and not config.overwrite:
        raise ConfigError(f"{config.folder} exists: choose another --name, or --overwrite to replace it")
    if config.partial.exists() and not (config.resume or config.overwrite):
        raise ConfigError(
            f"an unfinished run of {config.name!r} is in {config.output}: --resume to go on with it, or --overwrite to "
            "start anew"
        )


def _publish(config: TrainConfig) -> None:
    """Put the finished folder in its place by renaming, so that a running server sees all of it or nothing.

    An adapter that it replaces is moved away first; if the run dies in between, `_check_output` puts it back.
    """
    if config.folder.exists():
        os.rename(config.folder, config.partial / REPLACED)
    os.rename(config.partial / "finished", config.folder)
    shutil.rmtree(config.partial)


def _summary(config: TrainConfig, corpus: Corpus) -> str:
    sizes = f"{len(corpus.train)} to train on, {len(corpus.valid)} to validate, {len(corpus.test)} to test"
    lines = [f"{config.data}: {sizes}, {len(corpus.heldout_authors)} of authors held out"]
    lines += [f"  {count} left out by {flag}" for flag, count in corpus.filtered.items() if count]
    for reason, count in Counter(row.reason for row in corpus.skipped).most_common():
        lines.append(f"  {count} left out: {reason}")
    lines += [f"    {row.source} line {row.line}: {row.detail or row.reason}" for row in corpus.skipped[:SKIPPED_SHOWN]]
    if len(corpus.skipped) > SKIPPED_SHOWN:
        lines.append(f"    and {len(corpus.skipped) - SKIPPED_SHOWN} more; report.json lists them all")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
