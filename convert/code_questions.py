"""Questions over a Python source tree whose answers are computed from the syntax tree, not by a person or a model.

`code_defines`: which file defines X. `code_callers`: which functions call Y. Files are shown whole, in an order that
the sample decides; the one that the length cuts is shown up to a line, and nothing named in it is asked about. Only
what has one right answer is asked: names defined once in the whole tree, and calls that the syntax shows by that name.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lcconvert.convert.tasks import Ask, Case, Draft, Task
from lcconvert.runtime.errors import UserError

_HEAD = "Below are the files of a Python project, each after a line with its path. Questions about them follow.\n\n"
_DEFINES = "\n\nWhich of the files above defines `{name}`? Give its path."
_DEFINES_PREFIX = "`{name}` is defined in"
_CALLERS = "\n\nWhich functions in the files above call `{name}`? Give their names."
_CALLERS_PREFIX = "These functions call `{name}`:"
_MOST_CALLERS = 4
_ABSENT = ("parse_tide_table", "LanternRegistry", "fold_paper_crane", "weigh_anchor", "TideClock", "grind_lens", "Owl")
_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class SourceFile:
    """`defines`: functions and classes at the top level; `calls[callee]`: the functions that call it by that name."""

    path: str
    text: str = field(repr=False)
    defines: frozenset[str]
    calls: dict[str, frozenset[str]] = field(repr=False)

    @cached_property
    def lines(self) -> list[str]:
        return [f"# file: {self.path}\n", *self.text.rstrip("\n").splitlines(keepends=True), "\n", "\n"]

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(_WORD.findall(self.text))


@dataclass(frozen=True)
class SourceTree:
    name: str
    files: tuple[SourceFile, ...] = field(repr=False)

    @classmethod
    def load(cls, folder: Path) -> SourceTree:
        """Every readable .py file under `folder` in path order, hidden folders aside; UserError below two."""
        if not folder.is_dir():
            raise UserError(f"source tree {folder} is not a folder; give one with Python files")
        files = []
        for path in sorted(folder.rglob("*.py")):
            place = path.relative_to(folder)
            if any(part.startswith(".") for part in place.parts):
                continue
            try:
                files.append(read_source(place.as_posix(), path.read_text(encoding="utf-8")))
            except (SyntaxError, ValueError):  # a template, or another version's syntax: no answers can be computed
                continue
        if len(files) < 2:
            raise UserError(f"source tree {folder} holds {len(files)} readable .py files; give one with at least two")
        return cls(folder.resolve().name, tuple(files))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256("\0".join(f"{f.path}\0{f.text}" for f in self.files).encode()).hexdigest()

    @cached_property
    def owners(self) -> dict[str, list[str]]:
        """Paths of the files that define a name."""
        owners: dict[str, list[str]] = defaultdict(list)
        for file in self.files:
            for name in file.defines:
                owners[name].append(file.path)
        return owners


def read_source(path: str, text: str) -> SourceFile:
    """Parses one file; SyntaxError or ValueError when it is not Python."""
    calls: dict[str, set[str]] = defaultdict(set)
    tree = ast.parse(text)
    _collect(tree, None, calls)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defines = frozenset(node.name for node in tree.body if isinstance(node, kinds))
    return SourceFile(path, text, defines, {name: frozenset(callers) for name, callers in calls.items()})


def _collect(node: ast.AST, inside: str | None, calls: dict[str, set[str]]) -> None:
    """Fills `calls`: callee -> innermost named functions that call it, as `f(...)` or `something.f(...)`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and inside is not None:
            if isinstance(child.func, ast.Name):
                calls[child.func.id].add(inside)
            elif isinstance(child.func, ast.Attribute):
                calls[child.func.attr].add(inside)
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        _collect(child, child.name if named else inside, calls)  # type: ignore[attr-defined]


def _code(callers: bool) -> Callable[[Case], Callable[[int], Draft]]:
    def prepare(case: Case) -> Callable[[int], Draft]:
        if not isinstance(case.source, SourceTree):
            raise UserError(f"{case.task} asks about a source tree; give --source-tree FOLDER")
        tree = case.source
        files = list(tree.files)
        case.rng("order").shuffle(files)
        files.sort(key=lambda file: len(file.text) > case.length)  # what would fill the text alone comes last
        lines = [line for file in files for line in file.lines]

        def draft(n: int) -> Draft:
            units = lines[:n] or [files[0].lines[0]]
            whole, end = [], 0
            cut: SourceFile | None = None
            for file in files:
                if end >= len(units):
                    break
                end += len(file.lines)
                if end <= len(units):
                    whole.append(file)
                else:
                    cut = file
            choices = _callers(whole, cut, tree) if callers else _defines(whole, cut, tree)
            absent = tuple(_ask(callers, name, ()) for name in _ABSENT if not any(name in f.words for f in files))
            ask, depths = _choose(choices, callers, whole, case.rng("asked"))
            return Draft(_HEAD, units, ask, absent, depths, complete=n >= len(lines))

        return draft

    return prepare


def _defines(whole: list[SourceFile], cut: SourceFile | None, tree: SourceTree) -> dict[str, tuple[str, ...]]:
    return {
        name: (file.path,)
        for file in whole
        for name in sorted(file.defines)
        if len(tree.owners[name]) == 1 and len(name) > 4 and (cut is None or name not in cut.words)
    }


def _callers(whole: list[SourceFile], cut: SourceFile | None, tree: SourceTree) -> dict[str, tuple[str, ...]]:
    callers: dict[str, set[str]] = defaultdict(set)
    for file in whole:
        for name, found in file.calls.items():
            callers[name] |= found
    shown = {name for file in whole for name in file.defines if len(tree.owners[name]) == 1}
    return {
        name: tuple(sorted(found))
        for name, found in sorted(callers.items())
        if name in shown
        and len(found) <= _MOST_CALLERS
        and name not in found
        and (cut is None or name not in cut.words)
    }


def _choose(
    choices: dict[str, tuple[str, ...]], callers: bool, whole: list[SourceFile], rng: random.Random
) -> tuple[Ask, tuple[float, ...]]:
    """A question by lot, the same for as long as the text has it: the name with the smallest random rank."""
    if not choices:
        return _ask(callers, "nothing", ()), ()
    salt = rng.random()
    name = min(choices, key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest())
    at = next(i for i, file in enumerate(whole) if name in file.defines)
    before = sum(len(file.lines) for file in whole[:at])
    return _ask(callers, name, choices[name]), (before / max(sum(len(file.lines) for file in whole), 1),)


def _ask(callers: bool, name: str, answers: tuple[str, ...]) -> Ask:
    question, prefix = (_CALLERS, _CALLERS_PREFIX) if callers else (_DEFINES, _DEFINES_PREFIX)
    return Ask(question.format(name=name), prefix.format(name=name), answers)


CODE = {
    "code_defines": Task(_code(False), "path", 48),
    "code_callers": Task(_code(True), "name", 64),
}
