"""What a long-context task is, and the prompt of exact length that is made of one.

A task is a pure function of (seed, sample, length) that gives `draft(n)`: a head, n units of text with what is planted
among them, a question and its answers. Nothing is truncated: n is found by arithmetic over units whose token counts are
looked up (each distinct unit is tokenized once), what then is left is filled with the beginning of a further sentence
and dots, and one encode of the whole prompt checks that prompt + reserved output = length. Sample i asks the same at
every length wherever the task allows, so that a long prompt has a short twin.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lcconvert.convert.claim import replace_file
from lcconvert.convert.prompt_parts import Ending, cut_to, padding, prompt_ids, split_prompt
from lcconvert.convert.samples import sample_key
from lcconvert.convert.scoring import Kind, Metric
from lcconvert.convert.words import key_names
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lcconvert.convert.code_questions import SourceTree
    from lcconvert.convert.qa import QaFile

# Version of the texts of all tasks; part of every sample's key. Change it with them.
WORDING = "tasks-1"
_ATTEMPTS = 8
_STEPS = 60  # bound on the search for n


@dataclass(frozen=True)
class Ask(Ending):
    """A question with what it should be answered with."""

    answers: tuple[str, ...]


@dataclass(frozen=True)
class Draft:
    """One text. `depths`: share of the units before each planted answer; `spare`: text that may be cut at any word.

    `absent` are questions about things that are not in the text; the first that is not longer than `ask` is asked.
    """

    head: str
    units: list[str]
    ask: Ask
    absent: tuple[Ask, ...] = ()
    depths: tuple[float, ...] = ()
    spare: str = ""
    repetition: float = 1.0
    complete: bool = False  # the material is used up: a larger n gives the same


@dataclass(frozen=True)
class Case:
    """One sample of a task. `sentences` are the haystack in the order it is read; `source` what else is read."""

    task: str
    length: int
    sample: int
    seed: int
    sentences: Sequence[str] = field(repr=False, default=())
    start: int = 0
    source: SourceTree | QaFile | None = field(repr=False, default=None)

    def rng(self, what: str = "") -> random.Random:
        """Independent of the length, so that samples of all lengths are twins."""
        return random.Random(f"{self.seed}/{self.task}/{self.sample}/{what}")

    def names(self) -> Iterator[str]:
        """Hyphenated keys without end, none twice: pairs of the validation words, then longer ones."""
        rng = self.rng("names")
        pairs = [name.replace(" ", "-") for name in key_names("valid")]
        rng.shuffle(pairs)
        yield from pairs
        size = len(pairs)
        yield from (f"{pairs[i]}-{pairs[(i + step) % size]}" for step in range(1, size) for i in range(size))


@dataclass(frozen=True)
class Task:
    """`kind`: what an answer is made of, `metric`: how it is scored (scoring.py)."""

    prepare: Callable[[Case], Callable[[int], Draft]]
    kind: Kind
    max_new_tokens: int
    metric: Metric = "all"


@dataclass(frozen=True)
class TaskPrompt:
    """`context` + `tails[i]` is the prompt of `asks[i]`; the second ask, if any, is the absent one."""

    context: list[int]
    tails: list[list[int]]
    asks: list[Ask]
    depths: list[float]
    repetition: float
    stem: str = field(repr=False)  # the user's message before the question


class Counter:
    """Token counts of units, each distinct text counted once."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._counts: dict[str, int] = {}

    def total(self, units: Iterable[str]) -> int:
        counts, total = self._counts, 0
        for unit in units:
            count = counts.get(unit)
            if count is None:
                count = counts[unit] = len(self.tokenizer.encode(unit))
            total += count
        return total

    @cached_property
    def sha256(self) -> str:
        """Tells tokenizers and templates apart by what they make of a probe."""
        probe = "A probe: 1234567, Grüße\n\tdef f(x): return x"
        return sample_key(vocab=self.tokenizer.vocab_size, ids=prompt_ids(self.tokenizer, probe, "It"))


