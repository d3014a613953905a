"""Questions after a text that is read once: attention and gradients against plain formulas, and training on them."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny

from lcconvert.convert import trainer
from lcconvert.convert.corpus import Corpus
from lcconvert.convert.extend import ExtendConfig, Stage, extend
from lcconvert.convert.prefix_tuning import attend_after, hidden_after, read_prefix
from lcconvert.convert.retrieval import retrieval_reading
from lcconvert.convert.rows import StageRows
from lcconvert.convert.training_log import TrainingLog
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.sidecar import AttentionPolicy
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    write_tiny(folder / "source")
    lines = (f"On day {j} the {'river' if j % 2 else 'wind'} was {j * 5 % 7} feet high. " * 4 for j in range(400))
    (folder / "days.txt").write_text("\n\n".join(lines))
    return folder


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_attention_and_gradients_are_those_of_one_softmax(device: str) -> None:
    dtype, near = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 2e-2)
    torch.manual_seed(0)
    shape = {"dtype": dtype, "device": device}
    q = torch.randn(3, 20, 4, 64, **shape, requires_grad=True)
    k, v = (torch.randn(3, 20, 2, 64, **shape, requires_grad=True) for _ in range(2))
    prefix_k, prefix_v = (torch.randn(1000, 2, 64, **shape) for _ in range(2))  # 8 parts of 125 keys
    weight = torch.randn(q.shape, **shape)
    (attend_after(q, k, v, prefix_k=prefix_k, prefix_v=prefix_v) * weight).sum().backward()
    out = attend_after(q, k, v, prefix_k=prefix_k, prefix_v=prefix_v)
    grads = [x.grad for x in (q, k, v)]

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    keys, values = (
        torch.cat([far.double().expand(3, -1, -1, -1), own], 1).repeat_interleave(2, 2)
        for far, own in ((prefix_k, exact[1]), (prefix_v, exact[2]))
    )
    scores = torch.einsum("bthd,bshd->bhts", exact[0], keys) / 8.0
    scores = scores.masked_fill(~torch.ones(20, 1020, dtype=torch.bool, device=device).tril(1000), -torch.inf)
    wanted = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values)
    (wanted * weight.double()).sum().backward()

    torch.testing.assert_close(out.double(), wanted, atol=near, rtol=near)
    for got, plain in zip(grads, exact):
        assert got is not None
        assert plain.grad is not None
        torch.testing.assert_close(got.double(), plain.grad, atol=2 * near, rtol=2 * near)


def test_a_question_after_a_text_is_what_the_decoder_makes_of_both(work: Path) -> None:
    decoder = load_decoder(FolderSource(work / "source"))
    text = torch.randint(0, decoder.spec.vocab_size, (768,), generator=torch.Generator().manual_seed(1))
    asked = torch.randint(0, decoder.spec.vocab_size, (2, 12), generator=torch.Generator().manual_seed(2))
    prefix = read_prefix(decoder, text, AttentionPolicy(), torch.float32)
    assert prefix.length == 768
    with torch.no_grad():
        whole = decoder(torch.cat([text.expand(2, -1), asked], dim=1))[:, 768:]
        torch.testing.assert_close(hidden_after(decoder, prefix, asked), whole, atol=1e-4, rtol=1e-4)


def test_a_reading_holds_the_answer_to_every_question(work: Path) -> None:
    tokenizer = Tokenizer.from_files(FolderSource(work / "source").files)
    corpus = Corpus.read([str(work / "days.txt")], tokenizer, need=10**6, seed=0)
    reading = retrieval_reading(tokenizer, corpus, start=100, length=20_000, questions=40, rng=random.Random(3))
    assert len(reading.ids) == 20_000
    assert len(reading.questions) == 40
    text = tokenizer.decode(reading.ids)
    for ids, answers in reading.questions:
        said = tokenizer.decode([token for token, is_answer in zip(ids, answers) if is_answer])
        for number in (word.strip(".,:") for word in said.split()):
            assert not number.isdigit() or f" {number}" in text
        asked = tokenizer.decode([token for token, is_answer in zip(ids, answers) if not is_answer])
        assert "?" in asked or "." in asked
        assert any(answers)
    again = retrieval_reading(tokenizer, corpus, start=100, length=20_000, questions=40, rng=random.Random(3))
    assert again == reading


def test_rows_of_a_stage_with_questions(work: Path) -> None:
    tokenizer = Tokenizer.from_files(FolderSource(work / "source").files)
    corpus = Corpus.read([str(work / "days.txt")], tokenizer, need=10**6, seed=0)
    stage = Stage(steps=2, seq_len=8192, questions=10, batch_size=4)
    assert stage.rows == 2
    text, updates = StageRows(stage, corpus, tokenizer, 65536, 0, 0, 0).reading(1)
    assert len(text) == 8192 - 512
    assert [len(update["ids"]) for update in updates] == [4, 4, 2]
    for update in updates:
        torch.testing.assert_close(update["weights"].sum(1), torch.ones(len(update["ids"])))


@pytest.mark.parametrize("prefix_attention", ["dense", "hybrid"])
def test_training_on_questions_learns_and_goes_on_from_a_kill(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix_attention: str
) -> None:
    stages = (
        Stage(steps=2, seq_len=512, batch_size=2),
        Stage(
            steps=4,
            seq_len=3072,
            questions=12,
            batch_size=6,
            lr=3e-3,
            replay_share=0.1,
            prefix_attention=prefix_attention,  # type: ignore[arg-type]
        ),
    )
    config = ExtendConfig(context="64k", data=(str(work / "days.txt"),), stages=stages, save_every=3, device="cpu")
    whole = extend(str(work / "source"), tmp_path / "whole", config)
    rows = [json.loads(line) for line in (whole / "training" / "loss.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [1024, 2048, 5120, 8192, 11264, 14336]
    assert rows[-1]["loss"] < rows[2]["loss"]

    class Killed(TrainingLog):
        def add(self, **row: Any) -> None:
            if row["step"] == 5:
                raise ZeroDivisionError
            super().add(**row)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "TrainingLog", Killed)
        with pytest.raises(ZeroDivisionError):
            extend(str(work / "source"), tmp_path / "again", config)
    again = FolderSource(extend(str(work / "source"), tmp_path / "again", config))
    for name in again.names():
        assert torch.equal(again.tensor(name), FolderSource(whole).tensor(name))


def test_a_text_too_short_for_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_len is 512 and questions are asked about a text of at least 1024 tokens"):
        Stage(steps=1, seq_len=512, questions=4)
