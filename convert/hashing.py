"""One number for "these very weights": a validation report names it, and push refuses a report that names another.

Only config.json and the weight files count. Cards, plots and the sidecar (which validation itself updates) may change
without making the measurements stale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from lcconvert.runtime.errors import UserError

WEIGHT_PATTERNS = ("*.safetensors", "*.onnx", "*.onnx.data", "*.gguf")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes in hex, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    return digest.hexdigest()


def hashed_files(folder: Path) -> Iterator[Path]:
    """The files that decide what the model computes, sorted by name: config.json and the weights at the top level."""
    found = {path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)}
    if (config := folder / "config.json").is_file():
        found.add(config)
    return iter(sorted(found, key=lambda path: path.name))


def artifact_hash(folder: Path) -> str:
    """SHA-256 in hex over the sorted (name, size, SHA-256) lines of `hashed_files`; UserError when there are none."""
    lines = [f"{path.name} {path.stat().st_size} {file_hash(path)}\n" for path in hashed_files(folder)]
    if not lines:
        raise UserError(f"{folder} holds no config.json and no weights to hash; give an artifact folder")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
