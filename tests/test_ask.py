"""A folder is read once and asked again: only what changed is read, and no answer depends on what is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_tiny

from lcconvert.convert.ask import ask, files_named
from lcconvert.convert.pack import pack_folder
from lcconvert.runtime.errors import UserError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "sub").mkdir(parents=True)
    for number in range(4):
        (root / f"f{number}.py").write_text(f"def f{number}():\n    return {number}\n" + f"# line {number}\n" * 20)
    (root / "sub" / "notes.md").write_text("# Notes\nThe end is <|im_end|> here.\n", encoding="utf-8")
    return root


def test_packing_honours_gitignore_and_skips_what_is_no_text(folder: Path) -> None:
    (folder / ".gitignore").write_text("*.log\n/build/\n")
    (folder / "sub" / ".gitignore").write_text("!kept.log\n")
    (folder / "build").mkdir()
    for name in ("a.log", "sub/kept.log", "sub/other.log", "build/out.py"):
        (folder / name).write_text("text")
    (folder / "image.png").write_bytes(b"\x89PNG\0")
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    (folder / "link.py").symlink_to("/etc/passwd")
    subprocess.run(["git", "init", "-q", str(folder / "vendored")], check=True)
    (folder / "vendored" / "x.py").write_text("x")
    pack = pack_folder(folder, exclude=("f3.py",), control_tokens=("<|im_end|>",))
    names = [".gitignore", "f0.py", "f1.py", "f2.py", "sub/.gitignore", "sub/kept.log", "sub/notes.md"]
    assert pack.paths == names
    assert dict(pack.skipped) == {
        "image.png": "binary", "latin.txt": "not UTF-8", "link.py": "a link", "vendored/": "a repository of its own",
    }  # fmt: skip
    assert "===== f0.py =====\ndef f0():" in pack.text
    assert "root:" not in pack.text
    assert "<|im_end|>" not in pack.text
    assert "im_end|>" in pack.text


def test_a_folder_s_own_git_settings_are_not_run(folder: Path) -> None:
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    trap = folder.parent / "ran"
    subprocess.run(["git", "-C", str(folder), "config", "core.fsmonitor", f"touch {trap}; false"], check=True)
    before = sorted(path.name for path in (folder / ".git").iterdir())
    assert pack_folder(folder).paths == ["f0.py", "f1.py", "f2.py", "f3.py", "sub/notes.md"]
    assert not trap.exists()
    assert sorted(path.name for path in (folder / ".git").iterdir()) == before


def test_files_an_answer_names() -> None:
    paths = ["a/x.py", "b/x.py", "c/main.py", "d/util.py", "e/main.py.bak"]
    answer = "See main.py and a/x.py: x.py calls d/util.py."
    assert files_named(answer, paths) == ["c/main.py", "a/x.py", "d/util.py"]
    assert files_named("domain.py and main.pyc", paths) == []


def question(artifact: Path, files: Path, sessions: Path, text: str = "What does f2 return?") -> tuple[str, list[str]]:
    said: list[str] = []
    parts = ask(str(artifact), text, files=files, session_dir=sessions, max_tokens=24, device="cpu", say=said.append)
    return "".join(parts), said


def test_only_what_changed_is_read_and_answers_are_those_of_a_fresh_run(artifact, folder, tmp_path) -> None:
    sessions, number = tmp_path / "sessions", iter(range(99))

    def fresh(text: str = "What does f2 return?") -> str:
        return question(artifact, folder, tmp_path / f"fresh{next(number)}", text)[0]

    def counts(said: list[str]) -> tuple[int, int]:
        words = next(line for line in said if "restored" in line).split()
        return int(words[4]), int(words[6])

    first, said = question(artifact, folder, sessions)
    restored, read = counts(said)
    assert restored == 0
    assert read >= 1024
    assert len(list(sessions.iterdir())) == 1
    assert first == fresh()
    again, said = question(artifact, folder, sessions)
    assert counts(said) == (read, 0)
    assert again == first
    other, said = question(artifact, folder, sessions, "Why?")
    assert counts(said)[1] == 0
    assert other == fresh("Why?")
    edited = (folder / "f2.py").read_text().replace("return 2", "return 7")
    (folder / "f2.py").write_text(edited)
    changed, said = question(artifact, folder, sessions)
    restored, read_again = counts(said)
    assert 0 < restored < read
    assert read_again < read
    assert changed == fresh()
    assert counts(question(artifact, folder, sessions)[1]) == (read, 0)


def test_what_does_not_fit_is_refused_with_the_largest_files(artifact, folder, tmp_path) -> None:
    (folder / "huge.txt").write_text("word " * 1000)
    with pytest.raises(UserError, match=r"the context is 2048; leave files out .* huge\.txt \(5022 characters\)"):
        question(artifact, folder, tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        question(artifact, folder / "huge.txt", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no text files"):
        question(artifact, tmp_path / "none", tmp_path)
    with pytest.raises(UserError, match="question is empty"):
        question(artifact, folder, tmp_path, " ")


def test_the_command_streams_the_answer_and_talks_on_stderr(artifact, folder, tmp_path) -> None:
    command = [sys.executable, "-m", "lcconvert.convert", "ask", str(artifact), "--files", str(folder), "Who?"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--max-tokens", "5"],
        capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "5 files packed, 0 skipped" in done.stderr
    assert len(list((tmp_path / "cache" / "lcconvert" / "sessions").glob("ask-project-*.session"))) == 1
