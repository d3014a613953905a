"""GGUF exports read back: equal logits per family and type, the artifact's own int4 codes, RoPE keys, tokenizer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import tiny_model as gguf_model
from gguf_files import vocabulary, write_gguf
from safetensors.torch import load_file, save_file
from test_export_onnx import quantized, random_ids
from tiny import FAMILIES, write_tiny

from lcconvert.convert import gguf_export, gguf_source
from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.export import ExportConfig, export
from lcconvert.convert.gguf_header import read_gguf_header
from lcconvert.convert.gguf_names import ROPE_DIVISORS
from lcconvert.convert.rope_methods import extend_rope
from lcconvert.kernels.int4 import dequantize_int4
from lcconvert.runtime.errors import CheckFailed, Interrupted, UserError
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.rope import RopeSpec, cos_sin
from lcconvert.runtime.source import FolderSource, TensorSource
from lcconvert.runtime.spec import ModelSpec


def gguf_of(src: Path, out: Path, precision: str = "auto") -> TensorSource:
    export(str(src), out, ExportConfig(format="gguf", precision=precision))
    (path,) = out.glob("*.gguf")
    return open_checkpoint(path)


@torch.no_grad()
def logits(source: TensorSource) -> torch.Tensor:
    decoder = load_decoder(source)
    return decoder.logits(decoder(random_ids(1, 40)))


def with_rope(folder: Path, rope: RopeSpec, context: int) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | rope.to_config() | {"max_position_embeddings": context}))
    return folder


@pytest.mark.parametrize("family", [*FAMILIES, "llama-biases"])
def test_bf16_reads_back_equal(tmp_path: Path, family: str) -> None:
    extra = {"attention_bias": True, "mlp_bias": True} if family == "llama-biases" else {}
    src = FolderSource(write_tiny(tmp_path / "src", family.partition("-")[0], **extra))
    written = gguf_of(tmp_path / "src", tmp_path / "out")
    assert set(written.names()) == set(src.names())
    for name in src.names():
        tensor = src.tensor(name)
        wanted = tensor.to(torch.bfloat16).float() if tensor.ndim == 2 else tensor
        assert torch.equal(written.tensor(name), wanted), name
    before, after = (ModelSpec.from_config(s.config) for s in (src, written))
    assert after.rms_eps == pytest.approx(before.rms_eps)
    for field in ("family", "head_dim", "num_kv_heads", "rope", "max_position", "qkv_bias", "qk_norm", "tied_head"):
        assert getattr(after, field) == getattr(before, field), field


def test_a_bfloat16_source_is_copied(tmp_path: Path) -> None:
    write_tiny(tmp_path / "src")
    src = FolderSource(export(str(tmp_path / "src"), tmp_path / "bf16", ExportConfig(precision="bf16")))
    written = gguf_of(tmp_path / "bf16", tmp_path / "out")
    assert all(torch.equal(written.tensor(name), src.tensor(name).float()) for name in src.names())


@pytest.mark.parametrize(("precision", "step"), [("q8_0", 1 / 127), ("q4_0", 1 / 8)])
def test_rounded_types(tmp_path: Path, precision: str, step: float) -> None:
    """No value moves by more than one step of its block's largest."""
    src = FolderSource(write_tiny(tmp_path / "src", "qwen3"))
    written = gguf_of(tmp_path / "src", tmp_path / "out", precision)
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = (s.tensor(name).view(-1, 32) for s in (src, written))
    assert ((before - after).abs() <= step * 1.01 * before.abs().amax(1, keepdim=True)).all()
    assert not torch.equal(before, after)


def test_an_int4_artifact_keeps_its_codes(tmp_path: Path) -> None:
    src = quantized(write_tiny(tmp_path / "src", "llama"), "int4", group=64)
    written, stored = gguf_of(src, tmp_path / "out"), load_file(src / "model.safetensors")
    packed = [name for name in stored if name.endswith("weight_packed")]
    assert len(packed) == 14
    for name in packed:
        wanted = dequantize_int4(stored[name], stored[name.replace("packed", "scale")], torch.float32)
        assert torch.equal(written.tensor(name.removesuffix("_packed")), wanted)
    assert torch.allclose(logits(written), logits(FolderSource(src)), atol=0.05)  # the embedding is bfloat16


