"""Giving back exactly what stands in the text: one passage of many, or one of several answers to the same request.

`copy`: numbered passages of two words in a random pattern; one is to be copied (repeated words are where long-context
copies go wrong). `mrcr`: a conversation in which the same request comes up four times among others and got another
answer each time; the second, say, is to be repeated after a random code, as in OpenAI's MRCR: without the code the
score is 0. Both are scored by the likeness of the first line to the planted one (difflib's ratio), strict by equality.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

from lcconvert.convert.ruler import grow
from lcconvert.convert.tasks import Ask, Case, Draft, Task
from lcconvert.convert.words import key_names

_COPY_HEAD = "The following passages consist of a few words each. One of them is to be copied afterwards.\n\n"
_COPY_QUESTION = "\n\nCopy passage {number} word for word."
_COPY_PREFIX = "Passage {number}:"
_COPIED = 16  # words of a passage

_MRCR_HEAD = "The following is a conversation. Something that was written in it is to be repeated afterwards.\n\n"
_MRCR_QUESTION = (
    "\n\nWrite {code} and after it, on the same line, the {which} {form} about the {theme} in the conversation above. "
    "Write nothing else."
)
_FORMS = ("verse", "riddle", "diary entry", "toast", "weather report", "advertisement")
_WHICH = ("first", "second", "third", "fourth")
_LINES = (
    "Past the {a} {b} we wandered till the {c} turned {d}.",
    "No {a} {b} has ever kept a {d} {c} waiting.",
    "Give me one {a} {b} and I shall name the {d} {c}.",
    "It was {a}, this {b}, and the {c} stayed {d}.",
)


def _copy(case: Case) -> Callable[[int], Draft]:
    rng, rest = case.rng(), case.rng("rest")
    place = rng.random()
    planted, number = _pattern(rng), rng.randint(1000, 9999)
    ask = Ask(_COPY_QUESTION.format(number=number), _COPY_PREFIX.format(number=number), (planted,))
    others: list[str] = []
    numbers = [n for n in range(1000, 10_000) if n != number]
    rest.shuffle(numbers)

    def draft(n: int) -> Draft:
        # past 9,000 passages the numbers get a letter, so that none comes twice
        grow(others, n + 1, lambda: f"Passage {_numbered(numbers, len(others))}: {_pattern(rest)}\n")
        at = round(place * (n + 1))
        units = [*others[:at], f"Passage {number}: {planted}\n", *others[at : n + 1]]
        return Draft(_COPY_HEAD, units, ask, depths=(at / (n + 1),))

    return draft


def _numbered(numbers: list[int], i: int) -> str:
    turn, place = divmod(i, len(numbers))
    return f"{numbers[place]}{string.ascii_uppercase[turn - 1] if turn else ''}"


def _pattern(rng: random.Random) -> str:
    common, odd = rng.choice(key_names("valid")).split()
    words = [common] * _COPIED
    for i in rng.sample(range(_COPIED), 3):
        words[i] = odd
    return " ".join(words)


def _mrcr(case: Case) -> Callable[[int], Draft]:
    rng, rest = case.rng(), case.rng("rest")
    themes = list(key_names("valid"))
    rng.shuffle(themes)
    form, theme, nth = rng.choice(_FORMS), themes.pop(), rng.randrange(len(_WHICH))
    code = "".join(rng.choices(string.ascii_letters + string.digits, k=8))
    texts = [_text(rng) for _ in _WHICH]
    places = sorted(rng.random() for _ in _WHICH)
    question = _MRCR_QUESTION.format(code=code, which=_WHICH[nth], form=form, theme=theme)
    ask = Ask(question, "", (f"{code} {texts[nth]}",))
    others: list[str] = []

    def other() -> str:
        return _turn(rest.choice(_FORMS), themes[rest.randrange(len(themes))], _text(rest))

    def draft(n: int) -> Draft:
        grow(others, n + 1, other)
        turns = [((i + 0.5) / (n + 1), turn) for i, turn in enumerate(others[: n + 1])]
        turns += [(place, _turn(form, theme, text)) for place, text in zip(places, texts)]
        return Draft(_MRCR_HEAD, [turn for _, turn in sorted(turns)], ask, depths=(places[nth],))

    return draft


def _turn(form: str, theme: str, text: str) -> str:
    return f"A: Write a {form} about the {theme}.\nB: {text}\n"


def _text(rng: random.Random) -> str:
    """Two sentences on one line."""
    lines = rng.sample(_LINES, 2)
    filled = []
    for line in lines:
        (a, b), (d, c) = (rng.choice(key_names("valid")).split() for _ in range(2))
        filled.append(line.format(a=a, b=b, c=c, d=d))
    return " ".join(filled)


REPEATS = {"copy": Task(_copy, "text", 64, metric="ratio"), "mrcr": Task(_mrcr, "text", 112, metric="coded")}
