"""The documents behind a corpus: text and source files, JSONL and Parquet, any of them as .gz, one document at a time.

JSONL is read line by line and Parquet batch by batch, so a file may be larger than memory; only a text file is one
document. Files that are no text at all (pictures, archives) are passed over, as folders hold them.

Surprising rule: what claims to be text and cannot be read is an error that names file and line, unless `skip_bad` was
asked for; then it is left out and listed.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path

from lcconvert.runtime.errors import UserError

_MODULE = "module:"


@dataclass(frozen=True)
class Document:
    """`place` is the file, and the line or row in it where a file holds several documents."""

    text: str
    place: str


@dataclass
class Reader:
    """skip_bad: unreadable files and lines are noted in `skipped` ("PLACE: why") instead of raised as UserError."""

    skip_bad: bool = False
    skipped: list[str] = field(default_factory=list)

    def files(self, entry: str) -> list[Path]:
        """The files of a file, a folder (hidden ones left out) or `module:NAME`, sorted."""
        path = _module_path(entry) if entry.startswith(_MODULE) else Path(entry).expanduser()
        if path.is_dir():
            return sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        if path.is_file():
            return [path]
        raise UserError(f"data {entry} does not exist; give a text file, a folder or module:NAME")

    def documents(self, files: Sequence[Path]) -> Iterator[Document]:
        """The non-empty texts of `files` in order."""
        for path in files:
            kind = Path(path.name.removesuffix(".gz")).suffix
            try:
                if kind == ".parquet":
                    yield from _parquet(path)
                elif kind in (".jsonl", ".ndjson"):
                    yield from self._json_lines(path)
                else:
                    yield from _text(path)
            except (OSError, EOFError, zlib.error) as error:
                self._bad(str(path), f"cannot be read ({error})", "fetch it again or leave it out")

    def _json_lines(self, path: Path) -> Iterator[Document]:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):  # ValueError: neither JSON nor UTF-8
                    text = None
                place = f"{path} line {number}"
                if not isinstance(text, str):
                    self._bad(place, 'is not a JSON object with a "text" string', "fix or remove the line")
                elif text.strip():
                    yield Document(text, place)

    def _bad(self, place: str, why: str, remedy: str) -> None:
        if not self.skip_bad:
            raise UserError(f"data {place} {why}; {remedy}, or pass over what is unreadable with --skip-bad")
        self.skipped.append(f"{place}: {why}")


def _open(path: Path) -> BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _text(path: Path) -> Iterator[Document]:
    with _open(path) as file:
        try:
            text = file.read().decode("utf-8")
        except UnicodeDecodeError:
            return
    if text.strip() and "\0" not in text:
        yield Document(text, str(path))


def _parquet(path: Path) -> Iterator[Document]:
    """OSError (pyarrow's errors are turned into it) when the file is damaged or has no "text" column."""
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise UserError(f"data file {path} needs pyarrow to be read; run `pip install pyarrow`") from None
    row = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                row += 1
                if text and text.strip():
                    yield Document(text, f"{path} row {row}")
    except (ArrowInvalid, IndexError) as error:
        raise OSError(f'no readable "text" column: {error}') from None


def _module_path(entry: str) -> Path:
    name = entry.removeprefix(_MODULE)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise UserError(f"data {entry}: no Python module {name!r} with source text is installed; check its name")
    path = Path(spec.origin)
    return path.parent if path.name == "__init__.py" else path


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