def test_a_scale_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    src = quantized(write_tiny(tmp_path / "src"), "int4")
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0, 0] = 1e-9
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"scale of model\.layers\.0\.mlp\.up_proj\.weight does not fit float16"):
        gguf_of(src, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


LLAMA3 = {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    **{
        name: extend_rope(RopeSpec(), name, head_dim=16, trained=64, context=1024)
        for name in ("linear", "ntk", "theta", "yarn", "longrope")
    },
    "yarn with its own temperature": RopeSpec(kind="yarn", factor=16.0, original_max_position=64, attention_factor=1.5),
    "yarn with other betas": RopeSpec(kind="yarn", factor=16.0, original_max_position=64, beta_fast=8.0, beta_slow=2.0),
    "untruncated yarn": RopeSpec(kind="yarn", factor=16.0, original_max_position=64, truncate=False),
    "llama3 of another window": RopeSpec(**LLAMA3, original_max_position=64),
    "Llama 3.1": RopeSpec(**LLAMA3, original_max_position=8192),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_reads_back(tmp_path: Path, name: str) -> None:
    rope = ROPES[name]
    written = gguf_of(with_rope(write_tiny(tmp_path / "src"), rope, 1024), tmp_path / "out")
    again = ModelSpec.from_config(written.config)
    at = torch.tensor([0, 1, 700, 1023])
    for ours, theirs in zip(cos_sin(rope, 16, at), cos_sin(again.rope, 16, at)):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert again.max_position == 1024


def test_only_keys_that_llama_cpp_reads_carry_the_rope(tmp_path: Path) -> None:
    """Of YaRN's keys it reads factor and window; betas are 32 and 1, and `yarn_attn_factor` is overwritten."""
    for name in ("yarn with its own temperature", "yarn with other betas", "Llama 3.1"):
        src = with_rope(write_tiny(tmp_path / name), ROPES[name], 1024)
        gguf_of(src, tmp_path / f"out {name}")
    header = {path.parent.name: read_gguf_header(path) for path in tmp_path.rglob("*.gguf")}
    prefix = "llama.rope.scaling."
    yarn = header["out yarn with its own temperature"]
    assert yarn.metadata[prefix + "attn_factor"] == pytest.approx(1.5 / (0.1 * math.log(16) + 1))
    assert prefix + "yarn_attn_factor" not in yarn.metadata
    assert ROPE_DIVISORS not in yarn.tensors
    betas = header["out yarn with other betas"]
    assert prefix + "type" not in betas.metadata
    assert betas.metadata[prefix + "attn_factor"] == pytest.approx(0.1 * math.log(16) + 1)
    assert betas.tensors[ROPE_DIVISORS].shape == (8,)
    assert prefix + "attn_factor" not in header["out Llama 3.1"].metadata


@pytest.mark.parametrize("name", ["longrope", "untruncated yarn", "Llama 3.1"])
def test_rope_that_llama_cpp_cannot_be_told_is_refused(tmp_path: Path, name: str) -> None:
    src = with_rope(write_tiny(tmp_path / "src", "qwen2"), ROPES[name], 1024)
    with pytest.raises(UserError, match=r"which llama\.cpp cannot be told for qwen2"):
        gguf_of(src, tmp_path / "out")


def test_tensors_that_llama_cpp_has_no_place_for_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "biases", "qwen3", attention_bias=True)
    with pytest.raises(UserError, match=r"biases in its o_proj layers, which llama\.cpp does not load for qwen3"):
        gguf_of(tmp_path / "biases", tmp_path / "out")
    write_tiny(tmp_path / "wide", "qwen2", head_dim=32)
    with pytest.raises(UserError, match="4 heads of 32 on a hidden size of 64"):
        gguf_of(tmp_path / "wide", tmp_path / "out")


def test_what_reads_back_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write_tiny(tmp_path / "src")
    real = gguf.GGUFWriter.write_tensor_data

    def flipped(self: gguf.GGUFWriter, tensor: np.ndarray) -> None:
        changed = tensor.copy()
        changed[-1, 0] ^= 1
        real(self, changed)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", flipped)
    with pytest.raises(CheckFailed, match=r"tensor model\.embed_tokens\.weight .* reads back with other bytes"):
        gguf_of(src, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(gguf_export, "chat_template", lambda files, seen=[]: seen.append(files) or len(seen))
    with pytest.raises(CheckFailed, match="another chat template"):
        gguf_of(src, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


FULL = """
import resource, sys
from pathlib import Path
from lcconvert.convert.export import ExportConfig, export
from lcconvert.runtime.errors import UserError
for limit in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        export(sys.argv[1] + "/src", Path(sys.argv[1]) / "out", ExportConfig(format="gguf"))
    except UserError as error:
        print(error)
"""


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """Full in the header, in a tensor, and in the sidecar beside the file."""
    write_tiny(tmp_path / "src")
    export(str(tmp_path / "src"), tmp_path / "whole", ExportConfig(format="gguf"))
    size = (tmp_path / "whole" / "model-bf16.gguf").stat().st_size
    limits = [str(limit) for limit in (1000, 100_000, size - 1)]
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), *limits], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("the disk is full while writing")
        assert line.endswith("nothing was left behind")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src", "whole"]


def test_a_stopped_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = write_tiny(tmp_path / "src")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", stop)
    with pytest.raises(Interrupted, match="stopped; nothing was left behind"):
        gguf_of(src, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("precision", ["bf16", "q8_0", "q4_0"])
def test_large_tensors_are_rounded_and_read_back_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The library makes several copies of what it is given; an embedding of an 8B model would be many GB at once."""
    src = write_tiny(tmp_path / "src")
    whole = gguf_of(src, tmp_path / "whole", precision)
    seen: list[int] = []
    for name in ("quantize", "dequantize"):
        real = getattr(gguf, name)
        monkeypatch.setattr(gguf, name, lambda data, kind, real=real: seen.append(data.size) or real(data, kind))
    monkeypatch.setattr(gguf_export, "_ENCODED_AT_ONCE", 1000)
    monkeypatch.setattr(gguf_source, "_BLOCK_BYTES", 4000)
    blocks = gguf_of(src, tmp_path / "blocks", precision)
    assert (tmp_path / "blocks" / f"model-{precision}.gguf").stat().st_size == whole.path.stat().st_size
    assert all(torch.equal(blocks.tensor(name), whole.tensor(name)) for name in whole.names())
    assert max(seen) <= 4000  # bytes read, values rounded: no whole matrix


def test_tokenizer_and_template_go_round(tmp_path: Path) -> None:
    """GGUF to GGUF: the vocabulary, special ids and template that were read are the ones that are written."""
    values: dict[str, Any] = {**vocabulary("gpt2"), "pre": "smollm", "tokenizer.chat_template": "{{ messages }}"}
    src = write_gguf(tmp_path / "src.gguf", gguf_model("llama"), tokenizer=values)
    written, before = gguf_of(src, tmp_path / "out", "bf16"), open_checkpoint(src)
    assert dict(written.files) == dict(before.files)
    changed = {key for key in before.config if written.config.get(key) != before.config[key]}
    assert changed == set()


def test_tokenizers_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    spm = write_gguf(tmp_path / "spm.gguf", gguf_model("llama"), tokenizer=vocabulary("llama"))
    with pytest.raises(UserError, match="SentencePiece tokenizer; only byte-level BPE"):
        gguf_of(spm, tmp_path / "out")
    src = write_tiny(tmp_path / "src")
    (src / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        gguf_of(src, tmp_path / "out")


def test_widths_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src", intermediate_size=132)
    with pytest.raises(UserError, match="input width 132, which Q8_0 blocks of 32 do not divide"):
        gguf_of(src, tmp_path / "out", "q8_0")
