"""The grids weights are rounded to: int4 with one scale per group of inputs, and fp8 with one scale per output.

Plain rounding spends the int4 grid on the largest weight of a group. Here the scale of every group is searched: a grid
of clipping ratios, then one least-squares step, each judged by sum_k E[x_k^2] (w_k - s q_k)^2, the expected squared
error of the output when inputs are uncorrelated (the "imatrix" weighting; without calibration E[x^2] is 1).

The surprising rule: a scale may be negative. The codes are -8..7, so the sign decides which side owns the eighth step;
the search tries both. And every candidate is rounded to the stored dtype before it is judged, so nothing is lost later.
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
INT4_MIN, INT4_MAX = -8, 7
# Largest |w| mapped to 8 * ratio^-1 steps: below 1 the largest weights are clipped.
CLIP_RATIOS = tuple(1.04 - 0.04 * i for i in range(16))  # 1.04 .. 0.44
_CHUNK_VALUES = 1 << 18  # values searched at a time: few enough for the CPU's cache
_GPU_CHUNK_VALUES = 1 << 24  # enough for the launches of kernels not to count


def search_scale(
    w: torch.Tensor, second_moment: torch.Tensor, ratios: tuple[float, ...], dtype: torch.dtype
) -> torch.Tensor:
    """The scale of least weighted error for each group of int4 codes.

    w float32 [..., g]; second_moment float32, broadcastable to w; returns [...] in `dtype`, never zero.
    """
    values, error = w.abs().amax(-1), torch.full(w.shape[:-1], float("inf"), device=w.device)
    best = _stored(values / -INT4_MIN, dtype)
    for ratio in ratios:
        for sign in (1.0, -1.0):
            scale = _stored(values * (sign * ratio / -INT4_MIN), dtype)
            best, error = _keep_better(w, second_moment, scale, best, error)
    # given its codes, the best scale of a group is a weighted least-squares fit
    codes = _codes(w, best)
    fit = (second_moment * w * codes).sum(-1) / (second_moment * codes * codes).sum(-1).clamp_min(1e-30)
    best, _ = _keep_better(w, second_moment, _stored(torch.where(fit == 0, best.float(), fit), dtype), best, error)
    return best


def quantize_rtn(
    w: torch.Tensor,
    group_size: int,
    second_moment: torch.Tensor | None = None,
    *,
    ratios: tuple[float, ...] = CLIP_RATIOS,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds w float32 [N, K] to int4: (codes int8 [N, K] in -8..7, scale [N, K / group_size] in `scale_dtype`).

    second_moment: E[x^2] of the input channels, float32 [K], or None for equal weights.
    """
    rows, columns = w.shape
    if columns % group_size:
        raise ValueError(f"group size {group_size} does not divide {columns} inputs")
    if second_moment is None:
        second_moment = torch.ones(columns, device=w.device)
    moment = second_moment.float().view(-1, group_size)  # [G, g]
    codes = torch.empty(rows, columns, dtype=torch.int8, device=w.device)
    scale = torch.empty(rows, columns // group_size, dtype=scale_dtype, device=w.device)
    step = max(1, (_GPU_CHUNK_VALUES if w.is_cuda else _CHUNK_VALUES) // columns)
    for start in range(0, rows, step):
        part = w[start : start + step].float().view(-1, columns // group_size, group_size)  # [n, G, g]
        found = search_scale(part, moment, ratios, scale_dtype)
        scale[start : start + step] = found
        codes[start : start + step] = _codes(part, found).to(torch.int8).view(-1, columns)
    return codes, scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes [N, K] (int8, or grid values as floats), scale [N, G] -> float32 [N, K]."""
    rows, columns = codes.shape
    grouped = codes.view(rows, scale.shape[1], columns // scale.shape[1]).float()
    return (grouped * scale.float().unsqueeze(-1)).view(rows, columns)


def quantize_fp8(w: torch.Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds w float32 [N, K] to e4m3 with one scale per row: (float8_e4m3fn [N, K], scale [N, 1])."""
    scale = _stored(w.float().abs().amax(1, keepdim=True) / FP8_MAX, scale_dtype)
    return (w.float() / scale.float()).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def to_int4_grid(x: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest of -8..7, in place."""
    return x.round_().clamp_(INT4_MIN, INT4_MAX)


def to_fp8_grid(x: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest finite e4m3 value, as float32."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(FP8).float()


def _codes(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 integers in -8..7; w [..., g], scale [...]."""
    return to_int4_grid(w / scale.float().unsqueeze(-1))


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scale` as the file holds it: rounded to `dtype`, never smaller than its least normal number (so never 0)."""
    least = torch.finfo(dtype).tiny
    sign = torch.where(scale < 0, -1.0, 1.0)
    return (scale.abs().clamp_min(least) * sign).to(dtype)


def _keep_better(
    w: torch.Tensor, moment: torch.Tensor, scale: torch.Tensor, best: torch.Tensor, error: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    found = ((w - _codes(w, scale) * scale.float().unsqueeze(-1)).square_() * moment).sum(-1)
    better = found < error
    return torch.where(better, scale, best), torch.where(better, found, error)
