"""The stored formats: int4 weights, e4m3, KV pages. Properties over random shapes and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcconvert.kernels import kv_pages
from lcconvert.kernels.fp8 import expand_e4m3, fp8_matmul, fp8_product, quantize_fp8_rows
from lcconvert.kernels.int4 import dequantize_int4, pack_int4, unpack_int4
from lcconvert.kernels.kv_pages import (
    PAGE,
    PageTensors,
    dequantize_fp8,
    dequantize_k_int4,
    dequantize_pages,
    dequantize_v_int4,
    quantize_fp8,
    quantize_k_int4,
    quantize_v_int4,
    store_16,
)

seeds = st.integers(0, 2**31)
few = settings(max_examples=20, deadline=None, derandomize=True)


@few
@given(seed=seeds, n=st.integers(1, 5), words=st.integers(1, 9))
def test_int4_words_hold_element_i_at_bit_4i(seed, n, words):
    q = torch.randint(-8, 8, (n, 8 * words), generator=torch.manual_seed(seed)).to(torch.int8)
    packed = pack_int4(q)
    assert packed.dtype == torch.int32
    assert packed.shape == (n, words)
    bits = torch.arange(0, 32, 4)
    assert torch.equal(((packed[:, :, None] >> bits) & 15).view(n, -1) - 8, q.int())
    assert torch.equal(unpack_int4(packed, 8 * words), q)


def test_int4_packing_is_compressed_tensors():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    q = torch.randint(-8, 8, (6, 64), generator=torch.manual_seed(0)).to(torch.int8)
    assert torch.equal(pack_int4(q), pack_to_int32(q, 4))


@pytest.mark.parametrize("q", [torch.zeros(2, 12), torch.full((1, 8), 8), torch.full((1, 8), -9)])
def test_int4_refuses_what_does_not_fit(q):
    with pytest.raises(ValueError, match="int4"):
        pack_int4(q.to(torch.int8))


def test_int4_dequantizes_by_group():
    generator = torch.manual_seed(0)
    q = torch.randint(-8, 8, (3, 64), generator=generator).to(torch.int8)
    scale = torch.rand(3, 4, generator=generator) + 0.1
    want = q.float() * scale.repeat_interleave(16, 1)
    assert torch.equal(dequantize_int4(pack_int4(q), scale, torch.float32), want)
    assert torch.equal(dequantize_int4(pack_int4(q), scale, torch.bfloat16), want.bfloat16())


def test_e4m3_expands_every_finite_code():
    codes = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(expand_e4m3(codes), codes.float())


@few
@given(seed=seeds, rows=st.integers(1, 4), exponent=st.integers(-12, 12))
def test_fp8_rows_err_by_a_sixteenth_of_the_value(seed, rows, exponent):
    x = torch.randn(rows, 32, generator=torch.manual_seed(seed)) * 2.0**exponent
    x[0] = 0
    codes, scale = quantize_fp8_rows(x)
    error = (expand_e4m3(codes) * scale - x).abs()
    assert (error <= x.abs() / 16 + scale / 2**9).all()
    assert torch.equal(codes[0].float(), torch.zeros(32))
    assert torch.allclose(scale[1:, 0] * 448, x[1:].abs().amax(1))


def test_fp8_product_is_the_product_of_the_rounded_operands():
    generator = torch.manual_seed(0)
    x, w = torch.randn(5, 64, generator=generator) * 3, torch.randn(16, 64, generator=generator) / 7
    weight, weight_scale = quantize_fp8_rows(w)
    codes, scale = quantize_fp8_rows(x)
    want = (codes.double() * scale) @ (weight.double() * weight_scale).T
    assert torch.allclose(fp8_matmul(x, weight, weight_scale, torch.float32).double(), want, rtol=1e-5, atol=1e-5)
    bias = torch.randn(16, generator=generator)
    got = fp8_product(codes, scale, weight, weight_scale, torch.float32, bias)
    assert torch.allclose(got.double(), want + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 5, 16, 300])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_product_on_a_gpu(m, out_dtype, with_bias):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    generator = torch.manual_seed(0)
    x = torch.randn(m, 576, generator=generator).bfloat16() * 3
    weight, weight_scale = quantize_fp8_rows(torch.randn(1536, 576, generator=generator) / 7)
    bias = torch.randn(1536, generator=generator).bfloat16() if with_bias else None
    codes, scale = quantize_fp8_rows(x)
    want = fp8_product(codes, scale, weight, weight_scale, torch.float32, bias)
    on_gpu = [t.cuda() for t in (codes, scale, weight, weight_scale)]
    got = fp8_product(*on_gpu, out_dtype, None if bias is None else bias.cuda())
    assert got.dtype == out_dtype
    assert torch.allclose(got.float().cpu(), want, rtol=1e-2, atol=1e-2 * want.abs().max().item())
    again = fp8_product(*on_gpu, out_dtype, None if bias is None else bias.cuda())
    assert torch.equal(got, again)


def pages_like_keys(seed, pages=2, heads=3, d=16):
    """Channels of very different offset and spread, as rotary keys with biases have."""
    generator = torch.manual_seed(seed)
    spread, offset = torch.rand(heads, d, generator=generator) * 4, torch.randn(heads, d, generator=generator) * 30
    return torch.randn(pages, PAGE, heads, d, generator=generator) * spread + offset


@few
@given(seed=seeds)
def test_int4_keys_err_by_half_a_step_of_their_channel(seed):
    k = pages_like_keys(seed)
    codes, scale, zero = quantize_k_int4(k)
    assert codes.shape == (2, 3, PAGE, 8)
    assert scale.shape == zero.shape == (2, 3, 16)
    low, high = k.amin(1), k.amax(1)
    error = (dequantize_k_int4(codes, scale, zero) - k).abs().amax(1)
    rounding = low.abs() / 2**11 + (high - low) / 2**11  # of zero and scale to float16
    assert (error <= (high - low) / 30 + rounding).all()
    # the page's own minimum and maximum can be read off
    assert ((zero.float() - low).abs() <= low.abs() / 2**11 + 1e-7).all()
    assert ((zero.float() + 15 * scale.float() - high).abs() <= 2 * rounding).all()


@few
@given(seed=seeds)
def test_int4_values_err_by_half_a_step_of_their_token(seed):
    v = torch.randn(2, PAGE, 3, 16, generator=torch.manual_seed(seed)) * 5 - 2
    codes, scale, zero = quantize_v_int4(v)
    assert scale.shape == zero.shape == (2, 3, PAGE)
    span = (v.amax(3) - v.amin(3))[..., None]
    assert ((dequantize_v_int4(codes, scale, zero) - v).abs() <= span / 30 + span / 2**10 + v.abs() / 2**10).all()


def test_codes_are_packed_split_half():
    codes, scale, zero = quantize_k_int4(pages_like_keys(1))
    low, high = codes & 15, codes >> 4
    whole = torch.cat((low, high), -1).float() * scale.float()[:, :, None] + zero.float()[:, :, None]
    assert torch.equal(dequantize_k_int4(codes, scale, zero), whole.transpose(1, 2))


def test_a_constant_channel_survives():
    k = pages_like_keys(2)
    k[:, :, 1, 5] = 2.5
    assert (dequantize_k_int4(*quantize_k_int4(k))[:, :, 1, 5] == 2.5).all()


def test_fp8_pages_scale_by_head_and_saturate():
    x = pages_like_keys(3)
    scale = torch.tensor([0.5, 0.01, 2.0])
    stored = quantize_fp8(x, scale)
    want = (x / scale[:, None]).clamp(-448, 448)
    assert ((expand_e4m3(stored).transpose(1, 2) - want).abs() <= want.abs() / 16 + 2**-9).all()
    assert torch.equal(dequantize_fp8(stored, scale), (expand_e4m3(stored) * scale[:, None, None]).transpose(1, 2))


def test_quantizing_in_chunks_changes_nothing(monkeypatch):
    x, scale = pages_like_keys(4, pages=5), torch.tensor([0.5, 0.3, 2.0])
    whole = (*quantize_k_int4(x), *quantize_v_int4(x), expand_e4m3(quantize_fp8(x, scale)))
    monkeypatch.setattr(kv_pages, "_CHUNK", x[:2].numel())
    parts = (*quantize_k_int4(x), *quantize_v_int4(x), expand_e4m3(quantize_fp8(x, scale)))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts))


@pytest.mark.parametrize("kind", ["plain", "fp8", "int4_channel", "int4_token"])
def test_pages_come_back_in_the_order_listed(kind):
    x, scale = pages_like_keys(5, pages=4), torch.tensor([0.5, 0.3, 2.0])
    pool = {
        "plain": lambda: PageTensors("plain", store_16(x)),
        "fp8": lambda: PageTensors("fp8", quantize_fp8(x, scale), scale),
        "int4_channel": lambda: PageTensors("int4_channel", *quantize_k_int4(x)),
        "int4_token": lambda: PageTensors("int4_token", *quantize_v_int4(x)),
    }[kind]()
    pool.check()
    assert pool.head_dim == 16
    got = dequantize_pages(pool, torch.tensor([3, 0, 3]))
    assert got.shape == (3 * PAGE, 3, 16)
    alone = [dequantize_pages(pool, torch.tensor([page])) for page in range(4)]
    assert torch.equal(got, torch.cat((alone[3], alone[0], alone[3])))
    close_enough = {"plain": 0, "fp8": 0.07, "int4_channel": 0.1, "int4_token": 0.1}[kind]
    assert (got - x[[3, 0, 3]].flatten(0, 1)).abs().max() <= close_enough * x.abs().max()


def test_page_layout_faults_are_caught():
    codes, scale, zero = quantize_k_int4(pages_like_keys(6))
    for wrong in (
        PageTensors("int4_channel", codes, scale),
        PageTensors("int4_token", codes, scale, zero),
        PageTensors("plain", codes, scale),
        PageTensors("fp8", codes, torch.ones(3)),
        PageTensors("int4_channel", codes.transpose(0, 1), scale, zero),
    ):
        with pytest.raises(AssertionError):
            wrong.check()
