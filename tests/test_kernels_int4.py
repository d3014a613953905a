"""The int4 products, and the Triton quantizers against their references."""

import pytest
import torch
from kernel_tools import close, run_on, storage  # noqa: F401

from lcconvert.kernels import backend
from lcconvert.kernels.fp8 import expand_e4m3, quantize_fp8_rows
from lcconvert.kernels.int4 import (
    dequantize_int4,
    expand_int4_fp8,
    int4_matmul,
    int4_matmul_torch,
    pack_int4,
)
from lcconvert.kernels.kv_pages import PAGE, quantize_k_int4, quantize_v_int4


def weight(n, k, group, device="cpu", dtype=torch.float32):
    generator = torch.manual_seed(n + k)
    q = torch.randint(-8, 8, (n, k), generator=generator).to(torch.int8)
    scale = torch.rand(n, k // group, generator=generator) + 0.1
    return pack_int4(q).to(device), scale.to(device, dtype)


@pytest.mark.parametrize("m", [1, 3, 16, 17])
@pytest.mark.parametrize(("n", "k", "group"), [(21, 4160, 64), (8, 256, 32), (40, 192, 24)])
def test_matmul(device, m, n, k, group):
    packed, scale = weight(n, k, group, device)
    x = torch.randn(m, k, generator=torch.manual_seed(m)).to(device)
    want = x.double() @ dequantize_int4(packed, scale, torch.float64).T
    close(int4_matmul(x, packed, scale), want, 1e-4)
    close(int4_matmul_torch(x, packed, scale), want, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matmul_in_16_bits(device, dtype):
    packed, scale = weight(24, 512, 128, device, dtype)
    x = torch.randn(2, 512, generator=torch.manual_seed(0)).to(device, dtype)
    got = int4_matmul(x, packed, scale)
    assert got.dtype == dtype
    close(got, x.double() @ dequantize_int4(packed, scale, torch.float64).T, 1e-2)


@pytest.mark.parametrize("m", [1, 2, 9])
def test_matmul_beyond_one_tile_is_exact_about_its_ends(device, m):
    packed, scale = weight(35, 576, 32, device, torch.float16)
    x = torch.randn(m, 576, generator=torch.manual_seed(m)).to(device, torch.float16)
    got = int4_matmul(x, packed, scale)
    close(got, x.double() @ dequantize_int4(packed, scale, torch.float64).T, 2e-3)
    assert torch.equal(got, int4_matmul(x, packed, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "group"), [(5, 4224, 128), (9, 192, 32), (3, 48, 24)])
def test_expanded_alike(device, dtype, n, k, group):
    packed, scale = weight(n, k, group, device, dtype)
    if device == "cpu":  # the interpreter rounds to bfloat16 by cutting: scales that need no rounding
        scale = (scale.float() * 4).round().clamp(min=1).to(dtype)
    with backend.force("torch"):
        want = dequantize_int4(packed, scale, dtype)
    assert torch.equal(dequantize_int4(packed, scale, dtype), want)


@pytest.mark.parametrize(("n", "k", "group"), [(5, 4224, 128), (9, 192, 32), (3, 48, 24)])
def test_expanded_to_fp8_alike(device, n, k, group):
    packed, scale = weight(n, k, group, device, torch.bfloat16)
    if device == "cpu":  # the interpreter rounds to e4m3 wrongly, so it gets values that need no rounding
        q = torch.tensor([-8, -4, -2, -1, 0, 1, 2, 4], dtype=torch.int8)[
            torch.randint(0, 8, (n, k), generator=torch.manual_seed(0))
        ]
        packed, scale = pack_int4(q), 2.0 ** torch.arange(k // group).remainder(3).expand(n, -1).contiguous()
    packed[2] = pack_int4(torch.zeros(1, k, dtype=torch.int8)).to(device)
    with backend.force("torch"):
        want, want_scale = expand_int4_fp8(packed, scale)
    got, row_scale = expand_int4_fp8(packed, scale)
    assert torch.equal(row_scale, want_scale)
    assert row_scale[2] == 1
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_fp8_weights_stay_within_half_a_step():
    packed, scale = weight(6, 256, 64)
    codes, row_scale = expand_int4_fp8(packed, scale)
    want = dequantize_int4(packed, scale, torch.float32)
    assert torch.allclose(row_scale[:, 0], want.abs().amax(1) / 448)
    error = (expand_e4m3(codes) * row_scale - want).abs()
    assert (error <= want.abs() / 16 + row_scale * 2.0**-10).all()


@pytest.mark.gpu  # rows have to be adjacent, so every byte is read: too much for the interpreter
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_weights_beyond_31_bits_of_offset(device, vast):
    rows = 2**31 // 16 + 64
    packed = vast(torch.uint8)[: rows * 16].view(torch.int32).view(rows, 4)
    last, scale = weight(40, 32, 32, device, torch.float16)
    packed[-40:] = last
    scales = torch.ones(rows, 1, device=device, dtype=torch.float16)
    scales[-40:] = scale
    want = dequantize_int4(last, scale, torch.float32)
    x = torch.randn(1, 32, generator=torch.manual_seed(0)).to(device, torch.float16)
    close(int4_matmul(x, packed, scales)[:, -40:], x.double() @ want.double().T, 1e-2)
    assert torch.equal(dequantize_int4(packed, scales, torch.float16)[-40:], want.half())
    codes, row_scale = expand_int4_fp8(packed, scales)
    close(codes[-40:].float() * row_scale[-40:], want, 0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_quantized_alike(device, dtype):
    generator = torch.manual_seed(0)
    if device == "cuda":
        x = torch.randn(5, 72, generator=generator)
    else:  # the interpreter rounds to e4m3 wrongly (7.8 to 4), so it gets values that need no rounding
        codes = torch.randint(0, 0x7F, (5, 72), generator=generator, dtype=torch.uint8)
        codes[:, 7] = 0x7E  # 448, so that scales are powers of two
        x = codes.view(torch.float8_e4m3fn).float() * 2.0 ** torch.arange(-2, 3)[:, None]
    x = x.to(device, dtype)
    x[3] = 0
    x = x[:, :70]  # rows that are not adjacent
    with backend.force("torch"):
        want, want_scale = quantize_fp8_rows(x)
    got, scale = quantize_fp8_rows(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("quantize", [quantize_k_int4, quantize_v_int4])
def test_pages_are_quantized_alike(device, quantize):
    generator = torch.manual_seed(0)
    x = torch.randn(2, PAGE, 3, 32, generator=generator) * 3 + torch.randn(32, generator=generator) * 20
    x = x.to(device, torch.bfloat16)
    with backend.force("torch"):
        want = quantize(x)
    for got, reference in zip(quantize(x), want):
        assert torch.equal(got, reference)


def test_pages_beyond_31_bits_of_offset_are_quantized(device, vast):
    x = vast(torch.float16).as_strided((2, PAGE, 1, 16), (2**31, 16, 16, 1))
    x[1] = torch.randn(PAGE, 1, 16, generator=torch.manual_seed(0)).to(x)
    got = quantize_k_int4(x)
    with backend.force("torch"):
        want = quantize_k_int4(x[1:].contiguous())
    assert all(torch.equal(a[1:], b) for a, b in zip(got, want))


def test_triton_cannot_be_forced_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(backend, "interpreted", False)
    with backend.force("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        backend.use_triton(torch.zeros(1))
    assert not backend.use_triton(torch.zeros(1))
