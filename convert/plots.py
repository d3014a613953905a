"""The pictures of a report, drawn from `Report` alone and returned as PNG bytes.

No pyplot: figures are objects of their own, so nothing global is left behind in a server or a test.
"""

from __future__ import annotations

import io
import math
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lcconvert.convert.results import NeedleCell, Needles, Report
from lcconvert.runtime.units import format_count

# lost -> found; ends differ in lightness too, so that they stay apart in grey and for the colour-blind
_COLOURS = LinearSegmentedColormap.from_list("found", ["#b3372b", "#f3d38a", "#2f7f6f"])
_BLANK = "#e4e4e4"
_INK = "#222222"
_WORDING = {"heldout": "", "training": ", training wording", "multikey": ", four near distractors"}
_FEW = 5  # answers below which a cell is only an anecdote


def needles_png(report: Report) -> bytes:
    """Depth x length heatmaps, one a wording: share found by the strict rule, found/asked in each cell, the native
    window as a line."""
    lengths, depths = [row.length for row in report.needles[0].by_length], report.needles[0].depths
    height = max(3.6, 0.5 * min(len(depths), 12) + 1.9)
    size = (max(6.4, 1.15 * len(lengths) + 2.4), height * len(report.needles))
    figure = Figure(figsize=size, dpi=120)
    for axes, needles in zip(figure.subplots(len(report.needles), squeeze=False)[:, 0], report.needles):
        _heatmap(axes, needles, report, lengths, depths)
    few = min((cell.n for needles in report.needles for cell in needles.cells if cell.n), default=0) < _FEW
    note_below(
        figure,
        f"found / asked in each cell{'; fewer than 5 answers a cell are an indication, not a rate' if few else ''}",
    )
    return png(figure)


def _heatmap(axes: Axes, needles: Needles, report: Report, lengths: list[int], depths: list[float]) -> None:
    centres = [math.log2(n) for n in lengths]
    x, y = _edges(centres, 0.5), _edges(list(depths), 0.1)
    for cell in needles.cells:
        column, row = lengths.index(cell.length), depths.index(cell.depth)
        left, bottom = x[column], y[row]
        width, height = x[column + 1] - left, y[row + 1] - bottom
        blank = cell.state != "measured"
        colour = _BLANK if blank else _COLOURS(cell.strict / cell.n)
        hatch = "///" if blank else None
        axes.add_patch(_rectangle(left, bottom, width, height, colour, hatch))
        axes.text(
            centres[column], bottom + height / 2, _label(cell), ha="center", va="center",
            fontsize=9 if len(depths) <= 12 else 6, color=_ink(cell),
        )  # fmt: skip
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[-1], y[0])
    axes.set_xticks(centres, [format_count(n) for n in lengths])
    shown = depths if len(depths) <= 12 else depths[::2]
    axes.set_yticks(list(shown), [f"{depth:.3g}%" for depth in (100 * depth for depth in shown)])
    axes.set_xlabel("context length, tokens (answer included)")
    axes.set_ylabel("depth of the needle")
    native = report.artifact.native_context
    # a column of exactly the native window lies inside it, so the line goes to its far side
    at = x[lengths.index(native) + 1] if native in lengths else math.log2(native)
    _native_line(axes, report, at, (x[0], x[-1]))
    title = f"Needles found: {report.artifact.variant} ({needles.protocol} haystack{_WORDING[needles.wording]})"
    _title(axes, title)


