"""`python -m training search`: hyper-parameter search with Optuna, on one frozen base that is loaded once.

Every trial is a run of `training.loop`, and its figure the held-out loss, in nats a token, of the weights that the run
keeps. The median pruner ends trials that are behind. The study is a file: the same command goes on with it.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from training.cli import add_flags, pair_of, settings
from training.config import TrainConfig
from training.errors import ConfigError

SPACE = {"lr": "3e-4..1e-2", "rank": "4,8,16", "dropout": "0..0.2", "epochs": "1,2,3"}
TUNABLE = (
    "lr", "rank", "alpha", "rslora", "targets", "dropout", "epochs", "schedule", "warmup", "weight_decay", "clip",
    "batch_size", "accumulate",
)  # fmt: skip
SHAPE = ("rank", "alpha", "rslora", "targets")  # what --init-from decides
SHOWN = 10
_KINDS = get_type_hints(TrainConfig)


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included; logarithmic where they are ten times apart or more."""

    low: float
    high: float
    whole: bool

    def suggest(self, trial: Any, name: str) -> Any:
        log = self.low > 0 and self.high >= 10 * self.low
        draw = trial.suggest_int if self.whole else trial.suggest_float
        return draw(name, self.low, self.high, log=log)


@dataclass(frozen=True)
class Choice:
    """One of the texts, as they were given."""

    texts: Sequence[str]

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_categorical(name, self.texts)


def main(argv: Sequence[str]) -> None:
    """Search as the command line asks for. Raises TrainingError."""
    parser = argparse.ArgumentParser(
        prog="python -m training search",
        description="Search for the settings with the best held-out loss. The same command goes on with a search.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--name", help="the search's name: its files are in DIR/NAME of --output DIR, by default "
                        "runs/search (default: search)")  # fmt: skip
    parser.add_argument("--trials", type=int, default=20, metavar="N",
                        help="trials in all, those of earlier calls included (default: %(default)s)")  # fmt: skip
    parser.add_argument("--storage", type=Path, default=None, metavar="FILE",
                        help="the study's SQLite file (default: study.db beside the best recipe)")  # fmt: skip
    parser.add_argument("--tune", action="append", default=[], metavar="FIELD=SPACE",
                        help=f"LOW..HIGH or A,B,C; `FIELD=` leaves it as it is; repeatable; of {', '.join(TUNABLE)} "
                        f"(default: {' '.join(f'{k}={v}' for k, v in SPACE.items())})")  # fmt: skip
    add_flags(parser, leave_out=("resume", "overwrite", "ensure", "gate", "eval_samples", "contrast"))
    arguments = vars(parser.parse_args(argv))
    trials, storage, tune = (arguments.pop(name) for name in ("trials", "storage", "tune"))
    if trials < 1:
        raise ConfigError(f"--trials is {trials}: give at least 1")
    values: dict[str, Any] = {"output": "runs/search", **settings(arguments), "name": arguments.get("name", "search")}
    if storage is not None and not storage.absolute().parent.is_dir():
        raise ConfigError(f"--storage {storage}: there is no such folder; make it first")
    search(TrainConfig(**values), space(tune, values.get("init_from")), trials, storage)


def space(tune: Sequence[str], init_from: str | None = None) -> dict[str, Range | Choice]:
    """Field -> what is tried, `tune` over the defaults; of an adapter that is continued, not its shape.

    Raises ConfigError.
    """
    texts = {name: text for name, text in SPACE.items() if init_from is None or name not in SHAPE}
    for pair in tune:
        name, text = (pair[:-1], "") if pair.endswith("=") else pair_of("--tune", pair, "lr=1e-4..5e-3")
        if name not in TUNABLE:
            raise ConfigError(f"--tune {pair!r}: choose of {', '.join(TUNABLE)}")
        if init_from is not None and name in SHAPE and text:
            raise ConfigError(f"--tune {pair!r}: the adapter of --init-from {init_from} has its {name}; leave one out")
        texts[name] = text
    return {name: _space(name, text) for name, text in texts.items() if text}


def tried_config(config: TrainConfig, params: dict[str, Any]) -> TrainConfig:
    """The run of a trial. Raises ConfigError for a value that a run can't have."""
    return replace(config, **{name: _value(name, str(value)) for name, value in params.items()})


