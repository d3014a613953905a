"""Asks the tasks and counts what comes back: every (task, length, sample) is one prompt, asked once and logged.

Where a task allows it, the same text is first asked about something that is not in it (the control), from the same
prefill. The row of the question proper is written last, so a sample with that row is complete. Sample i at the shortest
length is the twin of sample i at the longer ones: `twin_kept` of `twin_found` tells what the length alone costs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from lcconvert.convert.claim import longest_kept
from lcconvert.convert.code_questions import SourceTree
from lcconvert.convert.cost import estimated_seconds, is_out_of_memory, synchronize
from lcconvert.convert.endpoint import Asker
from lcconvert.convert.needles import Answer, ask
from lcconvert.convert.prompt_parts import prompt_mode
from lcconvert.convert.qa import QaFile
from lcconvert.convert.results import CellState, TaskCell, TaskControl, Tasks, Third
from lcconvert.convert.samples import SampleLog, sample_key
from lcconvert.convert.scoring import Kind, candidates, score, wilson
from lcconvert.convert.task_list import TASKS
from lcconvert.convert.tasks import WORDING, Case, Counter, TaskPrompt, build
from lcconvert.convert.validate_config import Thresholds
from lcconvert.runtime.engine import Engine

Row = dict[str, Any]


class Target(Protocol):
    """Who answers. `margin`: tokens by which its prompts stay below the length."""

    margin: int

    def reading(self, prompt: TaskPrompt) -> AbstractContextManager[Asker]: ...


class InProcess:
    """Our engine: the common text is prefilled once and every question is a fork of it."""

    margin = 0

    def __init__(self, engine: Engine):
        self.engine = engine

    @contextmanager
    def reading(self, prompt: TaskPrompt) -> Iterator[Asker]:
        seq = self.engine.new_sequence()
        try:
            self.engine.prefill(seq, prompt.context)
            synchronize(self.engine.device)

            def asking(i: int, references: list[str], kind: Kind, max_new_tokens: int) -> Answer:
                return ask(self.engine, seq, [prompt.tails[i]], [references], max_new_tokens, kind)[0]

            yield asking
        finally:
            self.engine.free(seq)


@dataclass(frozen=True)
class TaskPlan:
    """What is asked. `sentences` is the haystack, `cache` a folder for built prompts."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    seed: int
    sentences: list[str] = field(repr=False)
    source: SourceTree | None = field(default=None, repr=False)
    questions: QaFile | None = field(default=None, repr=False)
    cache: Path | None = None
    bars: Thresholds = field(default_factory=Thresholds)

    def cases(self) -> Iterator[Case]:
        """Shortest length first, all tasks of a length before the next one."""
        half = len(self.sentences) // 2
        for length in self.lengths:
            for name in self.names:
                source = self.source if name.startswith("code_") else self.questions if name == "qa" else None
                for sample in range(self.samples):
                    start = random.Random(f"{self.seed}/{sample}/start").randrange(half, len(self.sentences))
                    yield Case(name, length, sample, self.seed, self.sentences, start, source)

    def check(self, counter: Counter, margin: int) -> None:
        """UserError when a task cannot be built at the shortest length, before anything is measured."""
        for case in self.cases():
            if case.sample == 0 and case.length == self.lengths[0]:
                build(TASKS[case.task], replace(case, length=case.length - margin), counter, self.cache)


def case_key(base: Row, case: Case, *, control: bool) -> str:
    """Hash of all that decides the answer; the number of samples and the other lengths and tasks do not."""
    task = TASKS[case.task]
    return sample_key(
        **base, kind="task", wording=WORDING, task=case.task, length=case.length, sample=case.sample, seed=case.seed,
        max_new_tokens=task.max_new_tokens, source=case.source.sha256 if case.source else None, control=control,
    )  # fmt: skip


def run_tasks(
    target: Target,
    counter: Counter,
    plan: TaskPlan,
    base: Row,
    log: SampleLog,
    advance: Callable[[], None],
    deadline: float | None,
) -> set[int]:
    """Asks all that the log does not hold; returns the lengths that ran out of memory, the longer ones with them.

    `deadline` (time.perf_counter) starts no prompt that is estimated to end after it.
    """
    out_of_memory: set[int] = set()
    worst: tuple[int, float] | None = None  # tokens and seconds of the slowest prompt of the last length
    pending = []
    for case in plan.cases():
        if log.get(case_key(base, case, control=False)) is None:
            pending.append(case)
        else:
            advance()

    def built(case: Case) -> TaskPrompt:
        return build(TASKS[case.task], replace(case, length=case.length - target.margin), counter, plan.cache)

    for case, prompt_of in _ahead(built, pending):
        started = time.perf_counter()
        if deadline is not None and started + estimated_seconds(worst, case.length) > deadline:
            break
        try:
            _ask_case(target, case, prompt_of(), base, log)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            out_of_memory = {case.length, *(longer for longer in plan.lengths if longer > case.length)}
            break
        spent = time.perf_counter() - started
        worst = (case.length, spent if worst is None or worst[0] != case.length else max(spent, worst[1]))
        advance()
    return out_of_memory