def perplexity_png(report: Report) -> bytes:
    """Perplexity of the same target tokens against the context before them, and of every token by its position."""
    assert report.perplexity is not None
    points = [(p.context, p.ppl) for p in report.perplexity.by_context if p.ppl is not None]
    figure = Figure(figsize=(6.4, 3.8), dpi=120)
    axes = figure.add_subplot()
    axes.plot(
        [math.log2(n) for n, _ in points], [ppl for _, ppl in points], marker="o", color="#2f5f9f", linewidth=1.8,
        label="the last tokens, with so much context",
    )  # fmt: skip
    for n, ppl in points:
        axes.annotate(
            f"{ppl:.4g}", (math.log2(n), ppl), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    contexts = [p.context for p in report.perplexity.by_context]
    edges = (math.log2(contexts[0]) - 0.5, math.log2(contexts[-1]) + 0.5)
    axes.set_xlim(*edges)
    placed = [(math.log2(row.start * row.end) / 2, row.ppl) for row in report.perplexity.by_position]
    placed = [(x, ppl) for x, ppl in placed if edges[0] < x < edges[1]]
    if placed:
        axes.plot(
            [x for x, _ in placed], [ppl for _, ppl in placed], marker="s", markersize=4, color="#8a8a8a",
            linewidth=1, linestyle=":", label="every token, by its position",
        )  # fmt: skip
        axes.legend(fontsize=8, frameon=False, loc="lower left")
    axes.set_xticks([math.log2(n) for n in contexts], [format_count(n) for n in contexts])
    if drawn := [ppl for _, ppl in (*points, *placed)]:
        low, high = min(drawn), max(drawn)
        if high > 10 * low:
            axes.set_yscale("log")
            axes.set_ylim(low / 1.5, high * 2)
        else:
            axes.set_ylim(max(0.0, low - 0.35 * low), high + 0.25 * low)
    axes.set_xlabel("context length, tokens (targets included)")
    axes.set_ylabel("perplexity")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    _native_line(axes, report, math.log2(report.artifact.native_context), edges)
    note_below(
        figure, f"the same last {report.perplexity.targets} tokens of {report.perplexity.text.name} in every window"
    )
    _title(axes, f"Perplexity with growing context: {report.artifact.variant}")
    return png(figure)


def _edges(centres: list[float], alone: float) -> list[float]:
    """Cell borders: half-way between neighbours, as far outside at the ends; `alone` on both sides of a single one."""
    inner = [(a + b) / 2 for a, b in pairwise(centres)]
    if not inner:
        return [centres[0] - alone, centres[0] + alone]
    return [2 * centres[0] - inner[0], *inner, 2 * centres[-1] - inner[-1]]


def _rectangle(left: float, bottom: float, width: float, height: float, colour: Any, hatch: str | None) -> Rectangle:
    edge = "white" if hatch is None else "#bbbbbb"
    return Rectangle((left, bottom), width, height, facecolor=colour, edgecolor=edge, hatch=hatch, linewidth=1.5)


def _label(cell: NeedleCell) -> str:
    if cell.state == "measured":
        return f"{cell.strict}/{cell.n}"
    return "no memory" if cell.state == "out of memory" else "not run"


def _ink(cell: NeedleCell) -> str:
    extreme = cell.state == "measured" and abs(cell.strict / cell.n - 0.5) > 0.3
    return "white" if extreme else _INK


def _native_line(axes: Axes, report: Report, at: float, edges: tuple[float, float]) -> None:
    label = f"native window {format_count(report.artifact.native_context)}"
    if edges[0] < at < edges[1]:
        native_line(axes, at, edges)
        inside = "right" if at > sum(edges) / 2 else "left"
        axes.text(at, 1.01, label, transform=axes.get_xaxis_transform(), ha=inside, va="bottom", fontsize=8)
    else:
        side, align, arrow = (1.0, "right", f"{label} →") if at >= edges[1] else (0.0, "left", f"← {label}")
        axes.text(side, 1.0, arrow, transform=axes.transAxes, ha=align, va="bottom", fontsize=8, color=_INK)


def note_below(figure: Figure, note: str) -> None:
    """Small print in the lower left corner."""
    figure.text(0.01, 0.05 / figure.get_figheight(), note, fontsize=7.5, color="#555555")


def _title(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", pad=18)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def native_line(axes: Axes, at: float, edges: tuple[float, float]) -> None:
    """A dashed line at the native window, if it is inside the axes."""
    if edges[0] < at < edges[1]:
        axes.axvline(at, color=_INK, linestyle="--", linewidth=1.4)


def png(figure: Figure) -> bytes:
    """The finished picture, with room for a note below and a title above."""
    inch = 1 / figure.get_figheight()
    figure.tight_layout(rect=(0, 0.2 * inch, 1, 1 - 0.3 * inch if figure.legends else 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
