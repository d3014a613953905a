"""The rules of the tree that no type checker holds."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"kernels": {"kernels"}, "runtime": {"kernels", "runtime"}, "convert": {"kernels", "runtime", "convert"}}
LIGHT = ("transformers", "accelerate", "onnx", "gguf", "compressed_tensors", "matplotlib", "huggingface_hub")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        for name in imports(path):
            if name.startswith("lcconvert."):
                assert name.split(".")[1] in ALLOWED[folder], f"{path} imports {name}"
            elif folder in ("kernels", "runtime"):
                assert name.split(".")[0] not in LIGHT, f"{path} imports {name}"


def test_wheel_lists_every_folder() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {
        p.name for p in ROOT.iterdir() if p.is_dir() and list(p.glob("*.py")) and p.name != "tests" and p.name[0] != "."
    }
    assert set(settings["packages"]) == {f"lcconvert.{name}" for name in folders}
    for name in folders:
        data = {pattern.removesuffix("/*") for pattern in settings["package-data"].get(f"lcconvert.{name}", [])}
        nested = [p for p in (ROOT / name).iterdir() if p.is_dir() and p.name not in {"__pycache__", *data}]
        assert not nested, f"{nested[0]} would be left out of the wheel"


def test_no_package_shadows_another() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()  # would hide PyPI's `kernels` from transformers
    assert not (ROOT / "tests" / "__init__.py").exists()
