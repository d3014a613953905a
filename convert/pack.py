"""A folder as one text: every text file after a line with its path, in the order of the paths.

Git decides what is left out, by the .gitignore files of the folder and its own rules, from an empty repository made for
the purpose: no setting, hook or index of the folder's own repository is read or run. Files that are not UTF-8 text and
links are skipped and listed; of PDF files their text is taken. Left out: office files, and the pictures of a PDF.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lcconvert.convert.pdf import PDF_MAGIC, PdfUnread, pdf_text
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.packed import file_part


@dataclass(frozen=True)
class Pack:
    """`parts`: (path, text with its header) of every file, by path; `skipped`: (path, why)."""

    parts: list[tuple[str, str]]
    skipped: list[tuple[str, str]]

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.parts)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.parts]


def pack_folder(
    folder: Path, *, exclude: tuple[str, ...] = (), control_tokens: Iterable[str] = (), text_cache: Path | None = None
) -> Pack:
    """Reads `folder`. `exclude`: more patterns as in .gitignore; `control_tokens`: see `file_part`; `text_cache`: where
    the text of PDF files is kept. UserError when no text is found."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give --files the folder to ask about")
    parts, skipped = [], []
    for path in _listed(folder, exclude):
        text = _text(folder / path, text_cache)
        if isinstance(text, _Skip):
            skipped.append((path, text.why))
            continue
        parts.append((path, file_part(path, text, control_tokens)))
    if not parts:
        raise UserError(f"{folder} holds no text files that git would not ignore; give another folder")
    return Pack(parts, skipped)


@dataclass(frozen=True)
class _Skip:
    why: str


def _text(path: Path, text_cache: Path | None) -> str | _Skip:
    if path.is_symlink():
        return _Skip("a link")
    if path.is_dir():
        return _Skip("a repository of its own")
    try:
        data = path.read_bytes()
    except OSError as error:
        return _Skip(str(error.strerror))
    if data.startswith(PDF_MAGIC):
        try:
            return pdf_text(data, text_cache)
        except PdfUnread as error:
            return _Skip(str(error))
    if b"\0" in data:
        return _Skip("binary")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return _Skip("not UTF-8")


def _listed(folder: Path, exclude: tuple[str, ...]) -> list[str]:
    """Paths below `folder` that git would add, sorted."""
    with tempfile.TemporaryDirectory() as empty:
        git = ["git", f"--git-dir={empty}", f"--work-tree={folder.resolve()}"]
        patterns = [f"--exclude={pattern}" for pattern in exclude]
        listing = [*git, "ls-files", "-z", "--others", "--exclude-standard", *patterns]
        try:
            subprocess.run(["git", "init", "-q", "--bare", empty], check=True, capture_output=True)
            subprocess.run([*git, "config", "core.bare", "false"], check=True, capture_output=True)
            done = subprocess.run(listing, check=True, capture_output=True, cwd=folder)
        except FileNotFoundError:
            raise UserError("git is not installed and decides which files are ignored; install git") from None
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode("utf-8", "replace").strip()
            raise UserError(f"git cannot list {folder} ({reason}); check its permissions") from None
    names = (name.decode("utf-8", "replace") for name in done.stdout.split(b"\0") if name)
    return sorted(names)
