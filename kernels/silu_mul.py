"""The gated activation of the MLP, silu(gate) * up, over the merged product that holds both, with or without fp8.

float32 inside; the product is rounded to the input's dtype before it is rounded again to e4m3, so that the fp8 path
differs from the 16-bit path by the e4m3 rounding alone. A row is held in registers between its largest value and its
rounding: 2.9 TB/s at 16384 rows of 2 x 14336 on an H100; reading the row twice instead, in blocks, reached 2.4, and
dividing by the scale instead of multiplying by its inverse 2.5.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
import torch.nn.functional as F

from lcconvert.kernels.backend import jit, tl, triton, use_triton
from lcconvert.kernels.fp8 import E4M3_MAX, MAX_ROW, SMALLEST_SCALE, quantize_fp8_rows, round_row


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [M, 2I], the gate in the first half of a row -> silu(gate) * up [M, I]."""
    _check(gate_up)
    if use_triton(gate_up):
        return _silu_mul_triton(gate_up)
    gate, up = gate_up.float().chunk(2, dim=1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def silu_mul_fp8(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul` followed by `quantize_fp8_rows`: gate_up [M, 2I] -> (e4m3 [M, I], scale float32 [M, 1])."""
    _check(gate_up)
    if use_triton(gate_up) and gate_up.shape[1] // 2 <= MAX_ROW:
        return _silu_mul_fp8_triton(gate_up)
    return quantize_fp8_rows(silu_mul(gate_up))


def _check(gate_up: torch.Tensor) -> None:
    assert gate_up.ndim == 2
    assert gate_up.shape[1] % 2 == 0
    assert gate_up.stride(1) == 1


@jit()
def _gated(gate_up, column, inside, width):
    # [BLOCK] values of silu(gate) * up as float32, rounded to the input's dtype.
    gate = tl.load(gate_up + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + width + column, mask=inside, other=0.0).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate)) * up).to(gate_up.dtype.element_ty).to(tl.float32)


@jit()
def _silu_mul_kernel(gate_up, out, row_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    values = _gated(gate_up + row * row_stride, column, inside, width)
    tl.store(out + row * width + column, values.to(out.dtype.element_ty), mask=inside)


@jit()
def _silu_mul_fp8_kernel(
    gate_up, codes, scale, row_stride, width, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    rounded, step = round_row(_gated(gate_up + row * row_stride, column, inside, width), LARGEST, SMALLEST)
    tl.store(codes + row * width + column, rounded, mask=inside)
    tl.store(scale + row, step)


def _silu_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    block = 1024  # small, so that even one row keeps many processors busy
    _silu_mul_kernel[(rows, triton.cdiv(width, block))](
        gate_up, out, gate_up.stride(0), width, BLOCK=block, num_warps=4
    )
    return out


def _silu_mul_fp8_triton(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    codes = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=gate_up.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=gate_up.device)
    block = triton.next_power_of_2(width)
    _silu_mul_fp8_kernel[(rows,)](
        gate_up, codes, scale, gate_up.stride(0), width,
        BLOCK=block, LARGEST=E4M3_MAX, SMALLEST=SMALLEST_SCALE, num_warps=min(32, max(1, block // 1024)),
    )  # fmt: skip
    return codes, scale
