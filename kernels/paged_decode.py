"""Attention of a few new queries over a paged, quantized cache: the part of decode that reads the whole context.

Scales never touch the cached codes: key scales and zero points fold into the query (q*s . code + q . z), value scales into
the probabilities. Pages are listed per sequence and are all full; the newest, partial page is attended elsewhere and joined
with `merge_partials`, which is why every result comes with its natural-log sum of exponentials.

The surprise: a sequence with no pages gives zeros and lse = -inf, so joining it changes nothing.
"""

from __future__ import annotations

import torch

from lcconvert.kernels.fp8 import expand_e4m3
from lcconvert.kernels.kv_pages import PAGE, PageTensors

_CHUNK_PAGES = 32  # pages the reference holds in float32 at once


def paged_decode(
    q: torch.Tensor,
    k: PageTensors,
    v: PageTensors,
    page_table: torch.Tensor,
    num_pages: torch.Tensor,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [S, Hq, D] over the first num_pages[s] (int32 [S]) of page_table int32 [S, maxP], 128 tokens each.

    k is plain, fp8 or int4_channel; v is plain, fp8 or int4_token. `scale` defaults to 1/sqrt(D).
    Returns (out float32 [S, Hq, D], lse float32 [S, Hq]).
    """
    sequences, heads, d = q.shape
    k.check()
    v.check()
    assert k.kind != "int4_token" and v.kind != "int4_channel", f"no kernel for {k.kind} keys with {v.kind} values"
    assert k.data.shape[:3] == v.data.shape[:3]
    assert k.head_dim == v.head_dim == d
    assert heads % k.data.shape[1] == 0
    assert q.is_contiguous()
    assert q.is_floating_point()
    assert page_table.dtype == num_pages.dtype == torch.int32
    assert page_table.is_contiguous()
    assert page_table.shape[0] == num_pages.shape[0] == sequences
    return paged_decode_torch(q, k, v, page_table, num_pages, d**-0.5 if scale is None else scale)


def paged_decode_torch(
    q: torch.Tensor, k: PageTensors, v: PageTensors, page_table: torch.Tensor, num_pages: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: sequence by sequence, gathered pages in batched products, float32."""
    sequences, heads, d = q.shape
    kv_heads = k.data.shape[1]
    out = torch.zeros((sequences, heads, d), dtype=torch.float32, device=q.device)
    lse = torch.full((sequences, heads), -torch.inf, dtype=torch.float32, device=q.device)
    for s, count in enumerate(num_pages.tolist()):
        query = q[s].float().view(kv_heads, heads // kv_heads, d) * scale
        for start in range(0, count, _CHUNK_PAGES):
            index = page_table[s, start : min(start + _CHUNK_PAGES, count)].long()
            scores = _scores(query, k, index)  # [n, Hkv, G, 128]
            part_lse = scores.logsumexp((0, 3))  # [Hkv, G]
            part = _weighted(scores.sub_(part_lse[..., None]).exp_(), v, index).view(heads, d)
            if start == 0:
                out[s], lse[s] = part, part_lse.view(heads)
            else:
                outs, lses = torch.stack((out[s], part)), torch.stack((lse[s], part_lse.view(heads)))
                joined, joined_lse = merge_partials(outs[:, None], lses[:, None])
                out[s], lse[s] = joined[0], joined_lse[0]
    return out, lse


def _gather(pages: PageTensors, index: torch.Tensor) -> torch.Tensor:
    """Listed pages as one batch [n * Hkv, 128, D or D/2], in float32 or as codes."""
    if pages.kind == "fp8":  # gathered as bytes: e4m3 has no gather everywhere
        return expand_e4m3(pages.data.view(torch.uint8).index_select(0, index).view(pages.data.dtype)).flatten(0, 1)
    data = pages.data.index_select(0, index).flatten(0, 1)
    return data.float() if pages.kind == "plain" else data


def _scores(query: torch.Tensor, k: PageTensors, index: torch.Tensor) -> torch.Tensor:
    """query float32 [Hkv, G, D], scaled -> scores [n, Hkv, G, 128]."""
    data = _gather(k, index)
    shape = (len(index), *query.shape[:2], PAGE)
    if k.kind == "int4_channel":
        assert k.scale is not None
        assert k.zero is not None
        folded = (query * k.scale.index_select(0, index).float()[:, :, None]).flatten(0, 1)  # [n * Hkv, G, D]
        offset = torch.einsum("hgd,nhd->nhg", query, k.zero.index_select(0, index).float())
        low, high = folded.chunk(2, dim=-1)
        scores = torch.bmm(low, (data & 15).float().transpose(1, 2))
        scores.baddbmm_(high, (data >> 4).float().transpose(1, 2))
        return scores.view(shape).add_(offset[..., None])
    if k.kind == "fp8":
        assert k.scale is not None
        query = query * k.scale[:, None, None]
    return torch.bmm(query.repeat(len(index), 1, 1), data.transpose(1, 2)).view(shape)


def _weighted(p: torch.Tensor, v: PageTensors, index: torch.Tensor) -> torch.Tensor:
    """Probabilities [n, Hkv, G, 128] times the listed values -> [Hkv, G, D]."""
    data = _gather(v, index)
    shape = (*p.shape[:3], -1)
    if v.kind == "int4_token":
        assert v.scale is not None
        assert v.zero is not None
        offset = torch.einsum("nhgt,nht->hg", p, v.zero.index_select(0, index).float())
        p = (p * v.scale.index_select(0, index).float()[:, :, None]).flatten(0, 1)
        low, high = (torch.bmm(p, codes.float()).view(shape).sum(0) for codes in (data & 15, data >> 4))
        return torch.cat((low, high), dim=-1) + offset[..., None]
    out = torch.bmm(p.flatten(0, 1), data).view(shape).sum(0)
    if v.kind == "fp8":
        assert v.scale is not None
        out = out * v.scale[:, None, None]
    return out


def merge_partials(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Join attention over disjoint key sets: outs [n, S, Hq, D], lses [n, S, Hq] -> out [S, Hq, D], lse [S, Hq]; float32."""
    assert outs.shape[:3] == lses.shape
    assert outs.dtype == lses.dtype == torch.float32
    lse = torch.logsumexp(lses, dim=0)
    weight = torch.exp(lses - torch.where(lse == -torch.inf, 0.0, lse))  # an empty set weighs 0, not NaN
    return (outs * weight[..., None]).sum(0), lse
