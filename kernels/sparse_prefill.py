"""Causal attention of many queries over listed 128-key blocks: long-context prefill at a few percent of the dense work.

Each tile of 128 queries of a head has its own ascending list of key blocks, ending with the block on the diagonal. With
all blocks listed the result is dense attention to rounding. There is no backward pass and no sliding window here.

The surprise: lists are trusted. A block past the diagonal would be attended without a causal mask, so whoever builds a
list by hand keeps to the rule; `BlockLists.dense` and `select_blocks` do.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lcconvert.kernels.backend import LOG2E, descriptor, dot_dtype, jit, tl, use_hopper, use_triton

BLOCK = 128  # queries in a tile, keys in a block


@dataclass(frozen=True)
class BlockLists:
    """Which key blocks each query tile attends."""

    index: torch.Tensor  # int32 [Hq, tiles, max]: ascending block numbers, the diagonal last, then unused
    count: torch.Tensor  # int32 [Hq, tiles], at least 1

    @staticmethod
    def dense(heads: int, queries: int, q_offset: int, device: torch.device | str = "cpu") -> BlockLists:
        """Every causal block, for `queries` rows that start at absolute position q_offset."""
        tiles, first = -(-queries // BLOCK), q_offset // BLOCK
        index = torch.arange(first + tiles, dtype=torch.int32, device=device)
        return BlockLists(
            index.expand(heads, tiles, -1).contiguous(),
            (index[first:] + 1).expand(heads, tiles).contiguous(),
        )


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockLists, q_offset: int, scale: float | None = None
) -> torch.Tensor:
    """q [T, Hq, D] at absolute positions q_offset.. over k, v [S, Hkv, D] at 0..S-1 -> [T, Hq, D] of q's dtype.

    q_offset is a multiple of 128 and S >= q_offset + T; neither T nor S need be one. `scale` defaults to 1/sqrt(D).
    """
    queries, heads, d = q.shape
    keys, kv_heads, _ = k.shape
    assert k.shape == v.shape == (keys, kv_heads, d)
    assert heads % kv_heads == 0
    assert q.dtype == k.dtype == v.dtype
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1
    assert q_offset % BLOCK == 0
    assert keys >= q_offset + queries
    tiles = -(-queries // BLOCK)
    assert blocks.index.shape[:2] == blocks.count.shape == (heads, tiles), f"lists {tuple(blocks.index.shape)}"
    assert blocks.index.dtype == blocks.count.dtype == torch.int32
    scale = d**-0.5 if scale is None else scale
    if use_triton(q) and dot_dtype(q) is not None and d in (16, 32, 64, 128):
        assert blocks.index.is_contiguous()
        assert blocks.count.is_contiguous()
        if use_hopper(q) and d >= 32:
            from lcconvert.kernels.sparse_prefill_hopper import attend_blocks

            return attend_blocks(q, k, v, blocks.index, blocks.count, block=BLOCK, scale=scale)
        return _block_sparse_attention_triton(q, k, v, blocks, q_offset, scale)
    return block_sparse_attention_torch(q, k, v, blocks, q_offset, scale)


def block_sparse_attention_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockLists, q_offset: int, scale: float
) -> torch.Tensor:
    """The reference: tile by tile, the listed blocks gathered, one small masked product each. Nothing is [T, S]."""
    queries, heads, d = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    keys = q_offset + queries
    last = -(-keys // BLOCK)
    k_blocks, v_blocks = (_blocked(x[:keys], last) for x in (k, v))  # [Hkv * last, 128, D]
    first_row = torch.arange(heads, device=q.device)[:, None] // group * last  # where a head's blocks start
    out = torch.empty_like(q)
    causal = torch.full((BLOCK, BLOCK), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    for tile, count in enumerate(blocks.count.T):
        rows = slice(tile * BLOCK, min((tile + 1) * BLOCK, queries))
        query = q[rows].transpose(0, 1)  # [Hq, m, D]
        m, longest, diagonal = query.shape[1], int(count.max()), q_offset // BLOCK + tile
        if longest == diagonal + 1 and int(count.min()) == longest:  # dense: the group shares keys without a copy
            key, value = (x.view(kv_heads, last, BLOCK, d)[:, :longest].flatten(1, 2) for x in (k_blocks, v_blocks))
            mask = q.new_zeros(m, longest * BLOCK)
            mask[:, -BLOCK:] = causal[:m]
            query = query.reshape(kv_heads, group * m, d)
            part = _attend(query, key, value, mask.repeat(group, 1), scale)
            out[rows] = part.view(heads, m, d).transpose(0, 1)
            continue
        # Lists are aligned to the right, so that the diagonal block is the last column of every head.
        column = torch.arange(longest, device=q.device) - (longest - count[:, None])  # [Hq, longest]
        listed = blocks.index[:, tile].gather(1, column.clamp_min(0).long())
        chosen = (first_row + listed).flatten()
        key, value = (x.index_select(0, chosen).view(heads, longest * BLOCK, d) for x in (k_blocks, v_blocks))
        absent = torch.zeros(column.shape, dtype=q.dtype, device=q.device).masked_fill_(column < 0, -torch.inf)
        mask = absent[:, None, :, None].repeat(1, m, 1, BLOCK)
        mask[:, :, -1] = causal[:m]
        part = _attend(query, key, value, mask.flatten(2), scale)
        out[rows] = part.transpose(0, 1)
    return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """[B, m, D] over [B, n, D] with an additive mask; four dimensions are what PyTorch's fast CPU path asks for."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], mask.expand(len(q), -1, -1)[None], scale=scale)[0]


