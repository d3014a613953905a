"""The error of every linear layer as a table to read: a line for each decoder layer, a column for each of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def error_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` of quantization.json as lines of percent of the output's energy; of experts, the worst of a layer.

    The last lines name the worst layer and how the weights were made.
    """
    cells: dict[int, dict[str, float]] = {}
    for row in rows:
        _, _, number, *_, part = row["name"].split(".")
        line = cells.setdefault(int(number), {})
        column = part.removesuffix("_proj")
        line[column] = max(line.get(column, 0.0), row["output_error"])
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = ["output error in %".ljust(18) + "".join(column.rjust(9) for column in columns)]
    for number, line in cells.items():
        shown = (f"{100 * line[column]:.3f}" if column in line else "-" for column in columns)
        lines.append(f"layer {number}".ljust(18) + "".join(text.rjust(9) for text in shown))
    if rows:
        worst = max(rows, key=lambda row: row["output_error"])
        lines.append(f"worst: {worst['name']} {100 * worst['output_error']:.3f} %")
        made = Counter(row["method"] for row in rows)
        lines.append("made by: " + ", ".join(f"{method} ({count})" for method, count in made.items()))
    return "\n".join(lines)
