"""The kernels between the products: norms, rotary embedding, gated activation, each with its fp8 form."""

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import close, run_on, storage  # noqa: F401

from lcconvert.kernels import backend
from lcconvert.kernels.fp8 import MAX_ROW, expand_e4m3, fp8_few_rows, fp8_matmul, quantize_fp8_rows
from lcconvert.kernels.kv_pages import PAGE
from lcconvert.kernels.rms_norm import rms_norm, rms_norm_fp8
from lcconvert.kernels.rotary import rotary, rotate_append
from lcconvert.kernels.silu_mul import silu_mul, silu_mul_fp8
from lcconvert.runtime.rope import apply_rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# What one rounding may cost; the interpreter cuts float32 down to bfloat16 instead of rounding.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def randn(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.manual_seed(seed)).to(device, dtype)


def quarters(*shape, seed=0, device="cpu", dtype=torch.float32):
    """Values whose sums need no rounding in any dtype."""
    return torch.randint(-64, 65, shape, generator=torch.manual_seed(seed)).to(device, dtype) / 4


def tables(tokens, d, device):
    angle = randn(tokens, d // 2, seed=9, device=device) * 100
    return angle.cos() * 1.1, angle.sin() * 1.1


def on_cpu(run, *args):
    with backend.force(None):
        return run(*args)


def codes_of_e4m3(*shape):
    """Random e4m3 values with 448 in every row: a row of these has scale 1 and needs no rounding."""
    codes = torch.randint(0, 0x7F, shape, generator=torch.manual_seed(3), dtype=torch.uint8)
    codes[:, 5] = 0x7E
    return codes.view(torch.float8_e4m3fn).float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "h"), [(1, 576), (3, 64), (66, 100)])
@pytest.mark.parametrize("add", [False, True])
def test_rms_norm(device, dtype, m, h, add):
    x = quarters(m, 2 * h, device=device, dtype=dtype)[:, :h]  # rows that are not adjacent
    delta = quarters(m, h + 4, seed=1, device=device, dtype=dtype)[:, 4:] if add else None
    weight = randn(h, seed=2, device=device, dtype=dtype)
    residual = x.clone() if delta is None else x + delta
    got = rms_norm(x, weight, 1e-5, delta=delta)
    assert torch.equal(x, residual)
    assert got.dtype == dtype
    exact = residual.double()
    want = exact / (exact.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    close(got, want, ROUNDING[dtype])
    with backend.force("torch"):
        close(got, rms_norm(residual, weight, 1e-5), ROUNDING[dtype])


def test_rms_norm_reference_is_the_one_of_torch():
    x, delta, weight = randn(3, 64), randn(3, 64, seed=1), randn(64, seed=2)
    want = F.rms_norm(x + delta, (64,), weight, 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6, delta=delta), want)


@pytest.mark.parametrize("add", [False, True])
def test_rms_norm_to_fp8(device, add):
    # The interpreter rounds to e4m3 wrongly (7.8 to 4), so rows are made whose norms need no rounding: values of one
    # size norm to 1 and the weight is made of e4m3 values.
    weight = codes_of_e4m3(1, 72)[0].to(device, torch.bfloat16)
    size = torch.tensor([[0.5], [2.0], [8.0]])
    x = (randn(3, 72).sign() * size).to(device, torch.bfloat16)
    delta = x * 3 if add else None
    want = x.float().sign() * weight.float()
    codes, scale = rms_norm_fp8(x, weight, 1e-12, delta=delta)
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(codes.float(), want)
    assert torch.equal(x.float().abs().cpu(), size.expand(3, 72) * (4 if add else 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "width"), [(1, 1536), (2, 700), (65, 64)])
def test_silu_mul(device, dtype, m, width):
    x = randn(m, 2 * width + 8, device=device, dtype=dtype)[:, : 2 * width] * 4
    gate, up = x.double().chunk(2, 1)
    got = silu_mul(x)
    assert got.dtype == dtype
    close(got, F.silu(gate) * up, ROUNDING[dtype])
    with backend.force("torch"):
        close(got, silu_mul(x), ROUNDING[dtype])


@pytest.mark.filterwarnings("ignore:overflow")
def test_silu_mul_of_very_negative_gates_is_zero(device):
    x = torch.tensor([[-1e4, -200.0, 1e4, 3.0, 3.0, 2.0]], device=device)
    assert torch.equal(silu_mul(x), torch.tensor([[0.0, 0.0, 2e4]], device=device))


