"""What every long-context question is made of, whichever task asks it: the chat frame, the common context, the tails.

A question is a user message, whose end (the question proper) varies, and the beginning of the answer, which is put into
the assistant's turn: base models and small ones are lost without it, and scores with and without it do not compare.
Without a chat template the same text is a plain completion. Special tokens are added once; two BOS are an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lcconvert.runtime.errors import CheckFailed
from lcconvert.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Ending:
    """`question` ends the user's message (it begins with newlines), `prefix` begins the answer."""

    question: str
    prefix: str


def prompt_mode(tokenizer: Tokenizer) -> str:
    return "chat" if tokenizer.has_chat_template else "completion"


def prompt_text(tokenizer: Tokenizer, content: str, prefix: str) -> str:
    if tokenizer.has_chat_template:
        return tokenizer.chat([{"role": "user", "content": content}]) + prefix
    return f"{content}\n\n{prefix}" if prefix else content


def prompt_ids(tokenizer: Tokenizer, content: str, prefix: str) -> list[int]:
    """The ids a server would see; CheckFailed when two BOS tokens come out."""
    if tokenizer.has_chat_template:
        ids = tokenizer.encode_chat([{"role": "user", "content": content}], prefix=prefix)
    else:
        ids = tokenizer.encode(prompt_text(tokenizer, content, prefix), add_special=True)
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        raise CheckFailed("the prompt begins with two BOS tokens; the chat template and the tokenizer both add one")
    return ids


def split_prompt(
    tokenizer: Tokenizer, stem: str, ids: list[int], endings: Sequence[Ending], known: int = 0
) -> tuple[list[int], list[list[int]]]:
    """The common context and the tail of each question on `stem`; `ids` is the prompt of ending `known`.

    The cut lies after the newlines before the question.
    """
    contents = [stem + ending.question for ending in endings]
    texts = [prompt_text(tokenizer, content, ending.prefix) for content, ending in zip(contents, endings)]
    marks = [ending.question.lstrip("\n") for ending in endings]
    tails = [tokenizer.encode(text[text.rindex(mark) :]) for text, mark in zip(texts, marks)]
    if ids[len(ids) - len(tails[known]) :] == tails[known]:
        return ids[: len(ids) - len(tails[known])], tails
    # a vocabulary that does not split there: encode every prompt whole and cut where they first differ
    wholes = [
        ids if i == known else prompt_ids(tokenizer, content, ending.prefix)
        for i, (content, ending) in enumerate(zip(contents, endings))
    ]
    common = 0
    while all(len(w) > common + 1 for w in wholes) and len({w[common] for w in wholes}) == 1:
        common += 1
    return ids[:common], [whole[common:] for whole in wholes]


def cut_to(tokenizer: Tokenizer, sentence: str, room: int) -> str:
    """The longest beginning of `sentence`, in whole words, that costs at most `room` tokens after a space."""
    words = sentence.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if len(tokenizer.encode(" " + " ".join(words[:middle]))) <= room:
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def padding(tokenizer: Tokenizer, tokens: int) -> str:
    """Dots of about `tokens` tokens: " ." costs one in common vocabularies, two in a byte-level one without merges."""
    unit = len(tokenizer.encode(" ." * 4)) // 4 or 1
    return " ." * (tokens // unit) + "." * (tokens % unit)
