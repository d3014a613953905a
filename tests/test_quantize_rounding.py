"""The rounding itself: search, GPTQ, packing. Properties on random weights, and compressed-tensors as the oracle."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from lcconvert.convert.ct_layout import int4_tensors, kv_scale_tensors, quantization_config
from lcconvert.convert.gptq import factorize, quantize_gptq
from lcconvert.convert.round_to_nearest import (
    FP8,
    dequantize,
    quantize_fp8,
    quantize_rtn,
    to_fp8_grid,
    to_int4_grid,
)
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import LinearFormat

weights = st.builds(
    lambda seed, rows, groups, size, spread: (_random(seed, rows, groups * size, spread), size),
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.sampled_from([8, 32, 64]),
    spread=st.sampled_from([1e-6, 0.02, 1.0, 1e3]),
)
quick = settings(max_examples=20, deadline=None, derandomize=True)


def _random(seed: int, rows: int, columns: int, spread: float = 1.0) -> torch.Tensor:
    """Heavy-tailed, so that clipping has something to gain."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3 * spread


def _error(w: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, moment: torch.Tensor | float = 1.0) -> float:
    return float(((w - dequantize(codes, scale)).square() * moment).double().sum())


@quick
@given(weights, st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_codes_and_scales_are_storable_and_no_worse_than_plain_rounding(case, dtype) -> None:
    w, size = case
    codes, scale = quantize_rtn(w, size, scale_dtype=dtype)
    assert codes.dtype == torch.int8
    assert scale.dtype == dtype
    assert codes.shape == w.shape
    assert scale.shape == (w.shape[0], w.shape[1] // size)
    assert codes.min() >= -8
    assert codes.max() <= 7
    assert torch.isfinite(scale).all()
    assert (scale != 0).all()
    plain = (w.unflatten(1, (-1, size)).abs().amax(-1) / 8).clamp_min(torch.finfo(dtype).tiny).to(dtype)
    plain_codes = to_int4_grid(w.unflatten(1, (-1, size)) / plain.float()[..., None]).flatten(1)
    assert _error(w, codes, scale) <= _error(w, plain_codes, plain) * (1 + 1e-6)


@quick
@given(weights, st.integers(0, 2**32 - 1))
def test_second_moments_lower_the_weighted_error(case, seed) -> None:
    w, size = case
    moment = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(seed)) ** 4 + 1e-6
    weighted = quantize_rtn(w, size, moment)
    assert _error(w, *weighted, moment) <= _error(w, *quantize_rtn(w, size), moment) * 1.02


@quick
@given(weights, st.sampled_from([0.5, 2.0, 64.0, -1.0]))
def test_search_follows_the_scale_of_the_weights(case, factor) -> None:
    w, size = case
    codes, scale = quantize_rtn(w, size, scale_dtype=torch.float32)
    other_codes, other_scale = quantize_rtn(w * factor, size, scale_dtype=torch.float32)
    assert _error(w * factor, other_codes, other_scale) == pytest.approx(_error(w, codes, scale) * factor**2, rel=1e-3)


def test_weights_on_the_grid_are_kept_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-8, 8, (6, 128), generator=generator)
    codes[:, ::64] = -8  # both ends of the grid are used in every group
    codes[:, 1::64] = 7
    w = codes.float() * 0.03125
    found, scale = quantize_rtn(w, 64)
    torch.testing.assert_close(dequantize(found, scale), w, rtol=0, atol=0)


def test_zero_groups_and_extreme_rows() -> None:
    w = torch.zeros(3, 64)
    w[1] = 1e-30
    w[2, 5] = 3e4
    codes, scale = quantize_rtn(w, 32, scale_dtype=torch.float16)
    back = dequantize(codes, scale)
    assert (back[0] == 0).all()
    assert torch.isfinite(back).all()
    assert back[2, 5] == pytest.approx(3e4, rel=1e-3)


def test_group_size_must_divide() -> None:
    with pytest.raises(ValueError, match="48 does not divide 64"):
        quantize_rtn(torch.zeros(2, 64), 48)


@quick
@given(weights)
def test_fp8_is_within_half_a_step(case) -> None:
    w, _ = case
    values, scale = quantize_fp8(w)
    assert values.dtype == FP8
    assert scale.shape == (len(w), 1)
    assert scale.dtype == torch.bfloat16
    back = values.float() * scale.float()
    assert torch.isfinite(back).all()
    # three mantissa bits; below 2^-6 of the scale the step is constant; the top value may be clipped by a rounded scale
    assert ((back - w).abs() <= w.abs() / 16 * 1.05 + scale.float() * 2.0**-9).all()


