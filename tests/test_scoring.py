"""Needle scoring: the two rules, the outcomes, early stopping, and Wilson's interval against known values."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcconvert.convert.scoring import candidates, decided, score, wilson


@pytest.mark.parametrize(
    ("answer", "finish", "points", "strict", "outcome"),
    [
        (" 1234567.", "stop", 1.0, True, "correct"),
        ("1234567", "length", 1.0, True, "correct"),  # complete although it touches the cap
        ("The code is 1234567, as given", "stop", 1.0, True, "correct"),
        ("7654321 and then 1234567", "stop", 1.0, False, "wrong"),  # substring credit only
        ("51234567", "stop", 1.0, False, "wrong"),  # digits run together
        ("7654321.", "stop", 0.0, False, "wrong"),
        ("I do not know.", "stop", 0.0, False, "wrong"),
        (" \n\x00", "stop", 0.0, False, "empty"),
        ("", "length", 0.0, False, "empty"),
        ("123456", "length", 0.0, False, "hit_cap"),  # cut inside the number
        ("Well, let me think about", "length", 0.0, False, "hit_cap"),
        ("999 and so on", "length", 0.0, False, "wrong"),  # it had answered before the cap
    ],
)
def test_single_reference(answer: str, finish: str, points: float, strict: bool, outcome: str) -> None:
    verdict = score(answer, ["1234567"], finish=finish)  # type: ignore[arg-type]
    assert (verdict.score, verdict.strict, verdict.outcome) == (points, strict, outcome)


def test_several_references_take_as_many_candidates() -> None:
    assert score("11, 22 and 33", ["22", "11"], finish="stop").strict
    listed = score("33, 22, 11", ["22", "11"], finish="stop")
    assert (listed.score, listed.strict, listed.outcome) == (1.0, False, "wrong")
    assert score("22", ["22", "11"], finish="stop").score == 0.5


def test_listing_every_number_scores_under_contains_only() -> None:
    numbers = [str(n) for n in range(1_000_000, 1_000_050)]
    verdicts = [score(" ".join(numbers), [n], finish="stop") for n in numbers[1:]]
    assert all(v.score == 1.0 and not v.strict for v in verdicts)


def test_candidates_at_the_end_need_a_finished_answer() -> None:
    assert candidates("12 and 345", finished=True) == ["12", "345"]
    assert candidates("12 and 345", finished=False) == ["12"]


def test_rulers_own_scores_on_recorded_answers() -> None:
    """The metrics "all" and "part" are RULER's string_match_all and string_match_part, as its scorer defines them."""
    rng = random.Random(0)
    for _ in range(200):
        wanted = [rng.choice(("1234567", "Amber-Lantern", "XKQZA", "77")) + "x" * rng.randint(0, 1) for _ in range(3)]
        answer = (
            rng.choice(("", "The answer: ")) + rng.choice((" ", "\x00", "\t")).join(rng.choices(wanted, k=2)).swapcase()
        )
        matches = [1.0 if wanted_one.lower() in answer.lower() else 0.0 for wanted_one in wanted]
        both = [score(answer, wanted, finish="stop", kind="pair", metric=metric).score for metric in ("all", "part")]
        assert both == [pytest.approx(sum(matches) / 3), max(matches)]


@pytest.mark.parametrize(
    ("answer", "references", "kind", "metric", "points", "strict"),
    [
        ("The old mill.\nIt stands", ["a mill", "The old mill"], "text", "part", 1.0, True),
        ("It was the old mill", ["old mill"], "text", "part", 1.0, False),
        ("no", ["old mill"], "text", "part", 0.0, False),
        (" 00c0ffee, deadbeef", ["deadbeef", "00c0ffee"], "node", "f1", 1.0, True),
        ("00c0ffee, 11111111", ["deadbeef", "00c0ffee"], "node", "f1", 0.5, False),
        ("00c0ffee deadbeef 11111111 22222222", ["deadbeef", "00c0ffee"], "node", "f1", 2 / 3, True),
        (' "tide tide lamp".', ["tide tide lamp"], "text", "ratio", 1.0, True),
        ("tide lamp", ["tide tide lamp"], "text", "ratio", 18 / 23, False),
        ("X1y2 No tide waits.\nMore", ["X1y2 No tide waits."], "text", "coded", 1.0, True),
        ("No tide waits.", ["X1y2 No tide waits."], "text", "coded", 0.0, False),
        ("The person is Marta.", ["Marta"], "person", "all", 1.0, True),
        ("Jonas, or Marta", ["Marta"], "person", "all", 1.0, False),
    ],
)  # fmt: skip
def test_other_metrics(answer: str, references: list[str], kind: Any, metric: Any, points: float, strict: bool) -> None:
    verdict = score(answer, references, finish="stop", kind=kind, metric=metric)
    assert (verdict.score, verdict.strict) == (pytest.approx(points), strict)
    assert score("", references, finish="stop", kind=kind, metric=metric).outcome == "empty"


@pytest.mark.parametrize(
    ("kind", "answer", "found"),
    [
        ("uuid", "It is 0CEF72A4-42c0-4f2a-b64b-6f34203fa833.", ["0CEF72A4-42c0-4f2a-b64b-6f34203fa833"]),
        ("uuid", "0cef72a4-42c0-4f2a-b64b-6f34203fa8331", []),
        ("variable", "VAR ABCDE, XYZABC and FGHIJ", ["ABCDE", "FGHIJ"]),
        ("pair", "1. amber-lantern 2. old-river-stone, x", ["amber-lantern", "old-river-stone"]),
        ("coded", "abcdef abc ghijkl.", ["abcdef", "ghijkl"]),
        ("path", "in `convert/tasks.py`, or ./a_b.py?", ["convert/tasks.py", "./a_b.py"]),
        ("name", "`run` and the functions A.run, _go", ["run", "A.run", "_go"]),
    ],
)
def test_candidates_of_each_kind(kind: Any, answer: str, found: list[str]) -> None:
    assert candidates(answer, finished=True, kind=kind) == found


@given(st.text("0123456789 .,x\n", max_size=12), st.text("0123456789 .,x\n", max_size=12))
def test_a_decided_verdict_never_changes(answer: str, more: str) -> None:
    if decided(answer, ["12"]):
        early, late = score(answer, ["12"], finish="length"), score(answer + more, ["12"], finish="length")
        assert early == late


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(5, 5, 0.5655, 1.0), (0, 5, 0.0, 0.4345), (8, 10, 0.4902, 0.9433), (0, 0, 0.0, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_known_values(k: int, n: int, low: float, high: float) -> None:
    assert wilson(k, n) == pytest.approx((low, high), abs=2e-4)
