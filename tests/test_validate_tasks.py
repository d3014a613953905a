"""Tasks through `validate`: counts, twins and controls in the report, a server as target, and runs that are killed."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import running, tiny_engine
from tiny import write_tiny

from lcconvert.convert.compare import left_out, render_tasks
from lcconvert.convert.endpoint import Asker, Endpoint
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.needles import Answer
from lcconvert.convert.results import Report
from lcconvert.convert.samples import LOG, SampleLog
from lcconvert.convert.scoring import Kind
from lcconvert.convert.task_runs import TaskPlan, run_tasks, tally_tasks
from lcconvert.convert.tasks import Counter, TaskPrompt
from lcconvert.convert.validate import validate
from lcconvert.convert.validate_config import ValidateConfig
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.tokenizer import Tokenizer

KILLS = 10
ASKED = ("niah_single_1", "niah_multivalue", "kv")
SETTINGS: dict[str, Any] = {
    "lengths": (1536, 2048), "samples": 0, "perplexity_context": None, "device": "cpu", "tasks": ASKED,
    "task_samples": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def counter(model: Path) -> Counter:
    return Counter(Tokenizer.from_files(FolderSource(model).files))


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()]


class Stub:
    """Answers from the plan: "oracle" what was planted, "forgets" nothing past 5,000 tokens or when not planted,
    "numbers" every number around it, and a constant."""

    margin = 0

    def __init__(self, answer: str):
        self.answer, self.asked = answer, 0

    @contextmanager
    def reading(self, prompt: TaskPrompt) -> Iterator[Asker]:
        def ask(i: int, references: list[str], kind: Kind, max_new_tokens: int) -> Answer:
            self.asked += 1
            found = ", ".join(prompt.asks[0].answers) if i == 0 else ""
            if self.answer == "forgets":
                found = "" if len(prompt.context) > 5000 or i else found
            elif self.answer == "numbers":
                found = ", ".join(f"{int(n) - 1}, {n}, {int(n) + 1}" for n in prompt.asks[0].answers)
            elif self.answer != "oracle":
                found = self.answer
            return Answer(found, 8, "stop", 0.1)

        yield ask


def measured(target: Stub, counter: Counter, folder: Path, names: tuple[Any, ...], samples: int = 3) -> Any:
    plan = TaskPlan(names, (4500, 6000), samples, 0, Haystack.load().sentences)
    with SampleLog(folder / LOG) as log:
        oom = run_tasks(target, counter, plan, {}, log, lambda: None, None)
        return tally_tasks(plan, counter, {}, log, oom)


def test_known_answers_in_the_report(counter: Counter, tmp_path: Path) -> None:
    names = ("niah_single_2", "niah_multiquery", "vt", "kv")
    for name in ("oracle", "constant", "forgets", "numbers"):
        (tmp_path / name).mkdir()
    right = measured(Stub("oracle"), counter, tmp_path / "oracle", names)
    assert {(cell.n, cell.strict, cell.score) for cell in right.cells} == {(3, 3, 1.0)}
    assert right.effective == dict.fromkeys(names, 6000)
    assert right.control.silent == right.control.n > 20  # not every sample has a question that is no longer
    wrong = measured(Stub("It is 1234567."), counter, tmp_path / "constant", names)
    assert {(cell.strict, cell.wrong, cell.score) for cell in wrong.cells} == {(0, 3, 0.0)}
    assert wrong.effective == dict.fromkeys(names)
    assert 10 <= wrong.control.invented <= 12  # a number is no variable and no uuid
    fading = measured(Stub("forgets"), counter, tmp_path / "forgets", names)
    assert {(c.length, c.strict, c.empty, c.twin_found, c.twin_kept, c.relative) for c in fading.cells} == {
        (4500, 3, 0, 3, 3, 1.0), (6000, 0, 3, 3, 0, 0.0),
    }  # fmt: skip
    assert fading.effective == dict.fromkeys(names, 4500)
    assert sum(third.n for cell in fading.cells if cell.task == "kv" for third in cell.thirds) == 6
    numbers = ("niah_single_1", "niah_multikey_2", "niah_multivalue")
    listing = measured(Stub("numbers"), counter, tmp_path / "numbers", numbers)
    assert {(cell.strict, cell.score) for cell in listing.cells} == {(0, 1.0)}


def test_out_of_memory_and_out_of_time_are_states(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS | {"tasks": ("kv",), "task_samples": 1}
    late = validate(str(model), tmp_path / "late", ValidateConfig(**settings, max_time="0.001s"))
    assert [cell["state"] for cell in late["tasks"]["cells"]] == ["not run", "not run"]
    assert left_out(late) == ["kv at 1536, 2K (not run)"]
    prefill = Engine.prefill

    def limited(engine: Engine, seq: Any, ids: list[int], **options: Any) -> Any:
        if len(ids) > 1500:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return prefill(engine, seq, ids, **options)

    monkeypatch.setattr(Engine, "prefill", limited)
    short = validate(str(model), tmp_path / "short", ValidateConfig(**settings))
    assert [cell["state"] for cell in short["tasks"]["cells"]] == ["measured", "out of memory"]


def test_more_samples_reuse_what_was_asked(counter: Counter, tmp_path: Path) -> None:
    first, second = Stub("oracle"), Stub("oracle")
    measured(first, counter, tmp_path, ("kv",), samples=2)
    measured(second, counter, tmp_path, ("kv",), samples=3)
    assert (first.asked, second.asked) == (8, 4)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, validate(str(model), out, ValidateConfig(**SETTINGS))


def test_the_report_has_what_was_asked(model: Path, undisturbed: tuple[Path, dict[str, Any]]) -> None:
    out, result = undisturbed
    report = Report.read(out)
    assert report.model_dump(mode="json") == result
    assert report.needles == []
    assert report.claim.validated is None
    assert report.tasks is not None
    assert [(cell.task, cell.length, cell.n) for cell in report.tasks.cells] == [
        (name, length, 2) for name in ASKED for length in (1536, 2048)
    ]
    for cell in report.tasks.cells:
        assert cell.strict + cell.wrong + cell.empty + cell.hit_cap + cell.error == cell.n
    rows = lines(out)
    assert len(rows) == 12 + report.tasks.control.n
    assert {row["prompt_tokens"] for row in rows if row["task"] == "kv" and not row["control"]} == {1472, 1984}
    html = (out / "report.html").read_text()
    assert "<h2>Tasks</h2>" in html
    assert "niah_multivalue" in html
    table = render_tasks(result).splitlines()
    assert table[0].split() == ["task", "at", "1536", "at", "2K", "keeps", "85%", "to"]
    assert "  0/2 (0%-66%); 0%  " in table[2]


def test_a_server_is_asked_the_same_questions(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own server on loopback: the same ids, the same greedy answers, the same report as in process."""
    engine = tiny_engine(tmp_path / "served")
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("an endpoint needs no weights here"))
    with running(engine) as url:
        result = validate(str(tmp_path / "served"), tmp_path / "out", ValidateConfig(**SETTINGS, endpoint=url))
        chat = ValidateConfig(**SETTINGS | {"tasks": ("kv",)}, endpoint=f"{url}/v1/", endpoint_api="chat")
        chatted = validate(str(tmp_path / "served"), tmp_path / "chat", chat)
        assert Endpoint(url, None, "completions").model == "tiny"
    assert (result["setup"]["endpoint"], result["config"]["endpoint"]) == ("tiny", "a server")
    assert url not in (tmp_path / "out" / "report.json").read_text()
    assert [cell["n"] for cell in result["tasks"]["cells"]] == [2] * 6
    assert [(cell["n"], cell["error"]) for cell in chatted["tasks"]["cells"]] == [(2, 0)] * 2
    ours = {(row["question"], row["length"], row["control"]): row for row in lines(undisturbed[0])}
    served = lines(tmp_path / "out")
    assert len(served) == len(ours)
    for row in served:
        same = ours[row["question"], row["length"], row["control"]]
        assert row["prompt_tokens"] == same["prompt_tokens"]
        if same["finish"] == "length":  # in process the end token counts, this server has none
            assert row["answer"].startswith(same["answer"].rstrip("\ufffd"))
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between tries
    with pytest.raises(UserError, match="does not answer"):
        Endpoint(url, None, "completions")


