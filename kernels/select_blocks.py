"""Chooses the key blocks each query tile attends, without training: all queries of a tile against mean-pooled keys.

A block's score is the largest logit any query of the tile has with any of the block's pooled keys (32 or 64 tokens
each: over a whole block a single needle would be diluted by 1/128). Blocks within ln(alpha) of the row's best are kept,
plus sinks and local blocks, within a floor and a cap. No softmax.

Pooled keys are centred: what all keys share (key biases, slow RoPE channels) shifts the logits of a query alike and is
nothing to softmax, but would let one query of a tile outshout the others. The share of the attention mass outside sinks
and local blocks that 9 kept blocks a row find (SmolLM2-135M, 4K to 8K tokens of text, five layers):

| pooled over | as it is | centred | with a large vector added to all keys: as it is | centred |
|---|---|---|---|---|
| 32 | 0.309 | 0.324 | 0.257 | 0.324 |
| 64 | 0.306 | 0.324 | 0.260 | 0.324 |

(0.416 with the best blocks known). A lone key among 64 is diluted twice as much as among 32, which this does not show.

On Hopper both sides are rounded to e4m3, in units of a power of two for 128 rows of a head, and summed in float16. The
table stays as it is; with keys that turn in three channels at 30 times their size 0.514 becomes 0.512. Useful TFLOP/s
of the scores on one H100, 16K queries at the end of 1M keys, 32 heads: bfloat16 694, e4m3 summed in float32 1231 (1269
in Gluon, warp-specialized), in float16 1437.

The surprise: the diagonal block has no score, since its pooled keys would hold tokens later than the queries; it is
always kept instead. Sinks and local blocks are always kept too and count towards floor and cap.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lcconvert.kernels.backend import descriptor, dot_dtype, jit, tl, triton, use_triton
from lcconvert.kernels.sparse_prefill import BLOCK, BlockLists

POOL = 32  # tokens averaged into one pooled key, unless the caller says otherwise
_LOGITS = 2**23  # logits the reference holds at once
SCORES = 2**25  # block scores the fast path holds at once
_LARGEST = 16.0  # an e4m3 code: 128 products of two such still fit float16
_TINY = 1e-30


def pool_keys(k: torch.Tensor, pool: int = POOL) -> torch.Tensor:
    """k [S, Hkv, D] -> [S // pool, Hkv, D] of k's dtype: means of full runs of `pool` tokens, less the mean of all."""
    full = k.shape[0] // pool
    pooled = k[: full * pool].view(full, pool, *k.shape[1:]).mean(dim=1, dtype=torch.float32)
    return (pooled - pooled.mean(dim=0)).to(k.dtype)


def select_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    q_offset: int,
    alpha: torch.Tensor,
    sink_blocks: int,
    local_blocks: int,
    dense_from: int,
    min_blocks: int,
    max_blocks: int | None,
    pool: int = POOL,
    pooled: torch.Tensor | None = None,
    scale: float | None = None,
) -> BlockLists:
    """Block lists for q [T, Hq, D] at absolute positions q_offset.. (a multiple of 128) over k [S, Hkv, D].

    alpha float32 [Hq] in [0, 1]: 0 keeps every block of that head. local_blocks >= 1 counts the diagonal. Tiles that
    reach position `dense_from` keep everything. `pool` (32 or 64) tokens make a pooled key: 64 halves the work and
    blurs more. `pooled` is `pool_keys(k, pool)`, to share it between calls on one layer.
    """
    queries, heads, d = q.shape
    assert k.shape[2] == d
    assert heads % k.shape[1] == 0
    assert k.shape[0] >= q_offset + queries
    assert q_offset % BLOCK == 0
    assert local_blocks >= 1
    assert sink_blocks >= 0
    assert pool in (32, 64)
    assert alpha.shape == (heads,)
    assert alpha.dtype == torch.float32
    if pooled is None:
        pooled = pool_keys(k, pool)
    assert pooled.shape == (k.shape[0] // pool, k.shape[1], d)
    assert pooled.dtype == q.dtype
    rules = Rules(
        first=q_offset // BLOCK,
        end=q_offset + queries,
        sink=sink_blocks,
        local=local_blocks,
        dense_from=dense_from,
        floor=min_blocks,
        cap=2**30 if max_blocks is None else max_blocks,
        per_block=BLOCK // pool,
    )
    scale = d**-0.5 if scale is None else scale
    if use_triton(q) and dot_dtype(q) is not None and d in (16, 32, 64, 128):
        return _select_blocks_triton(q, pooled, alpha, rules, scale)
    return select_blocks_torch(q, pooled, alpha, rules, scale)


@dataclass(frozen=True)
class Rules:
    """Where the queries are, and what is kept whatever the scores say."""

    first: int  # block number of the first tile's diagonal
    end: int  # position after the last query
    sink: int
    local: int
    dense_from: int  # a tile is dense when its last query is at this position or later
    floor: int
    cap: int
    per_block: int  # pooled keys

    @property
    def tiles(self) -> int:
        return -(-self.end // BLOCK) - self.first

    @property
    def first_dense_tile(self) -> int:
        """Tiles from this one on keep every block."""
        if self.end <= self.dense_from:
            return self.tiles
        return max(0, self.dense_from // BLOCK - self.first)


def select_blocks_torch(
    q: torch.Tensor, pooled: torch.Tensor, alpha: torch.Tensor, rules: Rules, scale: float
) -> BlockLists:
    """The reference, a few tiles at a time."""
    heads = q.shape[1]
    total = rules.first + rules.tiles
    keep = torch.zeros((heads, rules.tiles, total), dtype=torch.bool, device=q.device)
    step = max(1, _LOGITS // (heads * BLOCK * max(1, total * rules.per_block)))
    for start in range(0, rules.tiles, step):
        tiles = range(start, min(start + step, rules.tiles))
        scores = block_scores_torch(q, pooled, rules, tiles, scale)
        keep[:, tiles.start : tiles.stop, : scores.shape[2]] = _keep(scores, alpha, rules, tiles)
    count = keep.sum(-1, dtype=torch.int32)
    index = torch.zeros((heads, rules.tiles, int(count.max())), dtype=torch.int32, device=q.device)
    head, tile, block = keep.nonzero(as_tuple=True)
    index[head, tile, keep.cumsum(-1)[head, tile, block] - 1] = block.int()
    return BlockLists(index, count)


def block_scores_torch(q: torch.Tensor, pooled: torch.Tensor, rules: Rules, tiles: range, scale: float) -> torch.Tensor:
    """Scores float32 [Hq, tiles, blocks] of blocks before each tile's diagonal, -inf from there on."""
    queries, heads, d = q.shape
    kv_heads = pooled.shape[1]
    blocks = rules.first + tiles.stop
    earlier = blocks - 1
    scores = torch.full((heads, len(tiles), blocks), -torch.inf, dtype=torch.float32, device=q.device)
    if earlier == 0:
        return scores
    per_block = rules.per_block
    rows = q[tiles.start * BLOCK : min(tiles.stop * BLOCK, queries)].transpose(0, 1).float() * scale
    keys = pooled[: earlier * per_block].permute(1, 2, 0).float()  # [Hkv, D, n]
    logits = torch.matmul(rows.reshape(kv_heads, -1, d), keys).view(heads, rows.shape[1], -1)  # [Hq, rows, n]
    for i in range(len(tiles)):
        best = logits[:, i * BLOCK : (i + 1) * BLOCK].amax(1)  # [Hq, n]
        before = rules.first + tiles[i]
        scores[:, i, :before] = best.view(heads, earlier, per_block).amax(2)[:, :before]
    return scores


def _keep(scores: torch.Tensor, alpha: torch.Tensor, rules: Rules, tiles: range) -> torch.Tensor:
    """Scores [Hq, tiles, blocks] -> bool of the same shape."""
    block = torch.arange(scores.shape[2], device=scores.device)
    tile = torch.arange(tiles.start, tiles.stop, device=scores.device)[:, None]
    diagonal = rules.first + tile
    causal = block <= diagonal  # [tiles, blocks]
    forced = causal & ((block < rules.sink) | (block > diagonal - rules.local))
    threshold = scores.amax(-1) + alpha.log()[:, None]  # [Hq, tiles]
    ranked = scores.masked_fill(forced, torch.inf)
    passing = causal & (ranked >= threshold[..., None])
    wanted = passing.sum(-1).clamp_min(rules.floor).clamp_max(rules.cap)
    wanted = torch.where(tile[:, 0] >= rules.first_dense_tile, 2**30, torch.maximum(wanted, forced.sum(-1)))
    # The best `wanted` blocks, the earlier of equals first.
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, block.expand_as(order))
    return causal & (rank < wanted[..., None])


def round_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, heads, D] -> e4m3 [T, heads, D] and the float32 [ceil(T / 128), heads] each is to be multiplied by.

    The unit of 128 rows of a head is the power of two that brings its largest value to 8..16: products of 128 channels
    then sum up within float16, and all but tiny values round as they would with any other unit.
    """
    length, heads, d = x.shape
    groups = -(-length // BLOCK)
    padded = F.pad(x.float(), (0, 0, 0, 0, 0, groups * BLOCK - length)).view(groups, BLOCK, heads, d)
    largest = padded.abs().amax((1, 3)).clamp_min(_TINY)
    unit = torch.exp2(torch.ceil(torch.log2(largest / _LARGEST)))
    codes = (padded / unit[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(-1, heads, d)[:length], unit


@jit()
def _e4m3(x, LARGEST: tl.constexpr, TINY: tl.constexpr):
    # one group of `round_e4m3`
    x = x.to(tl.float32)
    largest = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), TINY)
    unit = tl.math.exp2(tl.math.ceil(tl.math.log2(largest / LARGEST)))
    return (x / unit).to(tl.float8e4nv), unit


@jit("length")
def _round_e4m3_kernel(
    x_desc, codes_desc, units, D: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr
):
    group = tl.program_id(0)
    head = tl.program_id(1)
    codes, unit = _e4m3(x_desc.load([group * BLOCK, head * D]), LARGEST, TINY)
    codes_desc.store([group * BLOCK, head * D], codes)
    tl.store(units + group * tl.num_programs(1) + head, unit)


@jit("queries", "first_tile", "first_block", "scored", "tiles", "width")
def _score_kernel(
    q, q_desc, pooled_desc, units, scores, queries, first_tile, first_block, scored, tiles, width, q_row, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr, EIGHT: tl.constexpr, LARGEST: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    # KEYS pooled keys at once, PER of them a block. EIGHT: e4m3 products, float16 sums; else those of DOT in float32.
    WIDE: tl.constexpr = KEYS // PER
    head = tl.program_id(0) % HEADS
    tile = scored - 1 - tl.program_id(0) // HEADS  # within this launch, longest row first
    before = first_block + first_tile + tile  # blocks before the diagonal
    row = (head.to(tl.int64) * tiles + tile) * width
    top = (first_tile + tile) * BLOCK
    rows = q_desc.load([top, head * D])
    # Rows past the end repeat the last query, which changes no maximum.
    final = tl.load(q + (queries - 1).to(tl.int64) * q_row + head * D + tl.arange(0, D))
    rows = tl.where((top + tl.arange(0, BLOCK) < queries)[:, None], rows, final[None, :])
    if EIGHT:
        rows, unit = _e4m3(rows, LARGEST, TINY)
        scale *= unit
    else:
        rows = rows.to(DOT)
    columns = tl.trans(rows)
    for start in range(0, before, WIDE):
        keys = pooled_desc.load([start * PER, (head // GROUP) * D])  # [KEYS, D]
        if EIGHT:
            logits = tl.dot(keys, columns, out_dtype=tl.float16)
            step = scale * tl.load(units + start // WIDE * (HEADS // GROUP) + head // GROUP)
        else:
            logits = tl.dot(keys.to(DOT), columns, input_precision="ieee")
            step = scale
        best = tl.max(logits, 1).to(tl.float32)  # over the tile's queries
        block = start + tl.arange(0, WIDE)
        best = tl.max(tl.reshape(best, [WIDE, PER]), 1) * step
        tl.store(scores + row + block, best, mask=block < before)


@jit()
def _ordered(x):
    # float32 -> int32 with the same order
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit(
    "tiles",
    "all_tiles",
    "first_tile",
    "first_block",
    "width",
    "index_width",
    "sink",
    "local",
    "floor",
    "cap",
    "dense_tile",
)
def _list_kernel(
    scores, log_alpha, index, count, tiles, all_tiles, first_tile, first_block, width, index_width,
    sink, local, floor, cap, dense_tile, WIDTH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    tile = tl.program_id(0)
    diagonal = first_block + first_tile + tile
    dense = first_tile + tile >= dense_tile
    block = tl.arange(0, WIDTH)
    causal = block <= diagonal
    forced = causal & ((block < sink) | (block > diagonal - local))
    row = (head.to(tl.int64) * tiles + tile) * width
    score = tl.load(scores + row + block, mask=block < tl.where(dense, 0, diagonal), other=-float("inf"))
    threshold = tl.max(score, 0) + tl.load(log_alpha + head)
    passing = causal & (forced | (score >= threshold))
    kept = tl.sum(passing.to(tl.int32), 0)
    wanted = tl.minimum(tl.maximum(kept, floor), cap)
    wanted = tl.maximum(wanted, tl.sum(forced.to(tl.int32), 0))
    wanted = tl.where(dense, diagonal + 1, tl.minimum(wanted, diagonal + 1))
    key = tl.where(causal, _ordered(score), -2147483648)
    key = tl.where(forced, 2147483647, key)
    # A cut that exactly the wanted keys reach. The threshold is one, unless floor or cap change the number: then one is
    # found by bisection, or, where equal keys straddle every cut, the largest that at least the wanted keys reach.
    at_threshold = tl.min(tl.where(passing, key, 2147483647), 0).to(tl.int64)
    low = tl.where(kept == wanted, at_threshold, -2147483647)
    high = tl.where(kept == wanted, at_threshold, 2147483647)
    while low < high:
        middle = (low + high + 1) >> 1
        reached = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0)
        low = tl.where(reached >= wanted, middle, low)
        high = tl.where(reached == wanted, middle, tl.where(reached > wanted, high, middle - 1))
    cut = low.to(tl.int32)
    keep = causal & (key >= cut)
    if tl.sum(keep.to(tl.int32), 0) > wanted:  # of the equal ones at the cut, the first
        above = key > cut
        equal = causal & (key == cut)
        spare = wanted - tl.sum(above.to(tl.int32), 0)
        keep = above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    target = head.to(tl.int64) * all_tiles + first_tile + tile
    tl.store(index + target * index_width + place, block, mask=keep)
    tl.store(count + target, wanted)


def _round_e4m3_triton(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length, heads, d = x.shape
    groups = -(-length // BLOCK)
    codes = torch.empty((length, heads, d), dtype=torch.float8_e4m3fn, device=x.device)
    units = torch.empty((groups, heads), dtype=torch.float32, device=x.device)
    _round_e4m3_kernel[(groups, heads)](
        descriptor(x, [BLOCK, d]), descriptor(codes, [BLOCK, d]), units, D=d, BLOCK=BLOCK, LARGEST=_LARGEST, TINY=_TINY
    )
    return codes, units


def _has_e4m3(q: torch.Tensor) -> bool:
    """Whether this GPU multiplies e4m3 and sums in float16."""
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9


def _select_blocks_triton(
    q: torch.Tensor, pooled: torch.Tensor, alpha: torch.Tensor, rules: Rules, scale: float
) -> BlockLists:
    queries, heads, d = q.shape
    assert q.stride(2) == 1
    assert q.stride(1) == d or heads == 1
    total = rules.first + rules.tiles
    # The width of the lists is a bound, not the longest list: finding that would wait for the device.
    listed = total if rules.first_dense_tile < rules.tiles else min(total, max(rules.cap, rules.sink + rules.local))
    index = torch.empty((heads, rules.tiles, listed), dtype=torch.int32, device=q.device)
    count = torch.empty((heads, rules.tiles), dtype=torch.int32, device=q.device)
    log_alpha = alpha.log()
    eight = _has_e4m3(q) and d >= 32
    keys = units = q_tiles = None
    if pooled.shape[0]:
        codes, units = _round_e4m3_triton(pooled) if eight else (pooled, None)
        keys, q_tiles = (descriptor(x, [BLOCK, d]) for x in (codes, q))
    step = max(1, SCORES // (heads * total))
    for start in range(0, rules.tiles, step):
        tiles = min(step, rules.tiles - start)
        scores = torch.empty((heads, tiles, total), dtype=torch.float32, device=q.device)
        scored = min(tiles, max(0, rules.first_dense_tile - start))
        if scored and keys is not None:
            _score_kernel[(scored * heads,)](
                q, q_tiles, keys, units, scores, queries, start, rules.first, scored, tiles, total, q.stride(0), scale,
                HEADS=heads, GROUP=heads // pooled.shape[1], D=d, BLOCK=BLOCK, PER=rules.per_block, KEYS=BLOCK,
                DOT=dot_dtype(q), EIGHT=eight, LARGEST=_LARGEST, TINY=_TINY, num_warps=8, num_stages=3,
            )  # fmt: skip
        width = max(16, triton.next_power_of_2(total))
        _list_kernel[(tiles, heads)](
            scores, log_alpha, index, count, tiles, rules.tiles, start, rules.first, total, listed,
            rules.sink, rules.local, rules.floor, rules.cap, rules.first_dense_tile,
            WIDTH=width, num_warps=4 if width <= 2048 else 8,
        )  # fmt: skip
    return BlockLists(index, count)
