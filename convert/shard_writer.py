"""Writes safetensors shards tensor by tensor, each to its place: nothing waits in memory and a stop loses little.

What will be written is known before the first weight is read, so the headers, the names and the index are written at
once and the disk is taken then: a full disk stops a command before its work. A tensor goes to its offset as it comes,
in any order; what an earlier, unfinished attempt wrote there may be kept.

The surprising rule: a shard is valid safetensors from the start, with zeros in place of what was not added yet; only
`close` tells whether all was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lcconvert.runtime.source import DTYPE_NAMES

Form = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class _Place:
    shard: int
    offset: int
    form: Form


class ShardWriter:
    """Writes the tensors of `expected` as shards of at most `max_shard_bytes`, filled in its order.

    expected: dtype and shape by tensor name. A larger tensor has a shard of its own. A single shard is
    `model.safetensors` and has no index. `written`: tensors that an earlier attempt with the same arguments left in
    `folder`; without any, its shards are removed.
    """

    def __init__(
        self,
        folder: Path,
        expected: Mapping[str, Form],
        max_shard_bytes: int = 5 * 10**9,
        *,
        written: Collection[str] = (),
    ):
        shards = _fill(expected, max_shard_bytes)
        count = len(shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._paths = [folder / name for name in (["model.safetensors"] if count == 1 else names)]
        self._places: dict[str, _Place] = {}
        self._added, self._unsynced = set(written), set[Path]()
        index = folder / "model.safetensors.index.json"
        for stale in [*folder.glob("model*.safetensors"), index]:
            if not written or stale not in self._paths:
                stale.unlink(missing_ok=True)
        for number, (path, content) in enumerate(zip(self._paths, shards, strict=True)):
            header, offsets, size = _header({name: expected[name] for name in content})
            for name, offset in offsets.items():
                self._places[name] = _Place(number, offset, expected[name])
            with path.open("r+b" if path.exists() else "x+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
                file.write(header)
        if count > 1:
            total = sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in expected.values())
            shard_of = {name: self._paths[place.shard].name for name, place in self._places.items()}
            table = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
            index.write_text(json.dumps(table, indent=2) + "\n")

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor of any device, which is free again when this returns."""
        if name in self._added:
            raise ValueError(f"tensor {name} was added twice")
        place = self._places[name]
        if (form := (tensor.dtype, tuple(tensor.shape))) != place.form:
            raise ValueError(f"tensor {name} is {form}, planned was {place.form}")
        content = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
        path = self._paths[place.shard]
        with path.open("r+b") as file:
            file.seek(place.offset)
            file.write(content.data)
        self._added.add(name)
        self._unsynced.add(path)

    def sync(self) -> None:
        """Returns when all that was added is on the disk and outlasts a loss of power."""
        for path in self._unsynced:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._unsynced.clear()

    def close(self) -> None:
        """ValueError when a planned tensor was never added."""
        if missing := sorted(set(self._places) - self._added):
            raise ValueError(f"tensor {missing[0]} was planned and not added ({len(missing)} missing)")
        self.sync()


def _fill(expected: Mapping[str, Form], limit: int) -> list[list[str]]:
    """Names by shard."""
    shards: list[list[str]] = []
    room = 0
    for name, (dtype, shape) in expected.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _header(content: Mapping[str, Form]) -> tuple[bytes, dict[str, int], int]:
    """The header of a shard with these tensors, the offset of each in the file, the file's size.

    The widest types come first, so that each tensor lies at a multiple of its own width.
    """
    order = sorted(content, key=lambda name: (-content[name][0].itemsize, name))
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in order:
        dtype, shape = content[name]
        begins[name] = end
        end += dtype.itemsize * torch.Size(shape).numel()
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}, start + end
