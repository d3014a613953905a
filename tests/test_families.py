"""Every family against transformers: prefill, cached decode, past the window; in 16 bit; after quantization; extended.

And the other way round: a config.json that means something else to transformers must mean the same here or be refused.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import CONTEXT, ROWS, TOKENS, Written, outcome, table, written
from safetensors.torch import load_file, save_file

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.engine_check import check_engine
from lcconvert.convert.export_weights import ExportWeights
from lcconvert.convert.inspect import inspect
from lcconvert.convert.prefix_tuning import hidden_after, read_prefix
from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.convert.trainable import check_trainable
from lcconvert.runtime.banded import banded_attention
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import Decoder, load_decoder
from lcconvert.runtime.sidecar import AttentionPolicy, KVConfig
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.stacked import decode_mxfp4
from lcconvert.runtime.stored import as_stored


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def model(row: str, families_root: Path) -> Written:
    return written(row, families_root)


def worst(engine: Engine, ids: list[int], theirs: torch.Tensor) -> float:
    """Largest logit difference over a prefill, one that goes on, and decode steps across a page's end (at 384)."""
    engine.chunk = 128
    seq = engine.new_sequence()
    theirs = theirs.to(engine.device)
    found = [engine.prefill(seq, ids[:300]) - theirs[299]]
    found.append(engine.logits(engine.prefill(seq, ids[300:380], want="all")) - theirs[300:380])
    found += [engine.decode(seq, ids[at]) - theirs[at] for at in range(380, TOKENS)]
    return max(float(difference.abs().max()) for difference in found)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def _expanded(folder: Path, out: Path) -> Path:
    """The artifact in `folder` with plain float32 weights, in its family's layout."""
    weights = ExportWeights(FolderSource(folder))
    with torch.device("meta"):
        modules = dict(Decoder(weights.spec).named_modules())
    tensors = {}
    for name, module in modules.items():
        for leaf, _ in module.named_parameters(recurse=False):
            linear = isinstance(module, torch.nn.Linear) and leaf == "weight"
            tensors[f"{name}.{leaf}"] = weights.dense(name) if linear else weights.plain(f"{name}.{leaf}")
    out.mkdir()
    config = {key: value for key, value in weights.source.config.items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config))
    stored = {name: tensor.float().contiguous() for name, tensor in as_stored(config, weights.spec, tensors.items())}
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _read(folder: Path, dtype: torch.dtype, **options: Any) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model.eval().requires_grad_(False)


def test_logits_equal_transformers(model: Written) -> None:
    engine = Engine.load(FolderSource(model.folder), device="cpu")
    assert engine.spec.parameters() == sum(weight.numel() for weight in model.oracle.parameters())
    assert worst(engine, model.ids, model.logits) <= 1e-4
    with torch.no_grad():
        at_once = engine.model.logits(engine.model(torch.tensor([model.ids])))[0]
    assert (at_once - model.logits).abs().max() <= 1e-4


