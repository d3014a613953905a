"""How far an unfinished `quantize` came, so that the same command goes on from there and ends with the same bytes.

A line of `RESUME` in the folder being written says what is made of what, and then one for each finished layer what the
report needs of it. A line is written only when the layer's tensors are on the disk, so a kill at any moment costs at
most one layer; a last line that was cut is ignored. What cannot be resumed is removed: a run that failed for a reason
that a repetition meets again, or before its first layer was finished.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lcconvert.convert.hashing import RESUME, hashed_files
from lcconvert.convert.writer import empty_folder
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.source import TensorSource

HOW_TO_RESUME = "repeat the same command to go on at the first layer that is not written"


class Journal:
    """The lines of `RESUME` in `folder`: `layers` has what was noted of each finished layer, in order.

    A folder without a readable first line is emptied. UserError: it holds an unfinished run with another `identity`.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self._path = folder / RESUME
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.is_file() else []
        if lines:
            self._check(folder, json.loads(lines[0]), json.loads(json.dumps(identity)))
            self.layers: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]
            os.truncate(self._path, sum(len(line) + 1 for line in lines))
        else:
            empty_folder(folder)
            self.layers = []
            self._append(dict(identity))

    def add(self, layer: dict[str, Any]) -> None:
        """Notes that a layer is on the disk, and what is known of it (JSON values)."""
        self._append(layer)
        self.layers.append(layer)

    def _append(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _check(self, folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for key, value in now.items():
            if then.get(key) != value:
                raise UserError(
                    f"{folder} holds an unfinished run with another {key} ({_short(then.get(key))}, now "
                    f"{_short(value)}); repeat the command that it was started with, or remove that folder to start "
                    "again"
                )


@contextmanager
def resumable(folder: Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """The journal of `folder`, which a UserError, a CheckFailed or a stop before the first layer is done empties."""
    journal = Journal(folder, identity)
    try:
        yield journal
    except BaseException as error:
        if not journal.layers or isinstance(error, (UserError, CheckFailed)):
            empty_folder(folder)
        raise


def source_identity(src: str, source: TensorSource) -> str:
    """SHA-256 in hex over what names the weights without reading them: the tensor table, config.json and files beside
    them, the times of local weight files, the commit of a Hub id."""
    digest = hashlib.sha256(source.name.encode())
    digest.update(json.dumps(source.config, sort_keys=True).encode())
    for name in source.names():
        digest.update(f"{name} {source.info(name)}\n".encode())
    for name, content in source.files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    path = Path(src).expanduser()
    for file in hashed_files(path) if path.is_dir() else [path] if path.is_file() else []:
        digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


def made_by() -> dict[str, str]:
    """Versions that decide what bytes come out."""
    return {name: version(name) for name in ("lcconvert", "torch")}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
