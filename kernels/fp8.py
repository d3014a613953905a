"""8-bit floating point (e4m3) matrix products: one scale per output row of the weight, one per token of the activation.

On CUDA large products are PyTorch's `_scaled_mm` with row-wise scales, which beat what we wrote ourselves. Sums stay in
the tensor core's own 14 bits ("fast accumulation"): that error is an eighth of what rounding the operands to e4m3 costs
and does not grow with the context, only with K. 16384 rows on one H100, inputs with eight channels of 200 times the
rest; errors are relative root mean squares against float64, of the product of the rounded and of the given operands:

| TFLOP/s | 6144x4096 | 28672x4096 | 4096x14336 | error of the sums, last | total, last |
|---|---|---|---|---|---|
| row-wise, fast accumulation (used) | 1399 | 1488 | 1436 | 0.0043 | 0.0350 |
| row-wise, float32 accumulation | 1251 | 1181 | 1321 | 0.0017 | 0.0348 |
| one scale a tensor, fast; row scales still to apply | 1423 | 1443 | 1198 | 0.0049 | 0.0351 |
| Triton, 128x256 tiles, persistent, fast | 1257 | 1335 | 1218 | 0.0043 | 0.0350 |
| Gluon, one loading warp, sums moved to float32 every 128 | 1036 | 1191 | 859 | 0.0017 | 0.0348 |
| Triton, 128x128 tiles, sums moved to float32 every 128 | 883 | 872 | 866 | 0.0017 | 0.0348 |
| bfloat16 | 795 | 770 | 770 | | |

Gluon was timed in a later, slower pass (row-wise, fast 1478, 1401, 1331; float32 1291, 1221, 962).

The surprise: `expand_e4m3` exists because PyTorch converts e4m3 on a CPU one element at a time; moving the bits into
float16 (same layout, exponent bias 8 apart) is four times faster and exact for every finite value. NaN is not kept.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch

from lcconvert.kernels.backend import dot_dtype, jit, tl, triton, use_triton

E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-100  # rows below are zeros to anything they meet, and 1 / scale stays finite
FEW_ROWS = 16  # up to here a product is bound by reading the weight
MAX_ROW = 32768  # values one program holds to find the largest of a row


def expand_e4m3(x: torch.Tensor) -> torch.Tensor:
    """e4m3 tensor -> float32, exact for finite values."""
    assert x.dtype == torch.float8_e4m3fn
    if x.is_cuda:
        return x.float()
    bits = x.contiguous().view(torch.int8).to(torch.int16) << 7  # sign at 15 and 14, the other seven bits at 13..7
    return (bits & ~0x4000).view(torch.float16).float().mul_(256.0)


def quantize_fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (e4m3 [M, K], scale fp32 [M, 1]) with x ~= e4m3 * scale; scale = absmax / 448, 1 for a zero row.

    The quotients are those of a true division, as in compressed-tensors: 16-bit values lie on the border between two
    codes often enough that a product with 1 / scale would change one value in twenty after a matrix product.
    """
    assert x.ndim == 2
    assert x.is_floating_point()
    if use_triton(x) and x.stride(1) == 1 and x.shape[1] <= MAX_ROW:
        return _quantize_fp8_rows_triton(x)
    values = x.float()
    largest = torch.full((), E4M3_MAX, device=x.device)  # CUDA divides by a Python number as a product, rounded twice
    scale = values.abs().amax(dim=1, keepdim=True) / largest
    scale = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale))
    return (values / scale).to(torch.float8_e4m3fn), scale


