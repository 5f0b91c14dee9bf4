"""report.html: one adapter beside its base, as a page for people. It holds all it shows and asks no other host."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from training import plots
from training.evaluate import Evaluation
from training.voice import History

REPORT_FILE = "report.html"
SETS = {"test": "Held-out texts", "heldout_authors": "Authors never seen"}
FORMS = {"punctuated": "", "bare": "bare prompt"}
LABELS = {
    "perplexity": "Perplexity", "eos_rate": "Stops by itself", "format_rate": "Keeps the format",
    "mean_tokens": "Mean length, tokens", "length_distance": "Distance of lengths", "distinct_1": "Distinct words",
    "distinct_2": "Distinct pairs", "distinct_3": "Distinct triples", "overlap_rate": "Eight words in a row copied",
    "longest_overlap": "Longest run copied, words", "mean_overlap": "Mean run copied, words", "copy_rate": "Copies",
    "style_rate": "Taken for the voice", "perplexity_ratio": "Perplexity, adapter / base",
    "style_gain": "Taken for the voice, gain over the base",
}  # fmt: skip
_HEADLINES = ("perplexity", "eos_rate", "format_rate", "style_rate", "copy_rate")


def write_html(folder: Path, report: Mapping[str, Any], history: History, evaluation: Evaluation) -> None:
    """Write report.html from what report.json holds and the lengths of all samples."""
    present = list(dict.fromkeys(row["prompts"] for row in report["rows"]))
    own = "test" if "test" in present else next(iter(present), "")
    drawn = [
        plots.lengths(of.training_lengths, [s.tokens for s in of.base], [s.tokens for s in of.adapter])
        for of in evaluation.sampled
        if (of.prompts, of.form) == (own, "punctuated")
    ]
    html = render(
        "report.html",
        report=report,
        sets=sorted(present, key=lambda name: name != own),
        own=own,
        headlines=[row for m in _HEADLINES if (row := _row(report, m, own)) is not None],
        loss=Markup(plots.loss_curve(history.train, history.valid, history.kept_step)),
        lengths=[Markup(plot) for plot in drawn],
        recipe={k: v for k, v in report["config"].items() if v not in (None, [], {})},
    )
    (folder / REPORT_FILE).write_text(html, encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """A page from `training/templates`; every value is escaped but for the plots."""
    environment = Environment(
        loader=PackageLoader("training"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "figure": figure, "share": share, "address": quote, "squeezed": squeezed, "setting": setting,
    }  # fmt: skip
    environment.globals |= {"labels": LABELS, "set_names": SETS, "form_names": FORMS}
    return environment.get_template(template).render(**values)


def figure(value: Any, metric: str) -> str:
    """A figure without its interval."""
    plain = number(value)
    if plain is None:
        return "–"
    if metric.endswith("_rate"):
        return share(plain)
    return f"{plain:,.0f}" if abs(plain) >= 100 or metric == "longest_overlap" else f"{plain:.3g}"


def share(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.0f} %" if value in (0, 1) else f"{100 * value:.1f} %"


def number(value: Any) -> float | None:
    """The plain number of a figure with or without an interval; None if there is none."""
    if isinstance(value, Mapping):
        return number(value.get("value"))
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def squeezed(text: str) -> str:
    """A sample without empty lines."""
    return re.sub(r"\s*\n\s*", "\n", text.strip())


def setting(value: Any) -> str:
    """A setting as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={of}" for name, of in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(report: Mapping[str, Any], metric: str, prompts: str) -> Mapping[str, Any] | None:
    rows = (row for row in report["rows"] if row["metric"] == metric and row["prompts"] == prompts)
    return next((row for row in rows if row["form"] in (None, "punctuated")), None)
