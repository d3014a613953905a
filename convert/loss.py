"""The loss of a language-model head, against targets or a teacher, without the logits: they are the first thing that
does not fit.

At 64K tokens and a 128K vocabulary the logits and their gradient would take 67 GB; here a tile of rows is turned into
logits, loss and gradients, and forgotten. The gradients are computed in the forward pass, so the head is multiplied
once more than in the plain form but nothing of size T x V is ever kept.

Surprising rule: rows of weight zero cost nothing at all, which is what makes answers-only training cheap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

TILE_ROWS = 512


def weighted_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, tile_rows: int = TILE_ROWS
) -> torch.Tensor:
    """sum_t weights[t] * CE(hidden[t] @ head.T, targets[t]), a differentiable fp32 scalar.

    hidden [N, H] in any float dtype, head [V, H], targets int64 [N], weights fp32 [N] >= 0 (not differentiated).
    Logits and the head's gradient are accumulated in fp32.
    """
    assert hidden.ndim == 2
    assert hidden.shape[1] == head.shape[1]
    assert targets.shape == weights.shape == hidden.shape[:1]
    rows = weights.nonzero()[:, 0]
    loss: torch.Tensor = _TiledLoss.apply(
        hidden[rows], head, weights[rows].float(), targets[rows], None, None, tile_rows
    )
    return loss


def weighted_divergence(
    hidden: torch.Tensor,
    head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    weights: torch.Tensor,
    tile_rows: int = TILE_ROWS,
) -> torch.Tensor:
    """sum_t weights[t] * KL(teacher || model) of the next-token distributions, in nats; fp32, tiled like the above.

    hidden [N, H] and head [V, H] are the model's and differentiated; teacher_hidden [N, H'] and teacher_head [V, H']
    are not. weights fp32 [N] >= 0.
    """
    assert hidden.shape[:1] == teacher_hidden.shape[:1] == weights.shape
    assert head.shape[0] == teacher_head.shape[0]
    loss: torch.Tensor = _TiledLoss.apply(hidden, head, weights, None, teacher_hidden, teacher_head, tile_rows)
    return loss


class _TiledLoss(torch.autograd.Function):
    """Against `targets`, or against a teacher's distribution where there are none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        weights: torch.Tensor,
        targets: torch.Tensor | None,
        teacher_hidden: torch.Tensor | None,
        teacher_head: torch.Tensor | None,
        tile_rows: int,
    ) -> torch.Tensor:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device) if needs_head else None
        head_cast = head.to(hidden.dtype)
        for start in range(0, hidden.shape[0], tile_rows):
            tile = slice(start, start + tile_rows)
            logits = (hidden[tile] @ head_cast.T).float()  # [tile, V]
            log_norm = logits.logsumexp(dim=-1)
            if targets is not None:
                picked = logits.gather(1, targets[tile, None])[:, 0]
                row_loss = log_norm - picked
            else:
                assert teacher_hidden is not None
                assert teacher_head is not None
                said = (teacher_hidden[tile] @ teacher_head.to(teacher_hidden.dtype).T).float().log_softmax(-1)
                wanted = said.exp()
                row_loss = (wanted * (said - logits)).sum(-1) + log_norm
            loss += (weights[tile] * row_loss).sum()
            if grad_hidden is None and grad_head is None:
                continue
            grad = logits.sub_(log_norm[:, None]).exp_()  # softmax, in the logits' memory
            if targets is not None:
                grad.scatter_add_(1, targets[tile, None], torch.full_like(picked, -1.0)[:, None])
            else:
                grad -= wanted
            grad = grad.mul_(weights[tile, None]).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[tile] = grad @ head_cast
            if grad_head is not None:
                grad_head += grad.T @ hidden[tile]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_head is not None:
            grad_head = (grad_head * grad_loss).to(ctx.head_dtype)
        return grad_hidden, grad_head, None, None, None, None, None
