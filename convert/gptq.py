"""GPTQ (arXiv 2210.17323): round one input channel, then move its error onto the channels not yet rounded.

Rounding to nearest ignores that inputs are correlated. GPTQ uses their second-moment matrix H = E[x x^T] to let later
weights repair the output error of earlier ones. Scales are fixed before the sweep, so channels can be visited from the
most to the least active without any permutation being stored.

It serves any grid: `rounding` maps w / scale onto it. Left out: recovery other than rising damping; a matrix that never
factorizes gives None, and the caller keeps plain rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_BLOCK = 128  # channels swept before their errors reach the rest in one matrix product


def quantize_gptq(
    w: torch.Tensor,
    scale: torch.Tensor,
    second_moments: torch.Tensor,
    rounding: Callable[[torch.Tensor], torch.Tensor],
    damp: float,
) -> torch.Tensor | None:
    """Grid values float32 [N, K] for w float32 [N, K] with scale [N, G], or None when H has no usable factor.

    second_moments: H = E[x x^T], float32 [K, K]. `damp`: the share of H's mean diagonal that is added to the diagonal.
    """
    columns = w.shape[1]
    order = second_moments.diagonal().argsort(descending=True)
    factor = _inverse_factor(second_moments[order][:, order], damp)
    if factor is None:
        return None
    # one input channel is one contiguous row: [K, N]
    steps = scale.float().repeat_interleave(columns // scale.shape[1], dim=1)[:, order].T.contiguous()
    work = w.float()[:, order].T.contiguous()
    values = torch.empty_like(work)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block, local = work[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            step = steps[start + i]
            values[start + i] = rounding(block[i] / step)
            errors[i] = (block[i] - values[start + i] * step) / local[i, i]
            if i + 1 < stop - start:
                block[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    if not torch.isfinite(values).all():
        return None
    result = torch.empty_like(w, dtype=torch.float32)
    result[:, order] = values.T
    return result


def _inverse_factor(h: torch.Tensor, damp: float) -> torch.Tensor | None:
    """Upper Cholesky factor of H^-1, with damping that rises tenfold until it exists; None past 100 %."""
    mean = h.diagonal().mean()
    if not torch.isfinite(h).all() or mean <= 0:
        return None
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    while damp <= 1.0:
        lower, failed = torch.linalg.cholesky_ex(h + eye * (damp * mean))
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
        damp *= 10
    return None
