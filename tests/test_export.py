"""safetensors exports: any source into an HF folder, bytes unchanged unless a type is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from gguf_files import tiny_model as gguf_model
from gguf_files import write_gguf
from safetensors.torch import load_file
from test_export_onnx import quantized, random_ids
from tiny import write_tiny

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.export import ExportConfig, export
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.source import FolderSource


def test_a_gguf_becomes_an_hf_folder(tmp_path: Path) -> None:
    oracle = gguf_model("llama")
    src = write_gguf(tmp_path / "m.gguf", oracle, storage=gguf.GGMLQuantizationType.F32)
    out = export(str(src), tmp_path / "out", ExportConfig(max_shard_bytes=60_000))
    assert len(list(out.glob("*.safetensors"))) > 2
    ids = random_ids(1, 40)
    with torch.no_grad():
        decoder = load_decoder(FolderSource(out))
        assert (decoder.logits(decoder(ids)) - oracle(ids).logits).abs().max() <= 1e-4
    source = open_checkpoint(src)
    for name, content in source.files.items():
        assert (out / name).read_bytes() == content
    assert json.loads((out / "config.json").read_bytes()) == source.config
    provenance = json.loads((out / "lcconvert.json").read_bytes())["provenance"]
    assert provenance["source"] == src.name


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_types(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    src = write_tiny(tmp_path / "src")
    out = FolderSource(export(str(src), tmp_path / "out", ExportConfig(precision=precision)))
    before = FolderSource(src)
    assert out.config["dtype"] == str(dtype).removeprefix("torch.")
    assert sorted(out.names()) == sorted(before.names())
    for name in out.names():
        assert torch.equal(out.tensor(name), before.tensor(name).to(dtype))


def test_a_quantized_artifact_is_copied_bit_for_bit_and_not_retyped(tmp_path: Path) -> None:
    src = quantized(write_tiny(tmp_path / "src"), "int4")
    out = export(str(src), tmp_path / "out", ExportConfig())
    before, after = load_file(src / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert FolderSource(out).config == FolderSource(src).config
    with pytest.raises(UserError, match="use precision auto"):
        export(str(src), tmp_path / "again", ExportConfig(precision="bf16"))
    assert not (tmp_path / "again").exists()


def test_a_taken_output_folder_is_refused(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src")
    with pytest.raises(UserError, match="not empty"):
        export(str(src), src, ExportConfig())
