"""Prefill attention over a whole layer's exact K and V: PyTorch's dense kernels, or ours over selected blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from lcconvert.kernels.select_blocks import select_blocks
from lcconvert.kernels.sparse_prefill import block_sparse_attention
from lcconvert.runtime.banded import banded_attention
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy
from lcconvert.runtime.sinks import with_sinks
from lcconvert.runtime.timing import PartTimer, part

_JOINED = 2_048  # rows whose two partial results are float32 at once


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_offset: int,
    total: int,
    policy: AttentionPolicy,
    alpha: torch.Tensor,
    pooled: torch.Tensor | None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    timer: PartTimer | None = None,
) -> torch.Tensor:
    """Causal attention of q [T, Hq, D], rows q_offset.., over k and v [q_offset + T, Hkv, D] -> [T, Hq * D].

    `total` is the length of the whole context, which the hybrid policy needs to know its dense end; `alpha` float32
    [Hq] and `pooled` (`pool_keys` of the whole layer) are that policy's too. A short context, where the always-kept
    blocks are all there is, and a chunk that does not start at a page border run dense. A layer with a `window` sees
    so many tokens at most and needs no policy; one with `sinks` [Hq] runs dense, as the sparse kernel has none.
    """
    if window is not None:
        with part(timer, "attention"):
            seen = max(0, q_offset - window + 1)
            return banded_attention(q, k[seen:], v[seen:], window, sinks).flatten(1)
    heads, tiles = q.shape[1], -(-len(q) // PAGE)
    always = PAGE * (policy.sink_blocks + policy.local_blocks)
    sparse = (
        policy.kind == "hybrid" and q_offset % PAGE == 0 and len(k) > always and q_offset < total - policy.dense_last
    )
    if not sparse or pooled is None or sinks is not None:
        if timer is not None:
            timer.count(None, tiles, heads, q_offset // PAGE)
        with part(timer, "attention"):
            dim = q.shape[-1]
            if sinks is not None:
                q, k, v = with_sinks(q, k, v, sinks)
            return _dense(q, k, v, dim**-0.5)[..., :dim].flatten(1)
    with part(timer, "selection"):
        blocks = select_blocks(
            q,
            k,
            q_offset=q_offset,
            alpha=alpha,
            sink_blocks=policy.sink_blocks,
            local_blocks=policy.local_blocks,
            dense_from=total - policy.dense_last,
            min_blocks=policy.min_blocks,
            max_blocks=policy.max_blocks,
            pool=policy.pool,
            pooled=pooled[: len(k) // policy.pool],
        )
    if timer is not None:
        timer.count(blocks, tiles, heads, q_offset // PAGE)
    with part(timer, "attention"):
        return block_sparse_attention(q, k, v, blocks, q_offset).flatten(1)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """[T, Hq, D] over [S, Hkv, D], the last query aligned with the last key, by PyTorch's own kernels.

    On a GPU a chunk with keys before it is computed as two products, earlier keys unmasked and its own keys causal, and
    joined by their sums: so cuDNN can do both, at 620 TFLOP/s on an H100 where the lower-right mask runs at 350.
    """
    earlier = len(k) - len(q)
    if q.is_cuda and q.dtype != torch.float32 and len(q) > 1 and earlier >= len(q):
        near, near_lse = _cudnn(q, k[earlier:], v[earlier:], scale, causal=True)
        far, far_lse = _cudnn(q, k[:earlier], v[:earlier], scale, causal=False)
        share = torch.sigmoid(far_lse - near_lse)  # [T, Hq, 1]: of the probability that lies in earlier keys
        for rows in range(0, len(q), _JOINED):
            part = slice(rows, rows + _JOINED)
            near[part] = torch.lerp(near[part].float(), far[part].float(), share[part]).to(q.dtype)
        return near
    bias = None if not earlier or len(q) == 1 else causal_lower_right(len(q), len(k))
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        is_causal=not earlier and len(q) > 1,
        enable_gqa=q.shape[1] != k.shape[1],
        scale=scale,
    )
    return out[0].transpose(0, 1)


def _cudnn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, Hq, D], natural-log sum of exponentials float32 [T, Hq, 1]) by cuDNN."""
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = cudnn(query, key, value, None, True, 0.0, causal, False, scale=scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)
