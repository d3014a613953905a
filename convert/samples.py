"""The log of finished measurements, `samples.jsonl`: one line each, on disk before the next one starts.

A line is found again by a hash of everything that decides its result, so a rerun measures only what is missing and a
changed setting is never mixed with old numbers. A run killed in the middle of a line loses that line only: the torn
tail is cut off when the log is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from lcconvert.runtime.errors import UserError

LOG = "samples.jsonl"


def sample_key(**parts: Any) -> str:
    """Twenty hex digits over the canonical JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class SampleLog:
    """Append-only; `get` finds a finished row by its key, `add` writes one and waits for the disk."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: dict[str, dict[str, Any]] = {}
        good = 0  # bytes of whole lines
        if path.exists():
            raw = path.read_bytes()
            for line in raw.splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    self._rows[row["key"]] = row
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{path} has a line that is not a sample (byte {good}); move the file away to start again"
                    ) from None
                good += len(line)
        self._file = path.open("ab")
        self._file.truncate(good)

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> dict[str, Any] | None:
        return self._rows.get(key)

    def add(self, key: str, row: dict[str, Any]) -> dict[str, Any]:
        row = {"key": key, **row}
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._rows[key] = row
        return row
