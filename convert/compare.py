"""Checkpoints side by side, from their reports alone: what was gained and what it cost.

Rows are plain values (None: not measured); `render_table` is the terminal view. The source comes first by the caller's
order, and nothing is marked as better: a smaller file that finds fewer needles is for the reader to judge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lcconvert.convert.results import NeedleLength, Report, TaskCell
from lcconvert.runtime.units import format_bytes, format_count

_WINDOW = 2048  # tokens of the perplexity column
_COST = ("length", "prefill_seconds", "decode_tokens_per_second", "peak_bytes")


def comparison_table(reports: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per labelled report (a dict of the schema results.Report), in the given order.

    Keys: checkpoint, perplexity_2k (plain, one forward), found and asked (strict, all lengths, first wording),
    by_length (a list of {length, found, asked}), cost (a list of {length, prefill_seconds, decode_tokens_per_second,
    peak_bytes}), validated (tokens), bytes_on_disk, kv_bytes_per_token (formula).
    """
    return [_row(label, Report.model_validate(report)) for label, report in reports.items()]


def _row(label: str, report: Report) -> dict[str, Any]:
    plain = report.perplexity.plain if report.perplexity else None
    measured = [row for row in report.needles[0].by_length if row.n] if report.needles else []
    return {
        "checkpoint": label,
        "perplexity_2k": plain.ppl if plain and plain.context == _WINDOW else None,
        "found": sum(row.strict for row in measured) if measured else None,
        "asked": sum(row.n for row in measured),
        "by_length": [{"length": row.length, "found": row.strict, "asked": row.n} for row in measured],
        "cost": [{key: getattr(row, key) for key in _COST} for row in report.cost if row.state == "measured"],
        "validated": report.claim.validated,
        "bytes_on_disk": report.artifact.bytes,
        "kv_bytes_per_token": report.kv_bytes_per_token,
    }


def render_table(rows: list[dict[str, Any]]) -> str:
    """Aligned plain text, a line per checkpoint; needle columns are the union of the lengths."""
    needles = [{at["length"]: f"{at['found']}/{at['asked']}" for at in row["by_length"]} for row in rows]
    lengths = sorted(set().union(*needles))
    head = ["checkpoint", "perplexity 2K", *(f"needles {format_count(n)}" for n in lengths)]
    head += ["validated to", "size on disk", "KV bytes/token"]
    lines = [head]
    for row, found in zip(rows, needles):
        ppl, validated = row["perplexity_2k"], row["validated"]
        lines.append(
            [
                row["checkpoint"],
                "-" if ppl is None else f"{ppl:.2f}" if ppl < 1e5 else f"{ppl:.2e}",
                *(found.get(n, "-") for n in lengths),
                "-" if validated is None else format_count(validated),
                format_bytes(row["bytes_on_disk"]),
                f"{row['kv_bytes_per_token']:,.0f}",
            ]
        )
    return _aligned(lines)


def render_costs(rows: list[dict[str, Any]]) -> str:
    """Aligned plain text, a line per checkpoint and length: what a context of that length cost."""
    lines = [["checkpoint", "context", "prefill s", "decode tokens/s", "peak memory"]]
    for row in rows:
        for cost in row["cost"]:
            lines.append(
                [
                    row["checkpoint"],
                    format_count(cost["length"]),
                    "-" if cost["prefill_seconds"] is None else f"{cost['prefill_seconds']:.2f}",
                    "-" if cost["decode_tokens_per_second"] is None else f"{cost['decode_tokens_per_second']:.1f}",
                    "-" if cost["peak_bytes"] is None else format_bytes(cost["peak_bytes"]),
                ]
            )
    return _aligned(lines)


def render_claim(report: dict[str, Any]) -> str:
    """A line that sets what needles show against what perplexity alone would say."""
    claim = Report.model_validate(report).claim

    def said(length: int | None) -> str:
        return format_count(length) if length else "no length"

    return f"validated by needles: {said(claim.validated)}; by perplexity alone: {said(claim.by_perplexity)}"


def left_out(report: dict[str, Any]) -> list[str]:
    """What was asked for and not measured, with the reason: one item for each kind of question."""
    whole = Report.model_validate(report)
    gaps: dict[tuple[str, str], list[str]] = {}
    rows: list[tuple[str, NeedleLength | TaskCell]]
    rows = [(f"needles ({needles.wording})", row) for needles in whole.needles for row in needles.by_length]
    rows += [(cell.task, cell) for cell in whole.tasks.cells] if whole.tasks else []
    for name, row in rows:
        if row.state != "measured":
            gaps.setdefault((name, row.state), []).append(format_count(row.length))
    return [f"{name} at {', '.join(lengths)} ({state})" for (name, state), lengths in gaps.items()]


def render_needles(report: dict[str, Any]) -> str:
    """Aligned plain text, a line per wording: found of asked with the 95% interval at every length."""
    sections = Report.model_validate(report).needles
    lines = [["needles", *(f"at {format_count(row.length)}" for row in sections[0].by_length)]]
    for needles in sections:
        found = (
            f"{row.strict}/{row.n} ({row.low:.0%}-{row.high:.0%})" if row.n else row.state for row in needles.by_length
        )
        lines.append([needles.wording, *found])
    return _aligned(lines)


def render_tasks(report: dict[str, Any]) -> str:
    """Aligned plain text, a line per task: right by the strict rule of asked, and the mean score, at every length."""
    tasks = Report.model_validate(report).tasks
    assert tasks is not None
    lengths = sorted({cell.length for cell in tasks.cells})
    lines = [["task", *(f"at {format_count(n)}" for n in lengths), f"keeps {tasks.keep:.0%} to"]]
    for name, kept in tasks.effective.items():
        cells = {cell.length: cell for cell in tasks.cells if cell.task == name}
        lines.append([name, *(_score(cells[n]) for n in lengths), format_count(kept) if kept else "-"])
    return _aligned(lines) + "\n(strict right/asked, 95% interval; mean score)"


def _score(cell: TaskCell) -> str:
    if cell.score is None:
        return cell.state
    return f"{cell.strict}/{cell.n} ({cell.low:.0%}-{cell.high:.0%}); {cell.score:.0%}"


def _aligned(lines: list[list[str]]) -> str:
    """Columns under the first line as their head; the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def draw(line: list[str]) -> str:
        first, rest = line[0].ljust(widths[0]), (text.rjust(width) for text, width in zip(line[1:], widths[1:]))
        return "  ".join((first, *rest)).rstrip()

    return "\n".join([draw(lines[0]), "  ".join("-" * width for width in widths), *map(draw, lines[1:])])
