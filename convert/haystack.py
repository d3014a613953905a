"""The text that needles hide in and perplexity is measured on, cut once into sentences with known token counts.

The bundled text is the Jargon File 4.4.7, which is in the public domain (it says so itself on its first page). Needles
read the second half and wrap around; perplexity reads from a fixed place in the first half, so that the two do not
overlap until a haystack is longer than half the text. Needle text is whitespace-normalized into " Sentence." pieces,
because every BPE and SentencePiece vocabulary puts a token boundary before such a space; perplexity text is left as it
is. Nothing is repeated silently: a haystack longer than the text carries its repetition factor.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

BUNDLED = Path(__file__).parent / "haystack.txt.gz"
_SUFFIXES = (".txt", ".md", ".rst", ".gz")
_SENTENCE_END = re.compile(r"""(?<=[.!?])\s+|(?<=[.!?][”’"')\]])\s+|\n\s*\n\s*""")
_LONGEST = 600  # characters of one piece; longer runs (tables, code) are cut at a space


@dataclass(frozen=True)
class Haystack:
    """One long text. `name` is what reports call it, `sha256` that of its UTF-8 bytes."""

    name: str
    text: str = field(repr=False)

    @classmethod
    def load(cls, path: Path | None = None) -> Haystack:
        """The bundled text, a .txt/.md/.rst file (also .gz), or every such file of a folder in name order."""
        if path is None:
            return cls("Jargon File 4.4.7", _read(BUNDLED))
        if path.is_dir():
            parts = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _SUFFIXES)
            if not parts:
                raise UserError(f"haystack {path} holds no {', '.join(_SUFFIXES)} file; give a folder of text")
            return cls(path.name, "\n\n".join(_read(part) for part in parts))
        if not path.is_file():
            raise UserError(f"haystack {path} does not exist; give a text file or a folder of text files")
        return cls(path.name, _read(path))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def sentences(self) -> list[str]:
        """Pieces of the whole text in order, each single-spaced and without outer spaces."""
        pieces = []
        for piece in _SENTENCE_END.split(self.text):
            words = " ".join(piece.split())
            while len(words) > _LONGEST:
                cut = words.rfind(" ", 0, _LONGEST)
                cut = cut if cut > 0 else _LONGEST
                pieces.append(words[:cut])
                words = words[cut:].lstrip()
            if any(c.isalpha() for c in words):  # rules and boxes of tables carry nothing
                pieces.append(words)
        return pieces

    def excerpt(self, tokenizer: Tokenizer, tokens: int, what: str) -> list[int]:
        """The first `tokens` ids of the perplexity region, unnormalized; UserError when the text is too short.

        The region starts at character 300,000, or a fifth of the way in when the text is shorter than 1.5 million
        characters: past front matter, before the half that needles start in.
        """
        start = min(300_000, len(self.text) // 5)
        if start:
            start = self.text.find("\n", start) + 1 or start
        ids: list[int] = []
        size = tokens * 8  # characters; English is about 4 a token
        while True:
            ids = tokenizer.encode(self.text[start : start + size])
            # the last token of a cut text may differ from that of the whole text
            if len(ids) > tokens + 8 or (start + size >= len(self.text) and len(ids) >= tokens):
                return ids[:tokens]
            if start + size >= len(self.text):
                raise UserError(
                    f"{what} asks for {tokens} tokens but {self.name} holds {len(ids)} after its first fifth; "
                    "give a longer --haystack or a shorter context"
                )
            size *= 2


class SentenceBank:
    """The sentences of a haystack with the token count of " sentence", counted once, when first needed."""

    def __init__(self, haystack: Haystack, tokenizer: Tokenizer):
        self.sentences = haystack.sentences
        if not self.sentences:
            raise UserError(f"haystack {haystack.name} holds no sentence; give a text file with prose in it")
        self._tokenizer = tokenizer
        self._counts: dict[int, int] = {}

    def count(self, i: int) -> int:
        if i not in self._counts:
            self._counts[i] = len(self._tokenizer.encode(" " + self.sentences[i]))
        return self._counts[i]

    def start_of(self, sample: int, samples: int) -> int:
        """Where sample i of n starts reading: evenly spread over the second half."""
        half = len(self.sentences) // 2
        return half + (len(self.sentences) - half) * sample // max(samples, 1) % len(self.sentences)

    def take(self, start: int, budget: int) -> tuple[list[int], float]:
        """Indices of consecutive sentences from `start` (wrapping) that fit `budget` tokens, and the repetition factor.

        The factor is 1.0 while no sentence is used twice, else tokens taken over tokens in the text.
        """
        taken: list[int] = []
        used = 0
        i = start
        while used + (count := self.count(i)) <= budget:
            taken.append(i)
            used += count
            i = (i + 1) % len(self.sentences)
        n = len(self.sentences)
        return taken, max(1.0, len(taken) / n)


def _read(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise UserError(f"haystack {path} cannot be read as UTF-8 text ({error}); give another file") from None
