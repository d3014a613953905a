"""Writes a checkpoint folder so that it either exists whole under its name or not at all.

Everything goes into `NAME.partial` beside the target and is renamed when the block ends; a failed or stopped command
removes it, or keeps it where the command can resume, and says which. The file `RESUME` in it, which may tell how far a
command came, goes last, so that a kill at any moment can be resumed. `verify_folder` re-reads what was written, and a
folder with a sidecar ends with the hashes of its files in it.
The surprising rule: a write error that means "disk full" reaches us in many spellings (OSError, Rust, torch's zip
writer, numpy without errno), so it is recognised here once and becomes one sentence.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lcconvert.convert.hashing import RESUME, record_files
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError
from lcconvert.runtime.model import is_finite
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.units import format_bytes

_FULL_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXT = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\d+ requested and \d+ written"
    r"|PytorchStreamWriter failed writing|inline_container\.cc.* unexpected pos"
)


@contextmanager
def new_folder(out: Path, *, keep_on_stop: str | None = None, need_bytes: int = 0) -> Iterator[Path]:
    """Yields `out.partial` to write into and renames it to `out` when the block completes.

    `keep_on_stop`: the sentence that tells how to resume; the partial folder then survives a stop or failure and is
    reused by the next call. `need_bytes`: refuse before writing when the disk has less. UserError when `out` is taken,
    when another command is writing it or when the disk fills; Interrupted, naming the state left, on Ctrl-C.
    """
    partial = partial_folder(out)
    _refuse_taken(out)
    try:
        created = _make_parents(out.parent)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be created ({error.strerror}); choose another output folder") from None
    lock = _lock(partial)
    try:
        if keep_on_stop is None:
            empty_folder(partial)
        held = sum(path.lstat().st_blocks * 512 for path in partial.rglob("*"))  # by an attempt that is resumed
        if (free := shutil.disk_usage(partial).free + held) < need_bytes:
            raise UserError(
                f"{out.parent} has {format_bytes(free)} free, {format_bytes(need_bytes)} are needed; "
                "free some space or choose another output folder"
            )
        yield partial
        record_files(partial)
        _flush(partial)
        partial.rename(out)
        (out / RESUME).unlink(missing_ok=True)
    except BaseException as error:
        left = _leave(partial, created, keep_on_stop)
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Interrupted):
            raise Interrupted(f"stopped; {left}") from None
        if _disk_full(error):
            raise UserError(f"the disk is full while writing {out}; free some space and repeat; {left}") from error
        raise
    finally:
        os.close(lock)


def partial_folder(out: Path) -> Path:
    """Where `out` is written until it is complete."""
    return out.parent / (out.name + ".partial")


def _refuse_taken(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise UserError(f"output folder {out} is not empty; choose another or remove it")
    elif out.exists():
        raise UserError(f"output {out} is an existing file, expected a new folder; choose another name")


def _make_parents(parent: Path) -> list[Path]:
    """Creates what is missing above the output; returns it innermost first, to be taken back on failure."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
    return missing


def _lock(folder: Path) -> int:
    """An exclusive lock on the folder itself, held until the returned handle is closed; no lock file is left behind."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise UserError(f"another command is writing {folder}; wait for it or choose another output folder") from None
    return handle


def empty_folder(folder: Path) -> None:
    """Removes everything in `folder`."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _leave(partial: Path, created: list[Path], keep_on_stop: str | None) -> str:
    """Removes the partial folder, or keeps it where there is something to resume; returns the clause that says so."""
    if keep_on_stop is not None and partial.is_dir() and any(partial.iterdir()):
        return f"{partial} is kept: {keep_on_stop}"
    shutil.rmtree(partial, ignore_errors=True)
    for folder in created:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return "nothing was left behind"


def _flush(folder: Path) -> None:
    """Forces the files to disk, so that the rename can never be seen without them."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _disk_full(error: BaseException | None) -> bool:
    if isinstance(error, (UserError, CheckFailed)) or not isinstance(error, Exception):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL_ERRNO
    return bool(_FULL_TEXT.search(str(error)))


def write_files(folder: Path, config: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Writes config.json and the auxiliary files, byte for byte."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, content in files.items():
        if Path(name).name != name:
            raise ValueError(f"auxiliary file {name!r} is not a plain file name")
        (folder / name).write_bytes(content)


def verify_folder(folder: Path, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> FolderSource:
    """Re-reads a written folder and accounts for every tensor: present, none extra, dtype, shape, all values finite.

    Raises CheckFailed naming the tensor or file that differs.
    """
    try:
        source = FolderSource(folder)
        present = set(source.names())
        if missing := sorted(set(expected) - present):
            raise CheckFailed(
                f"{folder} lacks tensor {missing[0]} ({len(missing)} missing); the write went wrong, repeat it"
            )
        if extra := sorted(present - set(expected)):
            raise CheckFailed(
                f"{folder} holds tensor {extra[0]}, which was not to be written; the write went wrong, repeat it"
            )
        for name, (dtype, shape) in expected.items():
            if (found := source.info(name)) != (dtype, tuple(shape)):
                raise CheckFailed(
                    f"tensor {name} of {folder} is {_form(*found)}, expected {_form(dtype, tuple(shape))}"
                )
            if not is_finite(source.tensor(name)):
                raise CheckFailed(
                    f"tensor {name} of {folder} holds values that are not finite; the conversion is wrong"
                )
    except UserError as error:
        raise CheckFailed(f"what was written cannot be read back: {error}") from None
    _check_total(folder, source)
    return source


def _check_total(folder: Path, source: FolderSource) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        stated = json.loads(index.read_text())["metadata"]["total_size"]
        total = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in map(source.info, source.names()))
        if stated != total:
            raise CheckFailed(f"{index} states {stated} bytes of tensors, the shards hold {total}; write them again")


def _form(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
