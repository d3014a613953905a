"""Contexts kept between requests: what is reused, what has to go, and that no greedy answer changes by it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from serving import CONTEXT, running, tiny_engine

from lcconvert.runtime.engine import Engine
from lcconvert.runtime.prefix_cache import Lease, PrefixCache, common_tokens
from lcconvert.runtime.sampler import SamplingParams

DOCUMENT = "".join(chr(97 + number * number % 23) for number in range(700))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return tiny_engine(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cache(engine) -> Iterator[PrefixCache]:
    cache = PrefixCache(engine)
    yield cache
    cache.clear()
    assert not any(engine.pool.users)


def ids(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, 260, size).astype(np.int32)


def read(cache: PrefixCache, engine: Engine, prompt: np.ndarray, tokens: int | None = None) -> Lease:
    """A request that is read and kept, and has not ended."""
    lease = cache.lease(prompt, tokens or len(prompt))
    assert lease is not None
    engine.prefill(lease.sequence, prompt[lease.cached :].tolist())
    cache.keep(lease)
    return lease


def test_common_tokens_are_whole_pages() -> None:
    a = ids(0, 700)
    b = a.copy()
    assert common_tokens(a, b) == 640
    b[300] += 1
    assert common_tokens(a, b) == 256
    b[127] += 1
    assert common_tokens(a, b) == 0
    assert common_tokens(a, a[:100]) == 0


def test_a_prompt_begins_with_what_is_kept_of_another(cache, engine) -> None:
    first = ids(1, 600)
    cache.end(read(cache, engine, first))
    assert cache.kept_tokens == 3 * 128  # the first page is not in the pool
    same = cache.lease(first, 600)
    branch = cache.lease(np.concatenate([first[:300], ids(2, 300)]), 600)
    whole_pages = cache.lease(first[:512], 512)  # a token must be left to read
    other = cache.lease(ids(3, 500), 500)
    assert [lease.cached for lease in (same, branch, whole_pages, other)] == [512, 256, 384, 0]
    assert same.sequence.ids == first[:512].tolist()
    for lease in (same, branch, whole_pages, other):
        cache.end(lease)


def test_a_continued_context_takes_the_place_of_its_beginning(cache, engine) -> None:
    first = ids(1, 300)
    longer = np.concatenate([first, ids(2, 300)])
    cache.end(read(cache, engine, first))
    cache.end(read(cache, engine, longer))
    assert len(cache._kept) == 1
    assert cache.longest(longer)[1] == 512
    assert cache.longest(first)[1] == 256


def test_least_recently_used_contexts_make_room(cache, engine) -> None:
    prompts = [ids(seed, 640) for seed in range(3)]  # five pages each of the sixteen, four of them in the pool
    for prompt in prompts:
        cache.end(read(cache, engine, prompt))
    assert cache.evicted == 0
    cache.end(cache.lease(prompts[0], 640))  # now the second is the oldest
    cache.end(read(cache, engine, ids(9, 640)))
    assert cache.evicted == 1
    assert [cache.longest(prompt)[1] for prompt in prompts] == [512, 0, 512]
    whole = cache.lease(ids(10, CONTEXT), CONTEXT)
    assert whole is not None
    assert cache.kept_tokens == 0
    cache.end(whole)


def test_room_that_is_promised_is_not_given_twice_and_shared_pages_count_once(cache, engine) -> None:
    prompt = ids(1, 1500)
    first = read(cache, engine, prompt, 1600)
    assert cache.lease(ids(2, 600), 600) is None
    again = cache.lease(prompt, 1600)  # eleven of its pages are those of the running one
    assert again is not None
    assert again.cached == 1408
    assert cache.lease(ids(2, 300), 400) is None
    cache.end(again)
    cache.end(first)
    assert cache.kept_tokens == 10 * 128
    third = cache.lease(ids(2, 600), 600)
    assert third is not None
    cache.end(third)


def test_the_budget(engine) -> None:
    for budget, kept in ((0, 0), (200, 0), (4 * 128, 384), (None, 768)):
        cache = PrefixCache(engine, budget)
        for seed in range(2):
            cache.end(read(cache, engine, ids(seed, 600)))
        assert cache.kept_tokens == kept
        cache.clear()
    assert not any(engine.pool.users)


def test_answers_over_http_are_those_of_a_fresh_engine(engine) -> None:
    """Questions on one document, and a chat that grows: every answer as without reuse, and most tokens not read."""

    def fresh(prompt: str) -> str:
        tokens = engine.tokenizer.encode(prompt, add_special=True)
        return "".join(piece.text for piece in engine.generate(tokens, SamplingParams(max_tokens=40)))

    with running(engine) as url, httpx.Client(base_url=url, timeout=30) as http:

        def ask(prompt: str) -> tuple[str, int]:
            body = {"prompt": prompt, "max_tokens": 40, "temperature": 0}
            reply = http.post("/v1/completions", json=body).json()
            return reply["choices"][0]["text"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]

        grown = DOCUMENT
        for turn, question in enumerate(["Who?", "What is it?", "Who?", "And why " + "so " * 100 + "?"]):
            answer, cached = ask(DOCUMENT + question)
            assert answer == fresh(DOCUMENT + question)
            assert cached == (640 if turn else 0)
            grown += question
            answer, _ = ask(grown)
            assert answer == fresh(grown)
            grown += answer
        changed = DOCUMENT[:300] + "#" + DOCUMENT[301:]
        assert ask(changed) == (fresh(changed), 256)
        metrics = http.get("/metrics").text
    assert 'lcconvert_prefix_lookups_total{result="miss"} 1.0' in metrics
    assert 'lcconvert_prefix_lookups_total{result="hit"} 8.0' in metrics
    assert not any(engine.pool.users)