def test_silu_mul_to_fp8(device):
    up = codes_of_e4m3(3, 72) * torch.tensor([[0.25], [1.0], [2.0]])
    x = torch.cat((torch.full_like(up, 64.0), up), 1).to(device, torch.bfloat16)  # silu(64) is 64
    codes, scale = silu_mul_fp8(x)
    assert torch.equal(scale.cpu(), torch.tensor([[16.0], [64.0], [128.0]]))
    assert torch.equal(codes.float() * scale, up.to(device) * 64)


def test_rows_of_next_to_nothing_become_zeros(device):
    x = torch.tensor([[1e-38, -1e-40], [0.0, 0.0]], device=device)
    with backend.force("torch" if device == "cpu" else "triton"):  # the interpreter makes 0.01 of 1e-38 in e4m3
        codes, scale = quantize_fp8_rows(x)
    assert torch.equal(scale, torch.ones_like(scale))
    assert torch.equal(codes.float(), torch.zeros_like(x))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 8, 100])
def test_fp8_forms_equal_rounding_afterwards(device, m):
    if device == "cpu":
        pytest.skip("the interpreter rounds to e4m3 wrongly")
    x, weight = randn(m, 3584, device="cuda", dtype=torch.bfloat16), randn(3584, seed=2, device="cuda").bfloat16()
    x[:, 7] *= 200
    for got, plain in ((rms_norm_fp8(x, weight, 1e-5), rms_norm(x, weight, 1e-5)), (silu_mul_fp8(x), silu_mul(x))):
        with backend.force("torch"):
            codes, scale = quantize_fp8_rows(plain)
        assert torch.equal(got[1], scale)
        assert torch.equal(got[0].float(), codes.float())


def test_rows_too_long_for_a_program_take_the_reference(device):
    x = torch.ones(1, MAX_ROW + 8, device=device)
    assert torch.equal(rms_norm(x, x[0], 0.0), x)
    codes, scale = rms_norm_fp8(x, x[0], 0.0) if device == "cuda" else (x * 448, x[:, :1] / 448)
    assert torch.allclose(codes.float() * scale, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "d"), [(1, 9, 64), (3, 28, 128), (70, 2, 32)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("where", ["new", "in place", "elsewhere"])
def test_rotary(device, dtype, tokens, heads, d, norm, where):
    merged = randn(tokens, (heads + 2) * d, device=device, dtype=dtype)
    x = merged[:, d : (heads + 1) * d].view(tokens, heads, d)
    cos, sin = tables(tokens, d, device)
    head_norm = (randn(d, seed=4, device=device, dtype=dtype), 1e-6) if norm else None
    want = apply_rope(F.rms_norm(x, (d,), *head_norm) if head_norm else x, cos, sin)
    around = merged.clone()
    target = {"new": None, "in place": x, "elsewhere": torch.zeros(tokens, heads + 3, d).to(x)[:, 3:]}[where]
    got = rotary(x, cos, sin, norm=head_norm, out=target)
    assert target is None or got is target
    assert got.dtype == dtype
    close(got, want, (1 + norm) * ROUNDING[dtype])
    assert torch.equal(merged[:, :d], around[:, :d])
    assert torch.equal(merged[:, -d:], around[:, -d:])
    if where != "in place":
        assert torch.equal(merged, around)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(9, 3, 64), (4, 1, 128), (2, 2, 32)])
@pytest.mark.parametrize("norm", [False, True])
def test_rotate_append(device, dtype, heads, kv_heads, d, norm):
    pages, sequences = 5, 3
    qkv = randn(sequences, (heads + 2 * kv_heads) * d + 8, device=device, dtype=dtype)[:, : (heads + 2 * kv_heads) * d]
    cos, sin = tables(sequences, d, device)
    page = torch.tensor([4, 0, 2], dtype=torch.int32, device=device)
    row = torch.tensor([127, 0, 31], dtype=torch.int32, device=device)
    norms = [(randn(d, seed=s, device=device, dtype=dtype), 1e-6) if norm else None for s in (4, 5)]
    q, k, v = qkv.reshape(sequences, -1, d).split((heads, kv_heads, kv_heads), 1)
    want_q, want_k = (apply_rope(F.rms_norm(x, (d,), *n) if n else x, cos, sin) for x, n in zip((q, k), norms))
    for choice in ("triton", "torch"):
        k_pages, v_pages = (randn(pages, kv_heads, PAGE, d, seed=s, device=device, dtype=dtype) for s in (6, 7))
        want_pages = [k_pages.clone(), v_pages.clone()]
        with backend.force(choice):
            got = rotate_append(
                qkv, cos, sin, k_pages, v_pages, page, row, heads=heads, q_norm=norms[0], k_norm=norms[1]
            )
        close(got, want_q, (1 + norm) * ROUNDING[dtype])
        at = (page.long(), slice(None), row.long())
        close(k_pages[at], want_k, (1 + norm) * ROUNDING[dtype])
        assert torch.equal(v_pages[at], v)
        for pool, before in zip((k_pages, v_pages), want_pages):  # nothing else was touched
            before[at] = pool[at]
            assert torch.equal(pool, before)


