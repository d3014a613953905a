"""Block selection: the rules that hold whatever the scores, the scores themselves, Triton against the reference."""

import pytest
import torch
from kernel_tools import run_on, storage  # noqa: F401

from lcconvert.kernels import backend, select_blocks
from lcconvert.kernels.select_blocks import pool_keys, round_e4m3
from lcconvert.kernels.sparse_prefill import BLOCK, BlockLists

RULES = {"sink_blocks": 1, "local_blocks": 2, "dense_from": 10**9, "min_blocks": 0, "max_blocks": None}


def inputs(device, queries, q_offset, heads=4, d=16):
    generator = torch.manual_seed(queries + q_offset)
    dtype = torch.float32 if device == "cpu" else torch.float16
    q = torch.randn(queries, heads, d, generator=generator).to(device, dtype)
    return q, torch.randn(q_offset + queries, 2, d, generator=generator).to(device, dtype)


def select(q, k, q_offset, alpha=0.5, **rules):
    alpha = torch.tensor(alpha, device=q.device).expand(q.shape[1]).contiguous()
    lists = select_blocks.select_blocks(q, k, q_offset=q_offset, alpha=alpha, **{**RULES, **rules})
    tiles = lists.count.shape[1]
    chosen = [
        [lists.index[head, tile, : lists.count[head, tile]].tolist() for tile in range(tiles)]
        for head in range(q.shape[1])
    ]
    for head in chosen:
        for tile, blocks in enumerate(head):
            assert blocks == sorted(set(blocks)), "ascending, no block twice"
            assert blocks[-1] == q_offset // BLOCK + tile, "the diagonal last"
    return chosen


CASES = [
    (700, 0, {}),
    (400, 512, {"max_blocks": 4}),
    (400, 512, {"min_blocks": 5, "alpha": 1.0}),
    (300, 640, {"dense_from": 900}),
    (384, 256, {"max_blocks": 1}),
    (5, 0, {}),
    (200, 256, {"alpha": [0.0, 0.3, 0.7, 1.0], "sink_blocks": 0, "local_blocks": 1}),
    (300, 640, {"pool": 64}),
]


@pytest.mark.parametrize(("queries", "q_offset", "rules"), CASES)
def test_triton_lists_are_the_references(device, monkeypatch, queries, q_offset, rules):
    q, k = inputs(device, queries, q_offset)
    with backend.force("torch"):
        want = select(q, k, q_offset, **rules)
    assert select(q, k, q_offset, **rules) == want
    monkeypatch.setattr(select_blocks, "SCORES", 50)  # one tile at a time
    monkeypatch.setattr(select_blocks, "_LOGITS", 50)
    assert select(q, k, q_offset, **rules) == want
    with backend.force("torch"):
        assert select(q, k, q_offset, **rules) == want


def test_alpha_zero_keeps_every_block(device):
    q, k = inputs(device, 300, 256)
    dense = BlockLists.dense(4, 300, 256)
    want = [[dense.index[0, tile, :n].tolist() for tile, n in enumerate(dense.count[0].tolist())]] * 4
    assert select(q, k, 256, alpha=0.0) == want


def test_sinks_local_blocks_floor_and_cap(device):
    q, k = inputs(device, 256, 1024)
    for head in select(q, k, 1024, alpha=1.0, sink_blocks=2, local_blocks=3):
        for tile, blocks in enumerate(head):
            assert {0, 1, 6 + tile, 7 + tile, 8 + tile} <= set(blocks)
            assert len(blocks) <= 6, "and at most the best other block"
    assert all(len(blocks) == 7 for head in select(q, k, 1024, alpha=1.0, min_blocks=7) for blocks in head)
    assert all(len(blocks) == 5 for head in select(q, k, 1024, alpha=0.0, max_blocks=5) for blocks in head)
    assert all(len(blocks) == 3 for head in select(q, k, 1024, alpha=0.0, max_blocks=1) for blocks in head)


def test_the_last_queries_are_dense(device):
    q, k = inputs(device, 300, 512)
    chosen = select(q, k, 512, alpha=1.0, max_blocks=4, dense_from=700)
    for head in chosen:
        assert len(head[0]) <= 4, "position 700 is in the second of three tiles"
        assert [len(blocks) for blocks in head[1:]] == [6, 7]


