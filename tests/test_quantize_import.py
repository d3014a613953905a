"""Checkpoints quantized by other tools: decoded exactly, and taken over code by code where the layout is ours.

The encoders here are Python integers, written from the layouts' descriptions; compressed-tensors' own is the other one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from families import random_model
from safetensors.torch import load_file, save_file
from tiny import write_tiny, write_tokenizer

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.import_quantized import DecodedSource
from lcconvert.convert.quantize import REPORT, quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.kernels.int4 import dequantize_int4
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.source import FolderSource

Tensors = dict[str, torch.Tensor]
GROUP = 32


class Case:
    """Random codes q in 0..2^bits - 1 of a weight [N, K], with scales and zero points [N, G]."""

    def __init__(
        self, rows: int, columns: int, *, bits: int = 4, groups: int | None = None, symmetric: bool, seed: int
    ):
        generator = torch.Generator().manual_seed(seed)
        self.bits, self.shape, self.groups = bits, (rows, columns), groups or columns // GROUP

        def draw(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator)

        self.q = draw(0, 2**bits, rows, columns)
        self.zero = draw(1, 2**bits, rows, self.groups)
        if symmetric:
            self.zero.fill_(2 ** (bits - 1))
        self.scale = (torch.rand(rows, self.groups, generator=generator) * 0.02 + 1e-3).half()
        self.group = torch.arange(columns) // (columns // self.groups)
        self.shuffled = torch.randperm(columns, generator=generator)

    def weight(self) -> torch.Tensor:
        exact = (self.q - self.zero[:, self.group]).double() * self.scale[:, self.group].double()
        assert torch.equal(exact.float().double(), exact)  # float32 holds it
        return exact.float()


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row as one long number, the first value in its lowest bits, cut into int32 words."""
    rows = []
    for row in values.tolist():
        number = sum(value << (bits * i) for i, value in enumerate(row))
        rows.append([number >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def gptq(case: Case, *, stored_less: int = 1, act_order: bool = False, index: bool = True) -> Tensors:
    if act_order:
        case.group = case.group[case.shuffled]
    tensors = {
        "qweight": words(case.q.T.T, case.bits).T,
        "qzeros": words((case.zero - stored_less).T, case.bits),
        "scales": case.scale.T,
    }
    return tensors | ({"g_idx": case.group.int()} if index else {})


def awq(case: Case) -> Tensors:
    def pack(values: torch.Tensor) -> torch.Tensor:
        packed = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int64)
        for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            packed |= values[:, output::8] << (4 * place)
        return packed.to(torch.int32)

    return {"qweight": pack(case.q.T), "qzeros": pack(case.zero.T), "scales": case.scale.T}


def packed(case: Case, *, zero: bool = False, act_order: bool = False) -> Tensors:
    if act_order:
        case.group = case.group[case.shuffled]
    tensors = {
        "weight_packed": words(case.q, case.bits),
        "weight_scale": case.scale,
        "weight_shape": torch.tensor(case.shape),
    }
    if zero:
        tensors["weight_zero_point"] = words(case.zero.T, case.bits).T
    if act_order:
        tensors["weight_g_idx"] = case.group.int()
    return tensors


def int8(case: Case, *, zero: bool = False) -> Tensors:
    tensors = {"weight": (case.q - 128).to(torch.int8), "weight_scale": case.scale}
    return tensors | ({"weight_zero_point": (case.zero - 128).to(torch.int8)} if zero else {})


CT = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "quantization_status": "compressed"}