def test_rows_beyond_31_bits_of_offset(device, vast):
    h = 64
    x = vast(torch.bfloat16).as_strided((2, 2 * h), (2**31, 1))
    x[1] = randn(2 * h, seed=1).to(x)
    row, weight = x[1:].clone(), randn(h, seed=2).to(x)
    cos, sin = tables(2, 32, device)
    assert torch.equal(silu_mul(x)[1:], silu_mul(row))
    assert torch.equal(rms_norm(x[:, :h], weight, 1e-5)[1:], rms_norm(row[:, :h].clone(), weight, 1e-5))
    turned = rotary(x.view(2, 4, 32), cos, sin)
    assert torch.equal(turned[1:], rotary(row.view(1, 4, 32), cos[1:], sin[1:]))
    if device == "cuda":
        for fused, data in ((silu_mul_fp8, ()), (rms_norm_fp8, (torch.cat((weight, weight)), 1e-5))):
            codes, scale = fused(x, *data)
            want, want_scale = fused(row, *data)
            assert torch.equal(scale[1:], want_scale)
            assert torch.equal(expand_e4m3(codes[1:]), expand_e4m3(want))


def test_a_page_beyond_31_bits_of_offset_is_written(device, vast):
    d, pages = 64, 2**31 // (PAGE * 64) + 2
    k_pages, v_pages = (vast(torch.bfloat16)[: pages * PAGE * d].view(pages, 1, PAGE, d) for _ in range(2))
    qkv = randn(1, 3 * d, device=device, dtype=torch.bfloat16)
    cos, sin = tables(1, d, device)
    page, row = (torch.tensor([i], dtype=torch.int32, device=device) for i in (pages - 1, 100))
    rotate_append(qkv, cos, sin, k_pages, v_pages, page, row, heads=1)
    assert torch.equal(v_pages[-1, 0, 100], qkv[0, 2 * d :])
    close(k_pages[-1, :, 100], apply_rope(qkv.view(1, 3, d)[:, 1:2], cos, sin)[0], 2**-7)


def test_running_twice_gives_the_same(device):
    x, weight = randn(5, 192, device=device, dtype=torch.bfloat16), randn(192, seed=2, device=device).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))
    assert torch.equal(silu_mul(x), silu_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 16])
@pytest.mark.parametrize(("n", "k"), [(24, 576), (40, 1100), (32, 1024)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_few_rows_by_an_fp8_weight(device, dtype, m, n, k, with_bias):
    x = randn(m, k + 8, device=device, dtype=dtype)[:, :k]
    weight, scale = (t.to(device) for t in on_cpu(quantize_fp8_rows, randn(n, k, seed=1)))
    bias = randn(n, seed=2, device=device, dtype=dtype) if with_bias else None
    want = x.double() @ (expand_e4m3(weight).double() * scale.double()).T
    want = want if bias is None else want + bias.double()
    got = fp8_few_rows(x, weight, scale, bias)
    assert got.dtype == dtype
    close(got, want, max(ROUNDING[dtype], 1e-5))
    with backend.force("torch"):
        close(fp8_few_rows(x, weight, scale, bias), want, max(ROUNDING[dtype], 1e-5))
    if device == "cuda" and dtype != torch.float32:
        assert torch.equal(fp8_matmul(x, weight, scale, dtype, bias), got)


@pytest.mark.gpu
def test_an_fp8_weight_beyond_31_bits_of_offset(device, vast):
    if device == "cpu":
        pytest.skip("the interpreter would walk over all of it")
    n, k = 520, 2**22
    weight = vast(torch.uint8).zero_()[: n * k].view(torch.float8_e4m3fn).view(n, k)
    last = codes_of_e4m3(4, 256).to(device)
    weight[-4:, :256] = last.to(weight.dtype)
    x = torch.zeros(2, k, dtype=torch.bfloat16, device=device)
    x[:, :256] = quarters(2, 256, device=device)
    got = fp8_few_rows(x, weight, torch.ones(n, 1, device=device))
    close(got[:, -4:], x[:, :256].double() @ last.double().T, 2**-8)
