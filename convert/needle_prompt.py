"""Builds a needle prompt of exact length: prompt tokens after the real chat template + reserved output = length.

Nothing is truncated afterwards and nothing is re-tokenized in a loop: the frame (template, instruction, needles,
question) is encoded once, sentences are added by their known counts until the next one would not fit, the last one is
cut at a word, and pad dots fill what is left. One encode of the finished text then checks the sum; vocabularies that
merge across a boundary are corrected by moving a few pads. Several questions may share one haystack: the text up to
the question is the same for all, so it is prefilled once and only the tails differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcconvert.convert.haystack import SentenceBank
from lcconvert.convert.needle_wordings import Puzzle
from lcconvert.convert.prompt_parts import cut_to, padding, prompt_ids, split_prompt
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.tokenizer import Tokenizer

_ATTEMPTS = 6


@dataclass(frozen=True)
class Prompt:
    """`context` is the common beginning of all prompts, `tails[i]` the rest of the prompt that asks question i."""

    context: list[int]
    tails: list[list[int]]
    depths: list[float]  # token share of the haystack before each needle, as it came out
    repetition: float  # 1.0: no sentence was used twice
    wrapped: bool  # the haystack reached the end of its text and went on at the beginning


def build_prompt(
    tokenizer: Tokenizer,
    bank: SentenceBank,
    *,
    length: int,
    reserved: int,
    puzzle: Puzzle,
    start: int,
) -> Prompt:
    """The prompt of `length - reserved` tokens that plants the needles of `puzzle` and asks each of its questions.

    The longest question has exactly that length, the others lack what they are shorter. `start` is the sentence of
    `bank` that the haystack begins with. UserError when the frame alone does not fit.
    """
    target, needles = length - reserved, puzzle.needles
    endings = [question.ending for question in puzzle.questions]
    costs = [len(tokenizer.encode(ending.question + ending.prefix)) for ending in endings]
    longest = costs.index(max(costs))

    def ids_of(stem: str) -> list[int]:
        return prompt_ids(tokenizer, stem + endings[longest].question, endings[longest].prefix)

    frame = len(ids_of(_content(puzzle, [], "")[0]))
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
        stem, depths = _content(puzzle, sentences, padding(tokenizer, pads))
        ids = ids_of(stem)
        if len(ids) == target:
            break
        pads += target - len(ids)
        while pads < 0 and sentences:
            pads += sentences.pop()[1]
    else:
        raise CheckFailed(f"no needle prompt of exactly {target} tokens could be built with this tokenizer")
    context, tails = split_prompt(tokenizer, stem, ids, endings, longest)
    return Prompt(context, tails, depths, repetition, start + len(taken) >= len(bank.sentences))


def _content(puzzle: Puzzle, sentences: list[tuple[str, int]], pad: str) -> tuple[str, list[float]]:
    """The user's message without its question, and for each needle the share of haystack tokens before it."""
    needles, total = puzzle.needles, sum(count for _, count in sentences)
    pending = sorted(range(len(needles)), key=lambda i: needles[i].depth)
    depths = [0.0] * len(needles)
    parts: list[str] = []
    used = 0
    for sentence, count in [*sentences, ("", 0)]:
        while pending and (not sentence or used >= needles[pending[0]].depth * total):
            i = pending.pop(0)
            parts.append(f" {needles[i].fact}")
            depths[i] = used / total if total else needles[i].depth
        if sentence:
            parts.append(f" {sentence}")
            used += count
    # padding stands inside the haystack, before a needle at its very end
    last = len(parts) - 1 if parts and needles and max(n.depth for n in needles) >= 1 else len(parts)
    parts.insert(last, pad)
    return puzzle.intro + "".join(parts).strip(), depths
