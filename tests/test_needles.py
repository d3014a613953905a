"""Needle prompts: the exact length contract, where needles lie, one haystack for many questions, no repetition."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tokenizer

from lcconvert.convert.haystack import Haystack, SentenceBank
from lcconvert.convert.needle_prompt import Needle, Prompt, build_prompt, choose_needles
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


def prompt_for(tokenizer: Tokenizer, bank: SentenceBank, length: int, sample: int = 0) -> tuple[Prompt, list[Needle]]:
    needles, absent = choose_needles(tokenizer, key_names("valid"), DEPTHS, random.Random(sample))
    questions = [*(needle.subject for needle in needles), absent.subject]
    start = bank.start_of(sample, 3)
    prompt = build_prompt(
        tokenizer, bank, length=length, reserved=RESERVED, needles=needles, questions=questions, start=start
    )
    return prompt, needles


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
    prompt, needles = prompt_for(tokenizer, SentenceBank(haystack, tokenizer), 3000)
    for needle, tail in zip(needles, prompt.tails):
        ids = prompt.context + tail
        text = tokenizer.decode(ids, skip_special=False)
        assert tokenizer.encode(text) == ids
        question, prefix = f"What is the {needle.subject}?", f"The {needle.subject} is"
        assert text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n{prefix}")
        assert text.count(needle.value) == 1  # planted once, never in the question


def test_needles_lie_at_their_depths_and_sentences_are_used_once(tokenizer: Tokenizer, haystack: Haystack) -> None:
    bank = SentenceBank(haystack, tokenizer)
    prompt, needles = prompt_for(tokenizer, bank, 6000)
    for needle, found in zip(needles, prompt.depths):
        assert found == pytest.approx(needle.depth, abs=0.06)
    text = tokenizer.decode(prompt.context)
    places = [text.index(needle.value) for needle in needles]
    assert places == sorted(places)
    assert prompt.repetition == 1.0
    assert not prompt.wrapped
    long_ones = [s for s in bank.sentences if len(s) > 60 and s in text]
    assert long_ones
    assert all(text.count(sentence) == 1 for sentence in long_ones)


def test_short_and_long_contexts_of_a_sample_are_twins(tokenizer: Tokenizer, haystack: Haystack) -> None:
    bank = SentenceBank(haystack, tokenizer)
    (short, needles), (long, same) = prompt_for(tokenizer, bank, 2000), prompt_for(tokenizer, bank, 5000)
    assert needles == same
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
    prompt, needles = prompt_for(tokenizer, SentenceBank(haystack, tokenizer), 2000)
    ids = prompt.context + prompt.tails[0]
    assert len(ids) == 2000 - RESERVED
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in ids[1:]
    assert tokenizer.decode(ids).endswith(f"What is the {needles[0].subject}?\n\nThe {needles[0].subject} is")


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
    from lcconvert.convert import needle_prompt, retrieval

    assert not set(key_words("train")) & set(key_words("valid"))
    training = " ".join(" ".join(topic) for topic in retrieval._TOPICS).lower()
    assert not [kind for kind in needle_prompt._KINDS if kind in training]


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
