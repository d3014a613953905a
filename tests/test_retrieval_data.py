"""Training data: the key split, planted facts and their answers, corpora of every kind, and the mixture of rows."""

import gzip
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tiny import write_tokenizer

from lcconvert.convert import needle_wordings, retrieval
from lcconvert.convert.corpus import LONG_CHARS, Corpus, split_pieces
from lcconvert.convert.extend_config import Stage
from lcconvert.convert.retrieval import make_puzzle, retrieval_sample
from lcconvert.convert.rows import StageRows
from lcconvert.convert.words import key_names, key_words
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

TEXT = "\n\n".join(f"Paragraph {i} tells of rain on the hills. " * 6 for i in range(40))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_files({path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = tmp_path_factory.mktemp("text") / "rain.txt"
    path.write_text(TEXT)
    return Corpus.read([str(path)], tokenizer, need=10**6, seed=0)


def read(tokenizer: Tokenizer, *data: object, need: int = 10**6, seed: int = 0) -> str:
    tokens = Corpus.read([str(entry) for entry in data], tokenizer, need=need, seed=seed).tokens
    return tokenizer.decode(tokens.tolist(), skip_special=False)


def test_training_and_validation_share_no_key_and_no_wording() -> None:
    train, valid = (set(key_words(side)) for side in ("train", "valid"))
    assert not train & valid
    assert min(len(train), len(valid)) > 200
    assert min(len(key_names("train")), len(key_names("valid"))) > 10_000
    assert all(set(name.split()) <= train for name in key_names("train"))

    def content_words(text: str) -> set[str]:
        return set(re.findall(r"[a-z]{6,}", re.sub(r"\{\w+\}", "", text).lower()))

    def texts(module: ModuleType) -> str:
        values = [v for name, v in vars(module).items() if name.startswith("_") and not name.startswith("__")]
        return " ".join(str(value) for value in values if isinstance(value, (str, tuple)))

    assert len(content_words(texts(retrieval))) > 20
    assert not content_words(texts(needle_wordings)) & content_words(texts(retrieval))


def test_answers_are_in_the_facts() -> None:
    rng = random.Random(0)
    names = set(key_names("train"))
    for _ in range(300):
        puzzle = make_puzzle(rng.randint(1, 12), rng)
        told = " ".join(puzzle.facts)
        assert puzzle.turns
        for question, answer in puzzle.turns:
            for number in re.findall(r"\d{4,}", answer + question):
                assert number in told
            for name in names & set(re.findall(r"[a-z]+ [a-z]+", answer)):
                assert name in told


def test_chains_tell_a_link_after_what_it_refers_to() -> None:
    rng = random.Random(0)
    for _ in range(50):
        puzzle = retrieval._chain(9, rng, key_names("train"))
        known: set[str] = set()
        for fact in puzzle.facts:
            names = re.findall(r"(?:[Jj]ar|[Tt]eam) (\w+ \w+)", fact)
            assert set(names[1:]) <= known
            known.add(names[0])


@pytest.mark.parametrize("chat", [True, False])
def test_sample_is_exact_and_its_answers_are_answers(tokenizer: Tokenizer, corpus: Corpus, chat: bool) -> None:
    if not chat:
        tokenizer = Tokenizer(tokenizer._backend, {"eos_token": "<|im_end|>"}, None)
    rng = random.Random(0)
    for length in (700, 1024, 2048, 5000) * 5:
        sample = retrieval_sample(tokenizer, corpus, start=rng.randrange(10**5), length=length, rng=rng)
        assert len(sample.ids) == len(sample.answers) == length
        assert all(0 <= border < length for border in sample.borders)
        answered = tokenizer.decode([i for i, a in zip(sample.ids, sample.answers) if a], skip_special=False)
        told = tokenizer.decode([i for i, a in zip(sample.ids, sample.answers) if not a], skip_special=False)
        assert "Paragraph" not in answered
        assert all(number in told for number in re.findall(r"\d{4,}", answered))
        if chat:
            assert answered.endswith("<|im_end|>")
            assert told.count("<|im_start|>assistant\n") == answered.count("<|im_end|>")
        again = retrieval_sample(tokenizer, corpus, start=0, length=length, rng=random.Random(length))
        assert again == retrieval_sample(tokenizer, corpus, start=0, length=length, rng=random.Random(length))


def test_window_too_short_for_a_fact(tokenizer: Tokenizer, corpus: Corpus) -> None:
    with pytest.raises(UserError, match="seq_len 100 cannot hold"):
        retrieval_sample(tokenizer, corpus, start=0, length=100, rng=random.Random(0))


def test_pieces_join_to_the_text() -> None:
    for text in (TEXT, "word " * 5000, "x" * 5000, "line\n" * 3000, "\n\n\n", "a\n\nb"):
        pieces = split_pieces(text)
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 2000


def test_every_kind_of_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "notes.md").write_text("# Notes\nof the day")
    (folder / "packed.txt.gz").write_bytes(gzip.compress(b"packed words"))
    lines = [json.dumps({"text": "first line"}), "", json.dumps({"text": "second line", "id": 2})]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    (folder / "lines2.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "third line"}).encode()))
    text = read(tokenizer, folder)
    documents = {"# Notes\nof the day", "packed words", "first line", "second line", "third line"}
    assert set(text.split("<|im_end|>")) == {*documents, ""}
    assert "def dumps" in read(tokenizer, "module:json", need=60_000)
    assert read(tokenizer, folder, seed=1) != text  # another order
    assert read(tokenizer, folder) == text


def test_reads_no_more_than_needed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("z" * 99)
    assert len(read(tokenizer, tmp_path, need=250).split("<|im_end|>")) == 3 + 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lines.jsonl", b'{"text": "a"}\n{"body": "b"}', 'lines.jsonl line 2 is not a JSON object with a "text"'),
        ("lines.jsonl", b"{", "lines.jsonl line 1"),
        ("bad.txt.gz", b"no gzip", "bad.txt.gz cannot be read"),
        ("cut.txt.gz", gzip.compress(b"words " * 99, mtime=0)[:-20], "cut.txt.gz cannot be read"),
        ("empty.txt", b"  \n", "holds no text to train on"),
    ],
)
def test_bad_data(tokenizer: Tokenizer, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tokenizer, tmp_path / name)


