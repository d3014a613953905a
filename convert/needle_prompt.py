"""Builds a needle prompt of exact length: prompt tokens after the real chat template + reserved output = length.

Nothing is truncated afterwards and nothing is re-tokenized in a loop: the frame (template, instruction, needles,
question) is encoded once, sentences are added by their known counts until the next one would not fit, the last one is
cut at a word, and pad dots fill what is left. One encode of the finished text then checks the sum; vocabularies that
merge across a boundary are corrected by moving a few pads. Several questions may share one haystack: the text up to
the question is the same for all, so it is prefilled once and only the tails differ.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lcconvert.convert.haystack import SentenceBank
from lcconvert.convert.prompt_parts import Ending, cut_to, padding, prompt_ids, split_prompt
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.tokenizer import Tokenizer

# Version of the texts below; part of every sample's key. Change it with them.
WORDING = "facts-3"
_INTRO = (
    "The text below hides the numbers of some things among other sentences. "
    "Read all of it and remember them, because you will be asked about one of them afterwards.\n\n"
)
_NEEDLE = " The {subject} is {value}."
_QUESTION = "\n\nWhat is the {subject}?"
_PREFIX = "The {subject} is"
# What a number can be; needles that share a haystack differ in this too, so that each question is about finding one
# fact and not about telling near-duplicates apart.
_KINDS = (
    "access code", "price", "phone number", "password", "ticket number", "room number", "population", "serial number",
    "licence plate", "postcode", "budget", "mileage", "insurance value", "area", "altitude", "balance",
)  # fmt: skip
_ATTEMPTS = 6
_TRIED = 1500  # names looked at for subjects of equal token count


@dataclass(frozen=True)
class Needle:
    """A fact to plant. `depth` is where it should lie: 0 right after the instruction, 1 right before the question."""

    subject: str
    value: str
    depth: float


@dataclass(frozen=True)
class Prompt:
    """`context` is the common beginning of all prompts, `tails[i]` the rest of the prompt that asks question i."""

    context: list[int]
    tails: list[list[int]]
    depths: list[float]  # token share of the haystack before each needle, as it came out
    repetition: float  # 1.0: no sentence was used twice
    wrapped: bool  # the haystack reached the end of its text and went on at the beginning


def choose_needles(
    tokenizer: Tokenizer, names: tuple[str, ...], depths: tuple[float, ...], rng: random.Random
) -> tuple[list[Needle], Needle]:
    """One needle per depth and one that will not be planted; 7-digit values; no two names share a word.

    All subjects cost the same number of tokens, so that every question about a shared haystack has the same length.
    """
    count = len(depths) + 1
    kinds = [_KINDS[i % len(_KINDS)] for i in range(count)]
    rng.shuffle(kinds)
    order = list(names)
    rng.shuffle(order)
    subjects = _equal_cost(tokenizer, kinds, order)
    values = rng.sample(range(1_000_000, 10_000_000), count)
    needles = [Needle(subject, str(value), depth) for subject, value, depth in zip(subjects, values, (*depths, 0.0))]
    return needles[:-1], needles[-1]


def _equal_cost(tokenizer: Tokenizer, kinds: list[str], names: list[str]) -> list[str]:
    """A subject "kind of the name" for each kind, all of one token count, the smallest that works for all."""
    costs = {(kind, name): 0 for kind in kinds for name in names[:_TRIED]}
    for kind, name in costs:
        costs[kind, name] = len(tokenizer.encode(f" {kind} of the {name}"))
    for cost in sorted(set(costs.values())):
        subjects, words = [], set[str]()
        for kind in kinds:
            fitting = (n for n in names[:_TRIED] if costs[kind, n] == cost and not words & set(n.split()))
            if (chosen := next(fitting, None)) is None:
                break
            subjects.append(f"{kind} of the {chosen}")
            words |= set(chosen.split())
        else:
            return subjects
    raise UserError(f"{len(kinds) - 1} depths need as many subjects of equal token count; ask for fewer depths")


def build_prompt(
    tokenizer: Tokenizer,
    bank: SentenceBank,
    *,
    length: int,
    reserved: int,
    needles: list[Needle],
    questions: list[str],
    start: int,
) -> Prompt:
    """The prompt of `length - reserved` tokens that plants `needles` and asks for each subject of `questions`.

    `start` is the sentence of `bank` that the haystack begins with. UserError when the frame alone does not fit.
    """
    target = length - reserved
    endings = [Ending(_QUESTION.format(subject=subject), _PREFIX.format(subject=subject)) for subject in questions]
    frame = len(prompt_ids(tokenizer, _content(needles, [], "")[0] + endings[0].question, endings[0].prefix))
    if frame > target:
        raise UserError(
            f"needle length {length} is {frame - target} tokens too short for the chat template, "
            f"{len(needles)} needles and {reserved} output tokens; use a length of at least {frame + reserved}"
        )
    taken, repetition = bank.take(start, target - frame)
    sentences = [(bank.sentences[i], bank.count(i)) for i in taken]
    room = target - frame - sum(count for _, count in sentences)
    following = bank.sentences[((taken[-1] + 1) if taken else start) % len(bank.sentences)]
    if cut := cut_to(tokenizer, following, room):
        sentences.append((cut, len(tokenizer.encode(f" {cut}"))))
        room -= sentences[-1][1]

    pads = room  # in tokens
    for _ in range(_ATTEMPTS):
        stem, depths = _content(needles, sentences, padding(tokenizer, pads))
        ids = prompt_ids(tokenizer, stem + endings[0].question, endings[0].prefix)
        if len(ids) == target:
            break
        pads += target - len(ids)
        while pads < 0 and sentences:
            pads += sentences.pop()[1]
    else:
        raise CheckFailed(f"no needle prompt of exactly {target} tokens could be built with this tokenizer")
    context, tails = split_prompt(tokenizer, stem, ids, endings)
    return Prompt(context, tails, depths, repetition, start + len(taken) >= len(bank.sentences))


def _content(needles: list[Needle], sentences: list[tuple[str, int]], pad: str) -> tuple[str, list[float]]:
    """The user's message without its question, and for each needle the share of haystack tokens before it."""
    total = sum(count for _, count in sentences)
    pending = sorted(range(len(needles)), key=lambda i: needles[i].depth)
    depths = [0.0] * len(needles)
    parts: list[str] = []
    used = 0
    for sentence, count in [*sentences, ("", 0)]:
        while pending and (not sentence or used >= needles[pending[0]].depth * total):
            i = pending.pop(0)
            parts.append(_NEEDLE.format(subject=needles[i].subject, value=needles[i].value))
            depths[i] = used / total if total else needles[i].depth
        if sentence:
            parts.append(f" {sentence}")
            used += count
    # padding stands inside the haystack, before a needle at its very end
    last = len(parts) - 1 if parts and needles and max(n.depth for n in needles) >= 1 else len(parts)
    parts.insert(last, pad)
    return _INTRO + "".join(parts).strip(), depths
