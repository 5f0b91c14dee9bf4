"""What a run leaves beside the weights: report.json, golden.json, a loss curve and a model card."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel

from training.base import Base
from training.config import TrainConfig, flag_of
from training.data import Corpus
from training.errors import DataError
from training.evaluate import Evaluation, Shown, lengths_of
from training.figures import METRICS
from training.gate import Verdict
from training.intervals import Interval, Rate
from training.sampling import greedy
from training.seen import digest_of, packed
from training.template import fill
from training.voice import History

FORMAT_VERSION = 1
GOLDEN_PROMPTS = 3
GOLDEN_TOKENS = 24
_PACKAGES = ("torch", "transformers", "peft", "datasets", "tokenizers")


def write_report(
    folder: Path, config: TrainConfig, base: Base, corpus: Corpus, history: History, evaluation: Evaluation,
    verdict: Verdict,
) -> dict[str, Any]:  # fmt: skip
    """Write report.json; the result is what it holds."""
    measured = {row.metric for row in evaluation.rows}
    style = evaluation.style
    report = {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "command": command(config),
        "base": {"name": base.name, "weights_sha256": base.weights_sha256()},
        "config": config.recorded(),
        "data": {
            "used": {s: len(getattr(corpus, s)) for s in ("train", "valid", "test", "heldout_authors")},
            "filtered": dict(corpus.filtered),
            "train_texts": packed({digest_of(row.key) for row in corpus.train} | corpus.learned),
            "unknown_origins": corpus.unsaid,
            "skipped_by_reason": dict(Counter(row.reason for row in corpus.skipped)),
            "skipped": [asdict(row) for row in corpus.skipped],
        },
        "training": {
            "steps": history.steps,
            "kept_step": history.kept_step,
            "ended_by": history.ended_by,
            "seconds": round(history.seconds, 1),
            "tokens": history.tokens,
            "tokens_per_second": round(history.tokens_per_second),
            "attention_padding": round(history.padding, 4),
            "peak_memory_mb": round(history.peak_bytes / 2**20),
            "train_loss": history.train,
            "valid_loss": history.valid,
        },
        "sampling": asdict(evaluation.settings),
        "gate": verdict.recorded() if verdict.checks else None,
        "metrics": {metric: meaning for metric, meaning in METRICS.items() if metric in measured},
        "rows": [asdict(row) for row in evaluation.rows],
        "perplexity_ratio": {
            name: asdict(of.ratio) | {"examples": of.examples, "tokens": of.tokens}
            for name, of in evaluation.perplexities.items()
            if of.ratio is not None
        },
        "lengths": [lengths_of(sampled) for sampled in evaluation.sampled],
        "style": {"reason": style} if isinstance(style, str) else asdict(style) | {"reason": None},
        "references": evaluation.references,
        "samples": [asdict(shown) for shown in evaluation.shown],
        "versions": {package: version(package) for package in _PACKAGES},
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    return json.loads(text)


def history_of(folder: Path) -> History:
    """What report.json in `folder` says of the run. Raises DataError if it says it otherwise than this version."""
    file = folder / "report.json"
    try:
        of = json.loads(file.read_text(encoding="utf-8"))["training"]
        train, valid = ([(int(step), float(loss)) for step, loss in of[name]] for name in ("train_loss", "valid_loss"))
        return History(
            train, valid, of["steps"], of["tokens"], of["seconds"], of["attention_padding"],
            of["peak_memory_mb"] * 2**20, of["ended_by"], of["kept_step"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a report of this version ({type(error).__name__}: {error})") from error


def write_golden(folder: Path, model: PeftModel, base: Base, corpus: Corpus, config: TrainConfig) -> None:
    """Write golden.json: a few prompts, with the greedy tokens and logprobs that every server has to give."""
    examples = corpus.heldout_authors or corpus.test
    prompts = list(dict.fromkeys(fill(config.parsed_template().prompt, example.fields) for example in examples))
    entries = []
    for prompt in prompts[:GOLDEN_PROMPTS]:
        ids = base.encode(prompt)
        token_ids, logprobs = greedy(model, ids, base.eos, GOLDEN_TOKENS)
        entries.append(
            {
                "prompt": prompt,
                "prompt_token_ids": ids,
                "token_ids": token_ids,
                "logprobs": [round(value, 6) for value in logprobs],
            }
        )
    golden = {"format_version": FORMAT_VERSION, "base_model": base.name, "dtype": "float32", "prompts": entries}
    (folder / "golden.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")


def write_loss_curve(folder: Path, name: str, history: History) -> None:
    """Write loss.png."""
    from matplotlib.figure import Figure  # imported late: it takes a second; without pyplot there is no display

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_axes(history.train), color="0.7", label="training")
    axes.plot(*_axes(history.valid), color="tab:blue", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=name)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=80, metadata={"Software": None})


def write_card(folder: Path, config: TrainConfig, base: Base, corpus: Corpus, evaluation: Evaluation) -> None:
    """Write README.md, the model card."""
    settings = evaluation.settings
    lines = [
        "---", f"base_model: {base.name}", "library_name: peft", "pipeline_tag: text-generation",
        "tags: [lora, gpt2]", "---", "",
        f"# {config.name}", "",
        f"A LoRA adapter (rank {config.rank}, alpha {config.lora_alpha}, on {', '.join(config.targets)}) for the "
        f"frozen GPT-2 `{base.name}`. It writes `{config.template}` and stops.", "",
        *continued(config, corpus),
        f"Trained on {len(corpus.train):,} texts of `{config.recorded()['data']}`"
        + (f" by {', '.join(config.authors)}" if config.authors else "")
        + (f" tagged {', '.join(config.tags)}" if config.tags else "")
        + f", {config.epochs:g} epochs, seed {config.seed}:", "",
        f"    {command(config)}", "",
        f"Samples: temperature {settings.temperature}, top-p {settings.top_p}, at most {settings.max_tokens} tokens. "
        "Rates with Wilson's 95 % interval, perplexities with the bootstrap's. Definitions and every setting are in "
        "`report.json`; `report.html` shows it all.", "",
        "| prompts | form | metric | n | base | adapter |", "|---|---|---|---:|---:|---:|",
        *(
            f"| {row.prompts} | {row.form or ''} | {row.metric} | {row.n} "
            f"| {_figure(row.base)} | {_figure(row.adapter)} |"
            for row in evaluation.rows
        ),
        "", "![loss](loss.png)", "", "## Samples, the first of each kind", "",
    ]  # fmt: skip
    for shown in first_of_each_kind(evaluation.shown):
        lines += [f"- `{shown.prompt}` ({shown.prompts}, {shown.form})"]
        lines += [f"  - base:{'' if shown.base_stopped else ' (no EOS)'} `{_one_line(shown.base)}`"]
        lines += [f"  - adapter:{'' if shown.adapter_stopped else ' (no EOS)'} `{_one_line(shown.adapter)}`"]
    lines += [
        "", "It imitates a style. What it writes was never said by the person it names; don't quote it as theirs.", "",
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def continued(config: TrainConfig, corpus: Corpus) -> list[str]:
    """The card's lines on what the adapter was continued from."""
    if config.init_from is None:
        return []
    lines = [f"Continued from {Path(config.init_from).resolve().name}, digest `{config.init_digest}`.", ""]
    if corpus.unsaid:
        lines += ["What that one was trained on isn't known: texts that this was measured on may be among it.", ""]
    return lines


