"""The tasks as a reader meets them: solved from their text alone, exact in length, twins across lengths."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter as Tally
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from tiny import write_tokenizer

from lcconvert.convert import tasks
from lcconvert.convert.code_questions import SourceTree, read_source
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.one_hop import FACTS
from lcconvert.convert.qa import QaFile
from lcconvert.convert.ruler import RULER
from lcconvert.convert.scoring import Verdict, score
from lcconvert.convert.task_list import TASKS
from lcconvert.convert.tasks import Ask, Case, Counter, TaskPrompt, build
from lcconvert.convert.validate_config import TaskName
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

NAMES = list(TASKS)
SAMPLES = 4


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> SourceTree:
    """Modules that define one function and call the one of the module before."""
    folder = tmp_path_factory.mktemp("tree")
    for i in range(1, 401):
        text = f"from parts import part_{i - 1:03}\n\n\ndef part_{i:03}(x):\n    return part_{i - 1:03}(x) + {i}\n"
        (folder / f"module_{i:03}.py").write_text(text)
    (folder / "broken.py").write_text("def (")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "secret.py").write_text("def secret(): pass\n")
    return SourceTree.load(folder)


def source_of(name: str, tree: SourceTree, documents: QaFile) -> SourceTree | QaFile | None:
    return documents if name == "qa" else tree if name.startswith("code") else None


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> QaFile:
    """Who keeps what, one a line; a last line is blank."""
    path = tmp_path_factory.mktemp("questions") / "keepers.jsonl"
    rows = [
        {
            "question": f"Who keeps the number {n} key?",
            "answers": [f"Keeper {n * 7919 % 10007}", f"the keeper called {n * 7919 % 10007}"],
            "text": f"Of the keys on the wall, number {n} is kept by Keeper {n * 7919 % 10007}. It is seldom used.",
        }
        for n in range(1, 9)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return QaFile.load(path)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return Haystack.load().sentences


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> Counter:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Counter(Tokenizer.from_files({path.name: path.read_bytes() for path in folder.iterdir()}))


@pytest.fixture(scope="module")
def make(counter: Counter, sentences: list[str], tree: SourceTree, documents: QaFile) -> Callable[..., TaskPrompt]:
    def make(name: str, length: int = 9000, sample: int = 0, seed: int = 0, cache: Path | None = None) -> TaskPrompt:
        source = source_of(name, tree, documents)
        return build(TASKS[name], Case(name, length, sample, seed, sentences, 100 + sample, source), counter, cache)

    return make


def read(name: str, stem: str, ask: Ask) -> list[str]:
    """Answers by reading the text, knowing how the task is worded and not what was planted."""
    if name.startswith("niah"):
        asked = re.search(r" of (.+) that the text", ask.question)
        assert asked is not None
        facts = re.findall(r"One of the secret \w+ of (\S+) is: (\S+)\.", stem)
        keys = re.split(", | and ", asked[1])
        return [value for key, value in facts if key in keys]
    if name == "vt":
        (value,) = re.findall(r"\d{5}", ask.question)
        found: list[str] = []
        for variable, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", stem.rpartition("Follow the chains")[2]):
            if source == value or source in found:
                found.append(variable)
        return found
    if name == "cwe":
        listed = re.findall(r"\d+\. (\S+)", stem.rpartition("numbered list")[2])
        return [word for word, _ in Tally(listed).most_common(10)]
    if name == "fwe":
        words = re.findall(r"\b[a-z]{6}\b", stem.partition("not words.")[2])
        return [word for word, _ in Tally(words).most_common(3)]
    if name == "kv":
        key = ask.question.split('"')[1]
        pairs = json.loads(stem[stem.index("{") : stem.rindex("}") + 1])
        return [pairs[key]] if key in pairs else []
    if name == "qa":
        asked = re.search(r"number (\d+) key", ask.question)
        assert asked is not None
        return re.findall(rf"number {asked[1]} is kept by ([^.]+)\.", stem)
    if name == "graphwalks":
        edges = re.findall("([0-9a-f]{8}) -> ([0-9a-f]{8})\n", stem)
        (node,) = re.findall("[0-9a-f]{8}", ask.question)
        if "have an edge to" in ask.question:
            return [start for start, end in edges if end == node]
        near = {end for start, end in edges if start == node}
        return [end for start, end in edges if start in near]
    if name == "copy":
        (number,) = re.findall(r"passage (\w+)", ask.question)
        return re.findall(rf"^Passage {number}: (.*)$", stem, re.MULTILINE)
    if name == "mrcr":
        asked = re.search(r"Write (\S+) and .* the (\w+) ([a-z ]+) about the (.+) in the conv", ask.question)
        assert asked is not None
        replies = re.findall(rf"A: Write a {asked[3]} about the {asked[4]}\.\nB: (.*)\n", stem)
        assert len(replies) == 4
        return [f"{asked[1]} {replies[('first', 'second', 'third', 'fourth').index(asked[2])]}"]
    if name == "nolima":
        (fact,) = (fact for fact, asked in FACTS if asked in ask.question)
        return re.findall(re.escape(fact).replace(r"\{name\}", "([A-Z][a-z]+)"), stem)
    wanted = ask.question.split("`")[1]
    files = re.findall(r"# file: (\S+)\n(.*?)(?=# file: |\Z)", stem, re.DOTALL)
    if name == "code_defines":
        return [path for path, text in files if f"def {wanted}(" in text]
    return [
        node.name
        for _, text in files[:-1]
        for node in ast.walk(ast.parse(re.sub(r"( \.)+$|\.+$", "", text)))
        if isinstance(node, ast.FunctionDef) and f"{wanted}(" in ast.unparse(node.body)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_known_answers(make: Callable[..., TaskPrompt], name: str) -> None:
    """A reader scores 100%, one constant answer nothing, and one that lists all candidates nothing under `strict`."""
    task, prompts = TASKS[name], [make(name, sample=i) for i in range(SAMPLES)]
    constant = ", ".join(make(name, seed=1, sample=SAMPLES).asks[0].answers)

    def scored(answer: str, wanted: list[str]) -> Verdict:
        return score(answer, wanted, finish="stop", kind=task.kind, metric=task.metric)

    for prompt in prompts:
        wanted = list(prompt.asks[0].answers)
        right = scored(", ".join(read(name, prompt.stem, prompt.asks[0])), wanted)
        assert (right.score, right.strict, right.outcome) == (1.0, True, "correct")
        same = scored(constant, wanted)
        assert not same.strict
        if name != "copy":  # two patterns of words are never quite unlike
            assert same.score == 0.0
        listed = scored(f"{_other(wanted[0])}, {', '.join(wanted)}", wanted)
        assert not listed.strict
        if task.metric in ("all", "part"):
            assert listed.score == 1.0
        assert not [ask for ask in prompt.asks[1:] if read(name, prompt.stem, ask)]
    if name not in ("cwe", "fwe", "qa", "copy", "mrcr"):
        assert len(prompts[0].asks) == 2


def test_no_question_of_nolima_shares_a_word_with_its_fact() -> None:
    for fact, asked in FACTS:
        assert not set(re.findall("[a-z]{4,}", fact.lower())) & set(re.findall("[a-z]{4,}", asked.lower()))


def test_no_constant_answer_scores_on_nolima(sentences: list[str]) -> None:
    draft = TASKS["nolima"].prepare
    answers = Tally(draft(Case("nolima", 1000, i, 0, sentences, 100))(0).ask.answers for i in range(1000))
    assert len(answers) > 100
    assert max(answers.values()) < 25  # of 1000; even chances make 9


def test_a_question_file_must_hold_its_answers(tmp_path: Path, documents: QaFile) -> None:
    assert len(documents.items) == 8
    path = tmp_path / "q.jsonl"
    for text, message in (
        ('{"question": "a", "answers": ["b"]}', "line 1, is not"),
        ('{"question": "a", "answers": ["b"], "text": "c"}', "line 1: the text holds none"),
        ("", "holds no question"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            QaFile.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        QaFile.load(tmp_path / "absent")


def _other(answer: str) -> str:
    """Something of the same kind that is no answer."""
    turned = {str(i): str((i + 5) % 10) for i in range(10)}
    letters = {chr(c): chr((c - base + 7) % 26 + base) for base in (65, 97) for c in range(base, base + 26)}
    stem, dot, suffix = answer.partition(".")
    digits_only = re.fullmatch("[0-9a-f-]{8,36}", answer)  # a shifted letter would be no hexadecimal digit
    return "".join((turned if digits_only else turned | letters).get(c, c) for c in stem) + dot + suffix


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocabulary", ["bytes", "smollm2"])
def test_the_length_is_exact_and_the_ids_are_what_a_server_would_see(
    request: pytest.FixtureRequest, counter: Counter, sentences: list[str], tree: SourceTree, documents: QaFile,
    name: str, vocabulary: str,
) -> None:  # fmt: skip
    if vocabulary == "smollm2":
        counter = Counter(Tokenizer.from_files(request.getfixturevalue("smollm2").files))
    length, reserved = 8001, TASKS[name].max_new_tokens
    prompt = build(TASKS[name], Case(name, length, 0, 0, sentences, 100, source_of(name, tree, documents)), counter)
    ids = prompt.context + prompt.tails[0]
    assert len(ids) == length - reserved
    assert all(len(prompt.context + tail) <= length - reserved for tail in prompt.tails)
    for ask, tail in zip(prompt.asks, prompt.tails):
        text = counter.tokenizer.decode(prompt.context + tail, skip_special=False)
        assert counter.tokenizer.encode(text) == prompt.context + tail
        assert text.endswith(f"{ask.question}<|im_end|>\n<|im_start|>assistant\n{ask.prefix}")
        assert text.count("<|im_start|>user") == 1


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("code")])
def test_samples_of_two_lengths_are_twins_and_others_differ(make: Callable[..., TaskPrompt], name: str) -> None:
    short, long, other, reseeded = make(name, 8000), make(name, 12000), make(name, sample=1), make(name, seed=5)
    assert short.asks[0] == long.asks[0]
    assert len({ask.answers for ask in (short.asks[0], other.asks[0], reseeded.asks[0])}) == 3
    assert make(name, 8000) == short


def test_parameters_are_rulers(make: Callable[..., TaskPrompt]) -> None:
    facts = {name: len(re.findall("One of the secret", make(name).stem)) for name in RULER if name.startswith("niah")}
    few = {name: count for name, count in facts.items() if name not in ("niah_multikey_2", "niah_multikey_3")}
    assert few == {
        "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 4, "niah_multivalue": 4,
        "niah_multiquery": 4,
    }  # fmt: skip
    assert facts["niah_multikey_2"] > 20
    assert facts["niah_multikey_3"] > 20
    answers = {name: make(name).asks[0].answers for name in RULER}
    assert {name: len(found) for name, found in answers.items()} == {
        "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 1, "niah_multikey_2": 1,
        "niah_multikey_3": 1, "niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3,
    }  # fmt: skip
    assert {name: task.max_new_tokens for name, task in RULER.items() if not name.startswith("niah")} == {
        "vt": 30, "cwe": 120, "fwe": 50,
    }  # fmt: skip
    assert {task.max_new_tokens for name, task in RULER.items() if name.startswith("niah")} == {128}
    listed = Tally(re.findall(r"\d+\. (\S+)", make("cwe", 9000).stem.rpartition("numbered list")[2]))
    assert sorted(set(listed.values())) == [3, 30]
    assert [listed[word] for word in answers["cwe"]] == [30] * 10
    assert set(get_args(TaskName)) == set(TASKS)


def test_a_built_prompt_is_kept_for_the_next_run(
    make: Callable[..., TaskPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make("vt", cache=tmp_path)
    monkeypatch.setattr(tasks, "_build", lambda *_: pytest.fail("built again"))
    assert make("vt", cache=tmp_path) == first
    with pytest.raises(pytest.fail.Exception):
        make("vt", seed=1, cache=tmp_path)


def test_what_does_not_fit_is_an_error_with_a_way_out(make: Callable[..., TaskPrompt], counter: Counter) -> None:
    for name in NAMES:
        with pytest.raises(UserError, match=f"{name} .*; use a (longer length|length of at least)") as error:
            make(name, 150)
        if name.startswith("code"):
            continue
        shortest = int(str(error.value).rsplit(" ", 1)[1])
        prompt = make(name, shortest)
        assert len(prompt.context + prompt.tails[0]) == shortest - TASKS[name].max_new_tokens
    with pytest.raises(UserError, match=r"code_defines at length 90000 .* the material has"):
        make("code_defines", 90000)
    with pytest.raises(UserError, match="give --qa-file"):
        build(TASKS["qa"], Case("qa", 5000, 0, 0), counter)
    with pytest.raises(UserError, match="give --source-tree"):
        build(TASKS["code_defines"], Case("code_defines", 5000, 0, 0), counter)


def test_the_haystack_repeats_openly(counter: Counter) -> None:
    few = [f"Sentence number {n} says little." for n in range(40)]
    assert build(TASKS["niah_single_2"], Case("niah_single_2", 4000, 0, 0, few), counter).repetition > 1.5


def test_source_trees(tmp_path: Path, tree: SourceTree) -> None:
    assert len(tree.files) == 400
    with pytest.raises(UserError, match="is not a folder"):
        SourceTree.load(tmp_path / "absent")
    (tmp_path / "one.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="holds 1 readable"):
        SourceTree.load(tmp_path)
    source = read_source(
        "a.py", "class A:\n    def f(self):\n        def g():\n            h(1)\n        self.k()\n        g()\n"
    )
    assert source.defines == {"A"}
    assert source.calls == {"h": {"g"}, "k": {"f"}, "g": {"f"}}
