"""Training text as one long row of tokens: documents in a seeded order, each followed by the end token.

Only as much text is read and tokenized as the plan will use, one document at a time, so pointing at a huge folder costs
nothing extra; what stays in memory is four bytes a token. Every window is a pure function of (files, seed, offset): a
resumed run sees the very tokens that it would have seen.

Surprising rules: documents are tokenized in paragraph-sized pieces, and the starts of the pieces are remembered as
`borders`; positions may jump and facts may be planted only there. A document that shares a paragraph with held-out text
is left out, because a model that has read its examination proves nothing.
"""

from __future__ import annotations

import hashlib
import random
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lcconvert.convert.documents import Document, Reader
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

LONG_CHARS = 16_384  # what `upsample_long` takes for a long document
_PIECE_CHARS = 400  # shorter paragraphs are joined up to this
_LONGEST_PIECE = 1600  # longer ones are cut where a line, else a sentence, else a word ends
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_TELLING_CHARS = 120  # shorter paragraphs (headings, licence lines) may stand in two texts by chance


@dataclass(frozen=True)
class Corpus:
    """tokens int32 [N], a ring; borders: sorted offsets of the pieces in it, the first is 0.

    starts and places: offset and origin (file, and line where it has lines) of every document. held_out: documents left
    out because they share a paragraph with held-out text; skipped: what was unreadable and passed over, by place.
    """

    tokens: np.ndarray
    borders: np.ndarray
    starts: tuple[int, ...]
    places: tuple[str, ...]
    held_out: int
    skipped: tuple[str, ...]

    @classmethod
    def read(
        cls,
        data: Sequence[str],
        tokenizer: Tokenizer,
        *,
        need: int,
        seed: int,
        upsample_long: float = 1.0,
        skip_bad: bool = False,
        held_out: Sequence[str] = (),
    ) -> Corpus:
        """Tokenizes documents of `data`, files in an order drawn from `seed`, until `need` tokens are read.

        upsample_long: documents of LONG_CHARS and more are met this many times as often as the shorter ones of the same
        entry of `data` (the others are thinned out); every entry keeps its share, by bytes, of the whole (Data
        Engineering for Scaling Language Models to 128K Context, arXiv 2402.10171). held_out: texts that may not be
        trained on. UserError for what cannot be read, with its place, unless `skip_bad`.
        """
        if not tokenizer.eos_ids:
            raise UserError("the tokenizer has no end token to put between documents; add eos_token_id to config.json")
        reader = Reader(skip_bad)
        forbidden = {mark for text in held_out for mark in _paragraph_marks(text)}
        tokens, borders, left_out = array("i"), array("q"), 0
        starts: list[int] = []
        places: list[str] = []
        for document in _mixed(reader, data, seed, upsample_long):
            if forbidden and not forbidden.isdisjoint(_paragraph_marks(document.text)):
                left_out += 1
                continue
            starts.append(len(tokens))
            places.append(document.place)
            for ids in tokenizer.encode_each(split_pieces(document.text)):
                if ids:
                    borders.append(len(tokens))
                    tokens.extend(ids)
            tokens.append(tokenizer.eos_ids[0])
            if len(tokens) >= need:
                break
        if not tokens:
            why = f", {left_out} documents of it are held-out text" if left_out else ""
            raise UserError(
                f"data {', '.join(data)} holds no text to train on{why}; name text files or folders of them"
            )
        return cls(
            np.frombuffer(tokens, dtype=np.int32),
            np.frombuffer(borders, dtype=np.int64),
            tuple(starts),
            tuple(places),
            left_out,
            tuple(reader.skipped),
        )

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

    def origins(self, start: int, length: int) -> list[str]:
        """The places that the tokens of `window(start, length)` come from, in order, each once."""
        size = len(self.tokens)
        start %= size
        found: dict[str, None] = {}
        while length > 0 and len(found) < len(self.places):
            document = bisect_right(self.starts, start) - 1
            found[self.places[document]] = None
            end = self.starts[document + 1] if document + 1 < len(self.starts) else size
            length -= end - start
            start = end % size
        return list(found)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


def _mixed(reader: Reader, data: Sequence[str], seed: int, upsample_long: float) -> Iterator[Document]:
    """Documents of all entries, each entry at its share by bytes: the one furthest behind is read next."""
    rng = random.Random(seed)
    files = [reader.files(entry) for entry in data]
    weights = [max(1, sum(path.stat().st_size for path in paths)) for paths in files]
    for paths in files:
        rng.shuffle(paths)
    sources = {i: reader.documents(paths) for i, paths in enumerate(files)}
    taken = [0] * len(files)  # characters
    thin = random.Random(f"thin/{seed}")
    while sources:
        i = min(sources, key=lambda i: taken[i] / weights[i])
        document = next(sources[i], None)
        if document is None:
            del sources[i]
        elif len(document.text) >= LONG_CHARS or thin.random() * upsample_long < 1.0:
            taken[i] += len(document.text)
            yield document


def _paragraph_marks(text: str) -> Iterator[bytes]:
    """A hash of every paragraph long enough to tell a text by, whatever its line breaks and letter case."""
    for paragraph in _PARAGRAPH.split(text):
        words = " ".join(paragraph.split()).lower()
        if len(words) >= _TELLING_CHARS:
            yield hashlib.blake2b(words.encode(), digest_size=12).digest()


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