def build(task: Task, case: Case, counter: Counter, cache: Path | None = None) -> TaskPrompt:
    """The prompt of `case.length - task.max_new_tokens` tokens; read from the folder `cache` when it is there.

    UserError when the length is too short for the task or the material for the length.
    """
    if cache is None:
        return _build(task, case, counter)
    text = sample_key(sentences=list(case.sentences)) if case.sentences else None
    key = sample_key(
        wording=WORDING, task=case.task, length=case.length, sample=case.sample, seed=case.seed, start=case.start,
        reserved=task.max_new_tokens, tokenizer=counter.sha256, text=text,
        source=case.source.sha256 if case.source else None,
    )  # fmt: skip
    path = cache / f"{key}.json"
    if path.is_file():
        saved = json.loads(path.read_bytes())
        asks = [Ask(**{**ask, "answers": tuple(ask["answers"])}) for ask in saved.pop("asks")]
        return TaskPrompt(asks=asks, **saved)
    prompt = _build(task, case, counter)
    cache.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(asdict(prompt), ensure_ascii=False).encode())
    return prompt


def _build(task: Task, case: Case, counter: Counter) -> TaskPrompt:
    tokenizer, draft_of = counter.tokenizer, task.prepare(case)
    target = budget = case.length - task.max_new_tokens
    draft, fill, left = None, "", 0
    for _ in range(_ATTEMPTS):
        if draft is None:
            draft, left = _fit(draft_of, counter, case, budget, task.max_new_tokens)
            fill = f" {cut}" if draft.spare and (cut := cut_to(tokenizer, draft.spare, left)) else ""
            left -= len(tokenizer.encode(fill))
        stem = draft.head + "".join(draft.units).lstrip() + fill + padding(tokenizer, left)
        ids = prompt_ids(tokenizer, stem + draft.ask.question, draft.ask.prefix)
        if not (off := target - len(ids)):
            break
        left += off
        if left < 0 or off > 64 + target // 256:  # the whole has other tokens than its parts: fit again, knowing that
            budget, draft = budget + off, None
    if draft is None or off:
        raise CheckFailed(f"no {case.task} prompt of exactly {target} tokens could be built with this tokenizer")
    if not draft.ask.answers:
        raise UserError(f"{case.task} finds nothing to ask in {case.length} tokens of its text; use a longer length")
    main, *others = [len(tokenizer.encode(ask.question + ask.prefix)) for ask in (draft.ask, *draft.absent)]
    fitting = [ask for ask, cost in zip(draft.absent, others) if cost <= main][:1]
    asks = [draft.ask, *fitting]
    context, tails = split_prompt(tokenizer, stem, ids, asks)
    return TaskPrompt(context, tails, asks, list(draft.depths), draft.repetition, stem)


def _fit(
    draft_of: Callable[[int], Draft], counter: Counter, case: Case, target: int, reserved: int
) -> tuple[Draft, int]:
    """The draft of most units that fits `target` tokens by their counts, and the tokens that are then left."""
    best = draft_of(0)
    text = best.head + "".join(best.units).lstrip() + best.ask.question
    used = len(prompt_ids(counter.tokenizer, text, best.ask.prefix))
    if used > target:
        raise UserError(
            f"{case.task} at length {case.length} is {used - target} tokens too short for the chat template, the "
            f"question and {reserved} output tokens; use a length of at least {used + reserved}"
        )
    frame = used - counter.total(best.units)
    low, high, n, slope = 0, 2**62, 32, 1.0
    for _ in range(_STEPS):
        draft = draft_of(n)
        tokens = frame + counter.total(draft.units)
        if tokens > used:
            slope = (tokens - used) / (n - low)
        if tokens > target:
            high = n
        else:
            low, used, best = n, tokens, draft
        if high - low <= 1 or best.complete:
            break
        n = min(low + max(1, int((target - used) / slope)), high - 1)
    if best.complete and target - used > target // 8 + 64:
        raise UserError(
            f"{case.task} at length {case.length} needs {target} tokens but the material has {used}; "
            "give more of it, or a shorter length"
        )
    return best, target - used
