"""Plots as inline SVG. Their colours are the page's own custom properties, so that they follow its theme."""

import io
import re
from collections.abc import Sequence
from typing import Any

# Stand-ins that matplotlib writes, and what a page has instead.
_INKS = {
    "#010101": "var(--ink)", "#020202": "var(--soft)", "#030303": "var(--line)", "#040404": "var(--base)",
    "#050505": "var(--adapter)", "#060606": "var(--real)",
}  # fmt: skip
_INK, _SOFT, _LINE, _BASE, _ADAPTER, _REAL = _INKS
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "chorus", "font.size": 9, "axes.edgecolor": _LINE, "text.color": _INK,
    "axes.labelcolor": _SOFT, "xtick.color": _LINE, "ytick.color": _LINE, "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": _LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def loss_curve(train: Sequence[Sequence[float]], valid: Sequence[Sequence[float]], kept: int) -> str:
    """Training and held-out loss over the steps; a dot where the kept weights are from."""

    def draw(axes: Any) -> None:
        axes.plot(*_axes(train), color=_BASE, linewidth=1.2, label="training")
        axes.plot(*_axes(valid), color=_ADAPTER, marker="o", markersize=3, linewidth=1.8, label="held out")
        for step, loss in valid:
            if step == kept:
                axes.plot([step], [loss], color=_ADAPTER, marker="o", markersize=7)
                axes.annotate(f"{loss:.2f}", (step, loss), (0, 8), textcoords="offset points", ha="center")
        axes.set(xlabel="step", ylabel="loss, nats a token")
        axes.legend()

    return _svg(draw, "Training and held-out loss over the steps")


def lengths(training: Sequence[int], base: Sequence[int], adapter: Sequence[int]) -> str:
    """Shares of texts by their length in tokens."""

    def draw(axes: Any) -> None:
        most = max(*training, *base, *adapter, 1)
        width = max(1, -(-most // 16))
        edges = [width * i for i in range(most // width + 2)]

        def weights(values: Sequence[int]) -> list[float]:
            return [100 / len(values)] * len(values)

        filled = {"histtype": "stepfilled", "color": _REAL, "alpha": 0.45, "label": "training texts"}
        tops = [max(axes.hist(training, bins=edges, weights=weights(training), **filled)[0])]
        for values, colour, label in ((base, _BASE, "base"), (adapter, _ADAPTER, "adapter")):
            line = {"histtype": "step", "color": colour, "linewidth": 1.8, "label": label}
            tops.append(max(axes.hist(values, bins=edges, weights=weights(values), **line)[0]))
        room = 1.35 * max(tops[0], tops[2])
        if tops[1] > room:  # most of the base's samples run to the limit: the rest is to be seen, too
            axes.set_ylim(0, room)
            axes.annotate(f"base: {tops[1]:.0f} %", (max(base), room), (-4, -9), textcoords="offset points", ha="right")
        axes.set(xlabel="tokens", ylabel="% of texts")
        axes.legend(loc="upper right" if max(tops[0], tops[2]) > tops[1] else "upper left")

    return _svg(draw, "Lengths of training texts and of samples by base and adapter, in tokens")


def _svg(draw: Any, label: str) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # imported late: it takes a second; without pyplot there is no display

    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, colour in _INKS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # the page's own font
    svg = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg class="plot" viewBox="\1" role="img" aria-label="{label}">', svg
    )
    return re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def _axes(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]
