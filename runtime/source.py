"""Where tensors come from. A `TensorSource` yields one tensor at a time, so a 100 GB checkpoint is never held whole.

`FolderSource` is the HF layout: config.json, safetensors shards, an index that must agree with them. Pickled weights
(`.bin`, `.pt`) are never opened: unpickling runs code from the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open

from lcconvert.runtime.errors import UserError

# Files beside the weights that travel with a checkpoint unchanged unless something in them must change.
AUX_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "lcconvert.json",
    *(f"{name}{suffix}" for name in ("LICENSE", "NOTICE") for suffix in ("", ".txt", ".md")),
)
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}  # as safetensors headers spell them


@runtime_checkable
class TensorSource(Protocol):
    """What the loader and every conversion stage read from."""

    name: str  # what to call it in messages and provenance
    config: dict[str, Any]  # the content of HF config.json
    files: Mapping[str, bytes]  # the auxiliary files present, by name

    def names(self) -> list[str]: ...

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]: ...

    def tensor(self, name: str) -> torch.Tensor: ...


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object; fetch the file again")
    return value


def _read_header(path: Path) -> dict[str, Any]:
    """The tensor table of one shard, with the file's length checked against it (a cut download is caught here)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 0 or 8 + length > size:
            raise UserError(f"{path} is {size} bytes, too short for its own header; it is truncated, fetch it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError, IndexError):
            raise UserError(f"{path} has no readable tensor table; it is not safetensors or is damaged") from None
    if size != end:
        raise UserError(
            f"{path} is {size} bytes but its header needs {end}; it is truncated or damaged, fetch it again"
        )
    return header


class FolderSource:
    """A local HF folder. Opening it reads headers only and checks the index against them."""

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give a checkpoint folder, a .gguf file or a Hub id")
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json; give the folder of an HF checkpoint")
        self.config = _read_json(path / "config.json")
        self.files: Mapping[str, bytes] = {n: (path / n).read_bytes() for n in AUX_FILES if (path / n).is_file()}
        self._shard_of = self._map_shards()

    def _map_shards(self) -> dict[str, tuple[Path, torch.dtype, tuple[int, ...]]]:
        index_path = self.path / "model.safetensors.index.json"
        shards = sorted(self.path.glob("*.safetensors"))
        if not shards and not index_path.is_file():
            pickled = [p.name for pattern in _PICKLED for p in sorted(self.path.glob(pattern))]
            if pickled:
                raise UserError(
                    f"{self.path} holds pickled weights ({pickled[0]}), which can run code when opened and are never "
                    "read; save the model as safetensors first"
                )
            raise UserError(f"{self.path} has no *.safetensors file; give the folder of an HF checkpoint")
        index: dict[str, str] | None = None
        if index_path.is_file():
            index = _read_json(index_path).get("weight_map")
            if not isinstance(index, dict):
                raise UserError(f"{index_path} has no weight_map; fetch the file again")
            shards = [self.path / name for name in sorted(set(index.values()))]
            for shard in shards:
                if shard.parent != self.path:
                    raise UserError(f"{index_path} names {shard.name!r} outside the folder; it is damaged")
                if not shard.is_file():
                    raise UserError(f"{shard} is missing though {index_path.name} names it; fetch the shard again")
        found: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
        for shard in shards:
            for tensor, entry in _read_header(shard).items():
                if tensor in found and index is None:
                    raise UserError(f"tensor {tensor} is in both {found[tensor][0].name} and {shard.name}; remove one")
                if entry["dtype"] not in _DTYPES:
                    raise UserError(f"tensor {tensor} in {shard} has dtype {entry['dtype']}, which is not supported")
                if index is None or index.get(tensor) == shard.name:
                    found[tensor] = (shard, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if index is not None and (absent := sorted(set(index) - set(found))):
            raise UserError(
                f"{index_path} names tensor {absent[0]} but {index[absent[0]]} does not hold it; "
                "the index and the shards are of different versions, fetch both again"
            )
        return found

    def names(self) -> list[str]:
        return list(self._shard_of)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        _, dtype, shape = self._entry(name)
        return dtype, shape

    def tensor(self, name: str) -> torch.Tensor:
        shard = self._entry(name)[0]
        try:
            with safe_open(shard, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"tensor {name} of {shard} cannot be read ({error}); fetch the shard again") from None

    def _entry(self, name: str) -> tuple[Path, torch.dtype, tuple[int, ...]]:
        try:
            return self._shard_of[name]
        except KeyError:
            raise UserError(f"tensor {name} is not in {self.name}; the checkpoint is incomplete") from None