def test_a_server_that_refuses_or_cuts_is_noticed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tmp_path / "served")
    engine.max_context = 1600
    settings = SETTINGS | {"tasks": ("kv",), "task_samples": 1}
    with running(engine) as url:
        result = validate(str(model), tmp_path / "out", ValidateConfig(**settings, endpoint=url))
        assert [(cell["n"], cell["error"]) for cell in result["tasks"]["cells"]] == [(1, 0), (1, 1)]
        assert "do not fit in 1600" in next(row for row in lines(tmp_path / "out") if row["length"] == 2048)["error"]
        request = Endpoint._request

        def cutting(endpoint: Endpoint, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
            if body:
                body["prompt"] = body["prompt"][-500:]
            return request(endpoint, path, body)

        monkeypatch.setattr(Endpoint, "_request", cutting)
        with pytest.raises(UserError, match=r"counted 500 prompt tokens where 1\d\d\d were meant"):
            validate(str(model), tmp_path / "cut", ValidateConfig(**settings, endpoint=url))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("kv", "kv")}, "each once"),
        ({"lengths": ()}, "lengths is empty"),
        ({"tasks": ("code_defines",)}, "give their folder as source_tree"),
        ({"tasks": ("qa",)}, "give it as qa_file"),
        ({"endpoint": "http://x", "tasks": ()}, "an endpoint answers tasks and nothing else"),
        ({"tasks": ()}, "nothing is to be measured"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ValidateConfig(**SETTINGS | changes)


def test_bad_requests_write_nothing(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"kv at length 256 is .* use a length of at least"):
        validate(str(model), out, ValidateConfig(**SETTINGS | {"lengths": (256,), "tasks": ("kv",)}))
    with pytest.raises(UserError, match="expected a URL"):
        validate(str(model), out, ValidateConfig(**SETTINGS, endpoint="localhost:8000"))
    with pytest.raises(UserError, match="give -o FOLDER"):
        validate(str(model), None, ValidateConfig(**SETTINGS, endpoint="http://localhost:1"))
    assert not out.exists()


def _work(model: str, out: str) -> None:
    """A run with every kind of result, in a process that will not live to see its end."""
    more = {"lengths": (1536,), "samples": 1, "depths": (0.2, 0.8), "max_new_tokens": 8, "perplexity_context": 1024}
    more |= {"wordings": ("heldout", "training", "multikey"), "tasks": ("kv",)}
    validate(model, Path(out), ValidateConfig(**SETTINGS | more))


def test_killed_ten_times_at_random_and_resumed(model: Path, tmp_path: Path) -> None:
    """SIGKILL, no clean-up: the report in the end is that of a run nobody disturbed, and nothing is asked twice."""
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["lcconvert.convert.validate"])
    out, rng = tmp_path / "out", random.Random(6)
    _work(str(model), str(tmp_path / "undisturbed"))
    undisturbed = Report.read(tmp_path / "undisturbed").model_dump(mode="json")
    seconds, kept = undisturbed["seconds"], []
    for _ in range(KILLS):
        process = start.Process(target=_work, args=(str(model), str(out)))
        process.start()
        while process.is_alive() and not (out / LOG).exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, seconds / 4))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        kept.append((out / LOG).read_bytes().count(b"\n"))
    _work(str(model), str(out))
    result = Report.read(out).model_dump(mode="json")
    assert kept == sorted(kept)
    assert kept[0] < len(lines(out))
    for name in ("artifact", "haystack", "needles", "tasks", "perplexity", "claim", "checks", "config"):
        assert result[name] == undisturbed[name]
    keys = [row["key"] for row in lines(out)]
    assert len(keys) == len(set(keys))
    assert set(keys) == {row["key"] for row in lines(tmp_path / "undisturbed")}
