"""The metadata and tensor table of a GGUF file, checked against the file's length before any weight is touched.

`gguf.GGUFReader` maps the file and keeps a numpy view for every vocabulary string (seconds for a real vocabulary), and
a cut download surfaces in it as an index or reshape error. This walk reads the same tables with `struct`, knows the
byte at which the file ends, and leaves types, block sizes and dequantization to the `gguf` library.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Little-endian versions 2 and 3 only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from lcconvert.runtime.errors import UserError

_SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table; `shape` is in torch order, `start` counts from the beginning of the file."""

    path: Path
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int  # bytes


@dataclass(frozen=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Reader:
    """Reads forward through the header; running out of file is the user's truncated download."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.size, self.at = path, file, path.stat().st_size, 0

    def take(self, count: int) -> bytes:
        if self.at + count > self.size:
            raise UserError(
                f"{self.path} is {self.size} bytes but its header alone needs {self.at + count}; "
                "it is truncated or damaged, fetch it again"
            )
        self.at += count
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.path} has text that is not UTF-8 before byte {self.at}; fetch it again") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALAR:
            return self.number(_SCALAR[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.number("I"), self.number("Q")
            if of in _SCALAR:
                code = f"<{count}{_SCALAR[of]}"
                return list(struct.unpack(code, self.take(struct.calcsize("<" + _SCALAR[of]) * count)))
            return [self.value(of) for _ in range(count)]
        raise UserError(f"{self.path} has a value of unknown type {kind} at byte {self.at}; fetch it again")


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the tables of `path`; raises UserError naming the file and its bytes when it is not a whole GGUF file."""
    with path.open("rb") as file:
        reader = _Reader(path, file)
        if reader.take(4) != b"GGUF":
            raise UserError(f"{path} does not begin with the bytes GGUF; give a GGUF file or a checkpoint folder")
        version = reader.number("I")
        if version not in (2, 3):
            raise UserError(f"{path} is GGUF version {version}, expected little-endian version 2 or 3; convert it anew")
        tensor_count, value_count = reader.number("Q"), reader.number("Q")
        metadata = {}
        for _ in range(value_count):
            key = reader.text()
            metadata[key] = reader.value(reader.number("I"))
        entries = [_table_entry(reader) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f"{path} has general.alignment {alignment!r}, expected a positive integer; fetch it again")
    data_start = -(-reader.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise UserError(f"{path} holds tensor {name} twice; the file is damaged, fetch it again")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise UserError(
                f"tensor {name} of {path} has rows of {shape[-1]}, not a multiple of {block}; it is damaged"
            )
        tensors[name] = GgufTensor(path, shape, kind, data_start + offset, prod(shape) // block * block_bytes)
    last = max(tensors, key=lambda name: tensors[name].start + tensors[name].size, default=None)
    if last is not None and (end := tensors[last].start + tensors[last].size) > reader.size:
        raise UserError(
            f"{path} is {reader.size} bytes but tensor {last} ends at byte {end}; it is truncated, fetch it again"
        )
    return GgufHeader(metadata, tensors)


def _table_entry(reader: _Reader) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = reader.text()
    dims = [reader.number("Q") for _ in range(reader.number("I"))]
    kind, offset = reader.number("I"), reader.number("Q")
    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise UserError(
            f"tensor {name} of {reader.path} has storage type {kind}, which the gguf library does not know; "
            "upgrade gguf or give another quantization of the model"
        ) from None
    return name, tuple(reversed(dims)) or (1,), known, offset  # ggml lists the fastest dimension first
