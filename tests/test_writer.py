"""An output folder exists whole or not at all, and what was written is what is read back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lcconvert.convert.shard_writer import ShardWriter
from lcconvert.convert.writer import new_folder, verify_folder, write_files
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError
from lcconvert.runtime.source import FolderSource

Write = Callable[[Path], object]
RESUME = "run the same command again to go on"


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- new_folder ---------------------------------------------------------------------------------------------------


def write_x(folder: Path) -> None:
    (folder / "sub").mkdir(exist_ok=True)
    (folder / "sub" / "x").write_text("x")


def attempt(out: Path, *, error: BaseException | None = None, write: Write = write_x, **options: Any) -> None:
    """Writes something into a new folder, then fails with `error`."""
    with new_folder(out, **options) as folder:
        write(folder)
        if error is not None:
            raise error


def test_the_folder_appears_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with new_folder(out) as folder:
        assert folder == out.with_name("out.partial")
        write_x(folder)
        assert not out.exists()
    assert listing(out) == {"sub"}
    assert listing(out.parent) == {"out"}


def test_an_empty_folder_is_taken_and_a_full_one_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    attempt(tmp_path / "out")
    with pytest.raises(UserError, match=r"output folder .*/out is not empty; choose another"):
        attempt(tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="existing file, expected a new folder"):
        attempt(tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot be created \(Not a directory\)"):
        attempt(tmp_path / "file" / "out")
    assert listing(tmp_path) == {"out", "file"}


def test_too_little_disk_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has .* free, 1e\+06 TB are needed; free some"):
        attempt(tmp_path / "new" / "out", need_bytes=10**18, error=AssertionError("the block must not run"))
    assert listing(tmp_path) == set()


@pytest.mark.parametrize("error", [ValueError("bug"), UserError("bad"), CheckFailed("no"), OSError(5, "io")])
def test_a_failure_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        attempt(tmp_path / "new" / "out", error=error)
    assert caught.value is error
    assert listing(tmp_path) == set()


def test_a_failure_keeps_what_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="bug"):
        attempt(out, error=ValueError("bug"), keep_on_stop=RESUME)
    assert listing(tmp_path) == {"out.partial"}
    attempt(out, keep_on_stop=RESUME, write=lambda folder: (folder / "sub" / "y").write_text("y"))
    assert listing(tmp_path) == {"out"}
    assert listing(out / "sub") == {"x", "y"}


def test_a_partial_folder_that_cannot_be_resumed_starts_empty(tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "old").mkdir(parents=True)
    (tmp_path / "out.partial" / "link").symlink_to(tmp_path)
    attempt(tmp_path / "out")
    assert listing(tmp_path / "out") == {"sub"}
    assert listing(tmp_path) == {"out"}


def test_ctrl_c_says_which_state_was_left(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=r"^stopped; nothing was left behind$"):
        attempt(tmp_path / "a", error=KeyboardInterrupt())
    with pytest.raises(Interrupted, match=r"^stopped; nothing was left behind$"):
        attempt(tmp_path / "a", error=KeyboardInterrupt(), keep_on_stop=RESUME, write=lambda folder: None)
    with pytest.raises(Interrupted, match=rf"^stopped; .*/b\.partial is kept: {RESUME}$"):
        attempt(tmp_path / "b", error=KeyboardInterrupt(), keep_on_stop=RESUME)
    with pytest.raises(Interrupted, match=r"^mine$"):
        attempt(tmp_path / "c", error=Interrupted("mine"))
    assert listing(tmp_path) == {"b.partial"}


def test_two_commands_do_not_write_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        write_x(folder)
        with pytest.raises(UserError, match=r"another command is writing .*out\.partial; wait"):
            attempt(out)
    assert listing(out) == {"sub"}


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from lcconvert.convert.shard_writer import ShardWriter
from lcconvert.convert.writer import new_folder
keep = sys.argv[2] or None
with new_folder(Path(sys.argv[1]), keep_on_stop=keep) as folder:
    writer = ShardWriter(folder, {f"t{i}": (torch.float32, (250,)) for i in range(4)}, 1000)
    for i in range(4):
        writer.add(f"t{i}", torch.ones(250))
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("keep", ["", RESUME])
def test_a_real_ctrl_c(tmp_path: Path, keep: str) -> None:
    process = start(tmp_path / "out", keep)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Interrupted: stopped; " in errors
    assert listing(tmp_path) == ({"out.partial"} if keep else set())


def test_a_killed_command_leaves_a_partial_folder_that_the_next_one_takes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(out, "")
    process.kill()
    process.communicate(timeout=60)
    assert listing(tmp_path) == {"out.partial"}
    assert len(listing(tmp_path / "out.partial")) == 5  # four shards and their index
    with new_folder(out) as folder:
        assert listing(folder) == set()
    assert listing(tmp_path) == {"out"}


def start(out: Path, keep: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), keep], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


# A file-size limit makes every kind of write fail for real, as a full disk does (EFBIG in place of ENOSPC).
FULL = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from lcconvert.convert.shard_writer import ShardWriter
from lcconvert.convert.writer import new_folder
from lcconvert.runtime.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
root = Path(sys.argv[1])
big = torch.ones(100_000)

def shards(folder):
    ShardWriter(folder, {"x": (big.dtype, big.shape)})  # takes the disk before there is anything to write

writes = {
    "shards": shards,
    "bytes": lambda folder: (folder / "f").write_bytes(bytes(400_000)),
    "torch": lambda folder: torch.save(big, folder / "f"),
    "numpy": lambda folder: np.save(folder / "f", big.numpy()),
    "tofile": lambda folder: big.numpy().tofile(folder / "f"),
}
for name, write in writes.items():
    try:
        with new_folder(root / name, keep_on_stop="repeat to go on" if name == "bytes" else None) as folder:
            write(folder)
    except UserError as error:
        print(name, "|", error)
print(sorted(path.name for path in root.iterdir()))
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    *lines, left = result.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["shards", "bytes", "torch", "numpy", "tofile"]
    for line in lines:
        assert "the disk is full while writing" in line
        assert line.endswith(
            "bytes.partial is kept: repeat to go on" if "bytes |" in line else "nothing was left behind"
        )
    assert left == "['bytes.partial']"


def test_a_device_without_space(tmp_path: Path) -> None:
    """ENOSPC from the kernel itself: /dev/full accepts no byte."""

    def write(folder: Path) -> None:
        (folder / "f").symlink_to("/dev/full")
        (folder / "f").write_bytes(b"x")

    with pytest.raises(UserError, match=r"the disk is full while writing .*/out; free some space and repeat; nothing"):
        attempt(tmp_path / "out", write=write)
    assert listing(tmp_path) == set()


# --- shards -------------------------------------------------------------------------------------------------------


def forms(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def written(folder: Path, tensors: dict[str, torch.Tensor], limit: int) -> dict[str, torch.Tensor]:
    """Adds the tensors in reverse, as the order does not matter, and reads them back by safetensors' own code."""
    writer = ShardWriter(folder, forms(tensors), limit)
    for name, tensor in reversed(tensors.items()):
        writer.add(name, tensor)
    writer.close()
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    back = written(tmp_path, tensors, 10**9)
    assert listing(tmp_path) == {"model.safetensors"}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12), limit=st.integers(16, 300))
