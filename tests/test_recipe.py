"""Recipes and the runner: strict reading, stages skipped when nothing changed, redone when something did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import write_tiny

from lcconvert.convert.recipe import load_recipe, shipped
from lcconvert.convert.run import render_result, run_recipe
from lcconvert.runtime.errors import UserError

TEXT = """
name = "tiny"
source = "{source}"
[extend]
context = "4k"
[quantize]
variant = "flash"
samples = 1
length = 512
[validate]
lengths = [1536]
depths = [0.5]
max_new_tokens = 16
perplexity_context = 512
agreement_tokens = 128
decode_tokens = 4
[serve]
question = "hello?"
max_tokens = 4
"""


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_complete(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.quantize.kv_scheme in ("int4", "fp8")
    assert recipe.extend.plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("variant", "varient"), r"\[quantize\]: unknown key 'varient'; known keys are variant"),
        (("name = ", "nom = "), "unknown key 'nom'"),
        (('context = "4k"', ""), r"\[extend\]: context is missing"),
        (('"4k"', '"four"'), r"context is 'four'|'four'"),
        (("[serve]", "[serve"), "is not TOML"),
        (('"flash"', '"turbo"'), "'turbo'"),
        (("[validate]", "[check]"), "unknown key 'check'"),
    ],
)
def test_faults_name_the_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(TEXT.format(source="x").replace(*change))
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))


def test_a_run_skips_what_is_done_and_redoes_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny(tmp_path / "src")
    recipe = tmp_path / "r.toml"
    recipe.write_text(TEXT.format(source=source))
    out = tmp_path / "out"
    first = run_recipe(str(recipe), out)
    log = capsys.readouterr().err
    assert "up to date" not in log
    assert first["answer"]["usage"]["completion_tokens"] <= 4
    text = render_result(first)
    for label, folder in (("source", out), ("extended", out / "extended"), ("flash", out / "flash")):
        assert label in text
        assert json.loads((folder / "validation" / "report.json").read_text())
    assert (out / "flash" / "lcconvert.json").is_file()
    assert json.loads((out / "result.json").read_text()) == first

    run_recipe(str(recipe), out)
    log = capsys.readouterr().err
    assert "running" not in log
    assert log.count("up to date") == 6

    recipe.write_text(TEXT.format(source=source).replace('"hello?"', '"why?"'))
    run_recipe(str(recipe), out)
    log = capsys.readouterr().err
    assert log.count("running") == 1
    assert "serve: running" in log

    (out / "flash" / "config.json").write_bytes((out / "flash" / "config.json").read_bytes() + b"\n")
    recipe.write_text(TEXT.format(source=source).replace("samples = 1", "samples = 2"))
    run_recipe(str(recipe), out)
    log = capsys.readouterr().err
    assert "extend: up to date" in log
    assert "validate extended: up to date" in log
    for name in ("quantize", "validate flash", "serve"):
        assert f"{name}: running" in log


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(TEXT.format(source="x"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no earlier run"):
        run_recipe(str(recipe), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]
