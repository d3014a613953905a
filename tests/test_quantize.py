"""The `quantize` stage: artifacts against transformers and compressed-tensors, accounting, calibration, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_model, write_tiny, write_tokenizer

from lcconvert.convert import round_layer
from lcconvert.convert.calibrate import SHARED_INPUT, Calibration, Moments, Reach, calibration_windows, load_layer
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.quantize import REPORT, make_plan, quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.convert.selector_calibration import block_shares, calibrate_alpha
from lcconvert.kernels.select_blocks import select_blocks
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import Fp8Linear, Int4Linear, LinearFormat, QuantLayout
from lcconvert.runtime.model import Decoder, Layer, load_decoder
from lcconvert.runtime.rope import cos_sin
from lcconvert.runtime.sidecar import AttentionPolicy, ContextClaim, KVConfig, Sidecar
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.tokenizer import Tokenizer

FAMILIES = ("llama", "qwen2", "qwen3")  # tied head; q/k/v biases and an own head; q/k norm
SMALL = {"samples": 2, "length": 1024}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_tiny(tmp_path_factory.mktemp("source") / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def artifacts(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    made = {}
    for family, source in sources.items():
        for variant in ("flash", "pro"):
            out = tmp_path_factory.mktemp("artifact") / f"{family}-{variant}"
            made[family, variant] = quantize(str(source), out, QuantizeConfig(variant=variant, **SMALL))
    return made


def _ids(seed: int = 1) -> torch.Tensor:
    return torch.randint(4, 260, (1, 90), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_flash_gives_the_logits_transformers_gives(artifacts, family: str) -> None:
    folder = artifacts[family, "flash"]
    ours = load_decoder(FolderSource(folder))
    assert isinstance(ours.model.layers[0].mlp.up_proj, Int4Linear)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert (ours.logits(ours(_ids())) - theirs(_ids()).logits).abs().max() <= 1e-4


def _assert_layers_agree(folder: Path) -> Decoder:
    """Layer by layer from equal inputs. A difference in the last float32 bit can move an activation across an e4m3
    rounding border, a step of 6 %, so a few values of a layer may differ and logits after many layers would."""
    ours = load_decoder(FolderSource(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: dict[int, torch.Tensor] = {}
    for number, layer in enumerate(theirs.model.layers):
        layer.register_forward_hook(lambda _m, _a, out, number=number: seen.__setitem__(number, out))
    with torch.no_grad():
        logits = theirs(_ids()).logits
        x = theirs.model.embed_tokens(_ids())
        cos, sin = cos_sin(ours.spec.rope, ours.spec.head_dim, torch.arange(90)[None])
        for number, layer in enumerate(ours.layers):
            close = (layer(x, cos, sin) - seen[number]).abs() <= 1e-3
            assert close.float().mean() >= 0.97
            x = seen[number]
        assert (ours.logits(ours.model.norm(x)) - logits).abs().max() <= 1e-4
    return ours


@pytest.mark.parametrize("family", FAMILIES)
def test_pro_gives_the_values_transformers_gives(artifacts, family: str) -> None:
    ours = _assert_layers_agree(artifacts[family, "pro"])
    assert isinstance(ours.layers[0].mlp.up_proj, Fp8Linear)


def test_fp8_layers_with_exact_inputs_give_the_logits_transformers_gives(sources, artifacts, tmp_path: Path) -> None:
    folder = quantize(str(sources["qwen2"]), tmp_path / "out", QuantizeConfig(variant="pro", inputs="16-bit", **SMALL))
    source, rounded = FolderSource(folder), FolderSource(artifacts["qwen2", "pro"])
    assert source.config["quantization_config"]["config_groups"]["group_0"]["input_activations"] is None
    ours = load_decoder(source)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = theirs(_ids()).logits
        assert (ours.logits(ours(_ids())) - wanted).abs().max() <= 1e-4
    engine = Engine.load(source, device="cpu", kv=KVConfig())
    seq = engine.new_sequence()
    ids = _ids()[0].tolist()
    assert (engine.logits(engine.prefill(seq, ids[:70], want="all")) - wanted[0, :70]).abs().max() <= 1e-4
    for i in range(70, 90):  # decode multiplies with the weight as it is stored
        assert (engine.decode(seq, ids[i]) - wanted[0, i]).abs().max() <= 1e-4
    assert torch.equal(  # the same weights
        source.tensor("model.layers.0.self_attn.q_proj.weight").view(torch.uint8),
        rounded.tensor("model.layers.0.self_attn.q_proj.weight").view(torch.uint8),
    )


@pytest.mark.parametrize("variant", ["flash", "pro"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_source_tensor_is_accounted_for(sources, artifacts, family: str, variant: str) -> None:
    before, after = FolderSource(sources[family]), FolderSource(artifacts[family, variant])
    left = set(after.names())
    for name in before.names():
        module = name.removesuffix(".weight")
        if module.endswith("_proj") and name.endswith(".weight"):
            packed = {f"{module}.weight_scale"}
            packed |= {name} if variant == "pro" else {f"{module}.weight_packed", f"{module}.weight_shape"}
            assert packed <= left
            left -= packed
        else:
            assert torch.equal(after.tensor(name), before.tensor(name).to(torch.bfloat16)), name
            left.remove(name)
    scales = {f"model.layers.{n}.self_attn.{kv}_scale" for n in range(2) for kv in "kv"}
    assert left == (scales if variant == "pro" else set())
    assert ("lm_head.weight" in after.names()) == (family == "qwen2")  # the others tie it to the embedding
    assert after.files["tokenizer.json"] == before.files["tokenizer.json"]


def test_config_sidecar_and_report(artifacts) -> None:
    flash, pro = FolderSource(artifacts["llama", "flash"]), FolderSource(artifacts["llama", "pro"])
    assert flash.config["dtype"] == "bfloat16"
    assert flash.config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert flash.config["quantization_config"]["kv_cache_scheme"] is None
    assert pro.config["quantization_config"]["kv_cache_scheme"]["strategy"] == "attn_head"
    sidecar = Sidecar.read(flash)
    assert (sidecar.variant, sidecar.kv.scheme, sidecar.attention.kind) == ("flash", "int4", "hybrid")
    assert sidecar.prefill_gemm == "fp8"
    assert isinstance(sidecar.attention.alpha, list)
    assert [len(row) for row in sidecar.attention.alpha] == [4, 4]
    assert all(0 < alpha <= 0.1 for row in sidecar.attention.alpha for alpha in row)
    sidecar = Sidecar.read(pro)
    assert (sidecar.variant, sidecar.kv.scheme, sidecar.attention.kind) == ("pro", "fp8", "dense")
    report = json.loads((artifacts["llama", "flash"] / REPORT).read_text())
    assert len(report["linear_layers"]) == 14
    assert {row["method"] for row in report["linear_layers"]} == {"gptq"}
    assert all(0 < row["output_error"] < 0.05 and row["sqnr_db"] > 10 for row in report["linear_layers"])
    assert 4.25 <= report["bits_per_weight"] <= 4.3  # 4 bits, a 16-bit scale per 64, the shapes
    size = sum(path.stat().st_size for path in artifacts["llama", "flash"].glob("*.safetensors"))
    assert report["bytes"] <= size <= report["bytes"] + 8192  # and the safetensors header


def test_kv_scales_cover_what_the_model_produces(sources, artifacts) -> None:
    decoder = load_decoder(FolderSource(sources["qwen3"]))
    pro = FolderSource(artifacts["qwen3", "pro"])
    cos, sin = cos_sin(decoder.spec.rope, decoder.spec.head_dim, torch.arange(90) + 1_000_000)
    x = decoder.model.embed_tokens(_ids()[0])
    with torch.no_grad():
        _, k, v = decoder.model.layers[0].qkv(x, cos, sin)
    for found, which in ((k, "k_scale"), (v, "v_scale")):
        scale = pro.tensor(f"model.layers.0.self_attn.{which}")
        assert scale.dtype == torch.float32
        assert scale.shape == (2,)
        peak = found.abs().amax((0, 2))
        assert (peak <= 448 * scale).all()
        assert (peak >= 448 * scale / 8).all()
    assert not torch.equal(
        pro.tensor("model.layers.0.self_attn.k_scale"), pro.tensor("model.layers.0.self_attn.v_scale")
    )


@pytest.mark.parametrize("variant", ["flash", "pro"])
def test_the_engine_serves_the_artifact_as_the_sidecar_says(artifacts, variant: str) -> None:
    engine = Engine.load(FolderSource(artifacts["llama", variant]), device="cpu")
    assert engine.kv.scheme == ("int4" if variant == "flash" else "fp8")
    seq = engine.new_sequence()
    ids = torch.randint(4, 260, (1200,), generator=torch.Generator().manual_seed(4)).tolist()
    assert torch.isfinite(engine.prefill(seq, ids)).all()
    assert torch.isfinite(engine.decode(seq, 7)).all()


def test_a_zero_kv_scale_on_disk_is_refused_at_load(artifacts, tmp_path: Path) -> None:
    for path in artifacts["llama", "pro"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"][0] = 0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_scale"):
        Engine.load(FolderSource(tmp_path), device="cpu")
    del tensors["model.layers.1.self_attn.v_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_scale"):
        Engine.load(FolderSource(tmp_path), device="cpu")


def test_calibration_lowers_the_loss_of_quality(sources, tmp_path: Path) -> None:
    """Mean KL to the 16-bit model on held-out tokens: GPTQ < weighted rounding, and without data it still works."""
    original = load_decoder(FolderSource(sources["qwen2"]))
    ids = torch.tensor([Tokenizer.from_files(original_files(sources["qwen2"])).encode(Haystack.load().text[-2000:])])
    with torch.no_grad():
        wanted = original.logits(original(ids)).log_softmax(-1)

    def loss(name: str, **settings: object) -> float:
        config = QuantizeConfig(attention="dense", **settings)
        decoder = load_decoder(FolderSource(quantize(str(sources["qwen2"]), tmp_path / name, config)))
        with torch.no_grad():
            found = decoder.logits(decoder(ids)).log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    free = loss("free", samples=0)
    rtn = loss("rtn", method="rtn", **SMALL)
    gptq = loss("gptq", **SMALL)
    assert gptq < rtn
    assert gptq < free
    report = json.loads((tmp_path / "free" / REPORT).read_text())
    assert report["calibration_tokens"] == 0
    assert {row["method"] for row in report["linear_layers"]} == {"rtn"}


def original_files(folder: Path) -> dict[str, bytes]:
    return dict(FolderSource(folder).files)


def test_moments_that_do_not_factorize_fall_back_to_rounding(sources, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(round_layer, "factorize", lambda *_: None)
    out = quantize(str(sources["llama"]), tmp_path / "out", QuantizeConfig(**SMALL))
    report = json.loads((out / REPORT).read_text())
    assert {row["method"] for row in report["linear_layers"]} == {"rtn (the calibration moments do not factorize)"}


def _walked(calibration: Calibration, layer: Layer, change: dict[str, torch.Tensor]) -> dict[str, Moments]:
    """One layer's moments by the first name of each group; `change` replaces weights when their turn has come."""
    seen, reaches = {}, list[Reach]()
    for names, moments in calibration.walk(layer, None, 0.95, reaches.append):
        seen[names[0]] = moments
        for name in set(names) & set(change):
            layer.get_parameter(f"{name}.weight").copy_(change[name])
    assert len(reaches) == 1
    return seen


