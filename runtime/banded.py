"""Attention within a sliding window, exactly, by PyTorch's kernels: a few rows at a time over the keys they can see.

The plain form of windowed layers, in training, prefill and calibration alike. Costs rows times (window + tile), never
rows squared, and holds one tile's mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lcconvert.runtime.sinks import with_sinks

_TILE = 1_024  # rows whose mask exists at once


def banded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """q [..., T, Hq, D], the last T of S rows, over k and v [..., S, Hkv, D] -> [..., T, Hq, D].

    A row sees itself and the `window` - 1 rows before it, by the order of rows. `sinks` [Hq] as in `sinks.py`.
    """
    rows, first = q.shape[-3], k.shape[-3] - q.shape[-3]
    tiles = []
    for start in range(0, rows, _TILE):
        stop = min(start + _TILE, rows)
        low = max(0, first + start - window + 1)
        query = torch.arange(first + start, first + stop, device=q.device)[:, None]
        key = torch.arange(low, first + stop, device=q.device)
        mask = (key <= query) & (key > query - window)  # [rows, keys]
        seen = slice(low, first + stop)
        tiles.append(masked_attention(q[..., start:stop, :, :], k[..., seen, :, :], v[..., seen, :, :], mask, sinks))
    return tiles[0] if len(tiles) == 1 else torch.cat(tiles, -3)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """q [..., T, Hq, D] over k and v [..., S, Hkv, D] where `mask`, broadcast to [..., Hq, T, S], is true."""
    dim, group = q.shape[-1], q.shape[-2] // k.shape[-2]
    if sinks is not None:
        q, k, v = with_sinks(q, k, v, sinks)
        mask = F.pad(mask, (1, 0), value=True)
    k, v = (x.repeat_interleave(group, dim=-2).transpose(-2, -3) for x in (k, v))  # few keys: repeating them is cheap
    out = F.scaled_dot_product_attention(q.transpose(-2, -3), k, v, attn_mask=mask, scale=dim**-0.5)
    return out.transpose(-2, -3)[..., :dim]
