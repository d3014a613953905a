"""ONNX exports run by onnxruntime on the CPU against our decoder: families, RoPE kinds, int4 bytes, fp8, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model, write_tiny

from lcconvert.convert.ct_layout import fp8_tensors, int4_tensors, kv_scale_tensors, quantization_config
from lcconvert.convert.export import ExportConfig, export
from lcconvert.convert.onnx_check import check_files, compare_logits
from lcconvert.convert.onnx_data import read_back
from lcconvert.convert.onnx_export import genai_config, reserved_length
from lcconvert.convert.rope_methods import Method, extend_rope
from lcconvert.convert.round_to_nearest import dequantize, quantize_fp8, quantize_rtn
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.linear import LinearFormat
from lcconvert.runtime.model import Decoder, load_decoder
from lcconvert.runtime.rope import RopeSpec
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Session:
    """A model.onnx with its cache, fed the way onnxruntime-genai does."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.layers, self.heads = config["num_hidden_layers"], config["num_key_value_heads"]
        self.size, self.inputs, self.outputs = config["head_size"], config["inputs"], config["outputs"]
        self.session = onnxruntime.InferenceSession(
            str(folder / config["filename"]), providers=["CPUExecutionProvider"]
        )
        self.cache: list[np.ndarray] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, S] after what the cache holds -> logits [B, S, V]."""
        batch, new = ids.shape
        cache = self.cache or [np.zeros((batch, self.heads, 0, self.size), np.float32)] * (2 * self.layers)
        names = [self.inputs[f"past_{kv}_names"] % i for i in range(self.layers) for kv in ("key", "value")]
        total = cache[0].shape[2] + new
        feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((batch, total), np.int64)}
        results = self.session.run(None, feeds | dict(zip(names, cache)))
        order = [o.name for o in self.session.get_outputs()]
        found = dict(zip(order, results))
        present = [self.outputs[f"present_{kv}_names"] % i for i in range(self.layers) for kv in ("key", "value")]
        self.cache = [found[name] for name in present]
        return torch.from_numpy(found["logits"])


def onnx_of(src: Path, out: Path, **config: Any) -> Session:
    return Session(export(str(src), out, ExportConfig(format="onnx", **({"compare": "never"} | config))))


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(4, 320, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return decoder.logits(decoder(ids))


def initializers(folder: Path) -> dict[str, bytes]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return {p.name: b"".join(read_back(folder / "model.onnx.data", p)) for p in graph.initializer if p.external_data}


@pytest.mark.parametrize("family", [*FAMILIES, "llama-biases"])
def test_prefill_chunks_and_decode_equal_ours(tmp_path: Path, family: str) -> None:
    extra = {"attention_bias": True, "mlp_bias": True} if family == "llama-biases" else {}
    src = write_tiny(tmp_path / "src", family.partition("-")[0], **extra)
    session = onnx_of(src, tmp_path / "out")
    ids = random_ids(1, 60)
    wanted = logits_of(load_decoder(FolderSource(src)), ids)
    found = [session(ids[:, :30]), session(ids[:, 30:45]), *(session(ids[:, at : at + 1]) for at in range(45, 60))]
    assert (torch.cat(found, dim=1) - wanted).abs().max() <= 1e-4
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()


def test_a_batch(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src")
    ids = random_ids(3, 20)
    found = onnx_of(src, tmp_path / "out")(ids)
    assert (found - logits_of(load_decoder(FolderSource(src)), ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("method", get_args(Method))
def test_positions_beyond_the_old_window(tmp_path: Path, method: Any) -> None:
    """A model of 64 tokens stretched to 1,024: prefill and one cached token past the old window, for every method."""
    trained, context = 64, 1024
    rope = extend_rope(RopeSpec(), method, head_dim=16, trained=trained, context=context)
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "src")
    config = json.loads((tmp_path / "src" / "config.json").read_text())
    config |= {**rope.to_config(), "max_position_embeddings": context}
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    session = onnx_of(tmp_path / "src", tmp_path / "out", compare="always")
    ids = random_ids(1, 400)
    wanted = logits_of(load_decoder(FolderSource(tmp_path / "src")), ids)
    assert (session(ids[:, :399]) - wanted[:, :399]).abs().max() <= 1e-3
    assert (session(ids[:, 399:]) - wanted[:, 399:]).abs().max() <= 1e-3
    provenance = json.loads((tmp_path / "out" / "lcconvert.json").read_text())["provenance"]
    assert provenance["export"]["comparison"].startswith("largest logit difference")


def test_yarn_equals_transformers(tmp_path: Path) -> None:
    """The oracle itself, attention factor included: no code of ours between the config and the logits."""
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64}
    oracle = tiny_model("qwen2", rope_parameters=rope, max_position_embeddings=512)
    oracle.save_pretrained(tmp_path / "src")
    ids = random_ids(1, 300)
    with torch.no_grad():
        wanted = oracle(ids).logits
    assert (onnx_of(tmp_path / "src", tmp_path / "out")(ids) - wanted).abs().max() <= 1e-3


def quantized(src: Path, kind: str, group: int = 32) -> Path:
    """Rewrites a tiny folder as an int4 or fp8 artifact, through the layout our own quantizer writes."""
    tensors = load_file(src / "model.safetensors")
    form = LinearFormat(kind, group)
    for name in [n for n in tensors if n.removesuffix(".weight").endswith(LINEAR)]:
        module, weight = name.removesuffix(".weight"), tensors.pop(name)
        if kind == "int4":
            tensors |= int4_tensors(module, *quantize_rtn(weight, group))
        else:
            tensors |= fp8_tensors(module, *quantize_fp8(weight))
    if kind == "fp8":
        tensors |= kv_scale_tensors(0, torch.ones(2), torch.ones(2)) | kv_scale_tensors(1, torch.ones(2), torch.ones(2))
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((src / "config.json").read_text())
    config["quantization_config"] = quantization_config(form, ("lm_head",), fp8_kv=False)
    (src / "config.json").write_text(json.dumps(config))
    return src


def test_int4_artifact_bytes_are_copied(tmp_path: Path) -> None:
    src = quantized(write_tiny(tmp_path / "src", "qwen2"), "int4")
    session = onnx_of(src, tmp_path / "out", compare="always")
    stored, written = load_file(src / "model.safetensors"), initializers(tmp_path / "out")
    packed = [n for n in stored if n.endswith("weight_packed")]
    assert len(packed) == 14
    for name in packed:
        assert written[name] == stored[name].numpy().tobytes()
        shape = next(p.dims for p in _protos(tmp_path / "out") if p.name == name)
        columns = stored[name].shape[1] * 8
        assert list(shape) == [stored[name].shape[0], columns // 32, 16]
        scale = stored[name.replace("packed", "scale")].float()
        assert written[name.replace("packed", "scale")] == scale.numpy().tobytes()
    ids = random_ids(1, 50)
    assert (session(ids) - logits_of(load_decoder(FolderSource(src)), ids)).abs().max() <= 1e-3


def _protos(folder: Path) -> list[onnx.TensorProto]:
    return list(onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer)


def test_int4_artifact_as_fp32(tmp_path: Path) -> None:
    src = quantized(write_tiny(tmp_path / "src"), "int4")
    session = onnx_of(src, tmp_path / "out", precision="fp32")
    assert not any(name.endswith("packed") for name in initializers(tmp_path / "out"))
    ids = random_ids(1, 50)
    assert (session(ids) - logits_of(load_decoder(FolderSource(src)), ids)).abs().max() <= 1e-3


def test_layers_an_int4_artifact_keeps_wider_stay_wider(tmp_path: Path) -> None:
    src = quantized(write_tiny(tmp_path / "src"), "int4")
    tensors = load_file(src / "model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    for leaf in ("packed", "scale", "shape"):
        tensors.pop(f"{module}.weight_{leaf}")
    tensors[f"{module}.weight"] = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)) * 0.1
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((src / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head", module]
    (src / "config.json").write_text(json.dumps(config))
    session = onnx_of(src, tmp_path / "out")
    ids = random_ids(1, 30)
    assert (session(ids) - logits_of(load_decoder(FolderSource(src)), ids)).abs().max() <= 1e-3


def test_int4_of_a_16_bit_checkpoint_is_round_to_nearest(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src", "qwen3")
    session = onnx_of(src, tmp_path / "out", precision="int4", group_size=32, compare="always")
    decoder = load_decoder(FolderSource(src))
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.removesuffix(".weight").endswith(LINEAR):
                weight.copy_(dequantize(*quantize_rtn(weight, 32, scale_dtype=torch.float32)))
    ids = random_ids(1, 50)
    assert (session(ids) - logits_of(decoder, ids)).abs().max() <= 1e-3
    assert (session.session.get_inputs()[0].name, len(session.cache)) == ("input_ids", 4)


def test_fp8_artifact_is_expanded(tmp_path: Path) -> None:
    """Weights exactly as stored times their scale; the activations are not rounded as our own fp8 path does."""
    src = quantized(write_tiny(tmp_path / "src"), "fp8")
    session = onnx_of(src, tmp_path / "out")
    plain = load_decoder(FolderSource(write_tiny(tmp_path / "plain")))
    stored = load_file(src / "model.safetensors")
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if f"{name}_scale" in stored:
                weight.copy_(stored[name].float() * stored[f"{name}_scale"].float())
    ids = random_ids(1, 50)
    assert (session(ids) - logits_of(plain, ids)).abs().max() <= 1e-3


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src", "llama")
    export(str(src), tmp_path / "out", ExportConfig(format="onnx", max_length=16, compare="never"))
    spec = ModelSpec.from_config(FolderSource(src).config)
    written = initializers(tmp_path / "out")
    assert sum(len(raw) for raw in written.values()) == 4 * (spec.parameters() + 16 * spec.head_dim)
    assert len(written["cos_cache"]) == 16 * spec.head_dim // 2 * 4


def test_genai_config_reserves_what_fits(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src")
    config = FolderSource(src).config
    spec = ModelSpec.from_config(config)
    written = genai_config(spec, config, 2048)
    assert written["model"]["type"] == "llama"
    assert (written["model"]["bos_token_id"], written["model"]["eos_token_id"]) == (0, 1)
    assert written["model"]["context_length"] == written["search"]["max_length"] == 2048
    big = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    eight_b = ModelSpec.from_config(config | big | {"head_dim": 128, "max_position_embeddings": 1 << 20})
    assert reserved_length(eight_b, 1 << 20) == 16_384  # 65,536 float32 values a token: exactly 4 GiB


def test_sidecar_keeps_the_policy_and_the_history(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src")
    before = Sidecar.read(FolderSource(src)).model_copy(
        update={"variant": "extended", "provenance": {"source": "owner/base"}}
    )
    (src / "lcconvert.json").write_bytes(before.to_bytes())
    onnx_of(src, tmp_path / "out")
    after = Sidecar.model_validate_json((tmp_path / "out" / "lcconvert.json").read_bytes())
    assert after.variant == "extended"
    assert after.provenance["source"] == "owner/base"
    assert after.provenance["export"]["source"] == src.name
    assert after.provenance["export"]["comparison"] == "not run"


def test_damage_on_disk_is_found(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src")
    onnx_of(src, tmp_path / "out")
    model = tmp_path / "out" / "model.onnx"
    spec = ModelSpec.from_config(FolderSource(src).config)
    data = bytearray((tmp_path / "out" / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (tmp_path / "out" / "model.onnx.data").write_bytes(data)
    with pytest.raises(CheckFailed, match="cos_cache read back from disk"):
        check_files(model, {"cos_cache": "0" * 64})
    other = ModelSpec.from_config(FolderSource(src).config | RopeSpec(kind="linear", factor=4.0).to_config())
    assert compare_logits(model, spec, 2048) <= 1e-3
    with pytest.raises(CheckFailed, match="differ from ours"):
        compare_logits(model, other, 2048)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"format": "tflite"}, "expected one of safetensors, onnx, gguf"),
        ({"format": "onnx", "precision": "int3"}, "format onnx has auto, fp32, int4"),
        ({"format": "gguf", "precision": "fp32"}, "format gguf has"),
    ],
)
def test_unknown_formats_and_precisions(values: dict[str, str], word: str) -> None:
    with pytest.raises(UserError, match=word):
        ExportConfig(**values)  # type: ignore[arg-type]


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src")
    odd = write_tiny(tmp_path / "odd", "llama", intermediate_size=132)
    extra = write_tiny(tmp_path / "extra")
    tensors = load_file(extra / "model.safetensors")
    save_file(tensors | {"model.layers.7.stray": torch.ones(1)}, extra / "model.safetensors")
    broken = write_tiny(tmp_path / "broken")
    save_file(tensors | {"model.norm.weight": torch.full((64,), torch.nan)}, broken / "model.safetensors")
    out = tmp_path / "out"
    for folder, values, word in (
        (odd, {"precision": "int4"}, "input width 132, which no int4 group size of 16, 32, 64, 128 divides"),
        (src, {"max_length": 4096}, "max_length is 4096 but"),
        (extra, {}, "holds tensor model.layers.7.stray"),
        (broken, {}, "model.norm.weight .* holds NaN"),
    ):
        with pytest.raises(UserError, match=word):
            export(str(folder), out, ExportConfig(format="onnx", **values))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "extra", "odd", "src"]