def test_layers_are_calibrated_on_what_they_will_get(sources) -> None:
    """Moments of every group against the rounded and the original decoder run side by side."""
    source = FolderSource(sources["qwen3"])
    spec = ModelSpec.from_config(source.config)
    windows = torch.randint(4, 260, (2, 200), generator=torch.Generator().manual_seed(5))
    calibration = Calibration(source, spec, windows, torch.device("cpu"))
    decoder, rounded = load_decoder(source), load_decoder(source)
    generator = torch.Generator().manual_seed(6)
    for number in range(spec.num_layers):
        change = {}
        for name in (name for names in SHARED_INPUT for name in names):
            weight = rounded.layers[number].get_parameter(f"{name}.weight")
            weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
            change[name] = weight.data
        seen = _walked(calibration, load_layer(source, spec, number, torch.device("cpu")), change)
    inputs: list[dict[str, torch.Tensor]] = [{}, {}]
    for found, model in zip(inputs, (decoder, rounded), strict=True):
        for names in SHARED_INPUT:
            module = model.layers[-1].get_submodule(names[0])
            module.register_forward_pre_hook(
                lambda _, args, name=names[0], found=found: found.__setitem__(name, args[0].flatten(0, -2))
            )
        with torch.no_grad():
            model(windows)
    for name, moments in seen.items():
        exact, x = inputs[0][name], inputs[1][name]
        torch.testing.assert_close(moments.inputs, x.T @ x / 400, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moments.missing, (exact - x).T @ x / 400, rtol=1e-3, atol=1e-4)
        assert (moments.owed is not None) == (name in ("self_attn.o_proj", "mlp.down_proj"))
    with torch.no_grad():
        torch.testing.assert_close(decoder.model.norm(calibration.exact), decoder(windows), rtol=1e-4, atol=1e-4)