def test_shards_are_capped_and_the_index_is_exact(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"t.{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    back = written(folder, tensors, limit)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    shards = {shard.name: load_file(shard) for shard in folder.glob("*.safetensors")}
    for content in shards.values():
        assert sum(t.nbytes for t in content.values()) <= limit or len(content) == 1
    if len(shards) > 1:
        count = len(shards)
        assert set(shards) == {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(sizes)
        assert index["weight_map"] == {name: shard for shard, content in shards.items() for name in content}
    (folder / "config.json").write_text("{}")
    verify_folder(folder, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})


def test_a_shard_is_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {
        "z": torch.arange(3, dtype=torch.int64),
        "b": torch.ones(3, 5, dtype=torch.bfloat16),
        "a": torch.arange(7.0),
        "e": torch.arange(9.0).to(torch.float8_e4m3fn),
    }
    written(tmp_path, tensors, 10**9)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_views_and_transposes_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    back = written(tmp_path, {"row": base[1], "transposed": base.t()}, 10**9)
    assert torch.equal(back["row"], base[1])
    assert torch.equal(back["transposed"], base.t())


def test_shards_of_an_earlier_attempt_go_away_or_are_completed(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(4)}
    written(tmp_path, tensors, 400)
    ShardWriter(tmp_path, {"x": (torch.float32, (1,))}, 400)
    assert listing(tmp_path) == {"model.safetensors"}
    writer = ShardWriter(tmp_path, forms(tensors), 900)
    for name in ("t0", "t3"):
        writer.add(name, tensors[name])
    with pytest.raises(ValueError, match=r"tensor t1 was planned and not added \(2 missing\)"):
        writer.close()
    writer = ShardWriter(tmp_path, forms(tensors), 900, written=("t0", "t3"))
    for name in ("t1", "t2"):
        writer.add(name, tensors[name])
    writer.close()
    (tmp_path / "config.json").write_text("{}")
    source = verify_folder(tmp_path, forms(tensors))
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_is_added_once_and_as_planned(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"x": (torch.float32, (1,)), "y": (torch.float16, (2,))})
    writer.add("x", torch.ones(1))
    with pytest.raises(ValueError, match="x was added twice"):
        writer.add("x", torch.ones(1))
    with pytest.raises(ValueError, match=r"tensor y is .*float32.*planned was .*float16"):
        writer.add("y", torch.ones(2))