def _blocked(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """[S, Hkv, D] -> [Hkv * blocks, 128, D], zeros after the end."""
    keys, heads, d = x.shape
    out = x.new_zeros(heads, blocks * BLOCK, d)
    out[:, :keys] = x.transpose(0, 1)
    return out.view(heads * blocks, BLOCK, d)


@jit("tiles", "width", "first_block")
def _prefill_kernel(
    q_desc, k_desc, v_desc, o_desc, index, count, tiles, width, first_block, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    # One KV head after the other, so that its blocks are found in the L2 cache; in it the longest rows first.
    rest = tl.program_id(0) % (tiles * GROUP)
    head = tl.program_id(0) // (tiles * GROUP) * GROUP + rest % GROUP
    tile = tiles - 1 - rest // GROUP
    row = head.to(tl.int64) * tiles + tile
    listed = index + row * width
    kv_column = (head // GROUP) * D
    q = q_desc.load([tile * BLOCK, head * D]).to(DOT)  # [BLOCK, D]; rows past the end read as zeros
    # The diagonal block, causal. Keys past the end read as zeros and are later than every real query. It comes first:
    # after the loop it would keep the assembler from running the loop's products asynchronously.
    start = (first_block + tile) * BLOCK
    k = k_desc.load([start, kv_column]).to(DOT)
    position = tl.arange(0, BLOCK)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = tl.where(position[:, None] >= position[None, :], scores, -float("inf"))
    best = tl.max(scores, 1) * scale_log2
    p = tl.math.exp2(scores * scale_log2 - best[:, None])
    total = tl.sum(p, 1)
    v = v_desc.load([start, kv_column]).to(DOT)
    acc = tl.dot(p.to(DOT), v, input_precision="ieee")
    block = tl.load(listed)
    for i in range(tl.load(count + row) - 1):
        start = block * BLOCK
        block = tl.load(listed + i + 1)  # one ahead
        k = k_desc.load([start, kv_column]).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        new_best = tl.maximum(best, tl.max(scores, 1) * scale_log2)
        p = tl.math.exp2(scores * scale_log2 - new_best[:, None])
        shrink = tl.math.exp2(best - new_best)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = v_desc.load([start, kv_column]).to(DOT)
        acc = tl.dot(p.to(DOT), v, acc, input_precision="ieee")
        best = new_best
    o_desc.store([tile * BLOCK, head * D], (acc / total[:, None]).to(o_desc.dtype))


def _block_sparse_attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: BlockLists, q_offset: int, scale: float
) -> torch.Tensor:
    queries, heads, d = q.shape
    tiles = blocks.count.shape[1]
    out = torch.empty((queries, heads, d), dtype=q.dtype, device=q.device)
    _prefill_kernel[(tiles * heads,)](
        *(descriptor(x, [BLOCK, d]) for x in (q, k, v, out)),
        blocks.index, blocks.count, tiles, blocks.index.shape[2], q_offset // BLOCK, scale * LOG2E,
        GROUP=heads // k.shape[1], D=d, BLOCK=BLOCK, DOT=dot_dtype(q), num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
