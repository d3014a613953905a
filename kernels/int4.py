"""Weights in 4 bits: packing, expansion for prefill, and the matrix-vector product decode spends its weight time in.

Layout is compressed-tensors' pack-quantized: a weight is [N, K] (out, in), element i of a row sits at bit 4*(i%8) of
int32 word i//8, stored as q+8 with q in [-8, 7], and one scale covers `g` neighbours of a row. Symmetric only. There is
no large-M kernel: prefill expands a layer once, to e4m3 or to 16 bits, and uses the ordinary matrix product.

TB/s of weights and scales read for one row of x on one H100 (a copy: 3.0), g = 128, in a CUDA graph over more weights
than the L2 cache holds:

| out x in | 6144x4096 | 4096x4096 | 28672x4096 | 4096x14336 |
|---|---|---|---|---|
| tensor cores, 16 rows and 8 groups a step, 3 stages (this) | 1.65 | 1.36 | 2.23 | 1.96 |
| 4 stages | 1.43 | 1.24 | 2.03 | 1.86 |
| 32 rows, 4 groups (this beyond 8 rows of x) | 1.31 | 1.13 | 2.18 | 1.50 |
| whole rows at once by 8 warps, no loop | 1.13 | 1.08 | 1.48 | - |
| CUDA cores, a float32 multiply-add a weight | 1.08 | 1.09 | 1.47 | 1.40 |
| Gluon, from memory to tensor core by registers, best tile for each | 1.51 | 1.22 | 2.03 | 1.78 |
| the same, launched while its predecessor ends | 1.73 | 1.47 | 2.11 | 1.93 |

So a product takes about 2.9 us and its bytes at 2.5 TB/s, more where 8 groups do not divide a row (1.1 at 4608x3584,
2.1 at 37888x3584), and the Gluon kernel did not earn its place. Eight rows cost 10 to 14 % more than one, sixteen 35 to
40 %.

The surprise: on a CPU PyTorch's own int4 product is slower than expanding for float32 and inexact for bfloat16, so the
reference is a grouped product of its own.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch

from lcconvert.kernels.backend import dot_dtype, interpreted, jit, tl, triton, use_triton
from lcconvert.kernels.fp8 import E4M3_MAX

_EXPAND_ROWS = 256  # weight rows the reference rounds at once
SMALL_M = 16  # rows up to which the fused product is used; above it the weight is expanded


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Pack int8 [N, K] in [-8, 7] into int32 [N, K/8].

    Raises ValueError when K is not a multiple of 8 or a value does not fit.
    """
    n, k = q.shape
    if k % 8:
        raise ValueError(f"a row has {k} values; int4 packing needs a multiple of 8")
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise ValueError(f"values span [{int(q.min())}, {int(q.max())}]; int4 holds [-8, 7]")
    nibbles = (q + 8).to(torch.uint8).view(n, k // 2, 2)
    return (nibbles[..., 0] | (nibbles[..., 1] << 4)).contiguous().view(torch.int32)  # little-endian words


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int32 [N, K/8] -> int8 [N, K], each q in [-8, 7]."""
    pairs = packed.contiguous().view(torch.uint8).to(torch.int16)  # [N, K/2], 0x00HL
    pairs |= pairs << 4
    pairs &= 0x0F0F  # 0x0H0L: low nibble first in memory
    return pairs.view(torch.int8).sub_(8)


def unpack_int4(packed: torch.Tensor, k: int) -> torch.Tensor:
    """Unpack int32 [N, K/8] to int8 [N, k]."""
    assert packed.dtype == torch.int32
    assert packed.ndim == 2
    return _nibbles(packed)[:, :k]


def dequantize_int4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Expand packed int32 [N, K/8] with scale [N, K/g] to [N, K] of `dtype` (product in float32, rounded once)."""
    n, groups = _check_weight(packed, scale)
    if dtype in (torch.float32, torch.float16, torch.bfloat16) and use_triton(packed) and _fits_tiles(packed, scale):
        return _dequantize_triton(packed, scale, dtype)
    q = _nibbles(packed).view(n, groups, -1)
    return torch.mul(q, scale.float()[..., None]).view(n, -1).to(dtype)


def expand_int4_fp8(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round packed int32 [N, K/8] with scale [N, K/g] to (codes e4m3 [N, K], row_scale float32 [N, 1]).

    W ~= codes * row_scale, which is the largest magnitude of the row / 448, and 1 for a zero row.
    """
    n, _ = _check_weight(packed, scale)
    if use_triton(packed) and _fits_tiles(packed, scale):
        return _expand_fp8_triton(packed, scale)
    codes = torch.empty((n, packed.shape[1] * 8), dtype=torch.float8_e4m3fn, device=packed.device)
    row_scale = torch.empty((n, 1), dtype=torch.float32, device=packed.device)
    most = torch.full((), E4M3_MAX, device=packed.device)  # CUDA divides by a Python number as a product, rounded twice
    for start in range(0, n, _EXPAND_ROWS):
        part = slice(start, start + _EXPAND_ROWS)
        step = scale[part].float()
        q = _nibbles(packed[part]).view(*step.shape, -1)
        row = (q.abs().amax(2) * step.abs()).amax(1, keepdim=True) / most  # int8 holds |-8|
        row_scale[part] = torch.where(row > 0, row, torch.ones_like(row))
        values = q * (step / row_scale[part])[..., None]
        codes[part] = values.clamp_(-E4M3_MAX, E4M3_MAX).view(len(step), -1).to(torch.float8_e4m3fn)
    return codes, row_scale


def _check_weight(packed: torch.Tensor, scale: torch.Tensor) -> tuple[int, int]:
    assert packed.dtype == torch.int32
    assert packed.ndim == 2
    assert packed.is_contiguous()
    assert scale.is_floating_point()
    assert scale.ndim == 2
    assert scale.shape[0] == packed.shape[0]
    k, groups = packed.shape[1] * 8, scale.shape[1]
    assert k % (8 * groups) == 0, f"{groups} groups do not divide {k} inputs into eights"
    return packed.shape[0], groups


def _fits_tiles(packed: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether a group is what the kernels' tiles need: 32 to 256 weights, a power of two."""
    return scale.is_contiguous() and packed.shape[1] * 8 // scale.shape[1] in (32, 64, 128, 256)


def int4_matmul(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the transpose of an int4 weight: packed int32 [N, K/8], scale [N, K/g] -> [M, N] of x's dtype.

    M <= 16 reads the weight once, in 4 bits; larger M expands it first. Sums are float32.
    """
    _check_weight(packed, scale)
    assert x.shape == (len(x), packed.shape[1] * 8), f"x {tuple(x.shape)} does not fit K={packed.shape[1] * 8}"
    if x.shape[0] > SMALL_M:
        return x @ dequantize_int4(packed, scale, x.dtype).T
    if use_triton(x) and dot_dtype(x) is not None and _fits_tiles(packed, scale):
        return _int4_matmul_triton(x, packed, scale)
    return int4_matmul_torch(x, packed, scale)


def int4_matmul_torch(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The reference of the small-M product: float32 throughout, rounded to x's dtype at the end."""
    if x.shape[0] != 1:
        return (x.float() @ dequantize_int4(packed, scale, torch.float32).T).to(x.dtype)
    # One row: scale 1/g as many numbers. The nibbles stay unscaled, x multiplies them, and each group's sum is scaled.
    n, groups = scale.shape
    pairs = packed.view(torch.uint8)  # [N, K/2]: byte j is inputs 2j (low) and 2j+1 (high)
    even, odd = (part.contiguous() for part in x.float().view(groups, -1, 2).unbind(-1))  # [G, g/2] each
    base = -8.0 * (even.sum(1) + odd.sum(1))  # [G]: codes are q+8
    out = torch.empty(n, dtype=torch.float32, device=x.device)
    step = min(n, max(64, 3 * 2**16 // x.shape[1]))  # rows whose expanded codes stay in the L2 cache
    nibbles = torch.empty((step, pairs.shape[1]), dtype=torch.uint8, device=x.device)
    low, high = (torch.empty((step, *even.shape), dtype=torch.float32, device=x.device) for _ in range(2))
    for start in range(0, n, step):
        part = pairs[start : start + step]
        rows = len(part)
        low[:rows].copy_(torch.bitwise_and(part, 15, out=nibbles[:rows]).view_as(low[:rows]))
        high[:rows].copy_(torch.bitwise_right_shift(part, 4, out=nibbles[:rows]).view_as(high[:rows]))
        sums = low[:rows].mul_(even).addcmul_(high[:rows], odd).sum(2) + base  # [rows, G]
        torch.sum(sums.mul_(scale[start : start + step]), dim=1, out=out[start : start + step])
    return out[None].to(x.dtype)


def _centred_pairs(kind: str, one_bits: int, magic_bits: int) -> str:
    """PTX that takes four code bytes b3 b2 b1 b0 apart: into their low nibbles - 8 and their high nibbles - 8.

    magic | n is the 16-bit float 2^m + n, so masking the nibbles of two bytes into that pattern and subtracting
    2^m + 8 makes two exact values an instruction.
    """
    one, magic, shift = (f"0x{bits:04X}{bits:04X}" for bits in (one_bits, magic_bits, magic_bits + 0x8008))
    lines = [".reg .b32 a, b, one, shift;", f"mov.b32 one, {one};", f"mov.b32 shift, {shift};"]
    lines += ["prmt.b32 a, $4, 0, 0x4140;", "prmt.b32 b, $4, 0, 0x4342;"]
    for i, half in enumerate("abab"):
        lines += [f"shr.b32 {half}, {half}, 4;"] if i >= 2 else []
        lines += [f"lop3.b32 ${i}, {half}, 0x000F000F, {magic}, 0xEA;", f"fma.rn.{kind} ${i}, ${i}, one, shift;"]
    return "{" + " ".join(lines) + "}"


_PAIRS_BF16 = _centred_pairs("bf16x2", 0x3F80, 0x4300)  # 128 + n
_PAIRS_FP16 = _centred_pairs("f16x2", 0x3C00, 0x6400)  # 1024 + n


@jit("n", "groups", "m")
def _small_m_kernel(
    x, packed, scale, out, n, groups, m,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, COLUMNS: tl.constexpr, ONE: tl.constexpr,
    EVEN: tl.constexpr, DOT: tl.constexpr, ASM: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # ROWS rows of the weight against all rows of x, as one tensor-core product a scale group: warps take groups, so a
    # program has whole rows and there is nothing to add up between programs. The weight is the left operand: it goes
    # from memory through shared memory to registers packed, and is taken apart there.
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    real = row < n
    column = tl.arange(0, COLUMNS)
    lane = tl.arange(0, GROUPS)
    byte = tl.arange(0, BYTES)
    both = tl.arange(0, 2 * BYTES)
    codes_at = packed + (row[None, :, None] * groups + lane[:, None, None]) * BYTES + byte[None, None, :]
    step_at = scale + row[None, :] * groups + lane[:, None]
    next_step = tl.load(step_at, mask=real[None, :] & (lane < groups)[:, None], other=0.0)
    acc = tl.zeros([GROUPS, ROWS, COLUMNS], tl.float32)
    for start in range(0, groups, GROUPS):
        step = next_step.to(tl.float32)  # asked for one turn ahead: too narrow to be prefetched into shared memory
        group = start + lane
        inside = group < groups
        next_step = tl.load(
            step_at + (start + GROUPS), mask=real[None, :] & (group + GROUPS < groups)[:, None], other=0.0
        )
        if EVEN:
            codes = tl.load(codes_at + start * BYTES)
        else:
            codes = tl.load(codes_at + start * BYTES, mask=real[None, :, None] & inside[:, None, None], other=0)
        if ASM:
            if x.dtype.element_ty == tl.bfloat16:
                low, high = tl.inline_asm_elementwise(
                    PAIRS, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
                )
            else:
                low, high = tl.inline_asm_elementwise(
                    PAIRS, "=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
                )
        else:
            low = ((codes & 15).to(tl.float32) - 8).to(DOT)
            high = ((codes >> 4).to(tl.float32) - 8).to(DOT)
        # Byte j of a row holds inputs 2j and 2j + 1.
        if ONE:
            inputs = tl.load(x + group[:, None] * (2 * BYTES) + both[None, :], mask=inside[:, None], other=0.0)
            even, odd = tl.split(tl.reshape(inputs.to(DOT), [GROUPS, BYTES, 2]))
            even = tl.broadcast_to(even[:, :, None], [GROUPS, BYTES, COLUMNS])
            odd = tl.broadcast_to(odd[:, :, None], [GROUPS, BYTES, COLUMNS])
        else:
            inputs = tl.load(
                x + (column[None, :, None] * groups + group[:, None, None]) * (2 * BYTES) + both[None, None, :],
                mask=(column < m)[None, :, None] & inside[:, None, None], other=0.0,
            )  # fmt: skip
            even, odd = tl.split(tl.reshape(inputs.to(DOT), [GROUPS, COLUMNS, BYTES, 2]))
            even = tl.permute(even, [0, 2, 1])
            odd = tl.permute(odd, [0, 2, 1])
        sums = tl.dot(low, even, input_precision="ieee")
        sums = tl.dot(high, odd, sums, input_precision="ieee")
        acc += sums * step[:, :, None]
    result = tl.sum(acc, 0)  # [ROWS, COLUMNS]
    at = out + column[None, :] * n + row[:, None]
    tl.store(at, result.to(out.dtype.element_ty), mask=real[:, None] & (column < m)[None, :])


def _int4_matmul_triton(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    m, (n, words), groups = x.shape[0], packed.shape, scale.shape[1]
    assert x.is_contiguous()
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    rows, tile, stages = (16, 8, 3) if m <= 8 else (32, 4, 4)
    _small_m_kernel[(triton.cdiv(n, rows),)](
        x, packed.view(torch.uint8), scale, out, n, groups, m,
        ROWS=rows, GROUPS=tile, BYTES=words * 4 // groups, COLUMNS=8 if m <= 8 else 16, ONE=m == 1,
        EVEN=n % rows == 0 and groups % tile == 0, DOT=dot_dtype(x), ASM=not interpreted,
        PAIRS=_PAIRS_BF16 if x.dtype == torch.bfloat16 else _PAIRS_FP16, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


@jit("n", "groups")
def _dequantize_kernel(packed, scale, out, n, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = (row < n)[:, None] & (group < groups)[None, :]
    first = row[:, None] * groups + group[None, :]  # [ROWS, GROUPS]: groups before this one
    codes = tl.load(
        packed + first[:, :, None] * BYTES + tl.arange(0, BYTES)[None, None, :], mask=inside[:, :, None], other=0
    )
    step = tl.load(scale + first, mask=inside, other=0.0).to(tl.float32)[:, :, None]
    low = ((codes & 15).to(tl.float32) - 8) * step
    high = ((codes >> 4).to(tl.float32) - 8) * step
    values = tl.reshape(tl.join(low, high), [ROWS, GROUPS, 2 * BYTES]).to(out.dtype.element_ty)
    both = tl.arange(0, 2 * BYTES)
    tl.store(out + first[:, :, None] * (2 * BYTES) + both[None, None, :], values, mask=inside[:, :, None])


def _dequantize_triton(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    (n, words), groups = packed.shape, scale.shape[1]
    out = torch.empty((n, words * 8), dtype=dtype, device=packed.device)
    size = words * 4 // groups
    tile = min(triton.next_power_of_2(groups), 2048 // size)
    rows = max(1, 4096 // (tile * size))
    _dequantize_kernel[(triton.cdiv(n, rows), triton.cdiv(groups, tile))](
        packed.view(torch.uint8), scale, out, n, groups, ROWS=rows, GROUPS=tile, BYTES=size, num_warps=4
    )
    return out


@jit("groups")
def _expand_fp8_kernel(
    packed, scale, codes_out, row_scale, groups, GROUPS: tl.constexpr, BYTES: tl.constexpr, LARGEST: tl.constexpr
):
    # Two passes over a row; the second finds it in the cache.
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, GROUPS)
    byte = tl.arange(0, BYTES)
    both = tl.arange(0, 2 * BYTES)
    most = tl.zeros([GROUPS], tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + lane
        inside = group < groups
        at = row * groups + group
        codes = tl.load(packed + at[:, None] * BYTES + byte[None, :], mask=inside[:, None], other=0x88).to(tl.int32)
        step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs((codes & 15) - 8), tl.abs((codes >> 4) - 8)), 1)
        most = tl.maximum(most, largest.to(tl.float32) * tl.abs(step))
    whole = tl.div_rn(tl.max(most, 0), LARGEST)
    whole = tl.where(whole > 0, whole, 1.0)
    tl.store(row_scale + row, whole)
    for start in range(0, groups, GROUPS):
        group = start + lane
        inside = group < groups
        at = row * groups + group
        codes = tl.load(packed + at[:, None] * BYTES + byte[None, :], mask=inside[:, None], other=0x88)
        step = tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)
        step = tl.div_rn(step, tl.zeros_like(step) + whole)[:, None]
        low = ((codes & 15).to(tl.float32) - 8) * step
        high = ((codes >> 4).to(tl.float32) - 8) * step
        values = tl.reshape(tl.join(low, high), [GROUPS, 2 * BYTES])
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST).to(tl.float8e4nv)
        tl.store(codes_out + at[:, None] * (2 * BYTES) + both[None, :], values, mask=inside[:, None])


def _expand_fp8_triton(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (n, words), groups = packed.shape, scale.shape[1]
    codes = torch.empty((n, words * 8), dtype=torch.float8_e4m3fn, device=packed.device)
    row_scale = torch.empty((n, 1), dtype=torch.float32, device=packed.device)
    size = words * 4 // groups
    tile = min(triton.next_power_of_2(groups), 2048 // size)
    _expand_fp8_kernel[(n,)](
        packed.view(torch.uint8), scale, codes, row_scale, groups,
        GROUPS=tile, BYTES=size, LARGEST=E4M3_MAX, num_warps=4,
    )  # fmt: skip
    return codes, row_scale
