"""Needle prompts: the exact length contract, where needles lie, one haystack for many questions, no repetition."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tokenizer

from lcconvert.convert.haystack import Haystack, SentenceBank
from lcconvert.convert.needle_prompt import Prompt, build_prompt
from lcconvert.convert.needle_wordings import NEAR, Puzzle, make_puzzles
from lcconvert.convert.words import key_names, key_words
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.tokenizer import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RESERVED = 16


@pytest.fixture(scope="module")
def haystack() -> Haystack:
    return Haystack.load()


def tiny_tokenizer(folder: Path, **changes: object) -> Tokenizer:
    """One token a byte, so that counts can be checked by hand."""
    write_tokenizer(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads(files["tokenizer_config.json"]) | changes
    files["tokenizer_config.json"] = json.dumps({k: v for k, v in config.items() if v is not None}).encode()
    return Tokenizer.from_files(files)


def prompt_for(tokenizer: Tokenizer, bank: SentenceBank, length: int, sample: int = 0) -> tuple[Prompt, Puzzle]:
    (puzzle,) = make_puzzles(tokenizer, ["heldout"], DEPTHS, str(sample), shared=True)
    start = bank.start_of(sample, 3)
    return build_prompt(tokenizer, bank, length=length, reserved=RESERVED, puzzle=puzzle, start=start), puzzle


@pytest.fixture(scope="module", params=["bytes", "smollm2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return tiny_tokenizer(tmp_path_factory.mktemp("tiny"))
    return Tokenizer.from_files(request.getfixturevalue("smollm2").files)


@given(length=st.integers(1024, 6000), sample=st.integers(0, 2))
@settings(max_examples=12, deadline=None)
def test_every_question_has_exactly_the_length(
    tokenizer: Tokenizer, haystack: Haystack, length: int, sample: int
) -> None:
    prompt, _ = prompt_for(tokenizer, SentenceBank(haystack, tokenizer), length, sample)
    assert {len(prompt.context) + len(tail) for tail in prompt.tails} == {length - RESERVED}


def test_ids_are_what_a_server_would_see(tokenizer: Tokenizer, haystack: Haystack) -> None:
    prompt, puzzle = prompt_for(tokenizer, SentenceBank(haystack, tokenizer), 3000)
    assert len(prompt.tails) == len(DEPTHS) + 1
    for asked, tail in zip(puzzle.questions, prompt.tails):
        ids = prompt.context + tail
        text = tokenizer.decode(ids, skip_special=False)
        assert tokenizer.encode(text) == ids
        question, prefix = asked.ending.question, asked.ending.prefix
        assert text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n{prefix}")
        assert text.count(asked.value) == (asked.depth is not None)  # planted once, never in the question


def test_needles_lie_at_their_depths_and_sentences_are_used_once(tokenizer: Tokenizer, haystack: Haystack) -> None:
    bank = SentenceBank(haystack, tokenizer)
    prompt, puzzle = prompt_for(tokenizer, bank, 6000)
    for needle, found in zip(puzzle.needles, prompt.depths):
        assert found == pytest.approx(needle.depth, abs=0.06)
    text = tokenizer.decode(prompt.context)
    places = [text.index(needle.value) for needle in puzzle.needles]
    assert places == sorted(places)
    assert prompt.repetition == 1.0
    assert not prompt.wrapped
    long_ones = [s for s in bank.sentences if len(s) > 60 and s in text]
    assert long_ones
    assert all(text.count(sentence) == 1 for sentence in long_ones)


def test_short_and_long_contexts_of_a_sample_are_twins(tokenizer: Tokenizer, haystack: Haystack) -> None:
    bank = SentenceBank(haystack, tokenizer)
    (short, puzzle), (long, same) = prompt_for(tokenizer, bank, 2000), prompt_for(tokenizer, bank, 5000)
    assert puzzle == same
    assert short.tails == long.tails


def test_a_short_text_is_repeated_openly(tokenizer: Tokenizer) -> None:
    text = " ".join(f"Sentence number {n} says little." for n in range(40))
    bank = SentenceBank(Haystack("short", text), tokenizer)
    prompt, _ = prompt_for(tokenizer, bank, 4000)
    assert prompt.repetition > 1.5
    assert prompt.wrapped


def test_too_short_a_length_names_the_shortest(tokenizer: Tokenizer, haystack: Haystack) -> None:
    bank = SentenceBank(haystack, tokenizer)
    with pytest.raises(UserError, match="use a length of at least") as error:
        prompt_for(tokenizer, bank, 128)
    shortest = int(str(error.value).rsplit(" ", 1)[1])
    prompt, _ = prompt_for(tokenizer, bank, shortest)
    assert len(prompt.context) + len(prompt.tails[0]) == shortest - RESERVED
    with pytest.raises(UserError, match="1 tokens too short"):
        prompt_for(tokenizer, bank, shortest - 1)


def test_without_a_chat_template_it_is_a_completion(tmp_path: Path, haystack: Haystack) -> None:
    tokenizer = tiny_tokenizer(tmp_path, chat_template=None, add_bos_token=True)
    prompt, puzzle = prompt_for(tokenizer, SentenceBank(haystack, tokenizer), 2000)
    ids = prompt.context + prompt.tails[0]
    assert len(ids) == 2000 - RESERVED
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in ids[1:]
    ending = puzzle.questions[0].ending
    assert tokenizer.decode(ids).endswith(f"{ending.question}\n\n{ending.prefix}")


def test_two_bos_tokens_are_refused(tmp_path: Path, haystack: Haystack) -> None:
    twice = "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}\n"
    tokenizer = tiny_tokenizer(tmp_path, chat_template=twice)
    with pytest.raises(CheckFailed, match="two BOS tokens"):
        prompt_for(tokenizer, SentenceBank(haystack, tokenizer), 2000)


def test_a_vocabulary_that_merges_across_the_cut_still_fits(tmp_path: Path, haystack: Haystack) -> None:
    """A piece that joins the newline and the question's first letter: the common context ends where prompts differ."""
    write_tokenizer(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = saved["model"]["vocab"]
    vocab["ĊW"] = len(vocab)
    saved["model"]["merges"] = [["Ċ", "W"]]
    saved["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    tokenizer = Tokenizer.from_files({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    prompt, _ = prompt_for(tokenizer, SentenceBank(haystack, tokenizer), 2000)
    assert tokenizer.encode(tokenizer.decode(prompt.context + prompt.tails[2], skip_special=False)) == (
        prompt.context + prompt.tails[2]
    )
    assert {len(prompt.context) + len(tail) for tail in prompt.tails} == {2000 - RESERVED}


def test_keys_and_wording_are_not_those_of_training() -> None:
    from lcconvert.convert import needle_wordings, retrieval

    assert not set(key_words("train")) & set(key_words("valid"))
    training = " ".join(" ".join(topic) for topic in retrieval._TOPICS).lower()
    assert not [kind for kind in needle_wordings._KINDS if kind in training]


TWENTY = tuple((i + 0.5) / 20 for i in range(20))


def test_held_out_and_near_distractors_share_a_haystack_that_training_wording_does_not(tokenizer: Tokenizer) -> None:
    text, training = make_puzzles(tokenizer, ["heldout", "training", "multikey"], TWENTY, "0/0", shared=True)
    assert {question.wording for question in text.questions} == {"heldout", "multikey"}
    assert {question.wording for question in training.questions} == {"training"}
    assert len(text.needles) == 40
    assert len(training.needles) == 20
    facts = " ".join(needle.fact for needle in (*text.needles, *training.needles))
    for puzzle in (text, training):
        planted = {needle.value: needle for needle in puzzle.needles}
        for asked in puzzle.questions:
            assert (asked.value in planted) == (asked.depth is not None)
            assert asked.value not in asked.ending.question + asked.ending.prefix
            if asked.depth is not None:
                assert planted[asked.value].depth == asked.depth
    assert len(set(re.findall("[0-9]{7}", facts))) == 60
    valid = set(key_names("valid"))
    for needle in (*text.needles, *training.needles):
        words = needle.fact.rstrip(".").split()
        assert {f"{one} {two}" for one, two in pairwise(words)} & valid


def test_a_multikey_fact_has_four_near_distractors(tokenizer: Tokenizer) -> None:
    (text,) = make_puzzles(tokenizer, ["heldout", "multikey"], TWENTY, "0/0", shared=True)
    keys = [needle.fact.split(" is ")[0].removeprefix("The ").split(" of the ") for needle in text.needles]
    single, near = keys[:20], keys[20:]
    assert not {kind for kind, _ in single} & {kind for kind, _ in near}
    words = [word for _, name in single for word in name.split()]
    assert len(set(words)) == len(words)
    for kind, name in near:
        alike = [other for other_kind, other in near if (other_kind, other.split()[0]) == (kind, name.split()[0])]
        assert len(alike) == len(set(alike)) == NEAR + 1
        assert not set(name.split()) & set(words)
    controls = [question for question in text.questions if question.depth is None]
    assert len(controls) == 2
    assert not [needle for needle in text.needles if controls[1].ending.prefix in needle.fact]
    assert near[0][1].split()[0] in controls[1].ending.prefix  # it is near, too


@pytest.mark.parametrize("depths", [(0.5,), (0.0, 0.25, 0.5, 0.75, 1.0), TWENTY[:7]])
def test_alone_a_multikey_fact_brings_its_distractors(tokenizer: Tokenizer, depths: tuple[float, ...]) -> None:
    alone = make_puzzles(tokenizer, ["multikey"], depths, "0/0", shared=False)
    (shared,) = make_puzzles(tokenizer, ["multikey"], depths, "0/0", shared=True)
    assert [len(puzzle.needles) for puzzle in alone] == [NEAR + 1] * len(depths)
    assert [len(puzzle.questions) for puzzle in alone] == [2, *[1] * (len(depths) - 1)]
    assert set(shared.needles) == {needle for puzzle in alone for needle in puzzle.needles}
    assert len(shared.needles) % (NEAR + 1) == 0


def test_the_training_wording_is_that_of_training(tokenizer: Tokenizer, haystack: Haystack) -> None:
    """Its questions differ in length: the longest prompt has the length asked for, no prompt more."""
    (puzzle,) = make_puzzles(tokenizer, ["training"], TWENTY[:5], "0/0", shared=True)
    bank = SentenceBank(haystack, tokenizer)
    prompt = build_prompt(tokenizer, bank, length=4000, reserved=RESERVED, puzzle=puzzle, start=0)
    lengths = [len(prompt.context) + len(tail) for tail in prompt.tails]
    assert max(lengths) == 4000 - RESERVED
    assert min(lengths) > 4000 - RESERVED - 64
    text = tokenizer.decode(prompt.context + prompt.tails[0], skip_special=False)
    assert text.endswith("?<|im_end|>\n<|im_start|>assistant\n")
    for needle in puzzle.needles:
        assert text.count(needle.fact) == 1
    assert re.search("The clerk filed the [a-z]+ [a-z]+ under reference [0-9]{7}", text)


def test_haystack_sources(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Second part. It ends.")
    (tmp_path / "a.md").write_text("First part! It\n   goes on.\n\nA new paragraph without a stop\n\n-----\n")
    joined = Haystack.load(tmp_path)
    assert joined.sentences == [
        "First part!", "It goes on.", "A new paragraph without a stop", "Second part.", "It ends.",
    ]  # fmt: skip
    (tmp_path / "bad.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match=r"bad\.gz cannot be read"):
        Haystack.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        Haystack.load(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="holds no sentence"):
        SentenceBank(Haystack("empty", "---\n"), None)  # type: ignore[arg-type]


def test_the_bundled_text_says_that_it_is_in_the_public_domain(haystack: Haystack) -> None:
    assert "This document (the Jargon File) is in the public domain" in " ".join(haystack.text[:5000].split())
    assert haystack.sha256 == "40dfb4b98191a670a09a183d5798d50f243d23fdbd1495dcc0aca2ce5895ba97"


def test_the_excerpt_is_exact_and_too_short_a_text_is_an_error(tokenizer: Tokenizer, haystack: Haystack) -> None:
    ids = haystack.excerpt(tokenizer, 4096, "perplexity")
    assert len(ids) == 4096
    assert haystack.excerpt(tokenizer, 1024, "perplexity") == ids[:1024]
    with pytest.raises(UserError, match="perplexity asks for 512 tokens"):
        Haystack("short", "Too little. " * 8).excerpt(tokenizer, 512, "perplexity")
