"""report.json, and what is made from it: pictures and one HTML page that needs no network and no script.

The page shows nothing that is not in report.json, so `render` can redo it at any time from that file.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lcconvert.convert.claim import replace_file
from lcconvert.convert.curves import costs_png, has_costs, has_scores, scores_png
from lcconvert.convert.plots import needles_png, perplexity_png
from lcconvert.convert.results import REPORT, Report
from lcconvert.runtime.units import format_bytes, format_count

HTML = "report.html"
NEEDLES_PNG = "needles.png"
PERPLEXITY_PNG = "perplexity.png"
SCORES_PNG = "scores.png"
COSTS_PNG = "costs.png"
PAGE_FILES = (REPORT, HTML, NEEDLES_PNG, PERPLEXITY_PNG, SCORES_PNG, COSTS_PNG)


def write_report(report: Report, out: Path) -> None:
    """Writes the JSON first, then what is made from it; each file is replaced in one step."""
    replace_file(out / REPORT, report.model_dump_json(indent=2).encode() + b"\n")
    for name, content in render(report).items():
        replace_file(out / name, content)


def render(report: Report) -> dict[str, bytes]:
    """The pictures and the page by file name; a section that was not measured has no picture."""
    files: dict[str, bytes] = {}
    if report.needles:
        files[NEEDLES_PNG] = needles_png(report)
    if report.perplexity is not None:
        files[PERPLEXITY_PNG] = perplexity_png(report)
    if has_scores(report):
        files[SCORES_PNG] = scores_png(report)
    if has_costs(report):
        files[COSTS_PNG] = costs_png(report)
    pictures = {name: base64.b64encode(content).decode() for name, content in files.items()}
    files[HTML] = _environment().get_template("report.html").render(report=report, pictures=pictures).encode()
    return files


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "tokens": format_count,
        "size": lambda value: "–" if value is None else format_bytes(value),
        "percent": _percent,
        "number": _number,
        "signed": lambda value: "–" if value is None else f"{value:+.1%}",
    }
    return environment


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
