"""Chooses the pages a decoded token attends, for each KV head, by a bound no key of a page can exceed.

The 4-bit codes of a key page run from 0 to 15, so a channel lies between `zero` and `zero + 15 * scale`, and a query's
best product with any key of the page is at most q . zero + 15 * relu(q) . scale: two dot products with numbers that
are stored anyway (the idea is Quest's, arXiv 2406.10774, which keeps minima and maxima of its own). A KV head takes the
best bound of its query heads.

The surprise: how many pages are chosen depends on how many there are, never on the scores, so that a captured CUDA
graph needs no number from the device.

Measured on an H100, 8192 pages, 32/8 heads of 128, us:

| | warps | us |
|---|---|---|
| bounds, 32 pages a program | 4 / 8 | 13.4 / 12.9 |
| bounds, 64 pages a program | 8 | 12.3 (2.7 TB/s) |
| list, one test at a time | 4 / 8 / 16 / 32 | 13.4 / 12.4 / 13.3 / 16.0 |
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import math

import torch

from lcconvert.kernels.backend import jit, tl, triton, use_triton
from lcconvert.kernels.kv_pages import PAGE, PageTensors

_ONE = 2**30  # a share of 1.0
_FORCED = 2**31 - 1  # key of a page that is kept whatever its bound
_PAGES = 32  # bounded by one program


def select_pages(
    q: torch.Tensor,
    k: PageTensors,
    table: torch.Tensor,
    pages: torch.Tensor,
    *,
    share: float,
    at_least: int,
    newest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [S, Hq, D] against the first pages[s] (int32 [S]) pages of table int32 [S, maxP]; keys are int4_channel.

    Keeps max(at_least, newest, ceil(share * pages)) pages of each sequence and KV head: the last `newest`, then the
    best bounds, the earlier of equals first. Returns (pool page numbers int32 [S, Hkv, W] in order of position, the
    tokens they hold int32 [S, Hkv]), a `PagePart`'s table and tokens. W follows from maxP; what is left is undefined.
    """
    sequences, heads, d = q.shape
    k.check()
    assert k.kind == "int4_channel"
    assert k.head_dim == d
    assert heads % k.data.shape[1] == 0
    assert q.is_contiguous()
    assert table.dtype == pages.dtype == torch.int32
    assert table.is_contiguous()
    assert table.shape[0] == pages.shape[0] == sequences
    assert 0 < share <= 1
    floor = max(at_least, newest)
    width = min(table.shape[1], max(floor, math.ceil(share * table.shape[1])))
    if use_triton(q) and d & (d - 1) == 0:
        return _select_pages_triton(q, k, table, pages, int(share * _ONE), floor, newest, width)
    return select_pages_torch(q, k, table, pages, share, floor, newest, width)


def page_bounds_torch(q: torch.Tensor, k: PageTensors, index: torch.Tensor) -> torch.Tensor:
    """Bounds float32 [Hkv, n] on the products of q [Hq, D] with any key of pages int64 [n]."""
    assert k.scale is not None
    assert k.zero is not None
    query = q.float().view(k.data.shape[1], -1, q.shape[1])  # [Hkv, G, D]
    bound = torch.einsum("hgd,nhd->hgn", query, k.zero.index_select(0, index).float())
    bound += torch.einsum("hgd,nhd->hgn", 15 * query.relu(), k.scale.index_select(0, index).float())
    return bound.amax(1)


