"""Hashes of an artifact's files: what a conversion wrote, and one number for "these very weights".

lcconvert.json records the SHA-256 of every file of the conversion (`record_files`), so a copy, a download or a folder
that is about to be published can be checked against it (`verify_files`). What comes later is not covered: the card, a
licence text put beside it, `validation/`. A validation report names the weights it was measured on by `artifact_hash`.

Surprising rule: lcconvert.json is covered too, less the validated context, which `validate` writes into it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.sidecar import NAME as SIDECAR
from lcconvert.runtime.sidecar import Sidecar

WEIGHT_PATTERNS = ("*.safetensors", "*.onnx", "*.onnx.data", "*.gguf")
# what comes after a conversion and is never recorded (.cache and .gitattributes are the Hub's); what may come then
RESUME = ".resume.jsonl"  # in the folder of an unfinished command: how far it came
_LATER = re.compile(r"README\.md|\.gitattributes|\.resume\.jsonl|(validation|\.eval_results|\.cache)/.*", re.DOTALL)
_MAY_BE_ADDED = re.compile(r"(LICENSE|NOTICE)(\.txt|\.md)?")


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


def record_files(folder: Path) -> None:
    """Writes the hashes of all files of `folder` into its lcconvert.json, if it has one."""
    path = folder / SIDECAR
    if not path.is_file():
        return
    sidecar = Sidecar.parse(path.read_bytes(), str(folder)).model_copy(update={"files": {}})
    path.write_bytes(sidecar.to_bytes())
    found = {name: _hash(folder, name) for name in _names(folder)}
    path.write_bytes(sidecar.model_copy(update={"files": found}).to_bytes())


def verify_files(folder: Path) -> dict[str, str]:
    """Hashes every file again and returns the hashes by path. CheckFailed names all that are missing, changed or extra;
    UserError: `folder` is no artifact, or one of before hashes were recorded."""
    try:
        raw = (folder / SIDECAR).read_bytes()
    except OSError:
        raise UserError(
            f"{folder} has no {SIDECAR}, so it is not an artifact; give the output of a conversion"
        ) from None
    recorded = Sidecar.parse(raw, str(folder)).files
    if not recorded:
        raise UserError(
            f"{folder}/{SIDECAR} records no hashes of files, so nothing can be verified; convert the checkpoint again"
        )
    found = {name: _hash(folder, name) for name in _names(folder)}
    differences = {
        "changed": [name for name in recorded if name in found and found[name] != recorded[name]],
        "missing": [name for name in recorded if name not in found],
        "extra": [name for name in found if name not in recorded and not _MAY_BE_ADDED.fullmatch(name)],
    }
    if any(differences.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names)
        raise CheckFailed(
            f"{folder} is not what its conversion wrote ({listed}); convert it again, or fetch those files again"
        )
    return {name: found[name] for name in recorded}


def _names(folder: Path) -> list[str]:
    """The files in `folder` that a conversion may have written, by path in it, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if not _LATER.fullmatch(name))


def _hash(folder: Path, name: str) -> str:
    if name != SIDECAR:
        return file_hash(folder / name)
    fixed = json.loads((folder / name).read_bytes())
    del fixed["files"]
    fixed["context"].pop("validated", None)
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def hashed_files(folder: Path) -> Iterator[Path]:
    """The files that decide what the model computes, sorted by name: config.json and the weights at the top level."""
    found = {path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)}
    if (config := folder / "config.json").is_file():
        found.add(config)
    return iter(sorted(found, key=lambda path: path.name))


def artifact_hash(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """SHA-256 in hex over the sorted (name, size, SHA-256) lines of `hashed_files`; UserError when there are none.

    `known`: hashes of files that need not be read again, by name.
    """
    known = known or {}
    lines = [
        f"{path.name} {path.stat().st_size} {known.get(path.name) or file_hash(path)}\n"
        for path in hashed_files(folder)
    ]
    if not lines:
        raise UserError(f"{folder} holds no config.json and no weights to hash; give an artifact folder")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
