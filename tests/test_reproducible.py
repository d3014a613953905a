"""The same source, recipe and seed give the same bytes, wherever and whenever; and every changed byte is noticed.

The two conversions run in processes of their own, with another hash seed, time zone, locale, working folder and output
folder, from copies of the source and the texts at other paths.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import write_tiny

from lcconvert.convert.cli import cli
from lcconvert.convert.extend import extend
from lcconvert.convert.extend_config import ExtendConfig
from lcconvert.convert.hashing import verify_files
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.sidecar import Sidecar

CONVERT = """
import sys
from pathlib import Path
from lcconvert.convert.export import ExportConfig, export
from lcconvert.convert.extend import extend
from lcconvert.convert.extend_config import ExtendConfig
from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig

out, work = Path(sys.argv[1]), Path(sys.argv[2])
training = {"steps": 3, "seq_len": 512, "accumulate": 2, "retrieval_share": 0.5, "save_every": 2}
long = str(extend(str(work / "source"), out / "long", ExtendConfig(
    context="8k", data=(str(work / "text"), "module:this"), device="cpu", **training)))
calibrated = {"samples": 2, "length": 512, "calibration": (str(work / "text"),), "device": "cpu"}
flash = str(quantize(long, out / "flash", QuantizeConfig(variant="flash", wide=("re:.*q_proj",), **calibrated)))
quantize(long, out / "pro", QuantizeConfig(variant="pro", **calibrated))
export(long, out / "safetensors", ExportConfig(precision="fp16", max_shard_bytes=60_000))
export(flash, out / "onnx", ExportConfig(format="onnx", precision="int4"))
export(flash, out / "gguf", ExportConfig(format="gguf"))
"""
ARTIFACTS = ("long", "flash", "pro", "safetensors", "onnx", "gguf")


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of the same conversions."""
    root = tmp_path_factory.mktemp("reproducible")
    first = root / "first"
    write_tiny(first / "source")
    (first / "source" / "LICENSE").write_text("MIT License")
    (first / "text").mkdir()
    for i in range(4):
        text = "\n\n".join(f"On day {day} the river was {day * i % 7} feet high." for day in range(120))
        (first / "text" / f"{i}.txt").write_text(text)
    second = root / "another place" / "second"
    shutil.copytree(first, second)
    surroundings = (
        {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C.UTF-8"},
        {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C"},
    )
    running = []
    for work, around in zip((first, second), surroundings):
        command = [sys.executable, "-c", CONVERT, str(work / "out"), str(work)]
        environment = os.environ | around | {"OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(command, env=environment, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    ends = [(process.communicate()[1].decode(), process.returncode) for process in running]
    assert [code for _, code in ends] == [0, 0], ends
    return first / "out", second / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_two_conversions_give_the_same_bytes(twice: tuple[Path, Path], artifact: str) -> None:
    first, second = (contents(out / artifact) for out in twice)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []
    assert "lcconvert.json" in first


@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_a_fresh_artifact_verifies_and_names_no_place(twice: tuple[Path, Path], artifact: str) -> None:
    folder = twice[0] / artifact
    assert set(verify_files(folder)) == set(contents(folder))
    sidecar = Sidecar.parse((folder / "lcconvert.json").read_bytes(), artifact)
    assert str(twice[0].parent) not in json.dumps(sidecar.provenance)
    assert (sidecar.provenance["source"], sidecar.provenance["license"]) == ("source", "mit")


def test_another_seed_gives_other_bytes(twice: tuple[Path, Path], tmp_path: Path) -> None:
    work = twice[0].parent
    settings = json.loads((twice[0] / "long" / "lcconvert.json").read_text())["provenance"]["config"]
    config = ExtendConfig(**{**settings, "data": (str(work / "text"), "module:this"), "seed": 1})
    other = extend(str(work / "source"), tmp_path / "long", config)
    assert contents(other)["model.safetensors"] != contents(twice[0] / "long")["model.safetensors"]


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def flip(path: Path) -> None:
    """One bit in the middle, so size and header stay."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def rewrite_policy(path: Path) -> None:
    value = json.loads(path.read_text())
    value["attention"]["local_blocks"] += 1
    path.write_text(json.dumps(value))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "model.safetensors": (flip, "changed"),
    "config.json": (append, "changed"),
    "lcconvert.json": (rewrite_policy, "changed"),
    "tokenizer.json": (Path.unlink, "missing"),
    "training/loss.jsonl": (Path.unlink, "missing"),
    "pytorch_model.bin": (Path.touch, "extra"),
    "training/optimizer.pt": (Path.touch, "extra"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_whatever_differs_is_named(twice: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(twice[0] / "flash" if name == "lcconvert.json" else twice[0] / "long", folder)
    damage, kind = DAMAGE[name]
    damage(folder / name)
    with pytest.raises(CheckFailed) as caught:
        verify_files(folder)
    assert f"({kind}: {name})" in str(caught.value)


def test_all_differences_are_named_at_once(twice: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(twice[0] / "long", folder)
    for name, (damage, _) in DAMAGE.items():
        if name != "lcconvert.json":
            damage(folder / name)
    with pytest.raises(CheckFailed) as caught:
        verify_files(folder)
    assert (
        "(changed: config.json, model.safetensors; missing: tokenizer.json, training/loss.jsonl; "
        "extra: pytorch_model.bin, training/optimizer.pt)"
    ) in str(caught.value)


def test_what_comes_after_the_conversion_may_change(twice: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(twice[0] / "flash", folder)
    for name in ("README.md", "NOTICE", ".gitattributes", "validation/report.json", ".cache/huggingface/x.lock"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("later")
    sidecar = Sidecar.parse((folder / "lcconvert.json").read_bytes(), "copy")
    claimed = sidecar.context.model_copy(update={"validated": 1024})
    (folder / "lcconvert.json").write_bytes(sidecar.model_copy(update={"context": claimed}).to_bytes())
    assert len(verify_files(folder)) == len(contents(twice[0] / "flash"))


def test_the_command_line(twice: tuple[Path, Path], tmp_path: Path) -> None:
    folder = twice[0] / "pro"
    plain = CliRunner().invoke(cli, ["inspect", "--verify", str(folder)])
    assert plain.output == f"{folder}: {len(contents(folder))} files are as they were written\n"
    listed = CliRunner().invoke(cli, ["inspect", "--verify", "--json", str(folder)])
    assert json.loads(listed.output) == verify_files(folder)
    for src, reason in (
        (twice[0].parent / "source", "has no lcconvert.json"),
        ("package:x", "no folder and no Hub id"),
    ):
        failed = CliRunner().invoke(cli, ["inspect", "--verify", str(src)])
        assert isinstance(failed.exception, UserError)
        assert reason in str(failed.exception)