def side_by_side(evaluation: Evaluation) -> str:
    """Metrics and samples of base and adapter, for a person to read."""
    lines = [f"{'':44} {'base':>22} {'adapter':>22}"]
    for row in evaluation.rows:
        label = f"{row.prompts}{', ' + row.form if row.form else ''}: {row.metric}"
        lines.append(f"{label:44} {_figure(row.base):>22} {_figure(row.adapter):>22}")
    for shown in evaluation.shown:
        if shown.prompts != evaluation.shown[0].prompts:
            break  # report.json holds the rest
        lines += [
            "", f"{shown.prompt}   [{shown.prompts}]",
            f"  base    | {_one_line(shown.base)}{_ending(shown.base_stopped)}",
            f"  adapter | {_one_line(shown.adapter)}{_ending(shown.adapter_stopped)}",
        ]  # fmt: skip
    return "\n".join(lines)


def first_of_each_kind(shown: Sequence[Shown]) -> list[Shown]:
    """The first sample of each prompt set and form."""
    return list({(s.prompts, s.form): s for s in reversed(shown)}.values())[::-1]


def command(config: TrainConfig) -> str:
    """The command that makes this adapter again: every flag that isn't at its default."""
    default, words = TrainConfig(config.name).recorded(), ["python", "-m", "training", "--name", config.name]
    for key, value in config.recorded().items():
        unset = config.alpha is None if key == "alpha" else value == default[key]
        if key == "name" or unset or value is None:
            continue
        if value is True or value is False:
            words.append(flag_of(key) if value else flag_of(key).replace("--", "--no-", 1))
            continue
        if key == "columns":
            value = [f"{field}={column}" for field, column in value.items()]
        elif key == "targets":
            value = ",".join(value)
        for item in value if isinstance(value, list) else [value]:
            words += [flag_of(key), str(item)]
    return shlex.join(words)


def _figure(value: float | Rate | Interval) -> str:
    if isinstance(value, Rate):
        return f"{value.value:.3f} ({value.low:.3f}-{value.high:.3f})"
    if isinstance(value, Interval):
        return f"{value.value:.5g} ({value.low:.4g}-{value.high:.4g})"
    return f"{value:g}"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n").replace("`", "'")


def _ending(stopped: bool) -> str:
    return " <EOS>" if stopped else " ... (token limit)"


def _axes(points: Sequence[tuple[int, float]]) -> tuple[list[Any], list[Any]]:
    return [step for step, _ in points], [loss for _, loss in points]