def _ahead(built: Callable[[Case], TaskPrompt], cases: list[Case]) -> Iterator[tuple[Case, Callable[[], TaskPrompt]]]:
    """Each case with what waits for its prompt; the next prompt is built while this one is asked."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(built, cases[0]) if cases else None
        for i, case in enumerate(cases):
            assert following is not None
            current = following
            following = pool.submit(built, cases[i + 1]) if i + 1 < len(cases) else None
            yield case, current.result


def _ask_case(target: Target, case: Case, prompt: TaskPrompt, base: Row, log: SampleLog) -> None:
    task = TASKS[case.task]
    started = time.perf_counter()
    with target.reading(prompt) as asking:
        prefill_seconds = time.perf_counter() - started
        for i, asked in reversed(list(enumerate(prompt.asks))):
            control = i > 0
            if control and log.get(case_key(base, case, control=True)) is not None:  # killed between the two
                continue
            references = [""] if control else list(asked.answers)  # a control is decided by its first candidate
            answer = asking(i, references, task.kind, task.max_new_tokens)
            row: Row = {
                "kind": "task", "task": case.task, "length": case.length, "sample": case.sample, "control": control,
                "question": asked.question.strip(), "answer": answer.text, "finish": answer.finish,
                "tokens": answer.tokens, "error": answer.error, "prompt_tokens": len(prompt.context + prompt.tails[i]),
                "prefill_seconds": prefill_seconds, "decode_seconds": answer.decode_seconds,
            }  # fmt: skip
            if control:
                first = next(iter(candidates(answer.text, finished=True, kind=task.kind)), None)
                planted = first is not None and first.lower() in (text.lower() for text in prompt.asks[0].answers)
                row["outcome"] = (
                    "error" if answer.error else "silent" if first is None else "other" if planted else "invented"
                )
            else:
                verdict = score(answer.text, references, finish=answer.finish, kind=task.kind, metric=task.metric)
                row |= {
                    "answers": references, "depths": prompt.depths, "repetition": prompt.repetition,
                    "score": verdict.score, "strict": verdict.strict,
                    "outcome": "error" if answer.error else verdict.outcome,
                }  # fmt: skip
            log.add(case_key(base, case, control=control), row)


def tally_tasks(plan: TaskPlan, counter: Counter, base: Row, log: SampleLog, out_of_memory: set[int]) -> Tasks:
    """The task section of a report, from the log alone."""
    rows: dict[tuple[str, int], list[Row]] = {(name, n): [] for name in plan.names for n in plan.lengths}
    controls: list[Row] = []
    for case in plan.cases():
        if (row := log.get(case_key(base, case, control=False))) is not None:
            rows[case.task, case.length].append(row)
        if (row := log.get(case_key(base, case, control=True))) is not None:
            controls.append(row)
    cells = []
    effective: dict[str, int | None] = {}
    for name in plan.names:
        short = rows[name, plan.lengths[0]]
        found = [
            _cell(name, n, rows[name, n], short, "out of memory" if n in out_of_memory else "not run")
            for n in plan.lengths
        ]
        effective[name] = longest_kept([(cell.length, cell.strict, cell.n) for cell in found], plan.bars)
        cells += found
    outcomes = [row["outcome"] for row in controls]
    return Tasks(
        wording=WORDING,
        prompt="chat" if prompt_mode(counter.tokenizer) == "chat" else "completion",
        samples=plan.samples,
        metrics={name: TASKS[name].metric for name in plan.names},
        max_new_tokens={name: TASKS[name].max_new_tokens for name in plan.names},
        source_tree=plan.source.name if plan.source else None,
        qa_file=plan.questions.name if plan.questions else None,
        keep=plan.bars.keep,
        cells=cells,
        effective=effective,
        control=TaskControl(n=len(outcomes), **{name: outcomes.count(name) for name in TaskControl.outcomes()}),
    )


def _cell(name: str, length: int, rows: list[Row], short: list[Row], absent: CellState) -> TaskCell:
    n, strict = len(rows), sum(row["strict"] for row in rows)
    outcomes = [row["outcome"] for row in rows]
    low, high = wilson(strict, n)
    twins = {row["sample"] for row in short if row["strict"]}
    twinned = [row for row in rows if row["sample"] in twins]
    base = sum(row["strict"] for row in short) / len(short) if short else 0.0
    return TaskCell(
        task=name,
        length=length,
        state="measured" if n else absent,
        n=n,
        score=sum(row["score"] for row in rows) / n if n else None,
        strict=strict,
        wrong=outcomes.count("wrong"),
        empty=outcomes.count("empty"),
        hit_cap=outcomes.count("hit_cap"),
        error=outcomes.count("error"),
        low=low,
        high=high,
        relative=strict / n / base if n and base else None,
        twin_found=len(twinned),
        twin_kept=sum(row["strict"] for row in twinned),
        thirds=[_third(rows, i) for i in range(3)],
        repetition=max((row["repetition"] for row in rows), default=1.0),
    )


def _third(rows: list[Row], i: int) -> Third:
    """Samples whose one planted answer lies in this third of the text."""
    inside = [row for row in rows if len(row["depths"]) == 1 and min(int(row["depths"][0] * 3), 2) == i]
    return Third(n=len(inside), strict=sum(row["strict"] for row in inside))
