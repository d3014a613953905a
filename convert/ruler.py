"""The eleven synthetic tasks of RULER (arXiv 2404.06654), by its names and parameters, in our own words.

Kept: the kinds of haystack, key and value, how many of each, where they lie (40 depths from 0 to 1), the variable chain
and its worked example, the repetitions of common words, the zeta law of coded words, the output budget, the beginning
of the answer in the prompt, the metric. Different: the sentences are ours; keys come from the validation half of
`words`; the essays are the user's haystack and do not repeat inside a sample while it is long enough; the words of
`cwe` are hyphenated pairs, because single words would run out, and its worked example is short. RULER's two question
answering tasks need downloaded texts and are left out.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, TypeVar

from lcconvert.convert.tasks import Ask, Case, Draft, Task

T = TypeVar("T")
_DEPTHS = tuple(i / 39 for i in range(40))
_ABSENT = 24  # candidates for the question that has no answer in the text
_NOISE = (
    "The tea is warm.", "The path is narrow.", "The lamp is on.", "The boat comes in.", "Out and home again.",
)  # fmt: skip

_HEAD = (
    "Some secret {values} are written down among the sentences of the following text. Learn them well: afterwards you "
    "will be asked for {some}.\n\n"
)
_FACT = " One of the secret {values} of {key} is: {value}."
_ONE = "\n\nWhat is the secret {value} of {keys} that the text above gives?"
_MANY = "\n\nWhat are all the secret {values} of {keys} that the text above gives?"
_ONE_PREFIX = "The secret {value} of {keys} that the text gives is"
_MANY_PREFIX = "The secret {values} of {keys} that the text gives are"

_VT_HEAD = (
    "Follow the chains of variable assignments that are hidden in the following text, and note every variable that "
    "ends up with the value asked for.\n\n"
)
_VT_QUESTION = "\n\nQuestion: which variables have the value {value} in the text above, directly or through another?"
_VT_PREFIX = "Answer: by the assignments in the text above, {count} variables have the value {value}, namely:"
_HOPS = 4

_CWE_HEAD = (
    "The following is a numbered list of words. Some of them are on it many times, the others only a few times. "
    "Remember those that come up most often.\n\n"
)
_CWE_QUESTION = "\n\nQuestion: which {count} words are most frequent in the list above?"
_CWE_PREFIX = "Answer: the {count} words that are most frequent in the list are:"
_COMMON = 10
_SMALL = 4096  # below this length common words come 6 times and the others once, else 30 times and 3 times

_FWE_HEAD = (
    "The following text is in a code whose words are not known. Keep count of how often each coded word comes up. "
    "Dots are not words.\n\n"
)
_FWE_QUESTION = "\n\nQuestion: not counting the dots, which three coded words are most frequent in the text above?"
_FWE_PREFIX = "Answer: the three most frequent words of the coded text are:"
_FWE_LEAST = 100  # words; with fewer the first ranks of the zeta law do not differ
_ZETA_2 = 1.6449340668482264  # sum of 1/k^2


def grow(items: list[T], n: int, new: Callable[[], T]) -> None:
    """Adds to `items` until there are n; what was there stays, so every draft begins like a longer one."""
    while len(items) < n:
        items.append(new())


def new_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _niah(
    haystack: Literal["noise", "text", "needles"], *, keys: int = 1, values: int = 1, queries: int = 1, uuids: str = ""
) -> Callable[[Case], Callable[[int], Draft]]:
    """`uuids` names what is a uuid instead of a word and a 7-digit number: "", "value" or "key value"."""
    kinds = ("uuid", "uuids") if "value" in uuids else ("number", "numbers")
    new_value = new_uuid if "value" in uuids else _number

    def ask(names: list[str], answers: tuple[str, ...]) -> Ask:
        many = len(answers) > 1
        words = {"value": kinds[0], "values": kinds[1], "keys": _join(names)}
        question, prefix = (_MANY, _MANY_PREFIX) if many else (_ONE, _ONE_PREFIX)
        return Ask(question.format(**words), prefix.format(**words), answers)

    def prepare(case: Case) -> Callable[[int], Draft]:
        rng, names, rest = case.rng(), case.names(), case.rng("distractors")
        new_key = (lambda: new_uuid(rng)) if "key" in uuids else (lambda: next(names))
        named = [new_key() for _ in range(max(keys, queries))]
        planted = [(key, new_value(rng)) for key in named for _ in range(values)]
        asked = named[:queries]
        answers = tuple(value for key, value in planted if key in asked)
        absent = tuple(
            ask([new_key() for _ in range(queries)], tuple(new_value(rng) for _ in answers)) for _ in range(_ABSENT)
        )
        places = rng.sample(_DEPTHS, len(planted))
        facts = [
            (place, _FACT.format(values=kinds[1], key=key, value=value)) for place, (key, value) in zip(places, planted)
        ]
        depths = tuple(place for place, (key, _) in zip(places, planted) if key in asked)
        head = _HEAD.format(values=kinds[1], some="one of them" if queries * values == 1 else "some of them")
        distractors: list[str] = []
        other_key = (lambda: new_uuid(rest)) if "key" in uuids else (lambda: next(names))

        def draft(n: int) -> Draft:
            if haystack != "needles":
                body, spare, repetition = text_units(case, n, noise=haystack == "noise")
            else:
                grow(
                    distractors,
                    n + 1,
                    lambda: _FACT.format(values=kinds[1], key=other_key(), value=new_value(rest)),
                )
                body, spare, repetition = distractors[: n + 1], "", 1.0
            return Draft(head, plant(body, facts), ask(asked, answers), absent, depths, spare, repetition)

        return draft

    return prepare


def _join(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def text_units(case: Case, n: int, *, noise: bool) -> tuple[list[str], str, float]:
    """n sentences of noise or haystack, the one after them, and how often the haystack was read."""
    source = _NOISE if noise else case.sentences
    start = 0 if noise else case.start
    size = len(source)
    sentences = [f" {source[(start + i) % size]}" for i in range(n)]
    # noise repeats by definition; its factor would say nothing
    return sentences, source[(start + n) % size], 1.0 if noise else max(1.0, n / size)


def plant(body: list[str], facts: list[tuple[float, str]]) -> list[str]:
    """Puts each fact before the unit at its share of `body`; equal shares keep their order."""
    units: list[str] = []
    done = 0
    for place, fact in sorted(facts, key=lambda item: item[0]):
        at = round(place * len(body))
        units += [*body[done:at], fact]
        done = at
    return units + body[done:]


def _chain(rng: random.Random, hops: int, value: str) -> tuple[list[str], list[str]]:
    """Variable names of a chain and the assignments that make it, in order."""
    names: list[str] = []
    grow(names, hops + 1, lambda: "".join(rng.choices(string.ascii_uppercase, k=5)))
    lines = [f" VAR {names[0]} = {value}."]
    lines += [f" VAR {name} = VAR {before}." for before, name in pairwise(names)]
    return names, lines


def _vt(case: Case) -> Callable[[int], Draft]:
    rng = case.rng()
    shown_value, value, *unplanted = (str(rng.randint(10_000, 99_999)) for _ in range(_ABSENT))
    shown, shown_lines = _chain(rng, _HOPS, shown_value)
    names, lines = _chain(rng, _HOPS, value)
    places = sorted(rng.sample(_DEPTHS, len(lines)))
    count = len(names)

    def ask(value: str, answers: tuple[str, ...]) -> Ask:
        return Ask(_VT_QUESTION.format(value=value), _VT_PREFIX.format(value=value, count=count), answers)

    example = ask(shown_value, ())
    text = plant(text_units(case, 10, noise=True)[0], [(i / len(lines), line) for i, line in enumerate(shown_lines)])
    head = _VT_HEAD + "".join(text).lstrip() + f"{example.question}\n\n{example.prefix} {', '.join(shown)}.\n\n\n"
    head += _VT_HEAD
    absent = tuple(ask(other, tuple(names)) for other in unplanted if other not in (value, shown_value))

    def draft(n: int) -> Draft:
        body, spare, _ = text_units(case, n, noise=True)
        return Draft(
            head, plant(body, list(zip(places, lines))), ask(value, tuple(names)), absent, tuple(places), spare
        )

    return draft


def _listed(words: list[str]) -> list[str]:
    """Units of a numbered list; number and word apart, because each then is tokenized once."""
    return [unit for i, word in enumerate(words, 1) for unit in (f" {i}.", f" {word}")]


def _cwe(case: Case) -> Callable[[int], Draft]:
    names = case.names()
    often, seldom = (6, 1) if case.length < _SMALL else (30, 3)
    shown, rare, common = ([next(names) for _ in range(_COMMON)] for _ in range(3))
    example = [*shown * 3, *rare]
    case.rng("example").shuffle(example)
    question, prefix = _CWE_QUESTION.format(count=_COMMON), _CWE_PREFIX.format(count=_COMMON)
    head = (
        _CWE_HEAD + "".join(_listed(example)).lstrip() + f"{question}\n\n{prefix} {_numbered(shown)}\n\n\n{_CWE_HEAD}"
    )
    others: list[str] = []

    def draft(n: int) -> Draft:
        grow(others, n + 1, lambda: next(names))
        words = common * often + others[: n + 1] * seldom
        case.rng("order").shuffle(words)
        return Draft(head, _listed(words), Ask(question, prefix, tuple(common)))

    return draft


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))


def _fwe(case: Case) -> Callable[[int], Draft]:
    rng = case.rng()
    words: dict[str, None] = {}
    while len(words) < max(case.length // 50, 8):
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    ranked = ["...", *list(words)[1:]]

    def draft(n: int) -> Draft:
        total = _FWE_LEAST + n
        coded: list[str] = []
        for rank, word in enumerate(ranked, 1):
            times = int(total / (rank * rank * _ZETA_2))
            if not times:
                break
            coded += [f" {word}"] * times
        case.rng("order").shuffle(coded)
        return Draft(_FWE_HEAD, coded, Ask(_FWE_QUESTION, _FWE_PREFIX, tuple(ranked[1:4])))

    return draft


RULER = {
    "niah_single_1": Task(_niah("noise"), "number", 128),
    "niah_single_2": Task(_niah("text"), "number", 128),
    "niah_single_3": Task(_niah("text", uuids="value"), "uuid", 128),
    "niah_multikey_1": Task(_niah("text", keys=4), "number", 128),
    "niah_multikey_2": Task(_niah("needles"), "number", 128),
    "niah_multikey_3": Task(_niah("needles", uuids="key value"), "uuid", 128),
    "niah_multivalue": Task(_niah("text", values=4), "number", 128),
    "niah_multiquery": Task(_niah("text", keys=4, queries=4), "number", 128),
    "vt": Task(_vt, "variable", 30),
    "cwe": Task(_cwe, "pair", 120),
    "fwe": Task(_fwe, "coded", 50),
}
