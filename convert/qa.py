"""Questions over documents of the user's own: a JSON Lines file of {"question", "answers", "text"}.

The text that holds the answer stands among those of the other lines, as in RULER's two question answering tasks, which
need downloaded sets; when they are used up, pieces of the haystack are the documents between. `answers` are wordings of
one answer: RULER's `part` rule asks for any of them anywhere, `strict` for the first line to be one of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lcconvert.convert.tasks import Ask, Case, Draft, Task
from lcconvert.runtime.errors import UserError

_HEAD = "Some documents follow. A question about one of them comes after the last one.\n\n"
_QUESTION = "\n\nAnswer from the documents above, in as few words as you can: {question}"
_PREFIX = "Answer:"
_PIECE = 12  # sentences of the haystack that make a document


@dataclass(frozen=True)
class Item:
    question: str
    answers: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class QaFile:
    name: str
    sha256: str
    items: tuple[Item, ...] = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> QaFile:
        """UserError names the line that is not a question with an answer that its text holds."""
        try:
            raw = path.read_bytes()
            lines = raw.decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"questions {path} cannot be read ({error}); give a JSON Lines file in UTF-8") from None
        items = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                item = Item(str(row["question"]), tuple(map(str, row["answers"])), " ".join(str(row["text"]).split()))
            except (ValueError, KeyError, TypeError):
                form = '{"question": "...", "answers": ["..."], "text": "..."}'
                raise UserError(f"{path}, line {number}, is not {form}; correct it") from None
            if not any(answer and answer.lower() in item.text.lower() for answer in item.answers):
                raise UserError(f"{path}, line {number}: the text holds none of the answers; correct one of them")
            items.append(item)
        if not items:
            raise UserError(f"{path} holds no question; give one a line")
        return cls(path.name, hashlib.sha256(raw).hexdigest(), tuple(items))


def _qa(case: Case) -> Callable[[int], Draft]:
    if not isinstance(case.source, QaFile):
        raise UserError("qa asks the questions of a file; give --qa-file FILE.jsonl")
    items = case.source.items
    item = items[(case.sample + case.seed) % len(items)]
    place = case.rng().random()
    # documents that hold the answer, too, would give it away at another place
    texts = [other.text for other in items if other != item and not _holds(other.text, item.answers)]
    case.rng("order").shuffle(texts)
    size = len(case.sentences)

    def document(i: int) -> str:
        if i < len(texts):
            return texts[i]
        start = case.start + (i - len(texts)) * _PIECE
        return " ".join(case.sentences[(start + j) % size] for j in range(_PIECE))

    ask = Ask(_QUESTION.format(question=item.question), _PREFIX, item.answers)

    def draft(n: int) -> Draft:
        at = round(place * n)
        between = [document(i) for i in range(n)]
        units = [f"Document {i}: {text}\n\n" for i, text in enumerate([*between[:at], item.text, *between[at:]], 1)]
        read = max(n - len(texts), 0) * _PIECE
        return Draft(_HEAD, units, ask, depths=(at / max(n, 1),), repetition=max(1.0, read / size))

    return draft


def _holds(text: str, answers: tuple[str, ...]) -> bool:
    return any(answer.lower() in text.lower() for answer in answers)


QA = {"qa": Task(_qa, "text", 32, metric="part")}
