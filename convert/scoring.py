"""What counts as a right answer. Two rules side by side, because each alone misleads.

`contains` is RULER's `all` rule: the share of the references that occur anywhere in the answer, lower-cased; `part` is
its rule for questions with several wordings of one answer. They are comparable with published tables, but a model that
lists every number it saw scores. `strict` looks at the first k
candidates only (k = number of references) and compares whole words, so listing and running digits together do not
score. The outcome names why an answer failed, since an answer cut by the output cap is not a wrong answer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["correct", "wrong", "empty", "hit_cap", "error"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "empty", "hit_cap", "error")

Kind = Literal["number", "uuid", "variable", "pair", "coded", "path", "name"]
# What a candidate is, by the kind of answer: whole words only, so that running answers together does not score.
_KINDS: dict[Kind, re.Pattern[str]] = {
    "number": re.compile(r"(?<!\w)\d+(?!\w)"),
    "uuid": re.compile(r"(?<![\w-])[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}(?![\w-])"),
    "variable": re.compile(r"(?<!\w)[A-Z]{5}(?!\w)"),
    "pair": re.compile(r"(?<![\w-])[A-Za-z]+(?:-[A-Za-z]+)+(?![\w-])"),
    "coded": re.compile(r"(?<!\w)[a-z]{6}(?!\w)"),
    "path": re.compile(r"(?<![\w./-])[\w./-]*\w\.py(?!\w)"),
    "name": re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?!\w)"),
}
_SAID = frozenset({"and", "or", "the", "function", "functions", "method", "methods"})  # around names, not names
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Verdict:
    contains: float  # share of the references found anywhere in the answer: RULER's `all`
    part: float  # 1 when any of them is: RULER's `part`
    strict: bool  # every reference is among the first k candidates
    outcome: Outcome  # by the strict rule


def candidates(answer: str, *, finished: bool, kind: Kind = "number") -> list[str]:
    """The whole items of `answer` in order; one that touches the end counts only if the answer is `finished`."""
    found = [m for m in _KINDS[kind].finditer(answer) if finished or m.end() < len(answer)]
    return [m[0] for m in found if kind != "name" or m[0].lower() not in _SAID]


def score(answer: str, references: list[str], *, finish: Literal["stop", "length"], kind: Kind = "number") -> Verdict:
    """Scores one answer; `finish` is "length" when the output cap cut it off.

    outcome: `correct` by the strict rule; `empty` without visible text; `hit_cap` when the cap came before k candidates
    were out; else `wrong`.
    """
    clean = _CONTROL.sub("\n", answer)
    text = clean.lower()
    wanted = [reference.lower() for reference in references]
    found = [item.lower() for item in candidates(clean, finished=True, kind=kind)[: len(wanted)]]
    strict = set(wanted) <= set(found)
    share = [reference in text for reference in wanted]
    outcome: Outcome
    if strict:
        outcome = "correct"
    elif not text.strip():
        outcome = "empty"
    elif finish == "length" and len(candidates(clean, finished=False, kind=kind)) < len(wanted):
        outcome = "hit_cap"
    else:
        outcome = "wrong"
    return Verdict(sum(share) / len(wanted), float(any(share)), strict, outcome)


def decided(answer: str, references: list[str], kind: Kind = "number") -> bool:
    """True when no further token can change the verdict of `score`: every reference is found and k candidates are out.

    Decoding may stop here; a wrong answer is never decided early, because the `contains` rule still gives it a chance.
    """
    text = answer.lower()
    complete = len(candidates(answer, finished=False, kind=kind)) >= len(references)
    return complete and all(reference.lower() in text for reference in references)


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% Wilson score interval of a proportion, (0, 1) when nothing was asked (E. B. Wilson, 1927)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
