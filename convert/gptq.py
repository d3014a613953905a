"""GPTQ (arXiv 2210.17323): round one input channel, then move its error onto the channels not yet rounded.

Rounding to nearest ignores that inputs are correlated. GPTQ uses their second-moment matrix H = E[x x^T] to let later
weights repair the output error of earlier ones. Scales are fixed before the sweep, so channels can be visited from the
most to the least active without any permutation being stored.

It serves any grid: `rounding` maps w / scale onto it. Left out: recovery other than rising damping; a matrix that never
factorizes gives None, and the caller keeps plain rounding.

The surprise: the factor of H^-1 needs no inverse of H. With the channels in reverse, H = R R^T for an upper R, so that
R^-1 is the factor: one Cholesky and one triangular inverse instead of two and a full inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_BLOCK = 128  # channels swept before their errors reach the rest in one matrix product


@dataclass(frozen=True)
class Factor:
    """order: int64 [K], channels from the most to the least active; upper: float32 [K, K], with
    upper^T @ upper = (H[order][:, order] + damping)^-1."""

    order: torch.Tensor
    upper: torch.Tensor

    def solve(self, d: torch.Tensor) -> torch.Tensor:
        """float32 [N, K] -> d @ (H + damping)^-1."""
        result = torch.empty_like(d)
        result[:, self.order] = d[:, self.order] @ self.upper.T @ self.upper
        return result


def factorize(second_moments: torch.Tensor, damp: float) -> Factor | None:
    """The factor of H^-1 for H = E[x x^T] float32 [K, K]; None when it has none, or is not finite.

    damp: the share of H's mean diagonal that is added to the diagonal; rises tenfold until the factor exists, to 100 %.
    """
    diagonal = second_moments.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(diagonal).all() or mean <= 0:
        return None
    rising = diagonal.argsort(stable=True)  # the order of the sweep, reversed
    h = second_moments[rising][:, rising]
    added = 0.0
    while damp <= 1.0:
        h.diagonal().add_((damp - added) * mean)
        added = damp
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            del h
            root = lower.flip(0, 1)  # upper: root @ root^T = H[order][:, order]
            del lower
            eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
            upper = torch.linalg.solve_triangular(root, eye, upper=True)
            return Factor(rising.flip(0), upper) if torch.isfinite(upper).all() else None
        damp *= 10
    return None


def quantize_gptq(
    w: torch.Tensor, scale: torch.Tensor, factor: Factor, rounding: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor | None:
    """Grid values float32 [N, K] for w float32 [N, K] with scale [N, G]; None when they do not stay finite."""
    columns, order, upper = w.shape[1], factor.order, factor.upper
    # one input channel is one contiguous row: [K, N]
    steps = scale.float().repeat_interleave(columns // scale.shape[1], dim=1)[:, order].T.contiguous()
    work = w.float()[:, order].T.contiguous()
    values = torch.empty_like(work)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        block, local = work[start:stop], upper[start:stop, start:stop]
        pull = local / local.diagonal()[:, None]  # row i: what a unit error of channel i moves the later ones by
        errors = torch.empty_like(block)
        for i in range(stop - start):
            step = steps[start + i]
            value = rounding(block[i] / step)
            values[start + i] = value
            torch.addcmul(block[i], value, step, value=-1, out=errors[i])
            if i + 1 < stop - start:
                block[i + 1 :].addr_(pull[i, i + 1 :], errors[i], alpha=-1)
        errors /= local.diagonal()[:, None]
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    if not torch.isfinite(values).all():
        return None
    result = torch.empty_like(w, dtype=torch.float32)
    result[:, order] = values.T
    return result
