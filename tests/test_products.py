"""Merged and expanded products against the modules they come from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lcconvert.kernels.int4 import pack_int4
from lcconvert.runtime.linear import Fp8Linear, Int4Linear, LinearFormat, QuantLayout
from lcconvert.runtime.model import Layer
from lcconvert.runtime.products import LayerWeights
from lcconvert.runtime.spec import ModelSpec

CONFIG = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
CONFIG |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 2048}
INT4, FP8 = LinearFormat("int4", 32), LinearFormat("fp8")
LAYOUTS = {
    "plain": QuantLayout(),
    "int4": QuantLayout(((("Linear",), INT4),)),
    "fp8": QuantLayout(((("Linear",), FP8),)),
    "q in fp8, the rest int4": QuantLayout(((("q_proj",), FP8), (("Linear",), INT4))),
    "k plain, up in fp8, the rest int4": QuantLayout(((("up_proj",), FP8), (("Linear",), INT4)), ignore=("k_proj",)),
}


def make_layer(layout: QuantLayout) -> Layer:
    layer = Layer(ModelSpec.from_config(CONFIG), layout, "model.layers.0")
    draw = torch.Generator().manual_seed(0)
    for module in layer.modules():
        if isinstance(module, Int4Linear):
            n, k = module.out_features, module.in_features
            module.weight_packed = pack_int4(torch.randint(-8, 8, (n, k), generator=draw).to(torch.int8))
            module.weight_scale = torch.rand(n, k // 32, generator=draw) * 0.02 + 0.01
        elif isinstance(module, Fp8Linear):
            module.weight = torch.randn(module.weight.shape, generator=draw).to(torch.float8_e4m3fn)
            module.weight_scale = torch.rand(module.out_features, 1, generator=draw) * 0.1 + 0.05
        if isinstance(module, (Int4Linear, Fp8Linear, nn.Linear)) and module.bias is not None:
            module.bias.data.normal_(generator=draw)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("gemm", ["few", "16-bit", "fp8"])
def test_products_equal_the_modules(name: str, gemm: str) -> None:
    layer = make_layer(LAYOUTS[name])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    wide = torch.randn(5, 128, generator=torch.Generator().manual_seed(2))
    attn, mlp = layer.self_attn, layer.mlp
    modules = {
        "qkv": ([attn.q_proj, attn.k_proj, attn.v_proj], x),
        "o": ([attn.o_proj], x),
        "gate_up": ([mlp.gate_proj, mlp.up_proj], x),
        "down": ([mlp.down_proj], wide),
    }
    wanted = {key: torch.cat([m(rows) for m in group], -1) for key, (group, rows) in modules.items()}
    weights = LayerWeights(layer)
    products = weights.few() if gemm == "few" else weights.many(gemm)
    for key, (group, rows) in modules.items():
        product = getattr(products, key)
        got = product(product.taken(rows))
        limit = 0.06 if "int4" in name and gemm == "fp8" else 0.04 if "fp8" in name else 1e-6
        assert (got - wanted[key]).norm() / wanted[key].norm() < limit, key
        part = product.rows(16, 48)
        assert torch.allclose(part(part.taken(rows)), got[:, 16:48], atol=1e-5)
        assert torch.equal(torch.cat([m(rows) for m in group], -1), wanted[key])  # the modules still work, as views


def test_merging_copies_nothing_twice() -> None:
    layer = make_layer(LAYOUTS["int4"])
    products = LayerWeights(layer).few()
    attn = layer.self_attn
    assert products.qkv.weight.data_ptr() == attn.q_proj.weight_packed.data_ptr()
    assert attn.v_proj.weight_packed.data_ptr() == products.qkv.weight[96:].data_ptr()
    assert products.o.weight.data_ptr() == attn.o_proj.weight_packed.data_ptr()
