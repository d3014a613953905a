"""`lcconvert run RECIPE`: extend, quantize, validate, serve; each stage is skipped when it is complete and unchanged.

A stage's stamp in OUT/run.json is a hash of its settings and of what it reads, with the state of what it wrote. Only
folders that a stamp names are ever replaced, so a run never deletes what it did not make.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.compare import comparison_table, render_costs, render_table
from lcconvert.convert.extend import extend
from lcconvert.convert.quantize import quantize
from lcconvert.convert.recipe import Recipe, load_recipe
from lcconvert.convert.serve_check import serve_once
from lcconvert.convert.validate import validate
from lcconvert.convert.validate_config import ValidateConfig
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.spec import ModelSpec


def run_recipe(name: str, out: Path) -> dict[str, Any]:
    """Runs every stage of the recipe into `out`; returns artifact, report, answer and table, also in OUT/result.json.

    Interrupted anywhere, the same command goes on where it stopped.
    """
    recipe = load_recipe(name)
    log = RunLog.open(out, recipe)
    source = recipe.source
    extended, final = out / "extended", out / recipe.quantize.variant
    examined = tuple(str(path) for path in (recipe.validation.haystack, recipe.validation.perplexity_text) if path)
    training = recipe.extend.model_copy(update={"held_out": (*recipe.extend.held_out, *examined)})
    log.stage("extend", [training], [source], extended, lambda: extend(source, extended, training))
    log.stage("quantize", [recipe.quantize], [extended], final, lambda: quantize(str(extended), final, recipe.quantize))
    reports: dict[str, Any] = {}
    earlier: tuple[Path, ...] = ()
    for label, subject, against in (
        ("source", source, None),
        ("extended", extended, source),
        (recipe.quantize.variant, final, extended),
    ):
        folder = out / "validation" if label == "source" else Path(subject) / "validation"
        limit = ModelSpec.from_config(open_checkpoint(str(subject)).config).max_position
        config = within(recipe.validation, limit).model_copy(
            update={"against": against and str(against), "beside": earlier}
        )
        inputs = [subject] if against is None else [subject, against]
        inputs += [path / "report.json" for path in earlier]
        log.stage(f"validate {label}", [config], inputs, folder, partial(validate, str(subject), folder, config))
        reports[label] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        earlier = (*earlier, folder)
    answer = None
    if recipe.serve is not None:
        served = out / "served.json"
        log.stage("serve", [recipe.serve], [final], served, partial(serve_once, final, served, recipe.serve))
        answer = json.loads(served.read_text(encoding="utf-8"))
    result = {
        "recipe": recipe.name,
        "artifact": str(final),
        "report": str(final / "validation" / "report.html"),
        "answer": answer,
        "table": comparison_table(reports),
    }
    write_json(out / "result.json", result)
    return result


def within(config: ValidateConfig, context: int) -> ValidateConfig:
    """The settings less the lengths past `context` tokens: the source is measured inside its own window."""
    longest = config.perplexity_context and min(config.perplexity_context, context)
    lengths = tuple(length for length in config.lengths if length <= context)
    return config.model_copy(update={"lengths": lengths, "perplexity_context": longest})


def render_result(result: dict[str, Any]) -> str:
    """The end of a run, for a terminal."""
    lines = [f"artifact: {result['artifact']}", f"report:   {result['report']}"]
    if result["answer"]:
        lines += [f"asked over HTTP: {result['answer']['question']}", f"answered:        {result['answer']['answer']}"]
    return "\n".join([*lines, "", render_table(result["table"]), "", render_costs(result["table"])])


@dataclass
class RunLog:
    """OUT/run.json: the recipe and the stamp of every finished stage."""

    path: Path
    recipe: str
    stamps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, out: Path, recipe: Recipe) -> RunLog:
        path = out / "run.json"
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file, expected a folder; give another --out")
        if path.is_file():
            return cls(path, recipe.name, json.loads(path.read_text(encoding="utf-8"))["stamps"])
        if out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and holds no earlier run; give a new folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        return cls(path, recipe.name)

    def stage(self, name: str, configs: list[Any], inputs: list[Any], output: Path, work: Callable[[], Any]) -> None:
        """Does `work`, which writes `output`, unless the stamp says it was done with these settings and inputs."""
        key = _digest([version("lcconvert"), *(c.model_dump(mode="json") for c in configs), *map(state, inputs)])
        stamp = self.stamps.get(name)
        if stamp and stamp["key"] != key:  # ours, and out of date
            for old in (output, output.with_name(output.name + ".partial")):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        elif stamp and output.exists() and stamp["output"] in (state(output), _renamed(output)):
            click.echo(f"{name}: up to date", err=True)
            self._stamp(name, key, state(output))
            return
        click.echo(f"{name}: running", err=True)
        self._stamp(name, key, None)
        work()
        self._stamp(name, key, state(output))

    def _stamp(self, name: str, key: str, output: Any) -> None:
        self.stamps[name] = {"key": key, "output": output}
        write_json(self.path, {"recipe": self.recipe, "stamps": self.stamps})


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` in one step."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def state(subject: str | Path) -> Any:
    """What identifies a stage's input or output: names, sizes and times of the files that decide its content."""
    path = Path(subject)
    if not path.exists():  # a Hub id or package
        source = open_checkpoint(str(subject))
        where = getattr(source, "path", None)
        return [str(subject), state(where) if where else source.name]
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if _decides(p))
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _renamed(output: Path) -> Any:
    """None for a checkpoint folder: it appears only when complete, so a kill just before its stamp loses nothing."""
    return None if (output / "config.json").is_file() else "incomplete"


def _decides(path: Path) -> bool:
    return path.is_file() and (path.name in ("config.json", "report.json") or path.suffix == ".safetensors")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
