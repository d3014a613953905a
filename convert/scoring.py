"""What counts as a right answer. Two rules side by side, because each alone misleads.

The score follows the task's metric. "all" and "part" are RULER's: the share of the references that occur anywhere in
the answer, lower-cased, and whether any does, for several wordings of one answer. They are comparable with published
tables, but a model that lists every number it saw scores. "f1" compares the sets of what is listed and what was asked,
"ratio" the likeness of two lines, "coded" the same with nothing for an answer that does not begin with the code.
`strict` looks at the first k candidates only (k = number of references, 1 for "part", "ratio" and "coded") and compares
whole words, so listing and running digits together do not score. The outcome names why an answer failed, since an
answer cut by the output cap is not a wrong answer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

Outcome = Literal["correct", "wrong", "empty", "hit_cap", "error"]
OUTCOMES: tuple[Outcome, ...] = ("correct", "wrong", "empty", "hit_cap", "error")

Metric = Literal["all", "part", "f1", "ratio", "coded"]
Kind = Literal["number", "uuid", "variable", "pair", "coded", "node", "person", "path", "name", "text"]
# What a candidate is, by the kind of answer: whole words only, so that running answers together does not score.
_KINDS: dict[Kind, re.Pattern[str]] = {
    "number": re.compile(r"(?<!\w)\d+(?!\w)"),
    "uuid": re.compile(r"(?<![\w-])[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}(?![\w-])"),
    "variable": re.compile(r"(?<!\w)[A-Z]{5}(?!\w)"),
    "pair": re.compile(r"(?<![\w-])[A-Za-z]+(?:-[A-Za-z]+)+(?![\w-])"),
    "coded": re.compile(r"(?<!\w)[a-z]{6}(?!\w)"),
    "node": re.compile(r"(?<!\w)[0-9a-f]{8}(?!\w)"),
    "person": re.compile(r"(?<!\w)[A-Z][a-z]+(?!\w)"),
    "path": re.compile(r"(?<![\w./-])[\w./-]*\w\.py(?!\w)"),
    "name": re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*(?!\w)"),
    "text": re.compile(r"(?m)^.*\S.*$"),
}
# around names, not names
_SAID = frozenset({"and", "or", "the", "function", "functions", "method", "methods", "person", "it", "she", "he"})
_CONTROL = re.compile(r"[\x00-\x1f]")


@dataclass(frozen=True)
class Verdict:
    score: float  # by the metric
    strict: bool  # every reference is among the first k candidates
    outcome: Outcome  # by the strict rule


def candidates(answer: str, *, finished: bool, kind: Kind = "number") -> list[str]:
    """The whole items of `answer` in order; one that touches the end counts only if the answer is `finished`."""
    found = [m for m in _KINDS[kind].finditer(answer) if finished or m.end() < len(answer)]
    if kind == "text":  # lines, without what an answer is wrapped in
        return [" ".join(m[0].split()).strip("\"'*` .") for m in found]
    return [m[0] for m in found if kind not in ("name", "person") or m[0].lower() not in _SAID]


def score(
    answer: str,
    references: list[str],
    *,
    finish: Literal["stop", "length"],
    kind: Kind = "number",
    metric: Metric = "all",
) -> Verdict:
    """Scores one answer; `finish` is "length" when the output cap cut it off.

    outcome: `correct` by the strict rule; `empty` without visible text; `hit_cap` when the cap came before k candidates
    were out; else `wrong`.
    """
    clean = _CONTROL.sub("\n", answer)
    text = clean.lower()
    wanted = [reference.lower() for reference in references]
    listed = [item.lower() for item in candidates(clean, finished=True, kind=kind)]
    share = [reference in text for reference in wanted]
    least = len(wanted)  # candidates that an answer must have
    if kind == "text":
        wanted = [" ".join(reference.split()).strip("\"'*` .") for reference in wanted]
    if metric in ("part", "ratio", "coded"):
        least, strict = 1, bool(listed) and listed[0] in wanted
    else:
        strict = set(wanted) <= set(listed[: len(wanted)])
    points = sum(share) / len(share)
    if metric == "part":
        points = float(any(share))
    elif metric == "f1":
        points = 2 * len(set(wanted) & set(listed)) / (len(set(wanted)) + len(set(listed)))
    elif metric in ("ratio", "coded"):
        given = listed[0] if listed else ""
        begun = metric == "ratio" or given.split(" ", 1)[0] == wanted[0].split(" ", 1)[0]
        points = SequenceMatcher(None, given, wanted[0], autojunk=False).ratio() if begun else 0.0
    outcome: Outcome
    if strict:
        outcome = "correct"
    elif not text.strip():
        outcome = "empty"
    elif finish == "length" and len(candidates(clean, finished=False, kind=kind)) < least:
        outcome = "hit_cap"
    else:
        outcome = "wrong"
    return Verdict(points, strict, outcome)


def decided(answer: str, references: list[str], kind: Kind = "number") -> bool:
    """True when no further token can change the verdict of `score`: every reference is found and k candidates are out.

    Decoding may stop here; a wrong answer is never decided early, because RULER's rules still give it a chance, nor is
    a list of nodes, because of which too many cost points.
    """
    if kind == "node":
        return False
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
