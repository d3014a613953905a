"""Weights in 4 bits: packing, and the matrix-vector product that decode spends its weight time in.

Layout is compressed-tensors' pack-quantized: a weight is [N, K] (out, in), element i of a row sits at bit 4*(i%8) of
int32 word i//8, stored as q+8 with q in [-8, 7], and one scale covers `g` neighbours of a row. Symmetric only. There is
no large-M kernel: prefill expands a layer once with `dequantize_int4` and uses the ordinary matrix product.

The surprise: for float32 activations on a CPU, PyTorch's own int4 product is slower than dequantizing (no vector code),
and for bfloat16 it is ten times faster than anything exact. So float32 takes the exact grouped product below, and a
caller who accepts bfloat16 rounding repacks once with `prepare_int4_cpu`.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

from typing import NamedTuple

import torch

from lcconvert.kernels.backend import interpreted, jit, tl, triton, use_triton

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
    q = _nibbles(packed).view(n, groups, -1)
    return torch.mul(q, scale.float()[..., None]).view(n, -1).to(dtype)


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


def int4_matmul(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [M, K] times the transpose of an int4 weight: packed int32 [N, K/8], scale [N, K/g] -> [M, N] of x's dtype.

    M <= 16 reads the weight in 4 bits; larger M expands it first. Sums are float32.
    """
    _check_weight(packed, scale)
    assert x.shape == (len(x), packed.shape[1] * 8), f"x {tuple(x.shape)} does not fit K={packed.shape[1] * 8}"
    if x.shape[0] > SMALL_M:
        return x @ dequantize_int4(packed, scale, x.dtype).T
    group_words = packed.shape[1] // scale.shape[1]
    if use_triton(x) and group_words & (group_words - 1) == 0:
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


class PreparedInt4(NamedTuple):
    """An int4 weight in the order of PyTorch's bfloat16 CPU kernel. Still 4 bits a weight."""

    weight: torch.Tensor  # uint8 [N, K/2]
    scale_zero: torch.Tensor  # bfloat16 [K/g, N, 2]
    group: int


def prepare_int4_cpu(packed: torch.Tensor, scale: torch.Tensor) -> PreparedInt4 | None:
    """Repack for `int4_matmul_prepared`; None where it lacks the shape (g must be 32 to 256, N a multiple of 16)."""
    n, groups = _check_weight(packed, scale)
    group = packed.shape[1] * 8 // groups
    if group not in (32, 64, 128, 256) or n % 16 or packed.device.type != "cpu":
        return None
    codes = (_nibbles(packed) + 8).to(torch.int32)
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale_zero = torch.stack((scale.float(), torch.zeros_like(scale, dtype=torch.float32)), dim=-1)
    return PreparedInt4(weight, scale_zero.transpose(0, 1).contiguous().to(torch.bfloat16), group)


def int4_matmul_prepared(x: torch.Tensor, prepared: PreparedInt4) -> torch.Tensor:
    """x [M, K] times a prepared weight -> [M, N] of x's dtype, with x, scales and result rounded to bfloat16 (0.3%)."""
    weight, scale_zero, group = prepared
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), weight, group, scale_zero).to(x.dtype)


@jit()
def _gemv_kernel(
    x, packed, scale, out, n, words, groups,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, GROUP_WORDS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # One row of x and ROWS rows of the weight. A row of x next to another is the next program, so that only the first
    # reads the weight from memory.
    BLOCK: tl.constexpr = GROUPS * GROUP_WORDS
    m = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < n
    row64 = row.to(tl.int64)
    acc = tl.zeros([ROWS, GROUPS, GROUP_WORDS], tl.float32)
    for start in range(0, words, BLOCK):
        group = start // GROUP_WORDS + tl.arange(0, GROUPS)
        word = group[:, None] * GROUP_WORDS + tl.arange(0, GROUP_WORDS)[None, :]  # [GROUPS, GROUP_WORDS]
        inside = group < groups
        codes = tl.load(
            packed + row64[:, None, None] * words + word[None, :, :],
            mask=real[:, None, None] & inside[None, :, None], other=0,
        )  # fmt: skip
        step = tl.load(
            scale + row64[:, None] * groups + group[None, :], mask=real[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        # The eight inputs of each word, read as they lie and then taken apart.
        eight = tl.arange(0, 8)
        inputs = tl.load(
            x + m * words * 8 + word[:, :, None] * 8 + eight[None, None, :], mask=inside[:, None, None], other=0.0
        ).to(tl.float32)
        even, odd = tl.split(tl.reshape(inputs, [GROUPS, GROUP_WORDS, 4, 2]))
        x04, x26 = tl.split(tl.reshape(even, [GROUPS, GROUP_WORDS, 2, 2]))
        x15, x37 = tl.split(tl.reshape(odd, [GROUPS, GROUP_WORDS, 2, 2]))
        x0, x4 = tl.split(x04)
        x2, x6 = tl.split(x26)
        x1, x5 = tl.split(x15)
        x3, x7 = tl.split(x37)
        # A nibble at bits 16-19 (12-15) under the right exponent is the float32 128 + nibble (2048 + nibble): four
        # shifts serve eight nibbles. Codes are q + 8.
        terms = (-136 * ((x0 + x2) + (x4 + x6)) - 2056 * ((x1 + x3) + (x5 + x7)))[None]
        terms += _as_float(codes << 16, 16, ASM) * x0[None]
        terms += _as_float(codes << 8, 12, ASM) * x1[None]
        terms += _as_float(codes << 8, 16, ASM) * x2[None]
        terms += _as_float(codes, 12, ASM) * x3[None]
        terms += _as_float(codes, 16, ASM) * x4[None]
        terms += _as_float(codes >> 8, 12, ASM) * x5[None]
        terms += _as_float(codes >> 8, 16, ASM) * x6[None]
        terms += _as_float(codes >> 16, 12, ASM) * x7[None]
        acc += terms * step[:, :, None]
    result = tl.sum(tl.sum(acc, 2), 1)
    tl.store(out + m * n + row, result.to(out.dtype.element_ty), mask=real)


@jit()
def _as_float(codes, BIT: tl.constexpr, ASM: tl.constexpr):
    # One instruction by hand; the compiler makes two of the plain expression.
    if BIT == 16:
        if ASM:
            return tl.inline_asm_elementwise(
                "lop3.b32 $0, $1, 0x000F0000, 0x43000000, 0xEA;",
                "=r,r",
                [codes],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        return ((codes & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x0000F000, 0x45000000, 0xEA;", "=r,r", [codes], dtype=tl.float32, is_pure=True, pack=1
        )
    return ((codes & 0x0000F000) | 0x45000000).to(tl.float32, bitcast=True)


def _int4_matmul_triton(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    m, (n, words), groups = x.shape[0], packed.shape, scale.shape[1]
    assert x.is_contiguous()
    assert scale.is_contiguous()
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    group_words = words // groups
    block_groups = max(1, min(triton.next_power_of_2(groups), 256 // group_words))
    rows = 16 if n >= 4096 else 8  # fewer rows where there would be too few programs to fill the device
    _gemv_kernel[(m, triton.cdiv(n, rows))](
        x, packed, scale, out, n, words, groups,
        ROWS=rows, GROUPS=block_groups, GROUP_WORDS=group_words, ASM=not interpreted, num_warps=4,
    )  # fmt: skip
    return out
