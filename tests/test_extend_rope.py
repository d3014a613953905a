"""Each extension method as transformers reads it back from config.json: the same frequencies, the same angles at 1M."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lcconvert.convert.extend_config import METHODS
from lcconvert.convert.rope_methods import default_longrope_factors, extend_rope
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.rope import RopeSpec, cos_sin, inv_freq

HEAD_DIM, TRAINED, CONTEXT, THETA = 64, 8192, 2**20, 100_000.0
LLAMA31 = RopeSpec(
    kind="llama3", theta=5e5, factor=8.0, original_max_position=8192, low_freq_factor=1.0, high_freq_factor=4.0
)


def llama_config(rope: RopeSpec, context: int = CONTEXT) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=context,
        **{k: v for k, v in rope.to_config().items() if v is not None},
    )


def stretched(method: Any, rope: RopeSpec | None = None, **kwargs: Any) -> RopeSpec:
    rope = rope or RopeSpec(theta=THETA)
    return extend_rope(rope, method, head_dim=HEAD_DIM, trained=TRAINED, context=CONTEXT, **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_table_equals_transformers(method: str) -> None:
    rope = stretched(method)
    config = llama_config(rope)
    oracle = LlamaRotaryEmbedding(config)
    ours, scale = inv_freq(rope, HEAD_DIM)
    assert torch.equal(ours, oracle.inv_freq)
    assert scale == oracle.attention_scaling
    if method in ROPE_INIT_FUNCTIONS:  # longrope picks its table by length: both must be the one we wrote
        for seq_len in (None, CONTEXT):
            assert torch.equal(ours, ROPE_INIT_FUNCTIONS[method](config, None, seq_len=seq_len)[0])


@pytest.mark.parametrize("method", METHODS)
def test_angles_at_the_far_end(method: str) -> None:
    """Against transformers' frequencies evaluated in float64, to 1e-6, up to position 1,048,575.

    Transformers' own forward multiplies position and frequency in float32, whose step at 1M radians is 0.06, so its
    cos and sin are only comparable near the start; there they agree to the same 1e-6.
    """
    rope = stretched(method)
    oracle = LlamaRotaryEmbedding(llama_config(rope))
    positions = torch.tensor([0, 1, 8191, 8192, 65_537, 524_287, 1_000_003, 1_048_575])
    cos, sin = cos_sin(rope, HEAD_DIM, positions)
    angle = positions.double()[:, None] * oracle.inv_freq.double()
    torch.testing.assert_close(cos.double(), angle.cos() * oracle.attention_scaling, atol=1e-6, rtol=0)
    torch.testing.assert_close(sin.double(), angle.sin() * oracle.attention_scaling, atol=1e-6, rtol=0)
    near = torch.arange(8)[None]
    their_cos, their_sin = oracle(torch.zeros(1, 8, HEAD_DIM), near)
    our_cos, our_sin = cos_sin(rope, HEAD_DIM, near[0])
    torch.testing.assert_close(our_cos, their_cos[0, :, : HEAD_DIM // 2], atol=1e-6, rtol=0)
    torch.testing.assert_close(our_sin, their_sin[0, :, : HEAD_DIM // 2], atol=1e-6, rtol=0)


def test_ntk_is_transformers_dynamic_at_the_target() -> None:
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=TRAINED,
        rope_parameters={"rope_type": "dynamic", "factor": 1.0, "rope_theta": THETA},
    )
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, None, seq_len=CONTEXT)
    ours, _ = inv_freq(stretched("ntk"), HEAD_DIM)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert ours[-1].item() == pytest.approx(THETA ** (-62 / 64) * TRAINED / CONTEXT, rel=1e-5)


def test_theta_law_slows_the_last_full_turn_by_the_scale() -> None:
    rope = stretched("theta")
    assert rope.theta == pytest.approx(2.4e8, rel=0.02)  # the published law at 8K -> 1M for base 1e5
    pair = (HEAD_DIM / 2) * math.log(TRAINED / (2 * math.pi)) / math.log(THETA)
    old, new = THETA ** (-2 * pair / HEAD_DIM), rope.theta ** (-2 * pair / HEAD_DIM)
    assert old / new == pytest.approx(CONTEXT / TRAINED)


@pytest.mark.parametrize("method", METHODS)
def test_survives_config_and_is_explicit(method: str) -> None:
    rope = stretched(method)
    fields = rope.to_config()
    assert RopeSpec.from_config({**fields, "max_position_embeddings": CONTEXT}).to_config() == fields
    if method in ("yarn", "longrope"):
        assert fields["rope_parameters"]["attention_factor"] == rope.attention_scale
    legacy = {"rope_theta": fields["rope_theta"], "rope_scaling": fields["rope_scaling"]}
    again = RopeSpec.from_config({**legacy, "max_position_embeddings": CONTEXT})
    assert torch.equal(inv_freq(again, HEAD_DIM)[0], inv_freq(rope, HEAD_DIM)[0])


def test_scaled_sources() -> None:
    def extend(rope: RopeSpec, method: Any) -> RopeSpec:
        return extend_rope(rope, method, head_dim=128, trained=131_072, context=CONTEXT)

    larger = extend(LLAMA31, "theta")
    assert larger.kind == "llama3"
    assert larger.factor == 8.0
    assert larger.theta > LLAMA31.theta
    assert extend(LLAMA31, "llama3").factor == 64.0
    yarn = RopeSpec(kind="yarn", theta=1e6, factor=4.0, original_max_position=32_768, attention_factor=1.14)
    assert extend(yarn, "yarn").factor == 32.0
    assert extend(yarn, "yarn").attention_scale == pytest.approx(0.1 * math.log(32) + 1)
    with pytest.raises(UserError, match="llama3"):
        extend(LLAMA31, "yarn")
    searched = RopeSpec(
        kind="longrope", factor=32.0, original_max_position=4096, short_factor=(1.0,) * 64, long_factor=(2.0,) * 64
    )
    for method in METHODS:
        with pytest.raises(UserError, match="longrope"):
            extend(searched, method)


def test_longrope_factors() -> None:
    default = default_longrope_factors(THETA, HEAD_DIM, TRAINED, 128.0)
    assert default[0] == 1.0
    assert default[-1] == pytest.approx(128.0)
    assert list(default) == sorted(default)
    given = tuple(1.0 + i for i in range(HEAD_DIM // 2))
    rope = stretched("longrope", factors=given)
    assert rope.long_factor == rope.short_factor == given
    with pytest.raises(UserError, match="32 factors"):
        stretched("longrope", factors=given[1:])
    with pytest.raises(UserError, match="only longrope"):
        stretched("yarn", factors=given)


@pytest.mark.parametrize("method", ["yarn", "longrope"])
def test_attention_factor_replaces_the_formula(method: str) -> None:
    rope = stretched(method, attention_factor=1.05)
    assert LlamaRotaryEmbedding(llama_config(rope)).attention_scaling == 1.05 == inv_freq(rope, HEAD_DIM)[1]
    with pytest.raises(UserError, match="only yarn and longrope"):
        stretched("theta", attention_factor=1.05)


@pytest.mark.parametrize("context", [TRAINED, TRAINED - 1, 2])
def test_context_not_larger_is_refused(context: int) -> None:
    with pytest.raises(UserError, match=f"context is {context} tokens but the source already reads {TRAINED}"):
        extend_rope(RopeSpec(theta=THETA), "yarn", head_dim=HEAD_DIM, trained=TRAINED, context=context)
