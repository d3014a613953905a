"""Root-mean-square norm of rows, joined with the residual addition before it and the fp8 rounding after it.

A layer norms the sum of its input and a product, and the next product wants e4m3 codes: as separate operations these
would read and write every hidden state five times. Here a row is read once, held by one program and written once.

The surprise: `delta` is added to `x` in place, so the sum, rounded to x's dtype, is the caller's new residual stream.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import torch.nn.functional as F

from lcconvert.kernels.backend import jit, tl, triton, use_triton
from lcconvert.kernels.fp8 import E4M3_MAX, MAX_ROW, SMALLEST_SCALE, quantize_fp8_rows, round_row


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, delta: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, H] -> x / sqrt(mean(x^2) + eps) * weight [H], float32 inside and rounded once, as `F.rms_norm`.

    `delta` [M, H], where given, is first added to x in place. The weight may be float32 where x is not.
    """
    _check(x, weight, delta)
    if use_triton(x) and x.shape[1] <= MAX_ROW:
        return _rms_norm_triton(x, weight, eps, delta, fp8=False)[0]
    if delta is not None:
        x += delta
    return rms_norm_torch(x, weight, eps)


def rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The reference: x [..., H] of any shape."""
    wide = x if weight.dtype == x.dtype else x.float()
    return F.rms_norm(wide, weight.shape, weight, eps).to(x.dtype)


def rms_norm_fp8(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, delta: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` followed by `quantize_fp8_rows`: x [M, H] -> (e4m3 [M, H], scale float32 [M, 1])."""
    _check(x, weight, delta)
    if use_triton(x) and x.shape[1] <= MAX_ROW:
        return _rms_norm_triton(x, weight, eps, delta, fp8=True)
    return quantize_fp8_rows(rms_norm(x, weight, eps, delta=delta))


def _check(x: torch.Tensor, weight: torch.Tensor, delta: torch.Tensor | None) -> None:
    assert x.ndim == 2
    assert x.stride(1) == 1
    assert weight.shape == x.shape[1:]
    assert weight.is_contiguous()
    assert delta is None or (delta.shape == x.shape and delta.dtype == x.dtype and delta.stride(1) == 1)


@jit()
def _rms_norm_kernel(
    x, delta, weight, out, scale, x_stride, delta_stride, h, eps,
    ADD: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < h
    here = x + row * x_stride + column
    values = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
        total = (values + more).to(x.dtype.element_ty)
        tl.store(here, total, mask=inside)
        values = total.to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values, 0) / h + eps)
    by_channel = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    normed = (values * factor * by_channel).to(x.dtype.element_ty)
    if FP8:
        codes, step = round_row(normed.to(tl.float32), LARGEST, SMALLEST)
        tl.store(out + row * h + column, codes, mask=inside)
        tl.store(scale + row, step)
    else:
        tl.store(out + row * h + column, normed, mask=inside)


def _rms_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, eps: float, delta: torch.Tensor | None, *, fp8: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, h = x.shape
    out = torch.empty((rows, h), dtype=torch.float8_e4m3fn if fp8 else x.dtype, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(h)
    # A few rows leave the device idle: their time is the longest chain of one thread, so they get more threads.
    per_thread = 8 if rows <= 64 else 16
    _rms_norm_kernel[(rows,)](
        x, delta, weight, out, scale, x.stride(0), 0 if delta is None else delta.stride(0), h, eps,
        ADD=delta is not None, FP8=fp8, BLOCK=block, LARGEST=E4M3_MAX, SMALLEST=SMALLEST_SCALE,
        num_warps=min(16, max(1, block // (32 * per_thread))),
    )  # fmt: skip
    return out, scale
