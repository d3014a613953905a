"""`lcconvert export`: a checkpoint in the files of other engines, computing the same thing.

safetensors: the same tensors in an HF folder, re-sharded, in a chosen float type; how a GGUF becomes an HF checkpoint.
onnx: for onnxruntime (onnx_export.py). gguf: for llama.cpp (gguf_export.py).

Surprising rule: `precision` means what an engine computes with, and "auto" means what the checkpoint stores, so a
quantized artifact stays quantized with its own integers and nothing is ever quantized unasked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.progress import progress
from lcconvert.convert.provenance import made_with, named_source, origin
from lcconvert.convert.shard_writer import ShardWriter
from lcconvert.convert.writer import new_folder, verify_folder, write_files
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import check_finite
from lcconvert.runtime.sidecar import NAME as SIDECAR
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec

PRECISIONS = {
    "safetensors": ("auto", "fp32", "bf16", "fp16"),
    "onnx": ("auto", "fp32", "fp16", "int4"),
    "gguf": ("auto", "bf16", "q8_0", "q4_0"),
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ExportConfig(BaseModel, frozen=True, extra="forbid"):
    """What to write. UserError for an unknown format, or a precision that the format does not have.

    onnx only: `group_size`, the largest int4 group when weights are rounded here; `max_length`, the positions that the
    RoPE tables cover (default: the configured context); `compare`, whether the result is run against our own decoder:
    auto does when onnxruntime is installed and the model has up to a billion weights.
    """

    format: str = "safetensors"
    precision: str = "auto"
    max_shard_bytes: int = Field(5 * 10**9, ge=1)
    group_size: int = Field(128, ge=16)
    max_length: int | None = Field(None, ge=1)
    compare: Literal["auto", "always", "never"] = "auto"

    @model_validator(mode="after")
    def _known(self) -> ExportConfig:
        if self.format not in PRECISIONS:
            raise UserError(f"export format is {self.format!r}, expected one of {', '.join(PRECISIONS)}")
        if self.precision not in PRECISIONS[self.format]:
            raise UserError(
                f"precision is {self.precision!r}, but format {self.format} has {', '.join(PRECISIONS[self.format])}"
            )
        return self


def export(src: str, out: Path, config: ExportConfig) -> Path:
    """Writes checkpoint `src` to the new folder `out` in the format of `config` and returns the folder.

    UserError (nothing written) when the checkpoint cannot be expressed in it; CheckFailed (nothing left) when what was
    written does not read back, or computes something else.
    """
    out = Path(out)
    source = open_checkpoint(src)
    sidecar = exported_sidecar(source, src, config)
    if config.format == "onnx":
        from lcconvert.convert.onnx_export import export_onnx

        return export_onnx(source, sidecar, out, config)
    if config.format == "gguf":
        from lcconvert.convert.gguf_export import export_gguf

        return export_gguf(source, sidecar, out, config)
    return _export_safetensors(source, sidecar, out, config)


def exported_sidecar(source: TensorSource, src: str, config: ExportConfig) -> Sidecar:
    """The source's sidecar with this export added to its provenance; what it says about its own source stays."""
    sidecar = Sidecar.read(source)
    step = {**named_source(src, source), "config": config.model_dump(mode="json"), **made_with("cpu")}
    return sidecar.model_copy(update={"provenance": {**origin(src, source), "export": step}})


def _export_safetensors(source: TensorSource, sidecar: Sidecar, out: Path, config: ExportConfig) -> Path:
    ModelSpec.from_config(source.config)
    quantized = bool(source.config.get("quantization_config"))
    if quantized and config.precision != "auto":
        raise UserError(
            f"{source.name} is quantized and precision is {config.precision!r}; a quantized checkpoint keeps its own "
            "types, use precision auto"
        )
    dtype = _DTYPES.get(config.precision)
    expected = {}
    for name in source.names():
        stored, shape = source.info(name)
        expected[name] = (dtype if dtype is not None and stored.is_floating_point else stored, shape)
    need = sum(kind.itemsize * torch.Size(shape).numel() for kind, shape in expected.values())
    model_config = dict(source.config)
    if dtype is not None:
        model_config = {k: v for k, v in model_config.items() if k != "torch_dtype"}
        model_config["dtype"] = str(dtype).removeprefix("torch.")
    with new_folder(out, need_bytes=need) as folder:
        writer = ShardWriter(folder, expected, config.max_shard_bytes)
        with progress("export safetensors", len(expected), "tensors") as bar:
            for name, (kind, _) in expected.items():
                tensor = source.tensor(name)
                check_finite(name, tensor, source.name)
                writer.add(name, tensor if tensor.dtype == kind else tensor.to(kind))
                bar.advance()
        writer.close()
        write_files(folder, model_config, {**source.files, SIDECAR: sidecar.to_bytes()})
        verify_folder(folder, expected)
    return out
