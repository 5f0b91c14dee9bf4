"""A choir's report: its voices beside each other, and who is told apart from whom. As files, not as a folder, so that
a server that looks into the same place leaves them alone."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.choir import NAMELESS, slug
from training.contrast import written
from training.data import Example
from training.figures import value_of
from training.html_report import render
from training.run import Finished
from training.style import LEAST_TEXTS, Classifier

FORMAT_VERSION = 1
JSON_FILE, HTML_FILE = "choir.json", "choir.html"
_COLUMNS = ("eos_rate", "format_rate", "style_rate", "copy_rate", "distinct_2")
_TABLE = (  # of the summary: head -> figure and side
    ("ppl base", ("perplexity", "base")), ("adapter", ("perplexity", "adapter")), ("eos", ("eos_rate", "adapter")),
    ("format", ("format_rate", "adapter")), ("style", ("style_rate", "adapter")), ("copies", ("copy_rate", "adapter")),
)  # fmt: skip


@dataclass(frozen=True)
class Confusion:
    """Shares of each voice's texts (rows) that a classifier of all voices takes for each voice (columns).

    It learned from the voices' training texts; `real` are their held-out texts, on which its accuracy is taken.
    """

    voices: list[str]
    accuracy: float  # balanced: the mean over the voices
    texts: list[int]  # held out, of each voice
    real: list[list[float]]
    samples: list[list[float]]  # the adapters'
    samples_n: list[int]
    of_base: list[float]  # of the base's samples after each voice's prompts: the share taken for that voice


def write_choir(output: Path, base: str, members: Sequence[Finished], failed: Sequence[tuple[str, str]]) -> str:
    """Write choir.json and choir.html into `output`; the result is the summary as text, for a terminal.

    `members` are the voices that were measured, published or kept aside by their gate (`GateFailed.finished`); `failed`
    are those that never got there, as (name, reason).
    """
    voices = [_voice(member, output) for member in members]
    told = confusion(members)
    report = {
        "format_version": FORMAT_VERSION,
        "base": base,
        "voices": voices,
        "failed": [{"name": name, "reason": reason} for name, reason in failed],
        "confusion": {"reason": told} if isinstance(told, str) else asdict(told) | {"reason": None},
    }
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (output / JSON_FILE).write_text(text, encoding="utf-8")
    write_choir_html(output / HTML_FILE, json.loads(text))
    return summary(report)


def write_choir_html(path: Path, report: Mapping[str, Any]) -> None:
    """Write the page of what choir.json holds."""
    path.write_text(render("choir.html", report=report), encoding="utf-8")


def summary(report: Mapping[str, Any]) -> str:
    """A line for each voice."""
    names = [_shown(voice) for voice in [*report["voices"], *report["failed"]]]
    width = max([len(name) for name in names] + [5])
    heads = [head for head, _ in _TABLE]
    lines = [f"{'voice':{width}} {'texts':>6} {'ratio':>6} {' '.join(f'{head:>8}' for head in heads)}  gate"]
    for voice in report["voices"]:
        ratio = "-" if voice["ratio"] is None else f"{voice['ratio']['value']:.3f}"
        cells = [_cell(voice["figures"], metric, side) for _, (metric, side) in _TABLE]
        shown = " ".join(f"{cell:>8}" for cell in cells)
        lines.append(f"{_shown(voice):{width}} {voice['texts']:>6} {ratio:>6} {shown}  {voice['gate']}")
    lines += [f"{of['name']:{width}} failed: {of['reason']}" for of in report["failed"]]
    told = report["confusion"]
    if told["reason"] is None:
        k, own = len(told["voices"]), [row[i] for i, row in enumerate(told["samples"])]
        lines.append(
            f"told apart: a classifier of the {k} voices is right on {told['accuracy']:.1%} of real held-out texts "
            f"(chance {1 / k:.1%}), and takes {sum(own) / k:.1%} of the adapters' samples for their own voice "
            f"(the base's: {sum(told['of_base']) / k:.1%})"
        )
    return "\n".join(lines)


def confusion(members: Sequence[Finished]) -> Confusion | str:
    """Who is told apart from whom, or why that can't be said."""
    texts = {member.config.name: _texts(member, member.corpus.train) for member in members}
    held_out = _held_out(members)
    usable = [m for m in members if len(texts[m.config.name]) >= LEAST_TEXTS and held_out[m.config.name]]
    if len(usable) < 2:
        return f"it takes two voices with {LEAST_TEXTS} training texts and a held-out one"
    names = [member.config.name for member in usable]
    classifier = Classifier({name: texts[name] for name in names}, usable[0].config.seed)

    def shares(of_texts: Sequence[str]) -> list[float]:
        taken = classifier.predict(of_texts)
        return [round(taken.count(name) / max(1, len(taken)), 4) for name in names]

    real = [shares(held_out[name]) for name in names]
    written_by = [member.evaluation.adapter_texts() for member in usable]
    return Confusion(
        names,
        round(sum(row[i] for i, row in enumerate(real)) / len(names), 4),
        [len(held_out[name]) for name in names],
        real,
        [shares(of_texts) for of_texts in written_by],
        [len(of_texts) for of_texts in written_by],
        [shares(member.evaluation.base_texts())[i] for i, member in enumerate(usable)],
    )


def _held_out(members: Sequence[Finished]) -> dict[str, list[str]]:
    """Each voice's own held-out texts: none that another was trained on, as one with two tags may be, or shares."""
    trained = {row.key for member in members for row in member.corpus.train}
    rows = {member.config.name: [*member.corpus.valid, *member.corpus.test] for member in members}
    times = Counter(row.key for of_voice in rows.values() for row in of_voice)
    return {
        member.config.name: _texts(
            member, [row for row in rows[member.config.name] if row.key not in trained and times[row.key] == 1]
        )
        for member in members
    }


def _texts(member: Finished, rows: Sequence[Example]) -> list[str]:
    template = member.config.parsed_template()
    return [written(template, row.fields) for row in rows]


def _voice(member: Finished, output: Path) -> dict[str, Any]:
    """What choir.json says of a voice: figures on its own prompts, the punctuated form."""
    figures = {
        row.metric: {"base": value_of(row.base), "adapter": value_of(row.adapter), "n": row.n}
        for row in member.evaluation.rows
        if row.prompts == "test" and row.form in (None, "punctuated") and row.metric in ("perplexity", *_COLUMNS)
    }
    compared = member.evaluation.perplexities.get("test")
    passed, config = member.verdict.passed, member.config
    folder = member.folder
    return {
        "name": config.name,
        "authors": list(config.authors),
        "tags": list(config.tags),
        "texts": len(member.corpus.train),
        "folder": folder.name,
        "report": f"{folder.name}/report.html" if (output / folder.name).is_dir() else None,
        "steps": member.history.steps,
        "gate": ("passed" if passed else "failed") if member.verdict.checks else "none",
        "gate_failed": [str(check) for check in member.verdict.failed],
        "ratio": asdict(compared.ratio) | {"examples": compared.examples} if compared and compared.ratio else None,
        "figures": figures,
    }


def _shown(voice: Mapping[str, Any]) -> str:
    """The voice's name, and whose it is where the name doesn't say."""
    whose = ", ".join([*voice.get("authors", ()), *voice.get("tags", ())])
    return voice["name"] if not whose or slug(whose) == voice["name"] != NAMELESS else f"{voice['name']} ({whose})"


def _cell(figures: Mapping[str, Any], metric: str, side: str) -> str:
    if metric not in figures:
        return "-"
    value = figures[metric][side]
    return f"{value:.1%}" if metric.endswith("_rate") else f"{value:.4g}"
