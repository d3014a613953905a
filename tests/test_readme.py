"""README figures come from files: the demo's end is the rendering of the result that a run of it wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lcconvert.convert.cli import cli
from lcconvert.convert.compare import comparison_table, render_costs, render_table
from lcconvert.convert.run import render_result

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    return README.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]


def test_h100_figures_are_those_of_the_committed_reports() -> None:
    files = {label: ROOT / "recipes" / f"h100-{label}.json" for label in ("extended", "flash")}
    rows = comparison_table({label: json.loads(path.read_text(encoding="utf-8")) for label, path in files.items()})
    assert render_table(rows) in block("h100")
    assert render_costs(rows) in block("h100")


def test_demo_figures_are_those_of_the_committed_result() -> None:
    result = json.loads((ROOT / "recipes" / "smoke-result.json").read_text(encoding="utf-8"))
    assert render_result(result) in block("demo")


def test_policy_figures_are_those_of_the_committed_reports() -> None:
    """Hybrid attention against dense on the same artifact: needles and the share of equal next tokens."""

    def report(name: str) -> dict:
        return json.loads((ROOT / "tests" / "bench" / "policy" / f"{name}.json").read_text(encoding="utf-8"))

    def found(name: str) -> list[str]:
        return [f"{row['strict']}/{row['n']}" for row in report(name)["needles"]["by_length"]]

    assert found("dense") == found("hybrid-32k")
    assert f"{found('dense')[0]} at 32K and {found('dense')[1]} at 128K" in README
    for name, length in (("hybrid-32k", "32K"), ("hybrid-128k", "128K")):
        share = report(name)["agreement"]["prefill"]["top1"]
        assert re.search(rf"{share:.1%} of\s(the\spositions\sof\s)?{length}", README)
    assert f"{report('hybrid-128k')['agreement']['by_position'][0]['top1']:.1%}" in README


def test_links_and_commands_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
    verbs = (ROOT / "Makefile").read_text(encoding="utf-8")
    for verb in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{verb}:" in verbs
    for verb in re.findall(r"`lcconvert (\w+)", README):
        assert verb in cli.commands


def test_the_tree_names_files_that_exist() -> None:
    tree = README.partition("## The tree")[2].partition("```")[2].partition("```")[0]
    files = {path.stem for folder in ("convert", "runtime", "kernels") for path in (ROOT / folder).glob("*.py")}
    named = [word for line in tree.splitlines() for word in re.split(r"\s{3,}", line)[0].split() if "/" not in word]
    assert len(files & set(named)) > 20