def test_files_are_written_byte_for_byte(tmp_path: Path) -> None:
    content = "{{ '\r\n' }}é".encode()
    write_files(tmp_path, {"a": "é", "b": 1e-05}, {"chat_template.jinja": content})
    assert (tmp_path / "chat_template.jinja").read_bytes() == content
    assert json.loads((tmp_path / "config.json").read_bytes()) == {"a": "é", "b": 1e-05}
    with pytest.raises(ValueError, match="not a plain file name"):
        write_files(tmp_path, {}, {"../x": b""})


# --- verification -------------------------------------------------------------------------------------------------

GOOD = {
    "w": torch.ones(4, 2),
    "scale": torch.ones(4, 1, dtype=torch.float16),
    "codes": torch.ones(4, dtype=torch.int32),
}
EXPECTED = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in GOOD.items()}


def folder_with(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    write_files(path, {}, {})
    written(path, tensors, 40)
    return path


def test_a_good_folder_is_returned_open(tmp_path: Path) -> None:
    source = verify_folder(folder_with(tmp_path, GOOD), EXPECTED)
    assert isinstance(source, FolderSource)
    assert torch.equal(source.tensor("w"), GOOD["w"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": None}, "lacks tensor w"),
        ({"more": torch.ones(1)}, "holds tensor more, which was not to be written"),
        ({"w": torch.ones(4, 2).half()}, r"tensor w of .* is float16 \[4, 2\], expected float32 \[4, 2\]"),
        ({"w": torch.ones(2, 4)}, r"tensor w of .* is float32 \[2, 4\], expected float32 \[4, 2\]"),
        ({"scale": torch.full((4, 1), torch.inf).half()}, "tensor scale of .* not finite"),
        ({"w": torch.tensor([[0.0, torch.nan]] * 4)}, "tensor w of .* not finite"),
    ],
)
def test_every_difference_is_found(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str) -> None:
    tensors = {name: tensor for name, tensor in (GOOD | change).items() if tensor is not None}
    with pytest.raises(CheckFailed, match=message):
        verify_folder(folder_with(tmp_path, tensors), EXPECTED)


def test_fp8_nan_is_found(tmp_path: Path) -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    expected = {"w": (torch.float8_e4m3fn, (8,))}
    verify_folder(folder_with(tmp_path, {"w": codes.view(torch.float8_e4m3fn)}), expected)
    codes[3] = 0x7F
    with pytest.raises(CheckFailed, match=r"tensor w of .* not finite"):
        verify_folder(folder_with(tmp_path, {"w": codes.view(torch.float8_e4m3fn)}), expected)


def test_a_wrong_total_or_a_cut_shard_is_found(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, GOOD)
    index = folder / "model.safetensors.index.json"
    stated = json.loads(index.read_text())
    stated["metadata"]["total_size"] += 1
    index.write_text(json.dumps(stated))
    with pytest.raises(CheckFailed, match="states 57 bytes of tensors, the shards hold 56"):
        verify_folder(folder, EXPECTED)
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckFailed, match=r"what was written cannot be read back: .*truncated"):
        verify_folder(folder, EXPECTED)


def test_what_safetensors_wrote_verifies_too(tmp_path: Path) -> None:
    write_files(tmp_path, {}, {})
    save_file(GOOD, tmp_path / "model.safetensors")
    verify_folder(tmp_path, EXPECTED)
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(CheckFailed, match="cannot be read back"):
        verify_folder(tmp_path, EXPECTED)
