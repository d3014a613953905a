"""`quantize` layer by layer: a run killed at any moment goes on to the same bytes; what cannot go on says so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from lcconvert.convert import quantize as stage
from lcconvert.convert.hashing import RESUME, file_hash, verify_files
from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.convert.resume import Journal
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError

FREE = QuantizeConfig(samples=0, attention="dense")

# Runs each command in a child that kills itself at its k-th step, then again to the end. A step is anything that
# changes the disk: a tensor, a sync, a line of the journal (which may be cut), the hashes, the final name.
KILLED = """
import os, signal, sys
from pathlib import Path
from lcconvert.convert import resume, shard_writer, writer
from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig

src, root = sys.argv[1:3]
steps, die_at = 0, None
os.fsync = lambda handle: None  # slow, and what it is for, a loss of power, is not tried here

def counted(owner, name):
    plain = getattr(owner, name)
    def step(*args, **options):
        global steps
        steps += 1
        if steps == die_at:
            if name == "_append" and args[0].layers is not None:
                with args[0]._path.open("a") as file:
                    file.write('{"rows": [{"na')
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **options)
    setattr(owner, name, step)

counted(shard_writer.ShardWriter, "add")
counted(shard_writer.ShardWriter, "sync")
counted(resume.Journal, "_append")
counted(writer, "record_files")
counted(writer, "_flush")
counted(Path, "rename")
commands = {
    "calibrated": QuantizeConfig(
        samples=1, length=160, wide=("re:.*v_proj",), kv="k8v4", max_shard=30_000, device="cpu"
    ),
    "free": QuantizeConfig(samples=0, attention="dense", device="cpu"),
}
for name, config in commands.items():
    quantize(src, Path(root) / name, config)  # here, so that no child imports anything
    total, steps = steps, 0
    def run(out, at=None):
        global steps, die_at
        if (child := os.fork()) == 0:
            steps, die_at = 0, at
            quantize(src, Path(root) / out, config)
            (Path(root) / f"{out}.steps").write_text(str(steps))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # amid the second layer, at the last line of the journal, at the final name
    for at in (total // 2, total - 3, total) if name == "calibrated" else (total // 2,):
        out = f"{name}-{at}"
        assert run(out, at) == -signal.SIGKILL, at
        assert run(out) == 0
        print(name, at, total, (Path(root) / f"{out}.steps").read_text())
    if name == "calibrated":
        out = f"{name}-often"
        for at in (3, 40, 36):  # before the first layer is done, in the second, in the third
            assert run(out, at) == -signal.SIGKILL
        assert run(out) == 0
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", "qwen2", num_hidden_layers=3)
    (tmp_path / "out").mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # a child would wait for threads that a fork does not copy
    )
    assert result.returncode == 0, result.stderr
    steps = [line.split() for line in result.stdout.splitlines()]
    for name, kills in (("calibrated", 4), ("free", 1)):
        wanted = {path.name: file_hash(path) for path in (tmp_path / "out" / name).iterdir()}
        assert RESUME not in wanted
        folders = [path for path in (tmp_path / "out").glob(f"{name}-*") if path.is_dir()]
        assert len(folders) == kills
        for folder in folders:
            assert {path.name: file_hash(path) for path in folder.iterdir()} == wanted, folder.name
        verify_files(folders[0])
        left = {int(at): (int(total), int(again)) for of, at, total, again in steps if of == name}
        assert all(again <= 0.8 * total for total, again in left.values())  # one of three layers stood, or more
        if name == "calibrated":
            total, again = left[max(left)]
            assert again < total / 4  # killed before its name was given: all layers stood


def test_ctrl_c_keeps_finished_layers_and_a_failure_keeps_nothing(tmp_path, monkeypatch, capsys) -> None:
    source = str(write_tiny(tmp_path / "source"))
    plain = stage.verify_folder

    def stop(error: BaseException) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(stage, "verify_folder", fail)

    stop(CheckFailed("no"))
    with pytest.raises(CheckFailed):
        quantize(source, tmp_path / "out", FREE)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    stop(KeyboardInterrupt())
    with pytest.raises(Interrupted, match=r"out\.partial is kept: repeat the same command to go on at the first layer"):
        quantize(source, tmp_path / "out", FREE)
    lines = (tmp_path / "out.partial" / RESUME).read_text().splitlines()
    assert len(lines) == 3
    other = FREE.model_copy(update={"group_size": 32})
    with pytest.raises(UserError, match=r"unfinished run with another settings .*group_size.*remove that folder"):
        quantize(source, tmp_path / "out", other)
    config = tmp_path / "source" / "config.json"
    before = config.read_text()
    config.write_text(before.replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))
    with pytest.raises(UserError, match=r"unfinished run with another source"):
        quantize(source, tmp_path / "out", FREE)
    config.write_text(before)
    assert (tmp_path / "out.partial" / RESUME).read_text().splitlines() == lines
    monkeypatch.setattr(stage, "verify_folder", plain)
    capsys.readouterr()
    with pytest.raises(UserError, match="another source"):  # the weight files are named by their times
        quantize(source, tmp_path / "out", FREE)


def test_a_full_disk_is_met_before_the_work_and_a_later_one_keeps_layers(tmp_path, monkeypatch) -> None:
    source = str(write_tiny(tmp_path / "source"))
    rounds = stage.round_layer

    def full(*args: object, **options: object) -> object:
        if args[1] == "model.layers.1":
            raise OSError(28, "No space left on device")
        return rounds(*args, **options)

    monkeypatch.setattr(stage, "round_layer", full)
    with pytest.raises(UserError, match=r"the disk is full .*free some space and repeat; .*partial is kept: repeat"):
        quantize(source, tmp_path / "out", FREE)
    monkeypatch.setattr(stage, "round_layer", rounds)
    again = quantize(source, tmp_path / "out", FREE)
    assert json.loads((again / stage.REPORT).read_text())["bits_per_weight"] == pytest.approx(4.26, abs=0.05)
    monkeypatch.setattr("os.posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"the disk is full .*nothing was left behind"):
        quantize(source, tmp_path / "new", FREE)


def test_a_cut_line_of_the_journal_is_no_layer(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"source": "a"})
    journal.add({"rows": [1]})
    journal.add({"rows": [2]})
    path = tmp_path / RESUME
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        finished = max(0, whole[:cut].count(b"\n") - 1)
        assert len(Journal(tmp_path, {"source": "a"}).layers) == finished
        assert path.read_bytes() == whole[: whole.index(b"\n") + 1 if finished == 0 else None][: len(path.read_bytes())]
    path.write_bytes(whole)
    with pytest.raises(UserError, match=re.escape('another source ("a", now "b")')):
        Journal(tmp_path, {"source": "b"})


def test_a_layer_does_not_wait_for_the_next(tmp_path, monkeypatch) -> None:
    """When layer 1 is begun, the tensors of layer 0 are in the file."""
    source = str(write_tiny(tmp_path / "source"))
    rounds, seen = stage.round_layer, {}

    def watch(layer: torch.nn.Module, prefix: str, *rest: object) -> object:
        if prefix == "model.layers.1":
            folder = stage.FolderSource(tmp_path / "out.partial")
            for number in (0, 1):
                seen[number] = bool(folder.tensor(f"model.layers.{number}.mlp.down_proj.weight_packed").any())
        return rounds(layer, prefix, *rest)

    monkeypatch.setattr(stage, "round_layer", watch)
    quantize(source, tmp_path / "out", FREE)
    assert seen == {0: True, 1: False}