def ct(bits: int, kind: str = "int", strategy: str = "group", symmetric: bool = True, **more: object) -> dict:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, **more}
    return {**CT, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
LAYOUTS: dict[str, tuple[dict, dict, Callable[[Case], Tensors]]] = {
    "gptq-v1": ({**GPTQ, "sym": True}, {"symmetric": True}, gptq),
    "gptq-v1-asymmetric": ({**GPTQ, "checkpoint_format": "gptq"}, {"symmetric": False}, gptq),
    "gptq-v1-no-index": (GPTQ, {"symmetric": False}, lambda c: gptq(c, index=False)),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, {"symmetric": False}, lambda c: gptq(c, stored_less=0)),
    "gptq-act-order": ({**GPTQ, "desc_act": True}, {"symmetric": True}, lambda c: gptq(c, act_order=True)),
    "gptq-one-group": ({**GPTQ, "group_size": -1}, {"symmetric": True, "groups": 1}, gptq),
    "gptq-3-bit": ({**GPTQ, "bits": 3}, {"symmetric": False, "bits": 3}, gptq),
    "gptq-8-bit": ({**GPTQ, "bits": 8}, {"symmetric": False, "bits": 8}, gptq),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, {"symmetric": False}, awq),
    "ct-int4": (ct(4, group_size=GROUP), {"symmetric": True}, packed),
    "ct-int4-asymmetric": (ct(4, symmetric=False), {"symmetric": False}, lambda c: packed(c, zero=True)),
    "ct-int4-act-order": (ct(4, actorder="group"), {"symmetric": True}, lambda c: packed(c, act_order=True)),
    "ct-int4-channel": (ct(4, strategy="channel"), {"symmetric": True, "groups": 1}, packed),
    "ct-int8-packed": (ct(8), {"symmetric": True, "bits": 8}, packed),
    "ct-int8": (ct(8, strategy="channel"), {"symmetric": True, "bits": 8, "groups": 1}, int8),
    "ct-int8-asymmetric": (ct(8, symmetric=False), {"symmetric": False, "bits": 8}, lambda c: int8(c, zero=True)),
}


def encode(folder: Path, block: dict, settings: dict, encoder: Callable[[Case], Tensors]) -> dict[str, torch.Tensor]:
    """Replaces every linear weight of the plain checkpoint in `folder`; returns what each then stands for."""
    tensors, exact = load_file(folder / "model.safetensors"), {}
    for number, name in enumerate([name for name in tensors if name.endswith("_proj.weight")]):
        case = Case(*tensors.pop(name).shape, seed=number, **settings)
        for leaf, tensor in encoder(case).items():
            tensors[f"{name.removesuffix('.weight')}.{leaf}"] = tensor.contiguous()
        exact[name] = case.weight()
    return store(folder, block, tensors, exact)


def store(folder: Path, block: dict, tensors: Tensors, exact: Tensors) -> Tensors:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return exact


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_decoded_exactly(tmp_path: Path, layout: str) -> None:
    plain = write_tiny(tmp_path / "model", "qwen2")
    before = FolderSource(plain)
    names, biases = before.names(), {n: before.tensor(n) for n in before.names() if n.endswith("bias")}
    exact = encode(plain, *LAYOUTS[layout])
    source = DecodedSource(FolderSource(plain))
    assert sorted(source.names()) == sorted(names)
    assert "quantization_config" not in source.config
    for name, weight in exact.items():
        assert source.info(name) == (torch.float32, tuple(weight.shape))
        assert torch.equal(source.tensor(name), weight), name
    assert biases
    for name, bias in biases.items():
        assert torch.equal(source.tensor(name), bias)
    ours = {"gptq-v1": GROUP, "ct-int4": GROUP}.get(layout)
    forms = {form.group_size for _, form in source.kept.groups}
    assert forms == ({ours} if ours else {64, 128} if layout in ("gptq-one-group", "ct-int4-channel") else set())


def _scaled(folder: Path, block: dict, leaf: str, shape: Callable[[int, int], tuple[int, ...]], size: int) -> Tensors:
    """Every linear weight as e4m3, with float32 scales of `shape` for blocks of `size` x `size` (0: rows)."""
    tensors, exact = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        codes = (tensors[name] * 400).to(torch.float8_e4m3fn)
        scale = torch.rand(shape(*codes.shape), generator=torch.Generator().manual_seed(len(exact))) * 0.01 + 1e-3
        wide = scale.reshape(-1, scale.shape[-1] if scale.ndim == 2 else 1)
        if size:
            wide = wide.repeat_interleave(size, 0)[: len(codes)].repeat_interleave(size, 1)[:, : codes.shape[1]]
        exact[name] = codes.float() * wide
        module = name.removesuffix(".weight")
        tensors |= {name: codes, f"{module}.{leaf}": scale, f"{module}.input_scale": torch.ones(1)}
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    return store(folder, block, tensors, exact)