def test_data_that_is_not_there(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        read(tokenizer, tmp_path / "nowhere")
    with pytest.raises(UserError, match="no Python module 'not_a_module'"):
        read(tokenizer, "module:not_a_module")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"table\.parquet needs pyarrow"):
        read(tokenizer, tmp_path)


def test_bad_data_is_skipped_only_on_request(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "good"}\nnot json\n\xff\xfe\n{"text": "also good"}\n')
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"words " * 99)[:-20])
    corpus = Corpus.read([str(tmp_path)], tokenizer, need=10**6, seed=0, skip_bad=True)
    assert tokenizer.decode(corpus.tokens.tolist(), skip_special=False) == "good<|im_end|>also good<|im_end|>"
    assert corpus.places == tuple(f"{tmp_path}/lines.jsonl line {n}" for n in (1, 4))
    places = sorted(place.removeprefix(f"{tmp_path}/").partition(":")[0] for place in corpus.skipped)
    assert places == ["cut.txt.gz", "lines.jsonl line 2", "lines.jsonl line 3"]


def test_long_documents_are_met_more_often_and_entries_keep_their_share(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, letter in (("code", "c"), ("prose", "p")):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.txt").write_text(letter * 500)
        for i in range(4):
            (tmp_path / name / f"long{i}.txt").write_text(letter.upper() * LONG_CHARS)
    entries = [str(tmp_path / "code"), str(tmp_path / "prose")]
    plain = Corpus.read(entries, tokenizer, need=10**6, seed=0)
    assert len(plain.places) == 88
    corpus = Corpus.read(entries, tokenizer, need=10**6, seed=0, upsample_long=4.0)
    assert sum("/long" in place for place in corpus.places) == 8
    assert 10 <= len(corpus.places) - 8 <= 30  # about a quarter of 80
    half = Corpus.read(entries, tokenizer, need=60_000, seed=0, upsample_long=4.0)
    text = tokenizer.decode(half.tokens.tolist(), skip_special=True).lower()
    assert abs(text.count("c") - text.count("p")) <= LONG_CHARS


def test_held_out_text_is_never_trained_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    told = (
        "The lighthouse keeper wrote down every ship that passed, its flag, its cargo and the hour, for thirty years."
    )
    (tmp_path / "mine.txt").write_text("My own words about the sea.")
    (tmp_path / "copy.txt").write_text(
        f"Preface\n\n{told.replace(' ', chr(10), 3).upper()} And so on, for ever.\n\nEnd"
    )
    held_out = [f"Another beginning.\n\n{told} And so on, for ever.\n\nAnother end."]
    corpus = Corpus.read([str(tmp_path)], tokenizer, need=10**6, seed=0, held_out=held_out)
    assert corpus.places == (str(tmp_path / "mine.txt"),)
    assert corpus.held_out == 1
    with pytest.raises(UserError, match="1 documents of it are held-out text"):
        Corpus.read([str(tmp_path / "copy.txt")], tokenizer, need=10**6, seed=0, held_out=held_out)


def test_origins_name_the_documents_of_a_window(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name * 9)  # ten tokens with the end token
    corpus = Corpus.read([str(tmp_path)], tokenizer, need=10**6, seed=0)
    first, second, third = corpus.places
    assert corpus.origins(3, 5) == [first]
    assert corpus.origins(9, 2) == [first, second]
    assert corpus.origins(55, 10) == [third, first]
    assert corpus.origins(0, 10**6) == [first, second, third]


def test_windows_go_around(corpus: Corpus) -> None:
    size = len(corpus.tokens)
    ids, borders = corpus.window(size - 10, 3 * size)
    assert np.array_equal(ids, np.tile(corpus.tokens, 5)[size - 10 : size - 10 + 3 * size])
    assert borders == sorted(borders)
    assert {(size - 10 + border) % size for border in borders} == set(corpus.borders.tolist())
    assert len(borders) == 3 * len(corpus.borders)


def test_rows(tokenizer: Tokenizer, corpus: Corpus) -> None:
    stage = Stage(steps=40, seq_len=700, pose_chunks=16, retrieval_share=0.4)
    rows = StageRows(stage, corpus, tokenizer, 2**20, seed=3, first_row=0, first_token=0)
    made = [rows[i] for i in range(len(rows))]
    assert len(made) == 40
    for row in made:
        assert row["ids"].shape == row["positions"].shape == row["weights"].shape == (700,)
        assert float(row["weights"].sum()) == pytest.approx(1.0, abs=1e-5)
        assert row["weights"][0] == 0
    assert sum(bool((row["weights"] > 0).sum() < 400) for row in made) == 16  # answers only
    assert sum(int(row["positions"][-1]) == 699 for row in made) >= 12  # at least three in ten are contiguous
    assert sum(int(row["positions"][-1]) > 2**18 for row in made) >= 5
    assert not any(row["replay"] for row in made)
    mixed = StageRows(stage.model_copy(update={"replay_share": 0.2}), corpus, tokenizer, 2**20, 3, 0, 0)
    replayed = [row for row in map(mixed.__getitem__, range(40)) if row["replay"]]
    assert len(replayed) == 8
    assert all((row["weights"] > 0).sum() == 699 and row["positions"][-1] == 699 for row in replayed)
    later = StageRows(stage, corpus, tokenizer, 2**20, seed=3, first_row=10, first_token=7000)
    for key in ("ids", "positions", "weights"):
        assert (later[5][key] == made[15][key]).all()
