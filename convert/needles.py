"""Needles at depth x length: plant facts in a long text, ask for them, count what comes back.

Protocol "shared": one haystack a sample holds one needle per depth, each a fact of its own kind; the haystack is
prefilled once and every question is asked from a fork of it. So a column of the heatmap costs one prefill, and the
answers read the context through the (quantized) KV cache. Protocol "single": one haystack per needle, the classic and
k times as slow. What is planted and asked (needle_wordings.py) and the haystack's first sentence depend on the sample
number only, so a short and a long context of the same sample are twins. Every sample also asks for something that was
not planted. Decoding is greedy and ends when the verdict can no longer change; a few questions are decoded together,
always the same ones, so that a resumed run computes what an undisturbed one does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

import torch

from lcconvert.convert.cost import PeakMemory, estimated_seconds, is_out_of_memory, kv_bytes_of, synchronize
from lcconvert.convert.haystack import SentenceBank
from lcconvert.convert.needle_prompt import Prompt, build_prompt
from lcconvert.convert.needle_wordings import VERSION, Puzzle, Question, make_puzzles
from lcconvert.convert.prompt_parts import prompt_mode
from lcconvert.convert.results import CellState, Control, Cost, NeedleCell, NeedleLength, Needles
from lcconvert.convert.samples import SampleLog, sample_key
from lcconvert.convert.scoring import Kind, candidates, decided, score, wilson
from lcconvert.convert.validate_config import Wording
from lcconvert.runtime.decode import MOST_SEQUENCES
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.kv_cache import Sequence
from lcconvert.runtime.sidecar import PAGE
from lcconvert.runtime.tokenizer import Tokenizer

Protocol = Literal["shared", "single"]


_TOGETHER = MOST_SEQUENCES - 1  # questions in one decode step; the context is a sequence too


@dataclass(frozen=True)
class NeedlePlan:
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    protocol: Protocol
    max_new_tokens: int
    seed: int
    wordings: tuple[Wording, ...] = ("heldout",)


@dataclass(frozen=True)
class Context:
    """One haystack to prefill, with what is planted and asked."""

    length: int
    sample: int
    puzzle: Puzzle


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finish: Literal["stop", "length"]
    decode_seconds: float
    error: str | None = None


def contexts(plan: NeedlePlan, tokenizer: Tokenizer) -> list[Context]:
    """Every haystack of the plan, shortest length first."""
    puzzles = [
        make_puzzles(tokenizer, plan.wordings, plan.depths, f"{plan.seed}/{sample}", shared=plan.protocol == "shared")
        for sample in range(plan.samples)
    ]
    return [
        Context(length, sample, puzzle)
        for length in plan.lengths
        for sample, found in enumerate(puzzles)
        for puzzle in found
    ]


def prompt_of(context: Context, plan: NeedlePlan, tokenizer: Tokenizer, bank: SentenceBank) -> Prompt:
    """The text of a context; UserError when its length is too short for the needles and the question."""
    return build_prompt(
        tokenizer,
        bank,
        length=context.length,
        reserved=plan.max_new_tokens,
        puzzle=context.puzzle,
        start=bank.start_of(context.sample, plan.samples),
    )


@dataclass
class _Reply:
    """An answer while it is decoded. It keeps step with the others after its end; what comes then is not looked at."""

    seq: Sequence
    references: list[str]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: Literal["stop", "length"] = "length"
    error: str | None = None
    ended: float | None = None  # seconds since the first step

    def push(self, token: int, finite: bool, engine: Engine, most: int, kind: Kind) -> bool:
        """Takes the next token; True when this was the last one."""
        if not finite:
            self.error = "the logits are not finite"
        elif token in engine.eos_ids:
            self.finish = "stop"
        else:
            self.ids.append(token)
            self.text = engine.tokenizer.decode(self.ids)
            return decided(self.text, self.references, kind) or len(self.ids) == most
        return True


def ask(
    engine: Engine,
    context: Sequence,
    tails: list[list[int]],
    references: list[list[str]],
    max_new_tokens: int,
    kind: Kind = "number",
) -> list[Answer]:
    """The greedy answers to questions on a prefilled context, which stays as it is; all are decoded together.

    tails[i] is the end of the prompt of question i, references[i] what it should be answered with.
    """
    replies: list[_Reply] = []
    try:
        firsts = []
        for tail, wanted in zip(tails, references, strict=True):
            replies.append(_Reply(engine.fork(context), wanted))
            firsts.append(engine.prefill(replies[-1].seq, tail))
        logits = torch.stack(firsts)
        synchronize(engine.device)
        started = time.perf_counter()
        while True:
            tokens, finite = logits.argmax(-1).tolist(), torch.isfinite(logits).all(-1).tolist()
            for reply, token, good in zip(replies, tokens, finite):
                if reply.ended is None and reply.push(token, good, engine, max_new_tokens, kind):
                    reply.ended = time.perf_counter() - started
            if all(reply.ended is not None for reply in replies):
                break
            logits = engine.decode_batch([reply.seq for reply in replies], tokens)
    finally:
        for reply in replies:
            engine.free(reply.seq)
    return [Answer(r.text, len(r.ids), r.finish, r.ended or 0.0, r.error) for r in replies]


def _batches(engine: Engine, seq: Sequence, prompt: Prompt, max_new_tokens: int) -> list[list[int]]:
    """Indices of the questions that are decoded together: as many as the pool has pages for, the last one alone.

    A decode rate is read from the one that is alone.
    """
    count = len(prompt.tails)
    pages = (seq.tail_length + max(map(len, prompt.tails)) + max_new_tokens) // PAGE  # that each fork fills
    size = _TOGETHER
    if pages and not engine.pool.growable:
        size = max(1, min(size, len(engine.pool.unused) // pages))
    return [*(list(range(i, min(i + size, count - 1))) for i in range(0, count - 1, size)), [count - 1]]


def question_key(base: dict[str, Any], plan: NeedlePlan, context: Context, question: Question) -> str:
    """Hash of all that decides the answer; the number of samples and the other lengths do not."""
    return sample_key(
        **base, kind="needle", version=VERSION, protocol=plan.protocol, max_new_tokens=plan.max_new_tokens,
        length=context.length, sample=context.sample, seed=plan.seed, puzzle=asdict(context.puzzle),
        question=asdict(question),
    )  # fmt: skip


def run_needles(
    engine: Engine,
    bank: SentenceBank,
    plan: NeedlePlan,
    planned: list[Context],
    base: dict[str, Any],
    log: SampleLog,
    advance: Callable[[], None],
    deadline: float | None,
) -> set[int]:
    """Asks all that the log does not hold, shortest length first; returns the lengths that ran out of memory.

    `deadline` (time.perf_counter) starts no context that is estimated to end after it.
    """
    out_of_memory: set[int] = set()
    worst: tuple[int, float] | None = None  # tokens and seconds of the last context measured
    for context in planned:
        length = context.length
        if out_of_memory:  # a longer one cannot fit either
            out_of_memory.add(length)
            continue
        started = time.perf_counter()
        if (
            deadline is not None
            and started + estimated_seconds(worst, length) > deadline
            and _missing(plan, context, base, log)
        ):
            continue
        if not _run_context(engine, bank, plan, context, base, log, advance):
            out_of_memory.add(length)
        worst = (length, time.perf_counter() - started)
    return out_of_memory


def _missing(plan: NeedlePlan, context: Context, base: dict[str, Any], log: SampleLog) -> set[int]:
    """Indices of the questions that the log does not hold."""
    questions = context.puzzle.questions
    return {i for i, q in enumerate(questions) if log.get(question_key(base, plan, context, q)) is None}


def _run_context(
    engine: Engine,
    bank: SentenceBank,
    plan: NeedlePlan,
    context: Context,
    base: dict[str, Any],
    log: SampleLog,
    advance: Callable[[], None],
) -> bool:
    """Asks the questions of one context that the log does not hold yet; False when memory ran out."""
    missing, questions = _missing(plan, context, base, log), context.puzzle.questions
    for _ in range(len(questions) - len(missing)):
        advance()
    if not missing:
        return True
    prompt = prompt_of(context, plan, engine.tokenizer, bank)
    places = {needle.value: depth for needle, depth in zip(context.puzzle.needles, prompt.depths)}
    seq = engine.new_sequence()
    try:
        with PeakMemory(engine.device) as peak:
            started = time.perf_counter()
            engine.prefill(seq, prompt.context)
            synchronize(engine.device)
            prefill_seconds = time.perf_counter() - started
            for batch in _batches(engine, seq, prompt, plan.max_new_tokens):
                if not missing & set(batch):
                    continue
                wanted = [[questions[i].value] for i in batch]
                answers = ask(engine, seq, [prompt.tails[i] for i in batch], wanted, plan.max_new_tokens)
                for i, answer in zip(batch, answers):
                    if i not in missing:
                        continue
                    question = questions[i]
                    verdict = score(answer.text, [question.value], finish=answer.finish)
                    log.add(
                        question_key(base, plan, context, question),
                        {
                            "kind": "needle",
                            "wording": question.wording,
                            "length": context.length,
                            "sample": context.sample,
                            "depth": question.depth,
                            "planted_at": places.get(question.value),
                            "question": question.ending.question.strip(),
                            "value": question.value,
                            "answer": answer.text,
                            "finish": answer.finish,
                            "tokens": answer.tokens,
                            "contains": verdict.score,
                            "strict": verdict.strict,
                            "outcome": "error" if answer.error else verdict.outcome,
                            "error": answer.error,
                            "prompt_tokens": len(prompt.context) + len(prompt.tails[i]),
                            "context_tokens": len(prompt.context),
                            "repetition": prompt.repetition,
                            "wrapped": prompt.wrapped,
                            "prefill_seconds": prefill_seconds,
                            "decode_seconds": answer.decode_seconds,
                            "together": len(batch),
                            "peak_bytes": peak.bytes(),
                            "kv_bytes_per_token": kv_bytes_of(engine, seq) / seq.length,
                        },
                    )
                    advance()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        engine.free(seq)
    return True


def tally(
    plan: NeedlePlan,
    planned: list[Context],
    tokenizer: Tokenizer,
    base: dict[str, Any],
    log: SampleLog,
    out_of_memory: set[int],
    perplexity_text: str | None,
) -> tuple[list[Needles], list[Cost]]:
    """The needle sections, one a wording, and the cost rows, from the log alone.

    `perplexity_text` is the hash of the text perplexity was measured on; a haystack of the same text that wrapped
    around (see haystack.py) has read what perplexity reads.
    """
    rows: dict[int, list[dict[str, Any]]] = {length: [] for length in plan.lengths}
    for context in planned:
        keys = [question_key(base, plan, context, question) for question in context.puzzle.questions]
        rows[context.length] += [row for key in keys if (row := log.get(key)) is not None]

    def state(length: int, n: int) -> CellState:
        return "measured" if n else "out of memory" if length in out_of_memory else "not run"

    sections = []
    for wording in plan.wordings:
        cells, by_length, controls = [], [], []
        short: float | None = None
        for length in plan.lengths:
            own = [row for row in rows[length] if row["wording"] == wording]
            controls += own
            asked = [row for row in own if row["depth"] is not None]
            for depth in plan.depths:
                cell = [row for row in asked if row["depth"] == depth]
                cells.append(_cell(length, depth, state(length, len(cell)), cell))
            strict = sum(row["strict"] for row in asked)
            if short is None and asked:
                short = strict / len(asked)
            low, high = wilson(strict, len(asked))
            wrapped = any(row["wrapped"] for row in asked)
            by_length.append(
                NeedleLength(
                    length=length,
                    state=state(length, len(asked)),
                    n=len(asked),
                    contains=sum(row["contains"] for row in asked),
                    strict=strict,
                    low=low,
                    high=high,
                    relative=strict / len(asked) / short if asked and short else None,
                    repetition=max((row["repetition"] for row in asked), default=1.0),
                    overlaps_perplexity=wrapped and perplexity_text == base["haystack"],
                )
            )
        sections.append(
            Needles(
                wording=wording,
                version=VERSION,
                protocol=plan.protocol,
                prompt="chat" if prompt_mode(tokenizer) == "chat" else "completion",
                depths=list(plan.depths),
                samples=plan.samples,
                max_new_tokens=plan.max_new_tokens,
                cells=cells,
                by_length=by_length,
                control=_control(controls),
            )
        )
    return sections, [_cost(n, state(n, len(rows[n])), rows[n]) for n in plan.lengths]


def _cell(length: int, depth: float, state: CellState, rows: list[dict[str, Any]]) -> NeedleCell:
    outcomes = [row["outcome"] for row in rows]
    strict = outcomes.count("correct")
    low, high = wilson(strict, len(rows))
    return NeedleCell(
        length=length,
        depth=depth,
        state=state,
        n=len(rows),
        contains=sum(row["contains"] for row in rows),
        strict=strict,
        wrong=outcomes.count("wrong"),
        empty=outcomes.count("empty"),
        hit_cap=outcomes.count("hit_cap"),
        error=outcomes.count("error"),
        low=low,
        high=high,
    )


def _control(rows: list[dict[str, Any]]) -> Control:
    absent = [row for row in rows if row["depth"] is None]
    planted = {row["value"] for row in rows if row["depth"] is not None}
    firsts = [next(iter(candidates(row["answer"], finished=True)), None) for row in absent]
    guessed = sum(row["value"] in row["answer"] for row in absent)
    other = sum(first in planted for first in firsts)
    silent = firsts.count(None)
    return Control(n=len(absent), silent=silent, invented=len(absent) - silent - other, other=other, guessed=guessed)


def _cost(length: int, state: CellState, rows: list[dict[str, Any]]) -> Cost:
    if not rows:
        return Cost(length=length, state=state)
    seconds = median(row["prefill_seconds"] for row in rows)
    alone = [row for row in rows if row["together"] == 1]
    decoded = sum(max(row["tokens"] - 1, 0) for row in alone)
    spent = sum(row["decode_seconds"] for row in alone)
    return Cost(
        length=length,
        state=state,
        prefill_seconds=seconds,
        prefill_tokens_per_second=rows[0]["context_tokens"] / seconds,
        decode_tokens_per_second=decoded / spent if decoded and spent else None,
        peak_bytes=max(row["peak_bytes"] for row in rows),
        kv_bytes_per_token=rows[0]["kv_bytes_per_token"],
    )