def _moments(columns: int, seed: int, tokens: int = 400) -> torch.Tensor:
    """Correlated inputs with a few loud channels, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x[:, ::17] *= 8
    return x.T @ x / tokens


def _output_error(w: torch.Tensor, back: torch.Tensor, moments: torch.Tensor) -> float:
    d = w - back
    return float((d @ moments * d).sum() / (w @ moments * w).sum())


def _swept(w: torch.Tensor, scale: torch.Tensor, moments: torch.Tensor, rounding, damp: float) -> torch.Tensor:
    factor = factorize(moments, damp)
    assert factor is not None
    swept = quantize_gptq(w, scale, factor, rounding)
    assert swept is not None
    return swept


@pytest.mark.parametrize("damp", [1e-3, 0.05])
def test_the_factor_solves_with_the_damped_moments(damp: float) -> None:
    moments, d = _moments(96, 4), _random(5, 7, 96)
    factor = factorize(moments, damp)
    assert factor is not None
    damped = moments.double() + damp * moments.diagonal().mean() * torch.eye(96)
    torch.testing.assert_close(factor.solve(d).double() @ damped, d.double(), rtol=1e-2, atol=1e-3)
    assert (moments.diagonal()[factor.order].diff() <= 0).all()
    assert torch.equal(factor.upper, factor.upper.triu())


@pytest.mark.parametrize("grid", ["int4", "fp8"])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_lowers_the_output_error(grid: str, seed: int) -> None:
    w, moments = _random(seed, 48, 192), _moments(192, seed)  # more columns than one block
    if grid == "int4":
        codes, scale = quantize_rtn(w, 64, moments.diagonal())
        values, rounding = codes.float(), to_int4_grid
    else:
        fp8, scale = quantize_fp8(w)
        values, rounding = fp8.float(), to_fp8_grid
    swept = _swept(w, scale, moments, rounding, damp=0.01)
    assert torch.equal(swept, rounding(swept.clone()))  # on the grid
    plain = _output_error(w, dequantize(values, scale), moments)
    assert _output_error(w, dequantize(swept, scale), moments) < 0.7 * plain


def test_gptq_with_uncorrelated_inputs_is_plain_rounding() -> None:
    w = _random(0, 8, 64)
    codes, scale = quantize_rtn(w, 32)
    swept = _swept(w, scale, torch.eye(64), to_int4_grid, damp=0.01)
    assert torch.equal(swept, codes.float())


def test_gptq_survives_dead_inputs_and_gives_up_on_bad_moments() -> None:
    w = _random(1, 8, 64)
    _, scale = quantize_rtn(w, 32)
    moments = _moments(64, 1)
    moments[5] = 0
    moments[:, 5] = 0  # an input that never fires: singular without damping
    swept = _swept(w, scale, moments, to_int4_grid, damp=1e-12)
    assert torch.isfinite(swept).all()
    for bad in (torch.full((64, 64), float("nan")), torch.zeros(64, 64), -moments):
        assert factorize(bad, damp=0.01) is None


def test_packed_bytes_are_compressed_tensors_own() -> None:
    codes, scale = quantize_rtn(_random(7, 24, 320), 64)
    tensors = int4_tensors("m", codes, scale)
    packed = tensors["m.weight_packed"]
    assert packed.dtype == torch.int32
    assert torch.equal(packed, pack_to_int32(codes, 4))
    assert torch.equal(unpack_from_int32(packed, 4, torch.Size(codes.shape)), codes)
    assert tensors["m.weight_shape"].tolist() == [24, 320]


def test_config_block_reads_back_through_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    block = quantization_config(LinearFormat("int4", 64), ("lm_head",), fp8_kv=False)
    assert block["kv_cache_scheme"] is None
    assert block["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert QuantizationConfig.model_validate(block).format == "pack-quantized"
    block = quantization_config(LinearFormat("fp8"), ("lm_head", "re:.*down_proj"), fp8_kv=True)
    kv = block["kv_cache_scheme"]
    wanted = {"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": False, "symmetric": True}
    assert {key: kv[key] for key in wanted} == wanted
    assert QuantizationConfig.model_validate(block).format == "float-quantized"


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -1.0])
def test_kv_scales_that_are_not_positive_are_refused(bad: float) -> None:
    good = torch.tensor([0.1, 0.2])
    with pytest.raises(UserError, match=r"model\.layers\.3\.self_attn\.v_scale"):
        kv_scale_tensors(3, good, torch.tensor([0.1, bad]))
