"""The record of a training: one JSON line per optimizer step, and a picture of it, both beside the weights.

A resumed run cuts the lines after its checkpoint off before it goes on, so the file is always one unbroken curve.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG = "loss.jsonl"
PLOT = "loss.png"


class TrainingLog:
    """Appends to `folder`/loss.jsonl, keeping only the first `steps` lines of what is there.

    Without `writes`, for all but one of several processes, it only remembers what is added.
    """

    def __init__(self, folder: Path, steps: int, writes: bool = True):
        self.path, self.writes = folder / LOG, writes
        kept = self.path.read_bytes().splitlines(keepends=True)[:steps] if writes and self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in kept]
        if not writes:
            return
        if kept:
            self.path.write_bytes(b"".join(kept))
        else:
            self.path.unlink(missing_ok=True)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        if not self.writes:
            return
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def plot(self) -> None:
        """Loss, learning rate and gradient norm over the steps, as loss.png beside the log."""
        if not self.writes:
            return
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained")
        FigureCanvasAgg(figure)
        steps = [row["step"] for row in self.rows]
        marker = "o" if len(steps) < 50 else ""
        names = {"loss": "loss (nats)", "grad_norm": "gradient norm", "lr": "learning rate"}
        axes = figure.subplots(len(names), 1, sharex=True, height_ratios=(3, 1, 1))
        for axis, (name, label) in zip(axes, names.items()):
            axis.plot(steps, [row[name] for row in self.rows], marker=marker, markersize=3, linewidth=1)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        for before, row in zip(self.rows, self.rows[1:]):  # where a stage with another length begins
            if before["stage"] != row["stage"]:
                for axis in axes:
                    axis.axvline(row["step"] - 0.5, color="gray", linewidth=0.8, linestyle="--")
        axes[0].set_title(f"{self.rows[-1]['tokens']:,} tokens in {len(steps)} steps")
        axes[-1].set_xlabel("optimizer step")
        figure.savefig(self.path.with_name(PLOT), dpi=110)
