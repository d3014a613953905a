"""The page, the pictures and the comparison table: made from report.json alone, self-contained, honest about gaps."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from reports import tiny_report

from lcconvert.convert.compare import comparison_table, render_claim, render_costs, render_table
from lcconvert.convert.curves import line_label, own_curves
from lcconvert.convert.report import render, write_report
from lcconvert.convert.results import NeedleCell, PlainPerplexity, Report
from lcconvert.runtime.errors import UserError


def full_report(**artifact: Any) -> Report:
    """Two lengths x three depths, one length out of memory, and a name that would be markup."""
    report = tiny_report("a" * 64)
    assert report.perplexity is not None
    cells = [
        NeedleCell(
            length=length, depth=depth, state="measured" if length < 4096 else "out of memory",
            n=2 * (length < 4096), strict=length < 4096, contains=length < 4096, hit_cap=length < 4096,
        )
        for length in (1024, 4096)
        for depth in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    (needles,) = report.needles
    last = needles.by_length[1].model_copy(update={"state": "out of memory", "n": 0, "strict": 0, "contains": 0})
    return report.model_copy(
        update={
            "artifact": report.artifact.model_copy(update={"name": "runs/<b>flash</b>"} | artifact),
            "needles": [needles.model_copy(update={"cells": cells, "by_length": [needles.by_length[0], last]})],
            "perplexity": report.perplexity.model_copy(
                update={"plain": PlainPerplexity(context=2048, nll=3.6, ppl=36.6)}
            ),
        }
    )


class Page(HTMLParser):
    """Open tags, attributes and text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += " "
        self.links += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "action", "style")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_no_network_and_escapes_what_it_shows() -> None:
    files = render(full_report())
    html = files["report.html"].decode()
    page = Page(html)
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html
    pictures = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in page.links]
    assert pictures == [files["needles.png"], files["perplexity.png"]]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert "<b>flash</b>" in page.text  # shown as text
    text = " ".join(page.text.split())
    for shown in ("Works up to 4K tokens", "5/5", "out of memory", "3.1%", "native window 2K", "int4", "a" * 64):
        assert shown in text


def test_the_page_says_when_nothing_is_validated_and_a_check_failed() -> None:
    report = full_report()
    claim = report.claim.model_copy(update={"validated": None})
    checks = [{"name": "needles_min", "limit": 0.8, "value": None, "passed": False}]
    data = report.model_copy(update={"claim": claim}).model_dump() | {"checks": checks}
    text = " ".join(Page(render(Report.model_validate(data))["report.html"].decode()).text.split())
    assert "No context length is validated." in text
    assert "needles_min 0.8 – failed" in text


def test_sections_that_were_not_measured_are_absent() -> None:
    report = full_report().model_copy(update={"needles": [], "perplexity": None, "agreement": None, "cost": []})
    files = render(report)
    assert set(files) == {"report.html"}
    assert not re.search("<h2>(Needles|Perplexity|Agreement|Memory)", files["report.html"].decode())


@pytest.mark.parametrize("native", [512, 1024, 2048, 4096, 65536])
def test_pictures_draw_with_the_native_window_anywhere(native: int) -> None:
    assert render(full_report(native_context=native))["needles.png"].startswith(b"\x89PNG")


def test_other_reports_are_drawn_beside_this_one(tmp_path: Path) -> None:
    source = tiny_report("b" * 64)
    source = source.model_copy(update={"artifact": source.artifact.model_copy(update={"variant": "source"})})
    assert "scores.png" in render(source)
    assert "costs.png" not in render(source)  # one length only
    alone, other = full_report(), own_curves(source)
    assert "scores.png" not in render(alone)
    assert [(point.length, point.share) for point in other.curves[0].points] == [(1024, 1.0), (4096, 0.8)]
    longer = source.cost[0].model_copy(update={"length": 8192, "prefill_seconds": 20.0})
    other = other.model_copy(update={"cost": [*other.cost, longer]})
    files = render(alone.model_copy(update={"beside": [other]}))
    assert files["scores.png"].startswith(b"\x89PNG")
    assert files["costs.png"].startswith(b"\x89PNG")
    text = " ".join(Page(files["report.html"].decode()).text.split())
    assert "Drawn beside this report: source (demo, bbbbbbbbbbbb)" in text


@pytest.mark.parametrize(
    ("attentions", "labels"),
    [(("dense", "hybrid"), ["flash, dense", "flash, hybrid"]), (("dense", "dense"), ["flash (a)", "flash (b)"])],
)
def test_lines_can_be_told_apart(attentions: tuple[str, str], labels: list[str]) -> None:
    one, two = (
        own_curves(tiny_report("c" * 64)).model_copy(update={"name": name, "attention": attention})
        for name, attention in zip(("runs/a", "runs/b/"), attentions)
    )
    assert [line_label(shown, [one, two]) for shown in (one, two)] == labels
    assert line_label(one, [one]) == "flash"


def test_both_verdicts_are_shown() -> None:
    report = full_report()
    claim = report.claim.model_copy(update={"validated": 1024, "by_perplexity": 2048})
    report = report.model_copy(update={"claim": claim})
    text = " ".join(Page(render(report)["report.html"].decode()).text.split())
    assert "By needles 1K By perplexity alone 2K" in text
    assert render_claim(report.model_dump()) == "validated by needles: 1K; by perplexity alone: 2K"


def test_report_json_makes_everything_again(tmp_path: Path) -> None:
    write_report(full_report(), tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(first) == {"report.json", "report.html", "needles.png", "perplexity.png"}
    again = render(Report.read(tmp_path))
    assert again == {name: first[name] for name in again}


def test_a_damaged_report_names_the_field(tmp_path: Path) -> None:
    data = json.loads(full_report().model_dump_json())
    data["artifact"]["bytes"] = "many"
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"report\.json: artifact\.bytes: "):
        Report.read(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        Report.read(tmp_path / "absent")


def test_comparison_table() -> None:
    flash = full_report()
    source = flash.model_copy(
        update={
            "needles": [],
            "claim": flash.claim.model_copy(update={"validated": None}),
            "artifact": flash.artifact.model_copy(update={"bytes": 269_000_000}),
            "kv_bytes_per_token": 23_040.0,
        }
    )
    rows = comparison_table({name: r.model_dump(mode="json") for name, r in (("source", source), ("flash", flash))})
    assert rows[1] == {
        "checkpoint": "flash", "perplexity_2k": 36.6, "found": 5, "asked": 5,
        "by_length": [{"length": 1024, "found": 5, "asked": 5}], "validated": 4096, "bytes_on_disk": 98_765_432,
        "kv_bytes_per_token": 6144.0,
        "cost": [{"length": 4096, "prefill_seconds": 8.25, "decode_tokens_per_second": 21.5, "peak_bytes": None}],
    }  # fmt: skip
    rows = json.loads(json.dumps(rows))  # as a recipe's result.json holds them
    assert render_table(rows).splitlines() == [
        "checkpoint  perplexity 2K  needles 1K  validated to  size on disk  KV bytes/token",
        "----------  -------------  ----------  ------------  ------------  --------------",
        "source              36.60           -             -        269 MB          23,040",
        "flash               36.60         5/5            4K       98.8 MB           6,144",
    ]
    assert render_costs(rows).splitlines()[2:] == [
        "source           4K       8.25             21.5            -",
        "flash            4K       8.25             21.5            -",
    ]
