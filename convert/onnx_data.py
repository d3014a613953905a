"""The weights of an ONNX model, appended one at a time to one side file, so that no model is ever held whole.

A protobuf message stops at 2 GiB, hence "external data": the graph holds (file, offset, length), the bytes lie beside
it. Surprising rule: onnx's own helpers want every array in memory before they write the first, so the file is written
here and only the pointers are handed to onnx. Floats are written as float32, packed integers as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import torch

_ALIGN = 4096  # a page, so that a runtime can map a tensor without copying it
_BLOCK_BYTES = 1 << 26
_TYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.uint8: onnx.TensorProto.UINT8}


class ExternalData:
    """Writes `path` (which must not exist) and gives out the initializers that point into it."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("xb")
        self.digests: dict[str, str] = {}  # initializer -> SHA-256 of its bytes, for the check after writing

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, tensor: torch.Tensor) -> onnx.TensorProto:
        """Appends a float tensor (as float32) or a uint8 tensor of any shape, a block of rows at a time."""
        dtype = torch.uint8 if tensor.dtype == torch.uint8 else torch.float32
        return self.add_blocks(name, tuple(tensor.shape), dtype, _row_blocks(tensor))

    def add_blocks(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, blocks: Iterable[torch.Tensor]
    ) -> onnx.TensorProto:
        """Appends a tensor given as consecutive pieces of its rows; their sizes must add up to `shape`."""
        self._file.write(b"\0" * (-self._file.tell() % _ALIGN))
        offset, digest = self._file.tell(), hashlib.sha256()
        for block in blocks:
            raw = block.to(dtype).contiguous().numpy().data
            digest.update(raw)
            self._file.write(raw)
        length = self._file.tell() - offset
        proto = onnx.TensorProto(name=name, data_type=_TYPES[dtype], dims=shape)
        assert length == dtype.itemsize * torch.Size(shape).numel(), (name, shape, length)
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", str(offset)), ("length", str(length))):
            proto.external_data.add(key=key, value=value)
        self.digests[name] = digest.hexdigest()
        return proto


def read_back(path: Path, proto: onnx.TensorProto) -> Iterator[bytes]:
    """The bytes an initializer points at, in pieces; stops short where the file does."""
    place = {entry.key: entry.value for entry in proto.external_data}
    left = int(place["length"])
    with path.open("rb") as file:
        file.seek(int(place["offset"]))
        while left and (piece := file.read(min(left, _BLOCK_BYTES))):
            left -= len(piece)
            yield piece


def _row_blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    if tensor.ndim == 0 or not len(tensor):
        yield tensor
        return
    rows = max(1, _BLOCK_BYTES * len(tensor) // (4 * tensor.numel() or 1))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows]
