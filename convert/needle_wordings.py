"""What is planted and what is asked, in three wordings that must not be confused with each other.

"heldout": sentences, keys and kinds of fact that no training here uses; the one that a claim rests on. "multikey": the
same sentences, but each asked fact has four others beside it that are about the same kind of thing and share a word of
its key, so that finding something similar is not enough. "training": the sentences of convert/retrieval.py with keys of
the validation half, which tells what was learnt from what carries over.
Held-out and multi-key facts go into one haystack; the training ones get their own, since the first words of the prompt
belong to a wording too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lcconvert.convert.prompt_parts import Ending
from lcconvert.convert.retrieval import lone_facts, lone_intro
from lcconvert.convert.validate_config import Wording
from lcconvert.convert.words import key_names
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

# Version of the texts below; part of every sample's key. Change it with them.
VERSION = "facts-4"
_INTRO = (
    "The text below hides the numbers of some things among other sentences. "
    "Read all of it and remember them, because you will be asked about one of them afterwards.\n\n"
)
_NEEDLE = "The {subject} is {value}."
_QUESTION = "\n\nWhat is the {subject}?"
_PREFIX = "The {subject} is"
# What a number can be; held-out needles that share a haystack differ in this too, so that each question is about
# finding one fact and not about telling near-duplicates apart.
_KINDS = (
    "access code", "price", "phone number", "password", "ticket number", "room number", "population", "serial number",
    "licence plate", "postcode", "budget", "mileage", "insurance value", "area", "altitude", "balance",
    "flight number", "bank account", "voltage", "tax code", "weight", "capacity", "turnover", "debt", "case number",
    "wavelength", "rent", "rainfall", "humidity", "depth",
)  # fmt: skip
_TRIED = 1500  # names looked at for subjects of equal token count
NEAR = 4  # distractors beside an asked fact of "multikey"


@dataclass(frozen=True)
class Needle:
    """A fact to plant. `depth` is where it should lie: 0 right after the instruction, 1 right before the question."""

    fact: str
    value: str
    depth: float


@dataclass(frozen=True)
class Question:
    """`depth` is None for what is not in the text."""

    wording: Wording
    ending: Ending
    value: str
    depth: float | None


@dataclass(frozen=True)
class Puzzle:
    """The needles of one haystack and what is asked about them."""

    intro: str
    needles: tuple[Needle, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class _Part:
    """One asked needle: it and the distractors it cannot do without, its question, and after the first one a control"""

    needles: tuple[Needle, ...]
    questions: tuple[Question, ...]


def make_puzzles(
    tokenizer: Tokenizer, wordings: Sequence[Wording], depths: tuple[float, ...], seed: str, *, shared: bool
) -> list[Puzzle]:
    """One needle per depth and wording, and one question per wording about what is not planted.

    `shared`: all depths in one haystack; else one haystack per asked needle (with its distractors).
    """
    own, near, train = [], [], []
    if "heldout" in wordings:
        own = _heldout(tokenizer, depths, random.Random(seed))
    if "multikey" in wordings:
        near = _multikey(depths, random.Random(f"{seed}/multikey"), {word for part in own for word in _words(part)})
    if "training" in wordings:
        train = _training(tokenizer, depths, random.Random(f"{seed}/training"))
    intro = lone_intro(random.Random(f"{seed}/intro"))
    found = []
    for opening, parts in ((_INTRO, [*own, *near]), (intro, train)):
        for together in [parts] if shared else [[part] for part in parts]:
            if together:
                needles = dict.fromkeys(needle for part in together for needle in part.needles)
                questions = tuple(question for part in together for question in part.questions)
                found.append(Puzzle(opening, tuple(needles), questions))
    return found


def _words(part: _Part) -> set[str]:
    return {word for needle in part.needles for word in needle.fact.rstrip(".").split()}


def _asking(subject: str) -> Ending:
    return Ending(_QUESTION.format(subject=subject), _PREFIX.format(subject=subject))


def _values(rng: random.Random, count: int) -> list[str]:
    """Distinct 7-digit numbers."""
    return [str(value) for value in rng.sample(range(1_000_000, 10_000_000), count)]


def _heldout(tokenizer: Tokenizer, depths: tuple[float, ...], rng: random.Random) -> list[_Part]:
    """No two names share a word. All subjects cost the same number of tokens, so all questions have one length."""
    count = len(depths) + 1
    kinds = [_KINDS[i % len(_KINDS)] for i in range(count)]
    rng.shuffle(kinds)
    names = list(key_names("valid"))
    rng.shuffle(names)
    *subjects, absent = _equal_cost(tokenizer, kinds, names)
    *values, unplanted = _values(rng, count)
    parts = []
    for i, (subject, value, depth) in enumerate(zip(subjects, values, depths)):
        asked = (Question("heldout", _asking(subject), value, depth),)
        control = (Question("heldout", _asking(absent), unplanted, None),) if i == 0 else ()
        parts.append(_Part((Needle(_NEEDLE.format(subject=subject, value=value), value, depth),), asked + control))
    return parts


def _equal_cost(tokenizer: Tokenizer, kinds: list[str], names: list[str]) -> list[str]:
    """A subject "kind of the name" for each kind, all of one token count, the smallest that works for all.

    Where none does, as with a vocabulary of bytes, their counts differ as little as the names allow.
    """
    names = names[:_TRIED]
    costs = {(kind, name): len(tokenizer.encode(f" {kind} of the {name}")) for kind in kinds for name in names}
    best, least = list[str](), math.inf
    for cost in sorted(set(costs.values())):
        subjects, words, off = [], set[str](), 0
        for kind in kinds:
            free = [name for name in names if not words & set(name.split())]
            if not free:
                raise UserError(f"{len(kinds) - 1} depths need as many names that share no word; ask for fewer depths")
            chosen = min(free, key=lambda name: abs(costs[kind, name] - cost))
            off += abs(costs[kind, chosen] - cost)
            subjects.append(f"{kind} of the {chosen}")
            words |= set(chosen.split())
        if off < least:
            best, least = subjects, off
        if not off:
            break
    return best


def _multikey(depths: tuple[float, ...], rng: random.Random, taken: set[str]) -> list[_Part]:
    """Facts in groups of one kind and one first word: "the price of the amber lantern", "... of the amber bridge".

    Neighbours in depth are of different groups. The control asks for one more key of the first group. `taken` are
    words of the other facts of the haystack, which do not come up again.
    """
    size = NEAR + 1
    count = -(-len(depths) // size)
    free: dict[str, list[str]] = {}
    for name in key_names("valid"):
        first, second = name.split()
        if not {first, second} & taken:
            free.setdefault(first, []).append(second)
    firsts = rng.sample(sorted(free), count)
    seconds = rng.sample(free[firsts[0]], count * size + 1)
    places = [*depths, *(rng.random() for _ in range(count * size - len(depths)))]
    values = _values(rng, count * size + 1)
    subjects, needles = [], []
    for i, (place, value) in enumerate(zip(places, values)):
        kind = _KINDS[(len(_KINDS) - 1 - i % count) % len(_KINDS)]  # the held-out facts take theirs from the other end
        subjects.append(f"{kind} of the {firsts[i % count]} {seconds[i]}")
        needles.append(Needle(_NEEDLE.format(subject=subjects[-1], value=value), value, place))
    absent = f"{_KINDS[-1]} of the {firsts[0]} {seconds[-1]}"
    parts = []
    for i, depth in enumerate(depths):
        asked = (Question("multikey", _asking(subjects[i]), values[i], depth),)
        control = (Question("multikey", _asking(absent), values[-1], None),) if i == 0 else ()
        parts.append(_Part(tuple(needles[i % count :: count]), asked + control))
    return parts


def _training(tokenizer: Tokenizer, depths: tuple[float, ...], rng: random.Random) -> list[_Part]:
    keys: list[str] = []
    used: set[str] = set()
    names = list(key_names("valid"))
    rng.shuffle(names)
    for name in names:
        if len(keys) <= len(depths) and not used & set(name.split()):
            keys.append(name)
            used |= set(name.split())
    values = _values(rng, len(keys))
    facts = lone_facts(keys, values)
    if tokenizer.has_chat_template:
        endings = [Ending(f"\n\n{question}", "") for _, question in facts]
    else:
        endings = [Ending(f"\n\nQuestion: {question}\nAnswer:", "") for _, question in facts]
    asked = [Question("training", ending, value, depth) for ending, value, depth in zip(endings, values, depths)]
    control = Question("training", endings[-1], values[-1], None)
    return [
        _Part((Needle(fact, question.value, depth),), (question, control) if i == 0 else (question,))
        for i, ((fact, _), question, depth) in enumerate(zip(facts, asked, depths))
    ]