@pytest.mark.parametrize(("device", "room"), [("cpu", 1.25), pytest.param("cuda", 2.0, marks=pytest.mark.gpu)])
def test_16_bit_is_as_close_as_transformers(model: Written, tmp_path: Path, device: str, room: float) -> None:
    """Both from bfloat16 weights, against their float32 result: here in bfloat16 hardly further off than transformers
    on a CPU. On a GPU the decode steps are CUDA graphs where the family allows them."""
    copy.deepcopy(model.oracle).bfloat16().save_pretrained(tmp_path)
    ids = torch.tensor([model.ids])
    theirs, exact = (_read(tmp_path, dtype)(ids).logits[0].float() for dtype in (torch.bfloat16, torch.float32))
    wide = load_decoder(FolderSource(tmp_path))
    narrow = Engine.load(FolderSource(tmp_path), device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        assert (wide.logits(wide(ids))[0] - exact).abs().max() <= 1e-4
    assert worst(narrow, model.ids, exact) <= room * float((theirs - exact).abs().max())


def test_flash(row: str, families_root: Path, tmp_path: Path) -> None:
    """transformers reads the artifact through compressed-tensors, expands it and gets the same logits.

    It does not read packed experts, so those are expanded here.
    """
    model, out = written(row, families_root), outcome(row, "quantize", families_root).folder
    assert out is not None
    readable = _expanded(out, tmp_path / "expanded") if ModelSpec.from_config(_config(out)).routed else out
    theirs = _read(readable, torch.float32)(torch.tensor([model.ids])).logits[0]
    assert worst(Engine.load(FolderSource(out), device="cpu"), model.ids, theirs) <= 1e-4


def test_extend(row: str, families_root: Path) -> None:
    """The artifact has the family's own names and order, and transformers reads it alike. Windowed layers, and those
    without RoPE, stay as they are."""
    model, found = written(row, families_root), outcome(row, "extend", families_root)
    spec = ModelSpec.from_config(_config(model.folder))
    assert bool(found.refused) == bool(reason := _why_not(spec))
    if found.folder is None:
        assert reason in found.refused
        return
    source = FolderSource(found.folder)
    assert sorted(source.names()) == sorted(FolderSource(model.folder).names())
    after = ModelSpec.from_config(source.config)
    changed = [n for n in range(spec.num_layers) if after.rope_of(n) != spec.rope_of(n)]
    assert changed == [n for n in range(spec.num_layers) if n not in (*spec.windowed, *spec.unrotated)]
    assert (after.windowed, after.window, after.max_position) == (spec.windowed, spec.window, CONTEXT)
    decoder = load_decoder(source)
    theirs = _read(source.path, torch.float32)(torch.tensor([model.ids])).logits[0]
    with torch.no_grad():
        assert (decoder.logits(decoder(torch.tensor([model.ids])))[0] - theirs).abs().max() <= 1e-4


def _why_not(spec: ModelSpec) -> str:
    if spec.rope.kind == "longrope":
        return "searched for its own length"
    turned = set(spec.windowed) - set(spec.unrotated)
    return "cannot keep apart" if turned and spec.local_rope is None else ""


@pytest.mark.parametrize("row", ["qwen3", "gemma3", "olmo3", "smollm3"])
def test_training_computes_the_same(row: str, families_root: Path) -> None:
    """With layers computed again in the backward pass, and for questions on a text that was read before."""
    model = written(row, families_root)
    decoder = load_decoder(FolderSource(model.folder))
    ids = torch.tensor([model.ids])
    decoder.logits(decoder(ids, checkpoint_layers=True)[0, ::50]).square().mean().backward()
    kept = {name: weight.grad.clone() for name, weight in decoder.named_parameters()}
    decoder.zero_grad()
    plain = decoder(ids)
    decoder.logits(plain[0, ::50]).square().mean().backward()
    for name, weight in decoder.named_parameters():
        torch.testing.assert_close(kept[name], weight.grad, atol=1e-5, rtol=1e-4)
    prefix = read_prefix(decoder, ids[0, :300], AttentionPolicy(), torch.float32)
    with torch.no_grad():
        after = hidden_after(decoder, prefix, ids[:, 300:])
    torch.testing.assert_close(after, plain[:, 300:], atol=1e-4, rtol=1e-4)


def test_experts_are_calibrated_on_their_tokens(families_root: Path, tmp_path: Path) -> None:
    model = written("qwen3-moe", families_root)
    config = QuantizeConfig(samples=2, length=256)
    artifact = FolderSource(quantize(str(model.folder), tmp_path / "out", config))
    rows = json.loads((artifact.path / "quantization.json").read_text())["linear_layers"]
    tokens = [row["tokens"] for row in rows if row["name"].endswith("gate_proj") and "experts" in row["name"]]
    assert len(tokens) == 6
    assert sum(tokens) == 3 * 2 * 256  # each token is shown to its three experts
    assert all(row["method"] == "gptq" for row in rows if row.get("tokens"))
    engine = Engine.load(artifact, device="cpu")
    assert torch.isfinite(engine.prefill(engine.new_sequence(), model.ids)).all()


@pytest.fixture
def mxfp4(families_root: Path, tmp_path: Path) -> Path:
    """The gpt-oss row with random MXFP4 experts, as OpenAI stores them."""
    folder, generator = tmp_path / "mxfp4", torch.Generator().manual_seed(3)
    shutil.copytree(written("gpt-oss", families_root).folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        for leaf, low, high, shape in (("blocks", 0, 256, (inputs // 32, 16)), ("scales", 120, 126, (inputs // 32,))):
            codes = torch.randint(low, high, (experts, outputs, *shape), generator=generator, dtype=torch.uint8)
            tensors[f"{name}_{leaf}"] = codes
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    block = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(_config(folder) | {"quantization_config": block}))
    return folder


def test_mxfp4_is_decoded_as_transformers_does(mxfp4: Path, families_root: Path, tmp_path: Path) -> None:
    """And quantized from, after calibration; dense attention, because block selection knows no sinks."""
    source, ids = open_checkpoint(mxfp4), written("gpt-oss", families_root).ids
    assert source.info("model.layers.1.mlp.experts.4.up_proj.weight") == (torch.bfloat16, (96, 64))
    theirs = _read(mxfp4, torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True))
    assert worst(Engine.load(source, device="cpu"), ids, theirs(torch.tensor([ids])).logits[0]) <= 1e-4
    assert inspect(str(mxfp4))["parameters"] == sum(weight.numel() for weight in theirs.parameters())
    out = FolderSource(quantize(str(mxfp4), tmp_path / "out", QuantizeConfig(samples=1, length=256)))
    sidecar = json.loads((out.path / "lcconvert.json").read_text())
    assert sidecar["attention"]["kind"] == "dense"
    assert sidecar["provenance"]["quantize"]["imported"] == "mxfp4"
    engine = Engine.load(out, device="cpu")
    assert torch.isfinite(engine.prefill(engine.new_sequence(), ids)).all()


def test_mxfp4_says_what_is_missing(mxfp4: Path) -> None:
    tensors = load_file(mxfp4 / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, mxfp4 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1\.mlp\.experts\.down_proj_scales is missing or does not fit"):
        load_decoder(open_checkpoint(mxfp4))


def test_mxfp4_holds_every_value_of_the_format() -> None:
    codes, scales = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1).expand(-1, 1, 16), torch.arange(256)
    found = decode_mxfp4(codes, scales.to(torch.uint8)[:, None])
    value = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    value += [-x for x in value]
    for row in range(253):  # beyond lies what bfloat16 does not reach
        assert found[row, :2].tolist() == [value[row & 15] * 2.0 ** (row - 127), value[row >> 4] * 2.0 ** (row - 127)]
    assert found[255].isnan().all()


def test_what_has_no_sinks_refuses_gpt_oss(families_root: Path, tmp_path: Path) -> None:
    model = written("gpt-oss", families_root)
    with pytest.raises(UserError, match="attention is hybrid, which has no sinks"):
        quantize(str(model.folder), tmp_path / "out", QuantizeConfig(attention="hybrid", samples=1, length=256))
    with pytest.raises(UserError, match="sinks in attention, which are not trained here"):
        check_trainable(ModelSpec.from_config(_config(model.folder)), "it")


def test_onnx(row: str, families_root: Path) -> None:
    """The export compares onnxruntime's logits with ours by itself, near the start and past the window."""
    found = outcome(row, "onnx", families_root)
    if found.folder is None:
        assert "has experts" in found.refused
        return
    assert "largest logit difference" in (found.folder / "lcconvert.json").read_text()


def test_gguf_takes_what_its_graphs_compute(row: str, families_root: Path) -> None:
    spec = ModelSpec.from_config(_config(written(row, families_root).folder))
    refused = outcome(row, "gguf", families_root).refused
    assert bool(refused) == bool(spec.beyond_plain or row == "qwen3-biases" or spec.family == "phi3")
    assert not refused or re.search(r"not written as GGUF here|biases", refused)


def test_a_missing_tensor_is_called_what_the_checkpoint_calls_it(families_root: Path, tmp_path: Path) -> None:
    shutil.copytree(written("phi3", families_root).folder, tmp_path / "phi3")
    tensors = load_file(tmp_path / "phi3" / "model.safetensors")
    del tensors["model.layers.1.self_attn.qkv_proj.weight"]
    save_file(tensors, tmp_path / "phi3" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks tensor model\.layers\.1\.self_attn\.qkv_proj\.weight"):
        load_decoder(FolderSource(tmp_path / "phi3"))


def test_the_readme_has_the_table(families_root: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    block = readme.partition("<!-- families: begin -->")[2].partition("<!-- families: end -->")[0]
    assert not block or table(families_root) in block


@pytest.mark.parametrize("scheme", ["bf16", "int4"])
def test_decode_within_a_window_reads_the_right_tokens(families_root: Path, scheme: Any) -> None:
    """Two sequences at once, one shorter than the window, against what the pages of each hold."""
    source = FolderSource(written("gemma3", families_root).folder)
    engine = Engine.load(source, device="cpu", kv=KVConfig(scheme=scheme))
    ids, seqs = written("gemma3", families_root).ids, [engine.new_sequence() for _ in range(2)]
    for seq, length in zip(seqs, (100, 383)):
        engine.prefill(seq, ids[:length])
    step, pool, window = engine._decode, engine.pool, engine.layers[0].window
    assert window is not None
    for token in ids[:2]:  # the second one closes a page
        engine.decode_batch(seqs, [token, token])
        q = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(token))
        found = step._within_window(0, q, step._fresh(seqs, [step._numbers(seq, token) for seq in seqs]), window)
        for query, seq, out in zip(q, seqs, found):
            k, v = (torch.empty(seq.length, 2, 32) for _ in range(2))
            pool.read_prefix(seq, 0, k, v)
            torch.testing.assert_close(out, banded_attention(query[None], k, v, window)[0], atol=1e-5, rtol=1e-5)


def test_what_other_engines_make_of_it(row: str, families_root: Path) -> None:
    """Their rotary table is ours but for 16-bit rounding, or a difference is told; so are experts not read."""
    out = outcome(row, "quantize", families_root).folder
    spec = ModelSpec.from_config(_config(Path(str(out))))
    for engine in ("vllm", "transformers", "onnxruntime"):
        reading = check_engine(str(out), engine)
        assert reading.otherwise or max(reading.rope.error.values()) < 5e-3
        assert any("experts" in text for text in reading.refused) == (
            bool(spec.routed) and (engine != "vllm" or spec.family == "gpt_oss")
        )