@jit()
def round_row(values, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    # A row of float32 -> (e4m3 codes, their scale), exactly as the reference does it.
    step = tl.div_rn(tl.max(tl.abs(values), 0), LARGEST)
    step = tl.where(step > SMALLEST, step, 1.0)
    # A division in four cheap steps: the rounded quotient's remainder, which is exact, corrects it (Markstein 1990).
    inverse = tl.div_rn(1.0, step)
    quotient = values * inverse
    quotient = tl.fma(tl.fma(-quotient, step, values), inverse, quotient)
    return quotient.to(tl.float8e4nv), step


@jit()
def _quantize_rows_kernel(
    x, codes, scale, row_stride, k, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr
):
    # One pass over the row; as separate operations this would cost prefill more than fp8 products save.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < k
    values = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    rounded, step = round_row(values, LARGEST, SMALLEST)
    tl.store(codes + row * k + column, rounded, mask=inside)
    tl.store(scale + row, step)


def _quantize_fp8_rows_triton(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, k = x.shape
    codes = torch.empty((rows, k), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    _quantize_rows_kernel[(rows,)](
        x,
        codes,
        scale,
        x.stride(0),
        k,
        BLOCK=block,
        LARGEST=E4M3_MAX,
        SMALLEST=SMALLEST_SCALE,
        num_warps=min(32, max(4, block // 1024)),
    )
    return codes, scale


def fp8_product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(codes e4m3 [M, K] * scale float32 [M, 1]) @ (weight e4m3 [N, K] * weight_scale float32 [N, 1]).T + bias [N].

    -> [M, N] of `out_dtype`. On CUDA K and N must be multiples of 16.
    """
    (m, k), n = codes.shape, weight.shape[0]
    assert codes.dtype == weight.dtype == torch.float8_e4m3fn
    assert codes.is_contiguous()
    assert weight.is_contiguous()
    assert weight.shape == (n, k), f"codes {tuple(codes.shape)} do not fit K={weight.shape[1]}"
    assert scale.shape == (m, 1)
    assert weight_scale.shape == (n, 1)
    assert scale.dtype == weight_scale.dtype == torch.float32
    assert bias is None or bias.shape == (n,)
    if codes.is_cuda:
        assert k % 16 == n % 16 == 0, f"fp8 on CUDA needs multiples of 16, got N={n} K={k}"
        # Row-wise scales are only offered with a bfloat16 result.
        out = torch._scaled_mm(
            codes,
            weight.T,
            scale_a=scale,
            scale_b=weight_scale.T,
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out.to(out_dtype)
    out = (expand_e4m3(codes) @ expand_e4m3(weight).T) * scale * weight_scale.T
    return (out if bias is None else out + bias).to(out_dtype)


def fp8_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    out_dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K], 16 or 32 bit, times the weight of `fp8_product` -> [M, N] of `out_dtype`.

    x is quantized here by row, except for a few 16-bit rows on CUDA, which gain nothing from it.
    """
    if x.is_cuda and len(x) <= FEW_ROWS and dot_dtype(x) is not None and use_triton(x):
        return fp8_few_rows(x, weight, weight_scale, bias).to(out_dtype)
    return fp8_product(*quantize_fp8_rows(x), weight, weight_scale, out_dtype, bias)


def fp8_few_rows(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [M <= 16, K], not quantized, @ (weight e4m3 [N, K] * weight_scale float32 [N, 1]).T + bias -> [M, N] as x.

    Bound by reading the weight, once for all rows. Left behind, at 4096x14336 and one row on an H100: programs of one
    warp for 16 whole rows each, 1.1 TB/s; `fp8_product` with the quantizing before it, 1.0 TB/s.
    """
    (m, k), n = x.shape, weight.shape[0]
    assert m <= FEW_ROWS
    assert x.stride(1) == 1
    assert weight.shape == (n, k)
    assert weight.dtype == torch.float8_e4m3fn
    assert weight.is_contiguous()
    assert weight_scale.shape == (n, 1)
    assert weight_scale.dtype == torch.float32
    assert weight_scale.is_contiguous()
    assert bias is None or (bias.shape == (n,) and bias.is_contiguous())
    if use_triton(x) and dot_dtype(x) is not None:
        return _few_rows_triton(x, weight, weight_scale, bias)
    out = (x.float() @ expand_e4m3(weight).T) * weight_scale.T
    return (out if bias is None else out + bias).to(x.dtype)


@jit("m")
def _few_rows_kernel(
    x, weight, weight_scale, bias, out, m, n, k, x_stride,
    ROWS: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ONE: tl.constexpr,
    EVEN: tl.constexpr, DOT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    # A tensor-core product for each of PIECES pieces of a row, so that the warps share a program's rows by their length
    # and nothing is added up between programs. The weight is the left operand: its rows fill the tensor core, which it
    # reaches as bytes; the rows of x are columns.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < n
    column = tl.arange(0, COLUMNS)
    used = column < m
    within = tl.arange(0, PIECES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [PIECES, WIDTH]
    codes_at = weight + row[None, :, None] * k + within[:, None, :]
    acc = tl.zeros([PIECES, ROWS, COLUMNS], tl.float32)
    for start in range(0, k, PIECES * WIDTH):
        channel = start + within
        inside = channel < k
        if EVEN:
            codes = tl.load(codes_at + start)
        else:
            codes = tl.load(codes_at + start, mask=real[None, :, None] & inside[:, None, :], other=0.0)
        if ONE:
            values = tl.load(x + channel, mask=inside, other=0.0).to(DOT)
            values = tl.broadcast_to(values[:, :, None], [PIECES, WIDTH, COLUMNS])
        else:
            values = tl.load(
                x + column.to(tl.int64)[None, :, None] * x_stride + channel[:, None, :],
                mask=used[None, :, None] & inside[:, None, :], other=0.0,
            )  # fmt: skip
            values = tl.permute(values.to(DOT), [0, 2, 1])
        acc = tl.dot(codes.to(DOT), values, acc, input_precision="ieee")
    result = tl.sum(acc, 0) * tl.load(weight_scale + row, mask=real, other=0.0)[:, None]
    if BIAS:
        result += tl.load(bias + row, mask=real, other=0.0).to(tl.float32)[:, None]
    at = out + column.to(tl.int64)[None, :] * n + row[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=real[:, None] & used[None, :])


def _few_rows_triton(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    rows, pieces, width = 16, 4, 128
    _few_rows_kernel[(triton.cdiv(n, rows),)](
        x, weight, weight_scale, bias, out, m, n, k, x.stride(0),
        ROWS=rows, PIECES=pieces, WIDTH=width, COLUMNS=8 if m <= 8 else 16, ONE=m == 1,
        EVEN=n % rows == 0 and k % (pieces * width) == 0, DOT=dot_dtype(x), BIAS=bias is not None,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out
