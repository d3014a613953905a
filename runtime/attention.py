"""Attention as the engine needs it: over a whole layer's exact K and V in prefill, over the paged cache in decode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from lcconvert.kernels.paged_decode import merge_partials, paged_decode
from lcconvert.kernels.select_blocks import select_blocks
from lcconvert.kernels.sparse_prefill import block_sparse_attention
from lcconvert.runtime.kv_cache import PagePool, Sequence
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_offset: int,
    total: int,
    policy: AttentionPolicy,
    layer: int,
) -> torch.Tensor:
    """Causal attention of q [T, Hq, D], rows q_offset.., over k and v [q_offset + T, Hkv, D] -> [T, Hq * D].

    `total` is the length of the whole context, which the hybrid policy needs to know its dense end. A short context,
    where the always-kept blocks are all there is, and a chunk that does not start at a page border run dense.
    """
    heads = q.shape[1]
    always = PAGE * (policy.sink_blocks + policy.local_blocks)
    sparse = (
        policy.kind == "hybrid" and q_offset % PAGE == 0 and len(k) > always and q_offset < total - policy.dense_last
    )
    if not sparse:
        return _dense(q, k, v).flatten(1)
    blocks = select_blocks(
        q,
        k,
        q_offset=q_offset,
        alpha=torch.tensor(policy.alpha_of(layer, heads), device=q.device),
        sink_blocks=policy.sink_blocks,
        local_blocks=policy.local_blocks,
        dense_from=total - policy.dense_last,
        min_blocks=policy.min_blocks,
        max_blocks=policy.max_blocks,
    )
    return block_sparse_attention(q, k, v, blocks, q_offset).flatten(1)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[T, Hq, D] over [S, Hkv, D], the last query aligned with the last key, by PyTorch's own kernels."""
    causal = len(q) == len(k)
    bias = None if causal or len(q) == 1 else causal_lower_right(len(q), len(k))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=bias,
        is_causal=causal and len(q) > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


@dataclass(frozen=True)
class PageTable:
    """The full pages of one sequence for the decode kernel: page numbers int32 [1, n] and their count int32 [1]."""

    pages: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, seq: Sequence, device: torch.device) -> PageTable | None:
        """None while the sequence has no full page; made once a step, every layer uses it."""
        if not seq.pages:
            return None
        pages = torch.tensor([seq.pages], dtype=torch.int32, device=device)
        return cls(pages, torch.tensor([len(seq.pages)], dtype=torch.int32, device=device))


def decode_attention(
    q: torch.Tensor, pool: PagePool, seq: Sequence, table: PageTable | None, layer: int
) -> torch.Tensor:
    """One query [Hq, D] over everything cached of `seq` in `layer` -> [Hq * D] in q's dtype."""
    scale = q.shape[-1] ** -0.5
    out, lse = _partial(q, *pool.near(seq, layer), scale)
    if table is not None:
        far, far_lse = paged_decode(q[None], pool.k[layer], pool.v[layer], table.pages, table.count, scale)
        out, _ = merge_partials(torch.stack((out, far)), torch.stack((lse, far_lse)))
    return out[0].flatten().to(q.dtype)


def _partial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of q [Hq, D] over the few near tokens k, v [n, Hkv, D]: out fp32 [1, Hq, D], lse [1, Hq]."""
    heads, dim = q.shape
    grouped = q.float().view(k.shape[1], -1, dim)  # [Hkv, G, D]
    scores = torch.einsum("hgd,nhd->hgn", grouped, k.float()) * scale
    lse = scores.logsumexp(-1)  # [Hkv, G]
    out = torch.einsum("hgn,nhd->hgd", (scores - lse[..., None]).exp(), v.float())
    return out.reshape(1, heads, dim), lse.reshape(1, heads)
