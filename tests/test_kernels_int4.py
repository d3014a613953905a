"""The int4 products, and the Triton quantizers against their references."""

import pytest
import torch
from kernel_tools import close, run_on, storage  # noqa: F401

from lcconvert.kernels import backend
from lcconvert.kernels.fp8 import quantize_fp8_rows
from lcconvert.kernels.int4 import (
    dequantize_int4,
    int4_matmul,
    int4_matmul_prepared,
    int4_matmul_torch,
    pack_int4,
    prepare_int4_cpu,
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


def test_prepared_weights_stay_four_bits_and_agree_to_bfloat16():
    packed, scale = weight(64, 256, 64)
    prepared = prepare_int4_cpu(packed, scale)
    assert prepared.weight.nbytes == packed.nbytes
    x = torch.randn(2, 256, generator=torch.manual_seed(0))
    close(int4_matmul_prepared(x, prepared), x @ dequantize_int4(packed, scale, torch.float32).T, 1e-2)


def test_shapes_the_prepared_kernel_lacks_are_declined():
    assert prepare_int4_cpu(*weight(8, 256, 64)) is None
    assert prepare_int4_cpu(*weight(16, 192, 24)) is None


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
