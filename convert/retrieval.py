"""Synthetic retrieval: facts planted in ordinary text, asked at the end, with loss on the answers only.

Plain text rewards a long context so weakly that minutes of training teach nothing about it; a few hundred such windows
do. Five families, after RULER (arXiv 2404.06654): one fact; one of many; all values of one key; several keys in one
question; and names that take their value over from each other.

Surprising rule: nothing here may resemble the validator. Keys come from the training half of `words`, wording and
topics are this file's own, and the surrounding text is the user's training data, never the validator's haystack.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lcconvert.convert.corpus import Corpus
from lcconvert.convert.words import key_names
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

_TOKENS_PER_FACT = 384  # one planted fact for so many tokens of window
_MOST_FACTS = 64
_MOST_QUESTIONS = 24

# fact, question for one key, for several keys, for all values of a key; short answer
_TOPICS = (
    (
        "The clerk filed the {key} under reference {value}.",
        "Under which reference did the clerk file the {key}?",
        "Under which references did the clerk file the {keys}, in this order?",
        "Under which references did the clerk file the {key}? Name them all.",
        "{key}: {value}",
    ),
    (
        "Dial {value} to reach the keeper of the {key}.",
        "What do you dial to reach the keeper of the {key}?",
        "What do you dial to reach the keepers of the {keys}, in this order?",
        "The keeper of the {key} has more than one extension. Which ones?",
        "Dial {value}",
    ),
    (
        "Shelf {value} is where the {key} belongs.",
        "On which shelf does the {key} belong?",
        "On which shelves do the {keys} belong, in this order?",
        "Name every shelf where the {key} belongs.",
        "Shelf {value}",
    ),
    (
        "On the guest list, the {key} is ticked off with {value}.",
        "What is the {key} ticked off with on the guest list?",
        "What are the {keys} ticked off with on the guest list, in this order?",
        "With which figures is the {key} ticked off on the guest list?",
        "{value}",
    ),
    (
        "A parcel for the {key} travels with label {value}.",
        "Which label does the parcel for the {key} travel with?",
        "Which labels do the parcels for the {keys} travel with, in this order?",
        "Which labels do the parcels for the {key} travel with? Give each one.",
        "The label is {value}",
    ),
)
_INTROS = ("", "Study this material; a quiz follows.\n\n", "Here is a file with odd remarks scattered through it.\n\n")
_CHAIN = (
    ("Jar {name} was filled with {value} beads.", "Jar {name} was then given as many beads as jar {other}."),
    ("Team {name} finished with {value} points.", "Team {name} finished level with team {other}."),
)
_CHAIN_QUESTION = ("Which jars hold {value} beads?", "Which teams have {value} points?")
_FAMILIES = {"one fact": 2, "one of many": 4, "all values": 2, "several keys": 2, "chain": 2}  # name: relative weight


@dataclass(frozen=True)
class Puzzle:
    """What stands before the text, the facts to plant in order, and the (question, answer) turns that follow."""

    intro: str
    facts: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sample:
    """ids [T]; answers: whether ids[t] is part of an answer [T]; borders: starts of text pieces, facts, questions."""

    ids: list[int]
    answers: list[bool]
    borders: list[int]


@dataclass(frozen=True)
class Reading:
    """A long text with facts, ids [S], and questions about them, each by itself: token ids and whether each is part of
    the answer."""

    ids: list[int]
    questions: list[tuple[list[int], list[bool]]]


def make_puzzle(facts: int, rng: random.Random, keys: Sequence[str] = ()) -> Puzzle:
    """A puzzle of a random family with about `facts` facts (>= 1), about `keys` or any of the training half."""
    (family,) = rng.choices(list(_FAMILIES), weights=list(_FAMILIES.values()))
    keys = keys or key_names("train")
    if family == "chain" and facts >= 2:
        return _chain(facts, rng, keys)
    fact, ask_one, ask_many, ask_all, answer = rng.choice(_TOPICS)
    if family == "one fact":
        facts = 1
    repeats = rng.randint(2, 4) if family == "all values" and facts >= 2 else 1
    keys = rng.sample(keys, max(1, facts // repeats))
    planted = list(zip([key for key in keys for _ in range(repeats)], _numbers(len(keys) * repeats, rng)))
    rng.shuffle(planted)
    values = {key: [value for other, value in planted if other == key] for key in keys}  # in the text's order
    asked = rng.sample(keys, min(len(keys), _MOST_QUESTIONS))
    turns = []
    if family == "several keys":
        while asked:
            size = rng.randint(2, 4)
            group, asked = asked[:size], asked[size:]
            question = ask_many if len(group) > 1 else ask_one
            named = {"keys": _join(group), "key": group[0]}
            turns.append((question.format(**named), ", ".join(values[key][0] for key in group) + "."))
    else:
        question = ask_all if repeats > 1 else ask_one
        sentence = repeats == 1 and rng.random() < 0.5  # answer by the fact itself, or shortly
        for key in asked:
            value = ", ".join(values[key])
            said = fact.format(key=key, value=value) if sentence else answer.format(key=key, value=value) + "."
            turns.append((question.format(key=key), said))
    return Puzzle(rng.choice(_INTROS), tuple(fact.format(key=key, value=value) for key, value in planted), tuple(turns))


def lone_facts(keys: Sequence[str], values: Sequence[str]) -> list[tuple[str, str]]:
    """A fact and the question about it for each key, topics in turn: what a validator asks in the training wording."""
    topics = [_TOPICS[i % len(_TOPICS)] for i in range(len(keys))]
    return [(topic[0].format(key=k, value=v), topic[1].format(key=k)) for topic, k, v in zip(topics, keys, values)]


def lone_intro(rng: random.Random) -> str:
    """What stands before the text that `lone_facts` are planted in."""
    return rng.choice(_INTROS)


def _chain(facts: int, rng: random.Random, keys: Sequence[str]) -> Puzzle:
    kind = rng.randrange(len(_CHAIN))
    first, follow = _CHAIN[kind]
    chains = max(1, facts // 4)
    names = rng.sample(keys, facts)
    stories = [names[i::chains] for i in range(chains)]
    values = _numbers(len(stories), rng)
    planted = []
    for story, value in zip(stories, values):
        lines = [first.format(name=story[0], value=value)]
        lines += [follow.format(name=name, other=other) for other, name in pairwise(story)]
        planted += [(i, line) for i, line in enumerate(lines)]
    turns = [(_CHAIN_QUESTION[kind].format(value=value), _join(story) + ".") for story, value in zip(stories, values)]
    rng.shuffle(turns)
    # stable sort: a link never comes before the one it refers to
    return Puzzle(
        rng.choice(_INTROS),
        tuple(line for _, line in sorted(planted, key=lambda item: item[0])),
        tuple(turns[:_MOST_QUESTIONS]),
    )


def _numbers(count: int, rng: random.Random) -> list[str]:
    """Distinct numbers of 4 to 8 digits."""
    found: dict[str, None] = {}
    while len(found) < count:
        digits = rng.randint(4, 8)
        found[str(rng.randint(10 ** (digits - 1), 10**digits - 1))] = None
    return list(found)


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def retrieval_sample(tokenizer: Tokenizer, corpus: Corpus, *, start: int, length: int, rng: random.Random) -> Sample:
    """Exactly `length` tokens: corpus text from offset `start` with planted facts, then questions and their answers.

    Uses the chat template when the tokenizer has one. The number of facts follows the length and shrinks to fit.
    """
    facts = rng.randint(2, max(2, min(_MOST_FACTS, length // _TOKENS_PER_FACT)))
    while True:
        puzzle = make_puzzle(facts, rng)
        head, tail = _frame(tokenizer, puzzle)
        planted = [tokenizer.encode(rng.choice(("{}\n\n", "{}\n", " {} ")).format(fact)) for fact in puzzle.facts]
        room = length - len(head) - sum(map(len, planted)) - sum(len(ids) for ids, _ in tail)
        if room > length // 4:
            break
        if facts == 1:
            raise UserError(f"seq_len {length} cannot hold a planted fact and its question; use a longer seq_len")
        facts //= 2
    text, cuts = corpus.window(start, room)
    cuts = cuts or [0]
    places = sorted(rng.sample(cuts, len(planted)) if len(planted) <= len(cuts) else rng.choices(cuts, k=len(planted)))
    ids, answers, borders = list(head), [False] * len(head), []
    done = 0
    for place, fact in [*zip(places, planted), (room, [])]:
        borders += [len(ids) + cut - done for cut in cuts if done <= cut < place]
        ids += text[done:place]
        done = place
        borders.append(len(ids))
        ids += fact
    answers += [False] * (len(ids) - len(answers))
    for turn, is_answer in tail:
        if not is_answer:
            borders.append(len(ids))
        ids += turn
        answers += [is_answer] * len(turn)
    return Sample(ids, answers, sorted({border for border in borders if border < length}))


def retrieval_reading(
    tokenizer: Tokenizer, corpus: Corpus, *, start: int, length: int, questions: int, rng: random.Random
) -> Reading:
    """Exactly `length` tokens: corpus text from offset `start` in which the facts of many puzzles are scattered, and
    `questions` of their questions, or as many as the text has room for.

    No two puzzles share a key. The text opens a conversation, and each question ends it with its answer.
    """
    names = list(key_names("train"))
    rng.shuffle(names)
    facts: list[tuple[float, list[int]]] = []  # place as a share of the text, tokens
    asked: list[tuple[str, str]] = []
    used = 0
    while len(asked) < questions and names:
        size = min(len(names), rng.choice((4, 8, 16, 32)), max(1, length // 128))
        puzzle = make_puzzle(size, rng, [names.pop() for _ in range(size)])
        planted = [tokenizer.encode(f"{fact}\n\n") for fact in puzzle.facts]
        used += sum(map(len, planted))
        if used > length // 2 and asked:
            break
        facts += zip(sorted(rng.random() for _ in planted), planted)  # a chain's links stay in order
        asked += puzzle.turns
    head, _ = _frame(tokenizer, Puzzle(rng.choice(_INTROS), (), (asked[0],)))
    facts.sort(key=lambda fact: fact[0])
    room = length - len(head) - sum(len(ids) for _, ids in facts)
    text, cuts = corpus.window(start, room)
    cuts = cuts or [0]
    ids, done = list(head), 0
    for share, fact in facts:
        place = cuts[min(bisect_left(cuts, share * room), len(cuts) - 1)]
        ids += text[done:place] + fact
        done = place
    ids += text[done:]
    rng.shuffle(asked)
    turns = [_frame(tokenizer, Puzzle("", (), (turn,)))[1] for turn in asked[:questions]]
    return Reading(
        ids,
        [(question + answer, [False] * len(question) + [True] * len(answer)) for (question, _), (answer, _) in turns],
    )


def _frame(tokenizer: Tokenizer, puzzle: Puzzle) -> tuple[list[int], list[tuple[list[int], bool]]]:
    """Tokens before the text, and after it alternating question parts (False) and answers (True).

    The token that ends a turn counts as the end of the answer: the model must learn to stop.
    """
    if not tokenizer.has_chat_template:
        turns = [(tokenizer.encode(f"\n\nQuestion: {q}\nAnswer:"), tokenizer.encode(f" {a}")) for q, a in puzzle.turns]
        return tokenizer.encode(puzzle.intro), [(ids, i == 1) for turn in turns for i, ids in enumerate(turn)]
    slots = [f"<<slot{i}>>" for i in range(1 + len(puzzle.turns))]  # where the text and the answers go
    messages: list[dict[str, str]] = []
    for i, (question, _) in enumerate(puzzle.turns):
        asked = f"{puzzle.intro}{slots[0]}\n\n{question}" if i == 0 else question
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": slots[i + 1]}]
    rendered = tokenizer.chat(messages, add_generation_prompt=False)
    head, rendered = rendered.split(slots[0], 1)
    tail: list[tuple[list[int], bool]] = []
    for slot, (_, answer) in zip(slots[1:], puzzle.turns):
        before, rendered = rendered.split(slot, 1)
        ids = tokenizer.encode(before)
        if tail:
            tail[-1][0].append(ids.pop(0))
        tail += [(ids, False), (tokenizer.encode(answer), True)]
    tail[-1][0].extend(tokenizer.encode(rendered)[:1])
    return tokenizer.encode(head), tail
