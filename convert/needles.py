"""Needles at depth x length: plant facts in a long text, ask for them, count what comes back.

Protocol "shared": one haystack a sample holds one needle per depth, each a fact of its own kind; the haystack is
prefilled once and every question is asked from a fork of it. So a column of the heatmap costs one prefill, and the
answers read the context through the (quantized) KV cache. Protocol "single": one haystack per needle, the classic and
k times as slow. Subjects, values and the haystack's first sentence depend on the sample number only, so a short and a
long context of the same sample are twins. Every sample also asks for a subject that was not planted.
Decoding is greedy and one question at a time; it stops early only when the verdict can no longer change.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch

from lcconvert.convert.cost import PeakMemory, is_out_of_memory, kv_bytes_of, synchronize
from lcconvert.convert.haystack import SentenceBank
from lcconvert.convert.needle_prompt import WORDING, Needle, Prompt, build_prompt, choose_needles
from lcconvert.convert.prompt_parts import prompt_mode
from lcconvert.convert.results import CellState, Control, Cost, NeedleCell, NeedleLength, Needles
from lcconvert.convert.samples import SampleLog, sample_key
from lcconvert.convert.scoring import Kind, candidates, decided, score, wilson
from lcconvert.convert.words import key_names
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.kv_cache import Sequence
from lcconvert.runtime.tokenizer import Tokenizer

Protocol = Literal["shared", "single"]


@dataclass(frozen=True)
class NeedlePlan:
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    protocol: Protocol
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Question:
    """`depth` is None for the subject that is not in the text."""

    subject: str
    value: str
    depth: float | None


@dataclass(frozen=True)
class Context:
    """One haystack to prefill and the questions asked about it."""

    length: int
    sample: int
    needles: tuple[Needle, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finish: Literal["stop", "length"]
    decode_seconds: float
    error: str | None = None


def contexts(plan: NeedlePlan, tokenizer: Tokenizer, sample: int, length: int) -> list[Context]:
    """The haystacks of one sample at one length: one under "shared", one per depth under "single"."""
    rng = random.Random(f"{plan.seed}/{sample}")
    needles, absent = choose_needles(tokenizer, key_names("valid"), plan.depths, rng)
    asked = [Question(n.subject, n.value, n.depth) for n in needles]
    control = Question(absent.subject, absent.value, None)
    if plan.protocol == "shared":
        return [Context(length, sample, tuple(needles), (*asked, control))]
    return [
        Context(length, sample, (needle,), (question, control) if i == 0 else (question,))
        for i, (needle, question) in enumerate(zip(needles, asked))
    ]


def prompt_of(context: Context, plan: NeedlePlan, tokenizer: Tokenizer, bank: SentenceBank) -> Prompt:
    """The text of a context; UserError when its length is too short for the needles and the question."""
    return build_prompt(
        tokenizer,
        bank,
        length=context.length,
        reserved=plan.max_new_tokens,
        needles=list(context.needles),
        questions=[question.subject for question in context.questions],
        start=bank.start_of(context.sample, plan.samples),
    )


def ask(
    engine: Engine,
    context: Sequence,
    tail: list[int],
    references: list[str],
    max_new_tokens: int,
    kind: Kind = "number",
) -> Answer:
    """The greedy answer to one question on a prefilled context, which stays as it is."""
    seq = engine.fork(context)
    ids: list[int] = []
    text, finish, error = "", "length", None
    started = None
    try:
        logits = engine.prefill(seq, tail)
        synchronize(engine.device)
        started = time.perf_counter()
        for _ in range(max_new_tokens):
            if not torch.isfinite(logits).all():
                error = "the logits are not finite"
                break
            token = int(logits.argmax())
            if token in engine.eos_ids:
                finish = "stop"
                break
            ids.append(token)
            text = engine.tokenizer.decode(ids)
            if decided(text, references, kind) or len(ids) == max_new_tokens:
                break
            logits = engine.decode(seq, token)
    finally:
        engine.free(seq)
    spent = time.perf_counter() - started if started else 0.0
    return Answer(text, len(ids), "stop" if finish == "stop" else "length", spent, error)


def question_key(base: dict[str, Any], plan: NeedlePlan, context: Context, question: Question) -> str:
    """Hash of all that decides the answer; the number of samples and the other lengths do not."""
    return sample_key(
        **base, kind="needle", wording=WORDING, protocol=plan.protocol, max_new_tokens=plan.max_new_tokens,
        length=context.length, sample=context.sample, seed=plan.seed, needles=[asdict(n) for n in context.needles],
        question=asdict(question),
    )  # fmt: skip


def run_needles(
    engine: Engine,
    bank: SentenceBank,
    plan: NeedlePlan,
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
    for length in plan.lengths:
        for sample in range(plan.samples):
            for context in contexts(plan, engine.tokenizer, sample, length):
                if out_of_memory:  # a longer one cannot fit either
                    out_of_memory.add(length)
                    continue
                started = time.perf_counter()
                # between linear and quadratic in the length; quadratic is the cautious guess
                estimate = worst[1] * (length / worst[0]) ** 2 if worst else 0.0
                if deadline is not None and started + estimate > deadline and _missing(plan, context, base, log):
                    continue
                if not _run_context(engine, bank, plan, context, base, log, advance):
                    out_of_memory.add(length)
                worst = (length, time.perf_counter() - started)
    return out_of_memory


def _missing(plan: NeedlePlan, context: Context, base: dict[str, Any], log: SampleLog) -> list[int]:
    """Indices of the questions that the log does not hold."""
    return [i for i, q in enumerate(context.questions) if log.get(question_key(base, plan, context, q)) is None]


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
    missing = _missing(plan, context, base, log)
    for _ in range(len(context.questions) - len(missing)):
        advance()
    if not missing:
        return True
    prompt = prompt_of(context, plan, engine.tokenizer, bank)
    seq = engine.new_sequence()
    try:
        with PeakMemory(engine.device) as peak:
            started = time.perf_counter()
            engine.prefill(seq, prompt.context)
            synchronize(engine.device)
            prefill_seconds = time.perf_counter() - started
            for i in missing:
                question = context.questions[i]
                answer = ask(engine, seq, prompt.tails[i], [question.value], plan.max_new_tokens)
                verdict = score(answer.text, [question.value], finish=answer.finish)
                log.add(
                    question_key(base, plan, context, question),
                    {
                        "kind": "needle",
                        "length": context.length,
                        "sample": context.sample,
                        "depth": question.depth,
                        "planted_at": None if question.depth is None else _planted_at(context, prompt.depths, question),
                        "subject": question.subject,
                        "value": question.value,
                        "answer": answer.text,
                        "finish": answer.finish,
                        "tokens": answer.tokens,
                        "contains": verdict.contains,
                        "strict": verdict.strict,
                        "outcome": "error" if answer.error else verdict.outcome,
                        "error": answer.error,
                        "prompt_tokens": len(prompt.context) + len(prompt.tails[i]),
                        "context_tokens": len(prompt.context),
                        "repetition": prompt.repetition,
                        "wrapped": prompt.wrapped,
                        "prefill_seconds": prefill_seconds,
                        "decode_seconds": answer.decode_seconds,
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


def _planted_at(context: Context, depths: list[float], question: Question) -> float:
    return next(depth for needle, depth in zip(context.needles, depths) if needle.subject == question.subject)


def tally(
    plan: NeedlePlan,
    engine: Engine,
    base: dict[str, Any],
    log: SampleLog,
    out_of_memory: set[int],
    perplexity_text: str | None,
) -> tuple[Needles, list[Cost]]:
    """The needle section and the cost rows, from the log alone.

    `perplexity_text` is the hash of the text perplexity was measured on; a haystack of the same text that wrapped
    around (see haystack.py) has read what perplexity reads.
    """
    rows: dict[int, list[dict[str, Any]]] = {}
    for length in plan.lengths:
        found = []
        for sample in range(plan.samples):
            for context in contexts(plan, engine.tokenizer, sample, length):
                keys = [question_key(base, plan, context, question) for question in context.questions]
                found += [row for key in keys if (row := log.get(key)) is not None]
        rows[length] = found

    def state(length: int, n: int) -> CellState:
        return "measured" if n else "out of memory" if length in out_of_memory else "not run"

    cells, by_length, costs = [], [], []
    short: float | None = None
    for length in plan.lengths:
        asked = [row for row in rows[length] if row["depth"] is not None]
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
        costs.append(_cost(length, state(length, len(rows[length])), rows[length]))
    needles = Needles(
        protocol=plan.protocol,
        prompt="chat" if prompt_mode(engine.tokenizer) == "chat" else "completion",
        wording=WORDING,
        depths=list(plan.depths),
        samples=plan.samples,
        max_new_tokens=plan.max_new_tokens,
        cells=cells,
        by_length=by_length,
        control=_control([row for found in rows.values() for row in found]),
    )
    return needles, costs


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
    decoded = sum(max(row["tokens"] - 1, 0) for row in rows)
    spent = sum(row["decode_seconds"] for row in rows)
    return Cost(
        length=length,
        state=state,
        prefill_seconds=seconds,
        prefill_tokens_per_second=rows[0]["context_tokens"] / seconds,
        decode_tokens_per_second=decoded / spent if decoded and spent else None,
        peak_bytes=max(row["peak_bytes"] for row in rows),
        kv_bytes_per_token=rows[0]["kv_bytes_per_token"],
    )