def select_pages_torch(
    q: torch.Tensor,
    k: PageTensors,
    table: torch.Tensor,
    pages: torch.Tensor,
    share: float,
    floor: int,
    newest: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference, a stable sort for each sequence."""
    out = torch.zeros((len(q), k.data.shape[1], width), dtype=torch.int32, device=q.device)
    tokens = torch.zeros(out.shape[:2], dtype=torch.int32, device=q.device)
    for s, count in enumerate(pages.tolist()):
        wanted = min(count, max(floor, math.ceil(share * count)))
        listed = table[s, :count]
        bounds = page_bounds_torch(q[s], k, listed.long())
        bounds[:, max(0, count - newest) :] = torch.inf
        best = bounds.argsort(dim=1, descending=True, stable=True)[:, :wanted]
        out[s, :, :wanted] = listed[best.sort(1).values]
        tokens[s] = wanted * PAGE
    return out, tokens


@jit("table_width", "newest")
def _bound_kernel(
    q, scale, zero, table, pages, keys, table_width, newest,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAGES: tl.constexpr, FORCED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence = tl.program_id(2)
    count = tl.load(pages + sequence)
    if tl.program_id(1) * PAGES >= count:
        return
    place = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    channel = tl.arange(0, D)
    listed = place < count
    page = tl.load(table + sequence * table_width + place, mask=listed, other=0).to(tl.int64)
    at = (page * KV_HEADS + head)[:, None] * D + channel[None, :]
    low = tl.load(zero + at).to(tl.float32)  # [PAGES, D]
    span = tl.load(scale + at).to(tl.float32) * 15
    best = tl.full([PAGES], -float("inf"), tl.float32)
    for i in tl.static_range(GROUP):
        query = tl.load(q + (sequence * KV_HEADS * GROUP + head * GROUP + i) * D + channel).to(tl.float32)[None, :]
        best = tl.maximum(best, tl.sum(query * low + tl.maximum(query, 0.0) * span, 1))
    bits = best.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # an integer of the same order
    key = tl.where(place >= count - newest, FORCED, key)
    tl.store(keys + (sequence * KV_HEADS + head) * table_width + place, key, mask=listed)


@jit()
def _add_each(a, b, c, d):
    return a + c, b + d


@jit("table_width", "width", "share", "floor")
def _list_pages_kernel(
    keys, table, pages, out, tokens, table_width, width, share, floor,
    PAGE: tl.constexpr, ONE: tl.constexpr, FORCED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(1)
    row = sequence * tl.num_programs(0) + tl.program_id(0)
    count = tl.load(pages + sequence)
    wanted = ((count.to(tl.int64) * share + (ONE - 1)) // ONE).to(tl.int32)
    wanted = tl.minimum(tl.maximum(wanted, floor), count)
    place = tl.arange(0, WIDTH)
    listed = place < count
    key = tl.load(keys + row * table_width + place, mask=listed, other=-2147483648)
    page = tl.load(table + sequence * table_width + place, mask=listed, other=0)
    # The cut lies between the keys wanted and the others: the largest that at least `wanted` reach. It is searched for
    # between the smallest and the largest not forced, three tests at a time, mostly until one has exactly `wanted`.
    low = tl.min(tl.where(listed, key, FORCED), 0).to(tl.int64)
    high = tl.maximum(tl.max(tl.where(key == FORCED, -2147483648, key), 0).to(tl.int64), low)
    while low < high:
        span = high - low
        first, second, third = low + (span + 3) // 4, low + (span + 1) // 2, low + (3 * span + 3) // 4
        pair = (key >= first.to(tl.int32)).to(tl.int32) + ((key >= second.to(tl.int32)).to(tl.int32) << 16)
        pair, at_third = tl.reduce((pair, (key >= third.to(tl.int32)).to(tl.int32)), 0, _add_each)
        at_first, at_second = pair & 0xFFFF, pair >> 16  # two counts in one, 16 bits each
        below = tl.where(at_first < wanted, first, tl.where(at_second < wanted, second, third)) - 1
        high = tl.where(at_third < wanted, below, high)
        low = tl.where(at_first < wanted, low, tl.where(at_second < wanted, first, second))
        low = tl.where(at_third < wanted, low, third)
        exact = (at_first == wanted) | (at_second == wanted) | (at_third == wanted)
        high = tl.where(exact, low, high)
    cut = low.to(tl.int32)
    above = listed & (key > cut)
    equal = listed & (key == cut)
    # One running sum counts both, 16 bits each: an equal is kept when it and the equals before it are still wanted.
    spare = wanted - tl.sum(above.to(tl.int32), 0)
    before = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    equals = before >> 16
    keep = above | (equal & (equals <= spare))
    target = (before & 0xFFFF) + tl.minimum(equals, spare) - 1
    tl.store(out + row * width + target, page, mask=keep)
    tl.store(tokens + row, wanted * PAGE)


def _select_pages_triton(
    q: torch.Tensor,
    k: PageTensors,
    table: torch.Tensor,
    pages: torch.Tensor,
    share: int,
    floor: int,
    newest: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, heads, d = q.shape
    kv_heads, most = k.data.shape[1], table.shape[1]
    assert most < 2**15, "positions are counted in 16 bits"
    keys = torch.empty((sequences, kv_heads, most), dtype=torch.int32, device=q.device)
    out = torch.empty((sequences, kv_heads, width), dtype=torch.int32, device=q.device)
    tokens = torch.empty((sequences, kv_heads), dtype=torch.int32, device=q.device)
    _bound_kernel[(kv_heads, triton.cdiv(most, _PAGES), sequences)](
        q, k.scale, k.zero, table, pages, keys, most, newest,
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, D=d, PAGES=_PAGES, FORCED=_FORCED, num_warps=8,
    )  # fmt: skip
    wide = max(16, triton.next_power_of_2(most))
    _list_pages_kernel[(kv_heads, sequences)](
        keys, table, pages, out, tokens, most, width, share, floor,
        PAGE=PAGE, ONE=_ONE, FORCED=_FORCED, WIDTH=wide, num_warps=min(8, max(1, wide // 256)),
    )  # fmt: skip
    return out, tokens
