"""Scores, memory and time against the length, for this report and those that it is shown beside.

One panel per kind of question, one line per report: what extending gained and what quantizing cost is the distance
between two lines. Everything is drawn from `Report`; other reports enter it as curves, so that the page can be made
again from one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lcconvert.convert.plots import native_line, note_below, png
from lcconvert.convert.results import Beside, Cost, Curve, CurvePoint, Report
from lcconvert.runtime.units import format_bytes, format_count

_LINES = ("#2f5f9f", "#c2702b", "#2f7f6f", "#7a4f9a", "#8a8a8a")
_MARKS = ("o", "s", "^", "D", "v")
_ACROSS = 3  # panels in a row
_TITLES = {
    "heldout": "needles", "multikey": "needles among near distractors", "training": "needles in the training wording",
}  # fmt: skip


def own_curves(report: Report) -> Beside:
    """A report as the curves that another one may show beside its own."""
    curves = [
        Curve(
            name=_TITLES[needles.wording],
            points=[
                CurvePoint(length=row.length, share=row.strict / row.n, low=row.low, high=row.high, n=row.n)
                for row in needles.by_length
                if row.n
            ],
        )
        for needles in report.needles
    ]
    cells = report.tasks.cells if report.tasks is not None else []
    for name in dict.fromkeys(cell.task for cell in cells):
        points = [
            CurvePoint(length=cell.length, share=cell.strict / cell.n, low=cell.low, high=cell.high, n=cell.n)
            for cell in cells
            if cell.task == name and cell.n
        ]
        curves.append(Curve(name=name, points=points))
    return Beside(
        label=report.artifact.variant,
        name=report.artifact.name,
        sha256=report.artifact.sha256,
        attention=report.setup.attention,
        curves=[curve for curve in curves if curve.points],
        cost=[row for row in report.cost if row.prefill_seconds is not None],
    )


def has_scores(report: Report) -> bool:
    """Whether there is a line to draw: two lengths, or another report to compare with."""
    return any(len(curve.points) > 1 for shown in _shown(report) for curve in shown.curves)


def has_costs(report: Report) -> bool:
    return any(len(shown.cost) > 1 for shown in _shown(report))


def scores_png(report: Report) -> bytes:
    """A panel a kind of question: share right by the strict rule against the length, with its 95% interval."""
    shown = _shown(report)
    names = list(dict.fromkeys(curve.name for one in shown for curve in one.curves))
    across = min(_ACROSS, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(max(4.0 * across, 6.4), 2.7 * down + 0.9), dpi=120)
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    lengths = sorted({point.length for one in shown for curve in one.curves for point in curve.points})
    for axes, name in zip(panels, names):
        for i, one in enumerate(shown):
            points = next((curve.points for curve in one.curves if curve.name == name), [])
            x = [math.log2(point.length) for point in points]
            axes.plot(
                x, [point.share for point in points], marker=_MARKS[i], color=_LINES[i], label=line_label(one, shown)
            )
            if one is shown[-1]:
                low, high = [point.low for point in points], [point.high for point in points]
                axes.fill_between(x, low, high, color=_LINES[i], alpha=0.12, linewidth=0)
        axes.set_ylim(-0.03, 1.05)
        axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
        axes.set_title(name, fontsize=10, loc="left")
        _length_axis(axes, lengths, report)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    _legend(
        figure, shown, "right by the strict rule; shaded: the 95% interval of this report; dashed: the native window"
    )
    return png(figure)


def costs_png(report: Report) -> bytes:
    """Prefill time, decode rate and peak memory against the length."""
    shown = _shown(report)
    wanted: list[tuple[str, Callable[[Cost], float | None], Callable[[float], str]]] = [
        ("prefill, seconds", lambda row: row.prefill_seconds, lambda v: f"{v:g}"),
        ("decode, tokens/s", lambda row: row.decode_tokens_per_second, lambda v: f"{v:g}"),
        ("peak memory", lambda row: row.peak_bytes, lambda v: format_bytes(int(v))),
    ]
    figure = Figure(figsize=(4.0 * len(wanted), 3.6), dpi=120)
    lengths = sorted({row.length for one in shown for row in one.cost})
    for axes, (title, value, name) in zip(figure.subplots(1, len(wanted)), wanted):
        found: list[float] = []
        for i, one in enumerate(shown):
            points = [(math.log2(row.length), v) for row in one.cost if (v := value(row)) is not None]
            found += [v for _, v in points]
            axes.plot(
                [x for x, _ in points], [v for _, v in points], marker=_MARKS[i], color=_LINES[i],
                label=line_label(one, shown),
            )  # fmt: skip
        if found:
            axes.set_yscale("log")
            ticks = _ticks(min(found), max(found))
            axes.set_ylim(min(found[0], ticks[0], *found) / 1.3, max(ticks[-1], *found) * 1.3)
            axes.set_yticks(ticks, [name(tick) for tick in ticks])
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(title, fontsize=10, loc="left")
        _length_axis(axes, lengths, report)
    _legend(figure, shown, f"measured on {report.setup.device}")
    return png(figure)


def _ticks(low: float, high: float) -> list[float]:
    """Round values from 1, 2, 5 times a power of ten, at most six, that cover low..high."""
    steps = [m * 10.0**e for e in range(-4, 16) for m in (1, 2, 5)]
    inside = [step for step in steps if low / 2.5 <= step <= high * 2.5]
    return inside[:: -(-len(inside) // 6)]


def _shown(report: Report) -> list[Beside]:
    """Earlier reports first, this one last."""
    return [*report.beside, own_curves(report)][-len(_LINES) :]


def line_label(one: Beside, shown: Sequence[Beside]) -> str:
    """The variant, and the name or the attention where that is not enough to tell two apart."""
    same = [other for other in shown if other.label == one.label]
    if len(same) == 1:
        return one.label
    if len({other.attention for other in same}) == len(same):
        return f"{one.label}, {one.attention}"
    return f"{one.label} ({one.name.rstrip('/').rpartition('/')[2]})"


def _length_axis(axes: Axes, lengths: list[int], report: Report) -> None:
    edges = (math.log2(lengths[0]) - 0.3, math.log2(lengths[-1]) + 0.3)
    axes.set_xlim(*edges)
    few = lengths[:: -(-len(lengths) // 6)]
    axes.set_xticks([math.log2(n) for n in few], [format_count(n) for n in few], fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    native_line(axes, math.log2(report.artifact.native_context), edges)


def _legend(figure: Figure, shown: Sequence[Beside], note: str) -> None:
    if len(shown) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", ncols=len(shown), fontsize=9, frameon=False)
    note_below(figure, note)
