"""Progress of long steps, on stderr: a bar with rate and time left on a terminal, sparse plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_PLAIN_EVERY = 10.0  # seconds between lines when stderr is not a terminal


class Progress(Protocol):
    def advance(self, n: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


class _Plain:
    def __init__(self, label: str, total: int, unit: str):
        self.label, self.total, self.unit = label, total, unit
        self.done, self.text, self.start, self.spoke = 0, "", time.monotonic(), time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n
        if self.done < self.total and time.monotonic() - self.spoke >= _PLAIN_EVERY:
            self.speak()

    def note(self, text: str) -> None:
        self.text = text

    def speak(self) -> None:
        self.spoke = now = time.monotonic()
        spent = now - self.start
        left = spent / self.done * (self.total - self.done) if self.done else 0.0
        tail = f", {left:.0f} s left" if self.done < self.total else f" in {spent:.1f} s"
        note = f"  {self.text}" if self.text else ""
        print(f"{self.label}: {self.done}/{self.total} {self.unit}{tail}{note}", file=sys.stderr, flush=True)


class _Silent:
    def advance(self, n: int = 1) -> None: ...

    def note(self, text: str) -> None: ...


class _Bar:
    def __init__(self, bar: object, task: object):
        self.bar, self.task = bar, task

    def advance(self, n: int = 1) -> None:
        self.bar.advance(self.task, n)  # type: ignore[attr-defined]

    def note(self, text: str) -> None:
        self.bar.update(self.task, note=text)  # type: ignore[attr-defined]


def say(text: str) -> None:
    """One line about what runs now."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, total: int, unit: str = "", shown: bool = True) -> Iterator[Progress]:
    """Shows `total` steps of `unit` under `label` until the block ends; nothing where it is not `shown`."""
    if not shown:
        yield _Silent()
        return
    if not sys.stderr.isatty():
        plain = _Plain(label, total, unit)
        yield plain
        plain.speak()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Rich

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Rich(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar, bar.add_task(label, total=total, note=""))
