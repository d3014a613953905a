"""Block-sparse prefill against masked float64 attention, and dense attention when every block is listed."""

import pytest
import torch
from kernel_tools import close, dense_attention, masked_attention, run_on, storage  # noqa: F401

from lcconvert.kernels.sparse_prefill import BLOCK, BlockLists, block_sparse_attention, block_sparse_attention_torch

# Products run in the inputs' type, except bfloat16 under the interpreter, which runs in float32.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def inputs(device, queries, q_offset, heads=4, kv_heads=2, d=16, dtype=None, spare=0):
    generator = torch.manual_seed(queries + q_offset + d)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.float16)
    shapes = ((queries, heads, d), (q_offset + queries + spare, kv_heads, d), (q_offset + queries + spare, kv_heads, d))
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def random_lists(device, heads, queries, q_offset, seed):
    """Each tile attends a random set of earlier blocks and its diagonal; what follows in a list is out of range."""
    generator = torch.manual_seed(seed)
    tiles, first = -(-queries // BLOCK), q_offset // BLOCK
    index = torch.full((heads, tiles, first + tiles), 2**30, dtype=torch.int32)
    count = torch.zeros((heads, tiles), dtype=torch.int32)
    for head in range(heads):
        for tile in range(tiles):
            diagonal = first + tile
            earlier = (torch.rand(diagonal, generator=generator) < 0.4).nonzero()[:, 0].tolist()
            listed = [*earlier, diagonal]
            index[head, tile, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
            count[head, tile] = len(listed)
    return BlockLists(index.to(device), count.to(device))


def allowed_by(lists, queries, keys, q_offset):
    """The lists as a mask [Hq, T, S]."""
    heads, tiles = lists.count.shape
    mask = torch.zeros(heads, queries, keys, dtype=torch.bool)
    for head in range(heads):
        for tile in range(tiles):
            for block in lists.index[head, tile, : lists.count[head, tile]].tolist():
                mask[head, tile * BLOCK : (tile + 1) * BLOCK, block * BLOCK : (block + 1) * BLOCK] = True
    causal = torch.arange(keys) <= torch.arange(queries)[:, None] + q_offset
    return (mask & causal).to(lists.count.device)


@pytest.mark.parametrize("d", [16, 64])
@pytest.mark.parametrize(("queries", "q_offset", "spare"), [(300, 0, 0), (256, 128, 0), (5, 256, 0), (130, 128, 50)])
def test_all_blocks_are_dense_attention(device, queries, q_offset, spare, d):
    q, k, v = inputs(device, queries, q_offset, d=d, spare=spare)
    lists = BlockLists.dense(4, queries, q_offset, device)
    want = dense_attention(q, k, v, q_offset)
    close(block_sparse_attention(q, k, v, lists, q_offset), want, TOLERANCE[q.dtype])
    close(block_sparse_attention_torch(q, k, v, lists, q_offset, d**-0.5), want, TOLERANCE[q.dtype])


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 2, 16), (4, 2, 32), (3, 3, 64), (7, 1, 128)])
def test_listed_blocks_and_no_others(device, heads, kv_heads, d):
    queries, q_offset = 200, 384
    q, k, v = inputs(device, queries, q_offset, heads, kv_heads, d)
    lists = random_lists(device, heads, queries, q_offset, seed=d)
    want = masked_attention(q, k, v, allowed_by(lists, queries, len(k), q_offset))
    close(block_sparse_attention(q, k, v, lists, q_offset), want, TOLERANCE[q.dtype])
    close(block_sparse_attention_torch(q, k, v, lists, q_offset, d**-0.5), want, TOLERANCE[q.dtype])


@pytest.mark.parametrize(("dtype", "d"), [(torch.float16, 128), (torch.bfloat16, 32), (torch.bfloat16, 128)])
def test_16_bit_inputs(device, dtype, d):
    q, k, v = inputs(device, 140, 128, d=d, dtype=dtype)
    got = block_sparse_attention(q, k, v, BlockLists.dense(4, 140, 128, device), 128)
    assert got.dtype == dtype
    close(got, dense_attention(q, k, v, 128), TOLERANCE[dtype])


def test_a_scale_of_ones_own(device):
    q, k, v = inputs(device, 100, 0)
    got = block_sparse_attention(q, k, v, BlockLists.dense(4, 100, 0, device), 0, scale=0.5)
    close(got, dense_attention(q * 2, k, v, 0), TOLERANCE[q.dtype])


def test_chunks_of_a_prompt_join_to_the_whole(device):
    q, k, v = inputs(device, 300, 0)
    whole = block_sparse_attention(q, k, v, BlockLists.dense(4, 300, 0, device), 0)
    parts = [
        block_sparse_attention(q[a:b], k, v, BlockLists.dense(4, b - a, a, device), a)
        for a, b in ((0, 128), (128, 300))
    ]
    close(torch.cat(parts), whole, TOLERANCE[q.dtype])


def test_the_same_twice(device):
    q, k, v = inputs(device, 200, 384, d=64)
    lists = random_lists(device, 4, 200, 384, seed=1)
    assert torch.equal(block_sparse_attention(q, k, v, lists, 384), block_sparse_attention(q, k, v, lists, 384))


@pytest.mark.parametrize("d", [16, 64])
def test_rows_beyond_31_bits_of_offset(device, vast, d):
    """Queries, keys and values whose rows lie 2^23 elements apart: the last starts past 2^31."""
    q, k, v = inputs(device, 257, 0, heads=1, kv_heads=1, d=d, dtype=torch.float16)
    room = vast(torch.float16)
    far = room.as_strided((257, 1, d), (2**23, d, 1))
    assert 256 * far.stride(0) == 2**31
    lists = BlockLists.dense(1, 257, 0, device)
    want = dense_attention(q, k, v, 0)
    far.copy_(q)
    close(block_sparse_attention(far, k, v, lists, 0), want, TOLERANCE[q.dtype])
    far.copy_(k)
    far_v = room[64:].as_strided((257, 1, d), (2**23, d, 1))
    far_v.copy_(v)
    close(block_sparse_attention(q, far, far_v, lists, 0), want, TOLERANCE[q.dtype])
