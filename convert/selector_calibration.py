"""How far below the best block score a query head may stop reading: alpha, found per head on real text.

The selector of the hybrid policy keeps the key blocks whose pooled score is within ln(alpha) of the tile's best. What
that score is worth differs from head to head, so each head gets the largest alpha with which the kept blocks still
carry a wanted share of the exact attention mass. The search calls the selector that serving uses, never a copy of it.

Left out: very long texts. On a sample of a few thousand tokens the always-kept blocks alone carry most of what many
heads look at, and any alpha would do; a longer context has many more far blocks. So alpha never exceeds 0.1, the middle
of what a selector of this kind was published with (0.08 to 0.18), and recall at length is what `validate` measures.
"""

from __future__ import annotations

import math

import torch

from lcconvert.kernels.select_blocks import select_blocks
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy

LEAST_LOG_ALPHA = -16.0  # e^-16: nothing that could matter is skipped
MOST_LOG_ALPHA = math.log(0.1)
_STEPS = 7  # bisections: ln(alpha) to 13.7 / 2^7 = 0.11


def calibrate_alpha(
    q: torch.Tensor, k: torch.Tensor, policy: AttentionPolicy, mass: float
) -> tuple[torch.Tensor, float]:
    """Largest alpha per query head that recalls `mass`: (float32 [Hq] in [e^-16, 0.1], share of skippable blocks kept).

    q [T, Hq, D], k [T, Hkv, D], rotated. Recall is averaged over the tiles that have a block to skip; with none (a
    sample not longer than the always-kept blocks) every head gets e^-16 and the share is 1.
    """
    heads = q.shape[1]
    shares = block_shares(q, k)  # [Hq, tiles, blocks]
    low = torch.full((heads,), LEAST_LOG_ALPHA)
    skippable = _kept(q, k, torch.ones(heads), policy, shares.shape).logical_not_().tril_()
    tiles = skippable[0].any(-1)
    if not tiles.any():
        return low.exp(), 1.0
    high = torch.full((heads,), MOST_LOG_ALPHA)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        kept = _kept(q, k, middle.exp(), policy, shares.shape)
        recall = (shares * kept).sum(-1)[:, tiles].mean(-1)  # [Hq]
        enough = recall.cpu() >= mass
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    kept = _kept(q, k, low.exp(), policy, shares.shape) & skippable
    return low.exp(), float(kept.sum() / skippable.sum())


def block_shares(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Exact causal attention mass of each key block, averaged over a tile's rows: float32 [Hq, tiles, blocks]."""
    length, heads, dim = q.shape
    blocks = -(-length // PAGE)
    shares = torch.zeros(heads, blocks, blocks, device=q.device)
    keys = k.float().repeat_interleave(heads // k.shape[1], dim=1).permute(1, 2, 0)  # [Hq, D, T]
    for tile in range(blocks):
        start, stop = tile * PAGE, min(length, (tile + 1) * PAGE)
        scores = torch.matmul(q[start:stop].float().transpose(0, 1) / math.sqrt(dim), keys[..., :stop])  # [Hq, r, stop]
        scores[..., start:stop] += torch.full((stop - start, stop - start), -math.inf, device=q.device).triu_(1)
        rows = scores.softmax(-1).mean(1)  # [Hq, stop]
        padded = torch.nn.functional.pad(rows, (0, (tile + 1) * PAGE - stop))
        shares[:, tile, : tile + 1] = padded.unflatten(-1, (-1, PAGE)).sum(-1)
    return shares


def _kept(
    q: torch.Tensor, k: torch.Tensor, alpha: torch.Tensor, policy: AttentionPolicy, shape: torch.Size
) -> torch.Tensor:
    """Which blocks the serving selector keeps, bool [Hq, tiles, blocks]; no tile counts as the dense end."""
    lists = select_blocks(
        q,
        k,
        q_offset=0,
        alpha=alpha.to(q.device),
        sink_blocks=policy.sink_blocks,
        local_blocks=policy.local_blocks,
        dense_from=len(q) + 1,
        min_blocks=policy.min_blocks,
        max_blocks=policy.max_blocks,
    )
    listed = torch.arange(lists.index.shape[-1], device=q.device) < lists.count[..., None]  # [Hq, tiles, max]
    # entries past the count point at column `blocks`, which is dropped
    at = torch.where(listed, lists.index, shape[-1]).long()
    kept = torch.zeros(*shape[:2], shape[-1] + 1, dtype=torch.bool, device=q.device)
    return kept.scatter_(-1, at, True)[..., :-1]