def test_weights_are_asked_to_give_back_what_rounding_has_cost() -> None:
    """W x + r must come near W x' + r' although x and r have changed: the debt against the inputs vanishes."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(500, 32, generator=generator)
    x = exact + 0.3 * torch.randn(500, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    lacking = x @ torch.randn(32, 24, generator=generator) / 50
    weight = torch.randn(24, 32, generator=generator)
    moments = Moments(x.T @ x / 500, (exact - x).T @ x / 500, lacking.T @ x / 500)
    layout = QuantLayout(((("Linear",), LinearFormat("fp8")),))
    target, _, _, method = round_layer._round(
        weight, LinearFormat("fp8"), moments, round_layer.Rounding(layout, torch.float32, 1e-6)
    )
    assert method == "gptq"
    wanted = exact @ weight.T + lacking
    before, after = ((x @ w.T - wanted).square().mean() for w in (weight, target))
    best = torch.linalg.lstsq(x, wanted).solution
    assert after < 0.5 * before
    torch.testing.assert_close(target, best.T, rtol=1e-2, atol=1e-2)


def test_calibration_text_is_disjoint_from_validation(sources, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_files(original_files(sources["llama"]))
    text = Haystack.load().text
    windows = calibration_windows((), tokenizer, samples=3, length=512, seed=0)
    assert windows.shape == (3, 512)
    measured = text.index(tokenizer.decode(Haystack.load().excerpt(tokenizer, 64, "test")).strip())
    for row in windows.tolist():
        at = text.find(tokenizer.decode(row[8:-8]))
        assert at >= 0
        assert at + 600 < measured  # a token of this tokenizer is a byte
    assert torch.equal(windows, calibration_windows((), tokenizer, samples=3, length=512, seed=0))
    own = tmp_path / "own.txt"
    own.write_text("the quick brown fox jumps over the lazy dog " * 40)
    assert calibration_windows((str(own),), tokenizer, samples=2, length=256, seed=1).shape == (2, 256)
    with pytest.raises(UserError, match=r"windows of 4096 tokens but .*own\.txt holds 1761"):
        calibration_windows((str(own),), tokenizer, samples=2, length=4096, seed=1)


def test_block_shares_are_the_attention_mass() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(300, 4, 32, generator=generator), torch.randn(300, 2, 32, generator=generator)
    shares = block_shares(q, k)  # three tiles, the last of 44 rows
    torch.testing.assert_close(shares.sum(-1), torch.ones(4, 3))
    rows = [(q[r, 2] @ k[: r + 1, 1].T / 32**0.5).softmax(-1)[128:256].sum() for r in range(256, 300)]
    assert shares[2, 2, 1] == pytest.approx(float(sum(rows)) / 44, rel=1e-4)


def test_alpha_recalls_the_wanted_mass() -> None:
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(12, 2, 32, generator=generator) / 2  # what the keys of a block have in common
    k = torch.randn(1500, 2, 32, generator=generator) / 2 + topics.repeat_interleave(128, dim=0)[:1500]
    q = torch.randn(1500, 4, 32, generator=generator)
    q[:, 0] = 4 * topics[1, 0]  # a head that always asks for block 1
    policy = AttentionPolicy(kind="hybrid", sink_blocks=1, local_blocks=2)
    shares = block_shares(q, k)

    def recall(alpha: torch.Tensor) -> torch.Tensor:
        lists = select_blocks(
            q, k, q_offset=0, alpha=alpha, sink_blocks=1, local_blocks=2, dense_from=1501, min_blocks=0, max_blocks=None
        )
        found = torch.zeros(4)
        for head in range(4):
            for tile in range(4, 12):
                found[head] += shares[head, tile, lists.index[head, tile, : lists.count[head, tile]].long()].sum() / 8
        return found

    loose, kept = calibrate_alpha(q, k, policy, 0.9)
    strict, more = calibrate_alpha(q, k, policy, 0.99)
    for alpha, mass in ((loose, 0.9), (strict, 0.99)):
        assert ((alpha > 1e-7) & (alpha <= 0.1)).all()
        assert (recall(alpha) >= mass - 0.01).all()  # the first tiles, which skip little, are not counted here
    assert strict[0] < loose[0]
    assert 0 < kept < more < 1
    short, all_kept = calibrate_alpha(q[:300], k[:300], policy, 0.9)
    assert all_kept == 1.0
    assert (short < 1e-6).all()


def _changed(source: Path, folder: Path, change) -> str:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_a_dead_layer_is_named_when_fp8_needs_its_scale(sources, tmp_path: Path) -> None:
    def silence(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"].zero_()

    src = _changed(sources["llama"], tmp_path / "dead", silence)
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.v_scale"):
        quantize(src, tmp_path / "out", QuantizeConfig(variant="pro", **SMALL))
    assert not (tmp_path / "out").exists()
    out = quantize(src, tmp_path / "out", QuantizeConfig(attention="dense", **SMALL))  # int4 needs no scale
    with torch.no_grad():
        decoder = load_decoder(FolderSource(out))
        assert torch.isfinite(decoder(_ids())).all()


def test_missing_and_left_over_tensors_are_named(sources, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    src = _changed(sources["llama"], tmp_path / "missing", lambda t: t.pop(name))
    with pytest.raises(UserError, match=f"lacks tensor {name}"):
        quantize(src, tmp_path / "out", QuantizeConfig())
    src = _changed(sources["llama"], tmp_path / "extra", lambda t: t.update(surprise=torch.zeros(2)))
    with pytest.raises(UserError, match="holds tensor surprise"):
        quantize(src, tmp_path / "out", QuantizeConfig())


def test_group_sizes(sources, tmp_path: Path) -> None:
    def plan(**settings: object):
        return make_plan(FolderSource(sources["llama"]), QuantizeConfig(samples=0, attention="dense", **settings))

    assert plan().form.group_size == 64
    assert plan(group_size=32).form.group_size == 32
    for size in (48, 128):
        with pytest.raises(
            UserError, match=rf"group size {size} does not fit model\.layers\.0\.self_attn\.q_proj.* 64"
        ):
            plan(group_size=size)
    assert plan(group_size=128, ignore=("re:.*self_attn.*", "re:.*(gate|up)_proj")).form.group_size == 128
    tiny_model("llama", hidden_size=72, head_dim=16, num_attention_heads=4).save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=r"no group size of 128, 64, 32 divides the 72 inputs of .*q_proj"):
        make_plan(FolderSource(tmp_path / "odd"), QuantizeConfig(samples=0, attention="dense"))
    with pytest.raises(UserError, match="leave no linear layer"):
        plan(ignore=("re:.*_proj",))


def test_ignored_layers_stay_in_16_bit(sources, tmp_path: Path) -> None:
    ignored = ("re:.*k_proj", "model.layers.0.mlp.down_proj")
    config = QuantizeConfig(samples=0, attention="dense", ignore=ignored, inputs="16-bit")
    folder = quantize(str(sources["qwen2"]), tmp_path / "out", config)
    assert Sidecar.read(FolderSource(folder)).prefill_gemm == "16-bit"
    source, before = FolderSource(folder), FolderSource(sources["qwen2"])
    for name in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        assert torch.equal(source.tensor(f"{name}.weight"), before.tensor(f"{name}.weight").bfloat16())
    assert "model.layers.1.mlp.down_proj.weight_packed" in source.names()
    ours = load_decoder(source)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert (ours.logits(ours(_ids())) - theirs(_ids()).logits).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_wide_layers_are_fp8_and_load_in_transformers(sources, tmp_path: Path, family: str) -> None:
    wide = ("re:.*self_attn.(q|k|v)_proj",)
    folder = quantize(str(sources[family]), tmp_path / "out", QuantizeConfig(**SMALL, wide=wide))
    ours = _assert_layers_agree(folder)
    for layer in ours.layers:
        assert isinstance(layer.self_attn.v_proj, Fp8Linear)
        assert isinstance(layer.self_attn.o_proj, Int4Linear)


def test_requests_that_cannot_be_met(sources, tmp_path: Path) -> None:
    src = str(sources["llama"])
    with pytest.raises(UserError, match="KV scheme 'fp8' needs scales"):
        quantize(src, tmp_path / "out", QuantizeConfig(variant="pro", samples=0))
    with pytest.raises(UserError, match="hybrid attention policy is calibrated"):
        quantize(src, tmp_path / "out", QuantizeConfig(samples=0))
    with pytest.raises(UserError, match="does not exist"):
        quantize(src, tmp_path / "out", QuantizeConfig(calibration=(str(tmp_path / "absent.txt"),)))
    tiny_model("llama").save_pretrained(tmp_path / "mute")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        quantize(str(tmp_path / "mute"), tmp_path / "out", QuantizeConfig())
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        quantize(src, tmp_path / "taken", QuantizeConfig(**SMALL))
    assert not (tmp_path / "out").exists()


def test_shards_and_provenance_of_an_extended_source(sources, tmp_path: Path) -> None:
    src = tmp_path / "extended"
    src.mkdir()
    for path in sources["llama"].iterdir():
        (src / path.name).write_bytes(path.read_bytes())
    write_tokenizer(src)
    claim = ContextClaim(configured=2048, validated=2048)
    before = Sidecar(variant="extended", context=claim, provenance={"source": "owner/base", "native_context": 512})
    (src / "lcconvert.json").write_bytes(before.to_bytes())
    out = quantize(str(src), tmp_path / "out", QuantizeConfig(samples=0, attention="dense", max_shard=30_000))
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    assert load_decoder(FolderSource(out)).spec.num_layers == 2
    after = Sidecar.read(FolderSource(out))
    assert after.provenance["source"] == "owner/base"
    assert after.provenance["native_context"] == 512
    assert after.provenance["quantize"]["config"]["variant"] == "flash"
    assert after.provenance["quantize"]["source"] == "extended"
    assert after.context == ContextClaim(configured=2048, validated=None)