def search(config: TrainConfig, spaces: dict[str, Range | Choice], trials: int, storage: Path | None) -> None:
    """Run what is missing to `trials` trials, write the best recipe and print all. Raises TrainingError."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("the search needs Optuna: pip install 'chorus-serve[search]'") from error
    from training.base import open_base
    from training.data import load_corpus
    from training.distributed import join
    from training.launcher import launched
    from training.origin import pinned
    from training.recipe import RECIPE_FILE, write_recipe
    from training.run import keep_heap, resolved, summary
    from training.train import Job, train

    adapter = (config.folder / "adapter_config.json").exists()
    if adapter or (config.partial.exists() and not config.folder.exists()):
        what = "an adapter" if adapter else "an unfinished run"
        raise ConfigError(f"--name {config.name}: {config.output} has {what} of this name; give the search another")
    if launched()[1] > 1:
        raise ConfigError("a search runs in one process: start it without a launcher")
    keep_heap()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ranks = join(config.device)
    base = open_base(config.model)
    auto = config.dtype == "auto"
    config = pinned(resolved(config, ranks), base)
    corpus = load_corpus(config, base)
    print(summary(config, corpus), flush=True)
    config.folder.mkdir(parents=True, exist_ok=True)
    study = _study(optuna, config, spaces, storage or config.folder / "study.db", auto)
    weights = base.load()
    complete, pruned = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    while len(study.get_trials(deepcopy=False, states=(complete, pruned))) < trials:
        trial = study.ask()

        def judge(voice: Any, trial: Any = trial) -> None:
            if not voice.failed:
                step, loss = voice.history.valid[-1]
                trial.report(loss, round(100 * step / len(voice.plan)))  # per cent, since lengths differ
                if trial.should_prune() and not voice.done:
                    voice.history.ended_by = "pruned"

        tried = tried_config(config, {name: what.suggest(trial, name) for name, what in spaces.items()})
        model, (voice,) = train(base, weights, [Job(tried, corpus)], ranks, judge)
        typed: Any = model
        weights = typed.unload()
        shutil.rmtree(tried.partial)
        if voice.failed or voice.history.ended_by == "pruned":
            study.tell(trial, state=pruned)
        else:
            study.tell(trial, dict(voice.history.valid)[voice.history.kept_step])
        print(_line(study.get_trials(deepcopy=False)[trial.number]), flush=True)
    done = study.get_trials(deepcopy=False, states=(complete,))
    if not done:
        raise ConfigError("no trial came to its end: --tune a space with smaller learning rates")
    write_recipe(config.folder, tried_config(config, study.best_params))
    print("\nbest first:", *map(_line, sorted(done, key=lambda trial: trial.value)[:SHOWN]), sep="\n")
    print(f"\npython -m training --recipe {config.folder / RECIPE_FILE} --name NAME trains the best")


def _study(optuna: Any, config: TrainConfig, spaces: dict[str, Range | Choice], file: Path, auto: bool) -> Any:
    """The study in `file`, a new one if there is none. Raises ConfigError if it is another search's."""
    what = config.recorded() | {"space": {name: asdict(space) for name, space in spaces.items()}}
    what = json.loads(json.dumps({name: value for name, value in what.items() if name not in spaces}))
    storage = f"sqlite:///{file.resolve()}"
    study = optuna.create_study(storage=storage, study_name="search", load_if_exists=True)
    before = study.user_attrs.get("search", what)
    if auto:
        what["dtype"] = before.get("dtype")  # it may have begun on another processor
    changed = sorted(name for name in before.keys() | what.keys() if before.get(name) != what.get(name))
    if changed:
        raise ConfigError(f"{file} holds another search ({', '.join(changed)} differ): give the same flags, another "
                          "--name, or delete it")  # fmt: skip
    study.set_user_attr("search", what)
    study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))  # drawn anew, not again
    study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=20)
    return study


def _line(trial: Any) -> str:
    """A trial in one line of the table."""
    told = "  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in trial.params.items())  # fmt: skip
    return f"trial {trial.number:3}  {'ended early' if trial.value is None else f'{trial.value:11.4f}'}  {told}"


def _space(name: str, text: str) -> Range | Choice:
    low, dots, high = text.partition("..")
    if not dots:
        texts = tuple(dict.fromkeys(text.split(",")))
        for value in texts:
            tried_config(TrainConfig(name="search"), {name: value})
        return Choice(texts)
    ends = [_value(name, end) for end in (low, high)]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends) or ends[0] >= ends[1]:
        raise ConfigError(f"--tune {name}={text}: LOW..HIGH is of numbers, the lower one first")
    for end in ends:
        tried_config(TrainConfig(name="search"), {name: end})
    return Range(ends[0], ends[1], isinstance(ends[0], int))


def _value(name: str, text: str) -> Any:
    """`text` as the field's type; several targets have `+` between them. Raises ConfigError."""
    kind = _KINDS[name]
    kinds = [kind, *get_args(kind)]
    try:
        if name == "targets":
            return tuple(text.split("+"))
        if bool in kinds:
            return {"true": True, "false": False}[text.lower()]
        return int(text) if int in kinds else float(text) if float in kinds else text
    except (ValueError, KeyError):
        raise ConfigError(f"--tune {name}: {text!r} is not a value of it") from None
