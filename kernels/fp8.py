"""8-bit floating point (e4m3) matrix products: one scale per output row of the weight, one per token of the activation.

On CUDA this is PyTorch's `_scaled_mm`, which beats anything we would write; elsewhere the same rounded operands are
multiplied in float32. Fast accumulation stays off: its 14-bit sums cost accuracy at long context for little speed.

The surprise: `expand_e4m3` exists because PyTorch converts e4m3 on a CPU one element at a time; moving the bits into
float16 (same layout, exponent bias 8 apart) is four times faster and exact for every finite value. NaN is not kept.
"""

from __future__ import annotations

import torch

E4M3_MAX = 448.0


def expand_e4m3(x: torch.Tensor) -> torch.Tensor:
    """e4m3 tensor -> float32, exact for finite values."""
    assert x.dtype == torch.float8_e4m3fn
    if x.is_cuda:
        return x.float()
    bits = x.contiguous().view(torch.int8).to(torch.int16) << 7  # sign at 15 and 14, the other seven bits at 13..7
    return (bits & ~0x4000).view(torch.float16).float().mul_(256.0)


def quantize_fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (e4m3 [M, K], scale fp32 [M, 1]) with x ~= e4m3 * scale; scale = absmax / 448, 1 for a zero row."""
    assert x.ndim == 2
    assert x.is_floating_point()
    values = x.float()
    scale = values.abs().amax(dim=1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (values / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def fp8_matmul(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    """x [M, K] (16 or 32 bit, quantized here by row) times weight e4m3 [N, K] transposed, its scale [N, 1] -> [M, N].

    On CUDA K and N must be multiples of 16.
    """
    n, k = weight.shape
    assert weight.dtype == torch.float8_e4m3fn
    assert weight.is_contiguous()
    assert weight_scale.shape == (n, 1)
    assert weight_scale.dtype == torch.float32
    assert x.shape == (x.shape[0], k), f"x {tuple(x.shape)} does not fit K={k}"
    codes, scale = quantize_fp8_rows(x)
    if x.is_cuda:
        assert k % 16 == n % 16 == 0, f"fp8 on CUDA needs multiples of 16, got N={n} K={k}"
        # Row-wise scales are only offered with a bfloat16 result.
        out = torch._scaled_mm(
            codes, weight.T, scale_a=scale, scale_b=weight_scale.T, out_dtype=torch.bfloat16, use_fast_accum=False
        )
        return out.to(out_dtype)
    out = expand_e4m3(codes) @ expand_e4m3(weight).T
    return (out * scale * weight_scale.T).to(out_dtype)