def test_a_lone_needle_is_found(device):
    """One key of 128 that one query asks for brings its block in."""
    q, k = (x * 0.1 for x in inputs(device, 128, 1280, d=32))
    needle = torch.ones(32, device=device).to(q)
    k[5 * BLOCK + 77] = needle * 30
    q[40, 2] = needle
    found = select(q, k, 1280, alpha=0.5, sink_blocks=1, local_blocks=1)
    assert 5 in found[2][0]
    assert len(found[2][0]) <= 4


def test_the_diagonal_hides_later_keys(device):
    """Changing keys from the tile's own block on, but not the mean of all, does not change what it selects."""
    q, k = inputs(device, 128, 512)
    k[512:] *= 100
    want = select(q, k, 512)
    k[512:] = k[512:].flip(0)
    assert select(q, k, 512) == want


def test_what_all_keys_share_does_not_choose(device):
    """A vector added to every key shifts all logits of a query alike: softmax does not see it, nor does selection."""
    q, k = inputs(device, 256, 512)
    k = (k * 16).round() / 16  # so that the sums below are exact in 16 bits too
    want = select(q, k, 512, max_blocks=4)
    shared = torch.tensor([40.0, -60.0], device=device).to(q).repeat_interleave(8)
    assert select(q, k + shared, 512, max_blocks=4) == want


@pytest.mark.parametrize("pool", [32, 64])
def test_pooled_keys_are_centred_means_of_full_runs(pool):
    k = torch.randn(5 * pool + 9, 2, 16, generator=torch.manual_seed(0))
    pooled = pool_keys(k, pool)
    assert pooled.shape == (5, 2, 16)
    assert torch.allclose(pooled[3], k[3 * pool : 4 * pool].mean(0) - k[: 5 * pool].mean(0), atol=1e-6)


def rounded(x):
    codes, unit = select_blocks._round_e4m3_triton(x)
    assert codes.float().abs().max() <= 16
    return (codes.float() * unit.repeat_interleave(BLOCK, 0)[: len(x), :, None]).to(x)


@pytest.mark.parametrize(("queries", "q_offset", "pool"), [(300, 5120, 32), (200, 1280, 64)])
def test_8_bit_scores_choose_the_best_blocks(device, monkeypatch, queries, q_offset, pool):
    """Up to the rounding of float16 sums, the blocks kept score best when both sides are rounded to e4m3."""
    if device == "cpu":
        monkeypatch.setattr(select_blocks, "_has_e4m3", lambda q: True)
    q, k = (x * size for x, size in zip(inputs(device, queries, q_offset, d=32), (3, 0.01), strict=True))
    rules = {"sink_blocks": 0, "local_blocks": 1, "max_blocks": 6, "pool": pool}
    chosen = select(q, k, q_offset, alpha=0.0, **rules)
    keys = rounded(pool_keys(k, pool)).float().repeat_interleave(2, 1)
    logits = torch.einsum("thd,shd->hts", rounded(q).float(), keys) / 32**0.5
    for head, tiles in enumerate(chosen):
        for tile, blocks in enumerate(tiles):
            before = q_offset // BLOCK + tile
            rows = logits[head, tile * BLOCK : (tile + 1) * BLOCK, : before * BLOCK // pool]
            scores = rows.amax(0).view(before, -1).amax(1)
            kept = torch.zeros(before, dtype=torch.bool, device=device)
            kept[blocks[:-1]] = True
            assert len(blocks) == 6
            assert scores[kept].min() >= scores[~kept].max() - 2e-3 * scores.max()


@pytest.mark.parametrize("rows", [256, 130])
def test_rounding_to_8_bits_is_the_references(device, rows):
    generator = torch.manual_seed(rows)
    if device == "cpu":  # the interpreter rounds wrongly: values that need no rounding
        x = torch.randint(-15, 16, (rows, 3, 32), generator=generator).float()
    else:
        x = torch.randn(rows, 3, 32, generator=generator).to(device, torch.float16)
    x = x * torch.tensor([2.0**-10, 1.0, 2.0**8], device=device).to(x)[:, None]
    want, unit = round_e4m3(x)
    got, got_unit = select_blocks._round_e4m3_triton(x)
    assert torch.equal(got_unit, unit)
    assert torch.equal(got.float(), want.float())


def test_queries_beyond_31_bits_of_offset(device, vast):
    q, k = inputs(device, 257, 256, heads=2)
    far = vast(torch.float16).as_strided((257, 2, 16), (2**23, 16, 1))
    far.copy_(q)
    want = select(q.half(), k.half(), 256)
    assert select(far, k.half(), 256) == want
