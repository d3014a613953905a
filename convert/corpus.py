"""Training text as one long row of tokens: documents in a seeded order, each followed by the end token.

Only as much text is read and tokenized as the plan will use, so pointing at a huge folder costs nothing extra. Every
window is a pure function of (files, seed, offset): a resumed run sees the very tokens that it would have seen.

Surprising rule: documents are tokenized in paragraph-sized pieces, and the starts of the pieces are remembered as
`borders`; positions may jump and facts may be planted only there. Texts are never mixed up inside a piece.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

_MODULE = "module:"
_PIECE_CHARS = 400  # shorter paragraphs are joined up to this
_LONGEST_PIECE = 1600  # longer ones are cut where a line, else a sentence, else a word ends
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")


@dataclass(frozen=True)
class Corpus:
    """tokens int32 [N], a ring; borders: sorted offsets of the pieces in it, the first is 0."""

    tokens: np.ndarray
    borders: np.ndarray

    @classmethod
    def read(cls, data: Sequence[str], tokenizer: Tokenizer, *, need: int, seed: int) -> Corpus:
        """Tokenizes documents of `data`, files in an order drawn from `seed`, until `need` tokens are read."""
        if not tokenizer.eos_ids:
            raise UserError("the tokenizer has no end token to put between documents; add eos_token_id to config.json")
        pieces: list[list[int]] = []
        total = 0
        for text in _documents(_files(data, seed)):
            for piece in split_pieces(text):
                pieces.append(tokenizer.encode(piece))
                total += len(pieces[-1])
            pieces[-1].append(tokenizer.eos_ids[0])
            total += 1
            if total >= need:
                break
        pieces = [piece for piece in pieces if piece]
        if not pieces:
            raise UserError(f"data {', '.join(data)} holds no text to train on; name text files or folders of them")
        lengths = np.array([len(piece) for piece in pieces])
        tokens = np.fromiter((token for piece in pieces for token in piece), dtype=np.int32, count=int(lengths.sum()))
        return cls(tokens, np.concatenate([[0], lengths.cumsum()[:-1]]))

    def window(self, start: int, length: int) -> tuple[list[int], list[int]]:
        """`length` tokens from offset `start` (both modulo N) and the borders inside the window, relative to it."""
        size = len(self.tokens)
        start %= size
        ids = np.take(self.tokens, range(start, start + length), mode="wrap")
        borders: list[int] = []
        for lap in range(0, start + length, size):
            inside = self.borders[(self.borders + lap >= start) & (self.borders + lap < start + length)]
            borders += (inside + lap - start).tolist()
        return ids.tolist(), borders

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


def split_pieces(text: str) -> list[str]:
    """Consecutive slices of `text` that join to it again, about a paragraph each, cut at blank lines; at least one."""
    pieces, start = [], 0
    for cut in [*(match.end() for match in _PARAGRAPH.finditer(text)), len(text)]:
        if cut - start < _PIECE_CHARS and cut != len(text):
            continue
        while cut - start > _LONGEST_PIECE:
            end = _soft_end(text, start + _PIECE_CHARS, start + _LONGEST_PIECE)
            pieces.append(text[start:end])
            start = end
        pieces.append(text[start:cut])
        start = cut
    return pieces


def _soft_end(text: str, low: int, high: int) -> int:
    """The last good place to cut in text[low:high]; a space opens the next piece, as tokenizers have it."""
    for mark, kept in (("\n", 1), (". ", 1), (" ", 0)):
        if (found := text.rfind(mark, low, high)) >= 0:
            return found + kept
    return high


def _files(data: Sequence[str], seed: int) -> list[Path]:
    files: list[Path] = []
    for entry in data:
        path = _module_path(entry) if entry.startswith(_MODULE) else Path(entry).expanduser()
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
            files += sorted(found)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"data {entry} does not exist; give a text file, a folder or module:NAME")
    random.Random(seed).shuffle(files)
    return files


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


def _documents(files: Sequence[Path]) -> Iterator[str]:
    """The texts of `files` in order. Files that are not text are passed over, as folders hold pictures and archives."""
    for path in files:
        kind = Path(path.name.removesuffix(".gz")).suffix
        if kind == ".parquet":
            yield from _parquet(path)
            continue
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError) as error:
            raise UserError(f"data file {path} cannot be read ({error}); fetch it again or leave it out") from None
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if kind in (".jsonl", ".ndjson"):
            yield from _json_lines(path, text)
        elif text.strip() and "\0" not in text:
            yield text


def _json_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            document = None
        if not isinstance(document, str):
            raise UserError(f'{path} line {number} is not a JSON object with a "text" string; fix or remove the line')
        if document.strip():
            yield document


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise UserError(f"data file {path} needs pyarrow to be read; run `pip install pyarrow`") from None
    try:
        table = parquet.ParquetFile(path)
        for batch in table.iter_batches(columns=["text"]):
            yield from (document for document in batch.column(0).to_pylist() if document and document.strip())
    except (ArrowInvalid, OSError, IndexError) as error:
        raise UserError(f'data file {path} has no readable "text" column ({error}); name another file') from None