@pytest.mark.parametrize(
    ("block", "leaf", "shape", "size"),
    [
        (ct(8, "float", "channel"), "weight_scale", lambda n, k: (n, 1), 0),
        (ct(8, "float", "tensor"), "weight_scale", lambda n, k: (1,), 0),
        (ct(8, "float", "block", block_structure=[48, 48]), "weight_scale",
         lambda n, k: (-(-n // 48), -(-k // 48)), 48),
        ({"quant_method": "fp8", "weight_block_size": [48, 48]}, "weight_scale_inv",
         lambda n, k: (-(-n // 48), -(-k // 48)), 48),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "weight_scale", lambda n, k: (), 0),
    ],
)  # fmt: skip
def test_scaled_e4m3_is_decoded_exactly(tmp_path: Path, block, leaf, shape, size) -> None:
    plain = write_tiny(tmp_path / "model", "llama")
    names = FolderSource(plain).names()
    exact = _scaled(plain, block, leaf, shape, size)
    source = DecodedSource(FolderSource(plain))
    assert sorted(source.names()) == sorted(names)
    for name, weight in exact.items():
        assert torch.equal(source.tensor(name), weight), name
    assert [form.kind for _, form in source.kept.groups] == ([] if size else ["fp8"])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_own_encoder_is_understood(tmp_path: Path, bits: int, symmetric: bool) -> None:
    plain = write_tiny(tmp_path / "model", "llama")
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=GROUP),
    )
    tensors, exact = load_file(plain / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name)
        groups = (len(weight), weight.shape[1] // GROUP)
        zero = torch.zeros(groups) if symmetric else torch.arange(groups[0] * groups[1]).reshape(groups) % 9 - 4
        state = {
            "weight": weight,
            "weight_scale": torch.full(groups, 0.02 if bits == 4 else 0.002),
            "weight_zero_point": zero.to(torch.int8),
        }
        made = PackedQuantizationCompressor.compress(state, scheme)
        exact[name] = PackedQuantizationCompressor.decompress(made, scheme)["weight"]
        for leaf, tensor in made.items():
            tensors[f"{name.removesuffix('.weight')}.{leaf}"] = tensor.contiguous()
    store(plain, ct(bits, symmetric=symmetric), tensors, exact)
    source = DecodedSource(FolderSource(plain))
    for name, weight in exact.items():
        assert torch.equal(source.tensor(name), weight), name


@pytest.mark.parametrize("layout", ["gptq-v1", "ct-int4"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_codes_of_our_layout_are_taken_over(tmp_path: Path, layout: str, family: str) -> None:
    """phi3 stores q, k and v, and gate and up, as one."""
    plain = tmp_path / "model"
    random_model(family).save_pretrained(plain)
    write_tokenizer(plain)
    exact = encode(plain, *LAYOUTS[layout])
    config = QuantizeConfig(attention="dense", samples=1, length=128)
    out = quantize(str(plain), tmp_path / "out", config)
    rows = json.loads((out / REPORT).read_text())["linear_layers"]
    assert {row["method"] for row in rows} == {"kept"}
    written, again = FolderSource(out), DecodedSource(FolderSource(out))
    for name, weight in exact.items():
        module = name.removesuffix(".weight")
        assert torch.equal(again.tensor(name), weight), name
        codes, scale = written.tensor(f"{module}.weight_packed"), written.tensor(f"{module}.weight_scale")
        assert torch.equal(dequantize_int4(codes, scale, torch.float32), weight)
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        ours, theirs = load_decoder(written), load_decoder(open_checkpoint(str(plain)))
        torch.testing.assert_close(ours.logits(ours(ids)), theirs.logits(theirs(ids)), rtol=0, atol=2e-2)
    twice = quantize(str(out), tmp_path / "twice", config)
    for shard in out.glob("*.safetensors"):
        assert (twice / shard.name).read_bytes() == shard.read_bytes()


def test_what_differs_is_rounded_again(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "model", "qwen2")
    exact = encode(plain, *LAYOUTS["awq"])
    free = QuantizeConfig(attention="dense", samples=0)
    rows = json.loads((quantize(str(plain), tmp_path / "out", free) / REPORT).read_text())["linear_layers"]
    assert {row["method"] for row in rows} == {"rtn"}
    again = DecodedSource(FolderSource(tmp_path / "out"))
    for name, weight in exact.items():
        error = (again.tensor(name) - weight).square().sum() / weight.square().sum()
        assert 0 < error < 0.02
    plain = write_tiny(tmp_path / "other", "llama")
    encode(plain, *LAYOUTS["gptq-v1"])
    kept = quantize(str(plain), tmp_path / "kept", free.model_copy(update={"wide": ("re:.*v_proj",)}))
    methods = {row["name"]: row["method"] for row in json.loads((kept / REPORT).read_text())["linear_layers"]}
    assert {method for name, method in methods.items() if "v_proj" in name} == {"rtn"}  # fp8 is asked for
    assert {method for name, method in methods.items() if "v_proj" not in name} == {"kept"}
    asked = quantize(str(plain), tmp_path / "asked", free.model_copy(update={"group_size": 64}))
    assert {row["method"] for row in json.loads((asked / REPORT).read_text())["linear_layers"]} == {"rtn"}


def test_e4m3_is_taken_over_by_pro(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "model", "llama")
    exact = _scaled(plain, ct(8, "float", "tensor"), "weight_scale", lambda n, k: (1,), 0)
    out = quantize(str(plain), tmp_path / "out", QuantizeConfig(variant="pro", kv="bf16", samples=0))
    assert {row["method"] for row in json.loads((out / REPORT).read_text())["linear_layers"]} == {"kept"}
    again = DecodedSource(FolderSource(out))
    for name, weight in exact.items():
        assert torch.equal(again.tensor(name), weight)
    load_decoder(FolderSource(out))


def test_a_bias_of_zeros_that_the_model_lacks_is_left_out(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "model", "llama")
    encode(plain, GPTQ, {"symmetric": True}, lambda case: gptq(case) | {"bias": torch.zeros(case.shape[0])})
    load_decoder(open_checkpoint(str(plain)))
    tensors = load_file(plain / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holds tensor model\.layers\.0\.mlp\.up_proj\.bias"):
        load_decoder(open_checkpoint(str(plain)))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', readable are gptq, awq"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', readable are gptq and gptq_v2"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ version is 'gemv' of 4 bits, readable is gemm of 4"),
        ({**CT, "format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized', readable are integers and e4m3"),
        ({**ct(8), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format is 'sparse-24"),
        ({**ct(8), "transform_config": {"config_groups": {"R1": {}}}}, "transform_config rotates activations"),
    ],
)
def test_layouts_that_cannot_be_read_are_named(tmp_path: Path, block: dict, message: str) -> None:
    plain = write_tiny(tmp_path / "model", "llama")
    store(plain, block, load_file(plain / "model.safetensors"), {})
    with pytest.raises(UserError, match=message):
        quantize(str(plain), tmp_path / "out", QuantizeConfig(attention="dense", samples=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, r"lacks tensor model\.layers\.0\.mlp\.down_proj\.scales"),
        ({"g_idx": torch.full((128,), 7, dtype=torch.int32)}, r"parts of model\.layers\.0\.mlp\.down_proj .* up to 7"),
        ({"scales": torch.full((4, 64), torch.nan).half()}, r"model\.layers\.0\.mlp\.down_proj\.weight .*NaN"),
    ],
)
def test_a_damaged_layer_is_named(tmp_path: Path, change: dict, message: str) -> None:
    plain = write_tiny(tmp_path / "model", "llama")
    encode(plain, *LAYOUTS["gptq-v1"])
    tensors = load_file(plain / "model.safetensors")
    for leaf, tensor in change.items():
        name = f"model.layers.0.mlp.down_proj.{leaf}"
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        quantize(str(plain), tmp_path / "out", QuantizeConfig(attention="dense", samples=0))
    assert not (tmp_path / "out").exists()
