"""The weights of an ONNX model, appended one at a time to one side file, so that no model is ever held whole.

A protobuf message stops at 2 GiB, hence "external data": the graph holds (file, offset, length), the bytes lie beside
it. Surprising rule: onnx's own helpers want every array in memory before they write the first, so the file is written
here and only the pointers are handed to onnx. Floats are written in one type, packed integers as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
import torch

from lcconvert.runtime.errors import UserError

_ALIGN = 4096  # a page, so that a runtime can map a tensor without copying it
_BLOCK_BYTES = 1 << 26
ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.uint8: onnx.TensorProto.UINT8,
}


class ExternalData:
    """Writes `path` (which must not exist), floats as `float_type`; gives out the initializers that point into it."""

    def __init__(self, path: Path, float_type: torch.dtype = torch.float32):
        self.path, self.float_type = path, float_type
        self._file = path.open("xb")
        self.digests: dict[str, str] = {}  # initializer -> SHA-256 of its bytes, for the check after writing

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, name: str, tensor: torch.Tensor) -> onnx.TensorProto:
        """Appends a finite float tensor or a uint8 tensor of any shape, a block of rows at a time.

        UserError when a value is beyond the range of float16 and that is the type written.
        """
        return self.add_blocks(name, tuple(tensor.shape), tensor.dtype, _row_blocks(tensor))

    def add_blocks(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, blocks: Iterable[torch.Tensor]
    ) -> onnx.TensorProto:
        """`add` of a tensor given as consecutive pieces of its rows; their sizes must add up to `shape`."""
        dtype = dtype if dtype == torch.uint8 else self.float_type
        self._file.write(b"\0" * (-self._file.tell() % _ALIGN))
        offset, digest = self._file.tell(), hashlib.sha256()
        for block in blocks:
            block = block.to(dtype)
            if dtype == torch.float16 and not torch.isfinite(block).all():
                raise UserError(
                    f"tensor {name} holds a value beyond 65,504, the most that float16 can; export with precision fp32"
                )
            raw = block.contiguous().numpy().data
            digest.update(raw)
            self._file.write(raw)
        length = self._file.tell() - offset
        proto = onnx.TensorProto(name=name, data_type=ONNX_TYPES[dtype], dims=shape)
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
