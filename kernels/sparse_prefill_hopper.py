"""The block-sparse attention of sparse_prefill.py as Hopper likes it: one warp loads, two warpgroups compute.

A program owns one tile. One warp keeps two key blocks and two value blocks on their way into shared memory; each of two
warpgroups attends half of the tile's rows, and starts the next block's scores before it weights this block's values, so
that the tensor cores work while it takes exponentials. Stock Triton cannot say this; sparse_prefill.py's own kernel
stays for other GPUs and is what the interpreter checks.

Useful TFLOP/s (listed blocks, the diagonal as half) on one H100, Llama-3.1-8B heads, bfloat16:

| | 128K keys, 10 %, one list | 16K queries of 1M, 164 blocks, one list | the same, random lists |
|---|---|---|---|
| stock Triton | 432 | 437 | 387 |
| this | 637 | 631 | 484 |
| tiles of all KV heads at once | 589 | 625 | 396 |
| the two warpgroups take turns (ping-pong) | 609 | 627 | 481 |

Random lists share no blocks but by accident and are bound by memory. A program for the tiles of one KV head next to the
others of it finds most of them in the L2 cache.

The surprise: the loop waits for the next keys where it does, before the values' products end, because that loop of its
own keeps the assembler from moving the wait for those products up before the exponentials.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lcconvert.kernels.backend import LOG2E
from lcconvert.kernels.hopper import fetch, gluon_descriptor, put


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, listed, count,
    row, column, kv_column, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(q_ready, 2 * q_desc.block_type.nbytes)
    for half in gl.static_range(2):
        fetch(q_desc, [row + half * (BLOCK // 2), column], q_ready, q_smem.index(half))
    block = gl.load(listed + count - 1)  # the diagonal first
    for i in range(count):
        start = block * BLOCK
        block = gl.load(listed + i)
        slot = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_free.index(slot), phase ^ 1)
        mbarrier.expect(k_ready.index(slot), k_desc.block_type.nbytes)
        fetch(k_desc, [start, kv_column], k_ready.index(slot), k_smem.index(slot))
        mbarrier.wait(v_free.index(slot), phase ^ 1)
        mbarrier.expect(v_ready.index(slot), v_desc.block_type.nbytes)
        fetch(v_desc, [start, kv_column], v_ready.index(slot), v_smem.index(slot))


@gluon.jit
def _attend(
    o_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, count, row, column, scale_log2,
    HALF: gl.constexpr, BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q = q_smem.index(HALF)  # [ROWS, D]
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, s_layout)
    o = gl.zeros([ROWS, D], gl.float32, o_layout)
    # The diagonal block, causal. Keys past the end read as zeros and are later than every real query.
    mbarrier.wait(q_ready, 0)
    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_free.index(0), count=1)
    query = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    key = gl.arange(0, BLOCK, gl.SliceLayout(0, s_layout))
    s = gl.where(query[:, None] >= key[None, :], s, -float("inf"))
    best = gl.max(s, 1) * scale_log2
    p = gl.exp2(s * scale_log2 - best[:, None])
    total = gl.sum(p, 1)
    p = gl.convert_layout(p.to(q_smem.dtype), p_layout)
    following = gl.minimum(1, count - 1)
    mbarrier.wait(k_ready.index(following % STAGES), (following // STAGES) & 1)
    for i in range(1, count):
        slot = i % STAGES
        before = (i - 1) % STAGES
        s = warpgroup_mma(q, k_smem.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(before), ((i - 1) // STAGES) & 1)
        o = warpgroup_mma(p, v_smem.index(before), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_free.index(slot), count=1)
        new_best = gl.maximum(best, gl.max(s, 1) * scale_log2)
        new_p = gl.exp2(s * scale_log2 - new_best[:, None])
        shrink = gl.exp2(best - new_best)
        total = total * shrink + gl.sum(new_p, 1)
        best = new_best
        new_p = gl.convert_layout(new_p.to(q_smem.dtype), p_layout)
        following = gl.minimum(i + 1, count - 1)
        mbarrier.wait(k_ready.index(following % STAGES), (following // STAGES) & 1)
        o, p = warpgroup_mma_wait(0, deps=(o, p))
        mbarrier.arrive(v_free.index(before), count=1)
        o = o * gl.convert_layout(shrink, o_rows)[:, None]
        p = new_p
    last = (count - 1) % STAGES
    mbarrier.wait(v_ready.index(last), ((count - 1) // STAGES) & 1)
    o = warpgroup_mma(p, v_smem.index(last), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    o = o / gl.convert_layout(total, o_rows)[:, None]
    q.store(o.to(q_smem.dtype))  # the queries have been used
    fence_async_shared()
    put(o_desc, [row + HALF * ROWS, column], q)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles", "width"])
def _hopper_prefill_kernel(
    q_desc, k_desc, v_desc, o_desc, index, count, tiles, width, scale_log2,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # One KV head after the other; in it the longest rows first, its query heads as neighbours.
    kv_head = gl.program_id(0) // (tiles * GROUP)
    rest = gl.program_id(0) % (tiles * GROUP)
    head = kv_head * GROUP + rest % GROUP
    tile = tiles - 1 - rest // GROUP
    entry = head.to(gl.int64) * tiles + tile
    listed = index + entry * width
    blocks = gl.load(count + entry)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK // 2, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK, D], v_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    row = tile * BLOCK
    column = head * D
    gl.warp_specialize(
        [
            (_attend, (o_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, blocks, row, column,
                       scale_log2, 0, BLOCK, D, STAGES)),
            (_attend, (o_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, blocks, row, column,
                       scale_log2, 1, BLOCK, D, STAGES)),
            (_load, (q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_ready, k_ready, k_free, v_ready, v_free, listed,
                     blocks, row, column, kv_head * D, BLOCK, STAGES)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    block: int,
    scale: float,
) -> torch.Tensor:
    """`block_sparse_attention` for checked 16-bit arguments with D of 32, 64 or 128; `index` and `count` the lists."""
    queries, heads, d = q.shape
    kv_heads, tiles = k.shape[1], count.shape[1]
    out = torch.empty((queries, heads, d), dtype=q.dtype, device=q.device)
    _hopper_prefill_kernel[(tiles * heads,)](
        gluon_descriptor(q, block // 2), gluon_descriptor(k, block), gluon_descriptor(v, block),
        gluon_descriptor(out, block // 2), index, count, tiles, index.shape[2], scale * LOG2E,
        GROUP=heads // kv_heads, D=d, BLOCK=block, STAGES=2, num_warps=4, maxnreg=168,
    )  # fmt: skip
    return out
