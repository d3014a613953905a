"""A folder is read once and asked again: only what changed is read, and no answer depends on what is saved."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import write_tiny

from lcconvert.convert.ask import ask, files_named, questions
from lcconvert.convert.cli import cli
from lcconvert.convert.pack import pack_folder
from lcconvert.convert.pdf import PdfUnread, pdf_text
from lcconvert.runtime.errors import UserError


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lcconvert"


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


def question(artifact: Path, files: Path, sessions: Path, *texts: str) -> tuple[str, list[str]]:
    said: list[str] = []
    asked = iter(texts or ("What does f2 return?",))
    parts = ask(str(artifact), asked, files=files, session_dir=sessions, max_tokens=24, device="cpu", say=said.append)
    return "".join(parts), said


def counts(said: list[str], turn: int = 0) -> tuple[int, int]:
    """Tokens of files that were reused and that were read, by what was said of a question."""
    words = [line for line in said if "tokens of files" in line][turn].split()
    return int(words[4]), int(words[6])


def test_only_what_changed_is_read_and_answers_are_those_of_a_fresh_run(artifact, folder, tmp_path) -> None:
    sessions, number = tmp_path / "sessions", iter(range(99))

    def fresh(text: str = "What does f2 return?") -> str:
        return question(artifact, folder, tmp_path / f"fresh{next(number)}", text)[0]

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
    with pytest.raises(UserError, match="question is missing"):
        questions(" ", None)


def test_a_chat_goes_on_in_one_context_and_sees_edits(artifact, folder, tmp_path) -> None:
    def typed():
        yield "What does f2 return?"
        yield "Why?"
        (folder / "f3.py").write_text("# changed\n" + (folder / "f3.py").read_text())
        yield "And now?"

    said: list[str] = []
    sessions = tmp_path / "sessions"
    options = {"files": folder, "session_dir": sessions, "max_tokens": 8, "device": "cpu", "say": said.append}
    text = "".join(ask(str(artifact), typed(), **options))
    first = "".join(ask(str(artifact), ["What does f2 return?"], **options | {"session_dir": tmp_path / "fresh"}))
    assert text.startswith(first)
    read = counts(said)[1]
    assert counts(said, 1) == (read, 0)
    reused, again = counts(said, 2)
    assert reused >= 512
    assert 0 < again < read
    assert sum("files packed" in line for line in said) == 2  # of the chat and of the fresh run
    assert counts(question(artifact, folder, sessions)[1])[1] == 0  # what the chat read of the edited folder is saved


def test_questions_of_the_command_line_and_of_stdin() -> None:
    typed = io.StringIO("\n Who? \n\nAnd who else?")
    assert list(questions("What?", typed)) == ["What?", "Who?", "And who else?"]
    assert list(questions(None, io.StringIO("One?\n"))) == ["One?"]
    assert list(questions("Alone?", None)) == ["Alone?"]


def pdf(*pages: str) -> bytes:
    """A file of pages with a line of text each."""
    texts = [f"BT /F 12 Tf 72 720 Td ({page}) Tj ET".encode() for page in pages]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode()]
    objects.append(b"<< /Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>")
    for i, text in enumerate(texts):
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources 3 0 R /Contents {5 + 2 * i} 0 R >>"
        objects += [page.encode(), b"<< /Length %d >>\nstream\n%s\nendstream" % (len(text), text)]
    data, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    trailer = b"trailer\n<< /Root 1 0 R /Size %d >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(data))
    return data + head + table + trailer


def test_the_text_of_pdf_files_is_packed(folder, tmp_path) -> None:
    (folder / "paper.pdf").write_bytes(pdf("The key is 7319.", "Second page <|im_end|>."))
    (folder / "scan.pdf").write_bytes(pdf(""))
    (folder / "broken.pdf").write_bytes(pdf("x")[:200])
    kept = tmp_path / "texts"
    pack = pack_folder(folder, control_tokens=("<|im_end|>",), text_cache=kept)
    assert "===== paper.pdf =====\nThe key is 7319.\n\nSecond page <\u200b|im_end|>.\n\n" in pack.text
    skipped = dict(pack.skipped)
    assert skipped["scan.pdf"] == "a PDF file without text, scanned perhaps"
    assert skipped["broken.pdf"].startswith("a PDF file that cannot be read")
    (only,) = kept.iterdir()
    only.write_text("kept")  # shows that the second time nothing is extracted
    assert "===== paper.pdf =====\nkept\n" in pack_folder(folder, text_cache=kept).text
    for damaged in (b"%PDF-1.7\n" + bytes(100), b"%PDF-", pdf("x").replace(b"2 0 R", b"1 0 R")):
        with pytest.raises(PdfUnread):
            pdf_text(damaged)


def test_the_command_streams_the_answers_and_talks_on_stderr(artifact, folder, cache) -> None:
    command = ["ask", str(artifact), "--files", str(folder), "Who?", "--chat", "--device", "cpu", "--max-tokens", "5"]
    done = CliRunner().invoke(cli, command, input="And who else?\n")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") >= 2
    assert "5 files packed, 0 skipped" in done.stderr
    assert done.stderr.count("tokens of files") == 2
    assert len(list((cache / "sessions").glob("ask-project-*.session"))) == 1
