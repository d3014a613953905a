"""Attention of a few new queries over a paged cache: the part of decode that reads the whole context.

The cache comes in parts, each with its own format and page lists: typically the exact pages at both ends of a sequence
and the quantized pages between, all of them or those chosen for each KV head. Scales never touch the cached codes: key
scales and zero points fold into the query (q*s . code + q . z), value scales into the probabilities. One launch a part
writes partial results, one more joins them.

The surprise: programs are not dealt out evenly to sequences but to pages, so one long sequence among short ones still
fills the device; each partial result says which sequence it belongs to.

Measured on an H100 (copy 3.0 TB/s), int4 pages, 1,048,576 tokens, 32/8 heads of 128, TB/s of what must be read:

| codes read as | warps | programs a processor | stages | TB/s |
|---|---|---|---|---|
| bytes | 4 / 2 | 2 / 4 | 7 | 1.87 / 1.68 |
| 16-bit units | 2 | 3 / 4 | 7 | 2.71 / 2.80 |
| | 2 | 4 / 5 / 6 | 5 | 2.83 / 2.31 / 2.84 |
| | 2 | 6 / 8 | 4 | 2.80 / 2.38 |
| | 2, exact ends in the same launch | 4 / 6 | 5 | 2.57 / 2.44 |

The last row, with 7 stages, is what runs. Others summed the values of all pages within the tensor core, which drifts
(see the kernel); their instructions are as many, so a launch of their own for the ends may win again where pages are
many. 328 pages for each KV head and the ends, in a CUDA graph: 30 us in one launch, 37 us in two.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lcconvert.kernels.backend import LOG2E, dot_dtype, interpreted, jit, processors, tl, triton, use_triton
from lcconvert.kernels.fp8 import expand_e4m3
from lcconvert.kernels.kv_pages import PAGE, PageTensors

_CHUNK_PAGES = 32  # pages the reference holds in float32 at once
_PIECE = 64  # tokens of exact ends a program takes


@dataclass(frozen=True)
class PagePart:
    """The first `tokens` tokens of the listed pages, for each sequence or for each sequence and KV head.

    Only plain pages may end within a page. Table entries past the last page and rows past the last token are not read.
    """

    k: PageTensors  # plain, fp8 or int4_channel
    v: PageTensors  # plain, fp8 or int4_token
    table: torch.Tensor  # int32 [S, maxP] or [S, Hkv, maxP]: page numbers
    tokens: torch.Tensor  # int32 [S] or [S, Hkv], 0 allowed

    def check(self, q: torch.Tensor) -> None:
        """Assert what the kernels rely on, for queries q [S, Hq, D]."""
        sequences, heads, d = q.shape
        self.k.check()
        self.v.check()
        kv_heads = self.k.data.shape[1]
        assert self.k.kind != "int4_token", "no kernel for keys by token"
        assert self.v.kind != "int4_channel", "no kernel for values by channel"
        assert self.k.data.shape[:3] == self.v.data.shape[:3]
        assert self.k.head_dim == self.v.head_dim == d
        assert heads % kv_heads == 0
        assert self.table.dtype == self.tokens.dtype == torch.int32
        assert self.table.shape[:-1] == self.tokens.shape
        assert self.tokens.shape in ((sequences,), (sequences, kv_heads))
        assert self.table.is_contiguous()
        assert self.tokens.is_contiguous()


def attend_pages(
    q: torch.Tensor, parts: Sequence[PagePart], scale: float | None = None, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention of q [S, Hq, D] over the tokens of all parts together -> [S, Hq, D] in q's dtype.

    `scale` defaults to 1/sqrt(D). A sequence without a token gives zeros. `sinks` float32 [Hq]: one more score of each
    head, behind which there is no value.
    """
    assert q.is_contiguous()
    assert q.is_floating_point()
    assert parts
    for part in parts:
        part.check(q)
        assert part.k.data.shape[1] == parts[0].k.data.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    known = all(x.kind != "plain" or dot_dtype(x.data) is not None for part in parts for x in (part.k, part.v))
    if use_triton(q) and q.shape[2] in (32, 64, 128) and known:
        return _attend_triton(q, parts, scale, sinks)
    return attend_pages_torch(q, parts, scale, sinks)


def attend_pages_torch(
    q: torch.Tensor, parts: Sequence[PagePart], scale: float, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference: gathered pages in float32 products."""
    sequences, heads, d = q.shape
    kv_heads = parts[0].k.data.shape[1]
    out = torch.zeros((sequences, heads, d), dtype=torch.float32, device=q.device)
    for s in range(sequences):
        query = q[s].float().view(kv_heads, heads // kv_heads, d) * scale
        pieces = [piece for part in parts for piece in _pieces(query, part, part.table[s], part.tokens[s])]
        if pieces:
            outs, lses = (torch.stack(x) for x in zip(*pieces, strict=True))  # [n, Hkv, G, D], [n, Hkv, G]
            lse = lses.logsumexp(0)
            if sinks is not None:
                lse = torch.logaddexp(lse, sinks.view(lse.shape))
            weight = torch.exp(lses - torch.where(lse == -torch.inf, 0.0, lse))  # no tokens weigh 0, not NaN
            out[s] = (outs * weight[..., None]).sum(0).view(heads, d)
    return out.to(q.dtype)


def _pieces(
    query: torch.Tensor, part: PagePart, table: torch.Tensor, tokens: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Attention of query float32 [Hkv, G, D] over a few pages at a time: (out [Hkv, G, D], lse [Hkv, G]) each."""
    pages = -(-int(tokens.max()) // PAGE)
    for start in range(0, pages, _CHUNK_PAGES):
        stop = min(start + _CHUNK_PAGES, pages)
        position = torch.arange(start * PAGE, stop * PAGE, device=query.device).view(-1, 1, PAGE)
        valid = position < tokens[..., None]  # [n, 1 or Hkv, 128]
        index = table[..., start:stop].long()
        if table.dim() == 2:  # a list for each KV head, maybe shorter than the longest
            index = index.T.where(valid[..., 0], 0)  # [n, Hkv]
        scores = _scores(query, part.k, index).masked_fill_(~valid[:, :, None], -torch.inf)  # [n, Hkv, G, 128]
        lse = scores.logsumexp((0, 3))  # [Hkv, G]
        p = scores.sub_(torch.where(lse == -torch.inf, 0.0, lse)[..., None]).exp_()
        yield _weighted(p, part.v, index, valid), lse


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [P, Hkv, ...] at pages [n], or at pages [n, Hkv] of each head -> [n, Hkv, ...]."""
    if index.dim() == 1:
        return x.index_select(0, index)
    return x[index, torch.arange(x.shape[1], device=x.device)]


def _gather(pages: PageTensors, index: torch.Tensor) -> torch.Tensor:
    """Listed pages as one batch [n * Hkv, 128, D or D/2], in float32 or as codes."""
    if pages.kind == "fp8":  # gathered as bytes: e4m3 has no gather everywhere
        return expand_e4m3(_take(pages.data.view(torch.uint8), index).view(pages.data.dtype)).flatten(0, 1)
    data = _take(pages.data, index).flatten(0, 1)
    return data.float() if pages.kind == "plain" else data


def _scores(query: torch.Tensor, k: PageTensors, index: torch.Tensor) -> torch.Tensor:
    """query float32 [Hkv, G, D], scaled -> scores [n, Hkv, G, 128]."""
    data = _gather(k, index)
    shape = (len(index), *query.shape[:2], PAGE)
    if k.kind == "int4_channel":
        assert k.scale is not None
        assert k.zero is not None
        folded = (query * _take(k.scale, index).float()[:, :, None]).flatten(0, 1)  # [n * Hkv, G, D]
        offset = torch.einsum("hgd,nhd->nhg", query, _take(k.zero, index).float())
        low, high = folded.chunk(2, dim=-1)
        scores = torch.bmm(low, (data & 15).float().transpose(1, 2))
        scores.baddbmm_(high, (data >> 4).float().transpose(1, 2))
        return scores.view(shape).add_(offset[..., None])
    if k.kind == "fp8":
        assert k.scale is not None
        query = query * k.scale[:, None, None]
    return torch.bmm(query.repeat(len(index), 1, 1), data.transpose(1, 2)).view(shape)


def _weighted(p: torch.Tensor, v: PageTensors, index: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Probabilities [n, Hkv, G, 128] times the listed values -> [Hkv, G, D]; rows not `valid` may hold anything."""
    data = _gather(v, index)
    shape = (*p.shape[:3], -1)
    if v.kind == "int4_token":
        assert v.scale is not None
        assert v.zero is not None
        offset = torch.einsum("nhgt,nht->hg", p, _take(v.zero, index).float())
        p = (p * _take(v.scale, index).float()[:, :, None]).flatten(0, 1)
        low, high = (torch.bmm(p, codes.float()).view(shape).sum(0) for codes in (data & 15, data >> 4))
        return torch.cat((low, high), dim=-1) + offset[..., None]
    data.view(*p.shape[:2], PAGE, -1).masked_fill_(~valid[..., None], 0.0)
    out = torch.bmm(p.flatten(0, 1), data).view(shape).sum(0)
    if v.kind == "fp8":
        assert v.scale is not None
        out = out * v.scale[:, None, None]
    return out


# Codes are read as 16-bit units of two bytes, four nibbles: channels 2j, 2j + D/2, 2j+1 and 2j+1 + D/2. A nibble under
# the exponent of a suitable power of two is already that power plus its value, so a mask and an or make two of them,
# exactly, and what they are too large by is a sum of the other operand. A float16 has room for a nibble in place or
# four bits up; a bfloat16 only in place, but it has the range that probabilities need.
_KEY_QUARTERS = """
{
    .reg .b32 next;
    lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $1, $4, 0x00F000F0, 0x54005400, 0xEA;
    shr.b32 next, $4, 8;
    lop3.b32 $2, next, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $3, next, 0x00F000F0, 0x54005400, 0xEA;
}
"""
_VALUE_QUARTERS = """
{
    .reg .b32 next;
    lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
    shr.b32 next, $4, 4;
    lop3.b32 $1, next, 0x000F000F, 0x43004300, 0xEA;
    shr.b32 next, $4, 8;
    lop3.b32 $2, next, 0x000F000F, 0x43004300, 0xEA;
    shr.b32 next, $4, 12;
    lop3.b32 $3, next, 0x000F000F, 0x43004300, 0xEA;
}
"""


@jit()
def _key_quarters(units, ASM: tl.constexpr, TEXT: tl.constexpr):
    """16-bit units -> float16 1024 + channel 2j, 64 + channel 2j + D/2, 1024 + 2j+1, 64 + 2j+1 + D/2."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            TEXT, "=r,=r,=r,=r,r", [units],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a, c = 1024.0 + (units & 15).to(tl.float32), 1024.0 + (units >> 8 & 15).to(tl.float32)
        b, d = 64.0 + (units >> 4 & 15).to(tl.float32), 64.0 + (units >> 12 & 15).to(tl.float32)
    return a, b, c, d


@jit()
def _value_quarters(units, ASM: tl.constexpr, TEXT: tl.constexpr):
    """16-bit units -> bfloat16 128 + channel 2j, 2j + D/2, 2j+1, 2j+1 + D/2."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            TEXT, "=r,=r,=r,=r,r", [units],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        a, c = 128.0 + (units & 15).to(tl.float32), 128.0 + (units >> 8 & 15).to(tl.float32)
        b, d = 128.0 + (units >> 4 & 15).to(tl.float32), 128.0 + (units >> 12 & 15).to(tl.float32)
    return a, b, c, d


@jit()
def _attend_piece(
    q, k_data, v_data, table, tokens, out, lse, owner, sequence, piece, head, part, scale_log2,
    PIECE: tl.constexpr, WIDTH: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, PAGE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """PIECE tokens of a plain page, by one program: the exact ends are too short for a launch of their own."""
    column = tl.arange(0, ROWS)
    real = (column < GROUP)[None, :]
    channel = tl.arange(0, D)
    query = sequence * KV_HEADS * GROUP + head * GROUP + column
    query = tl.load(q + query[None, :] * D + channel[:, None], mask=real, other=0.0).to(DOT)
    place = piece * PIECE
    stop = tl.load(tokens + sequence)
    page = tl.load(table + sequence * WIDTH + place // PAGE, mask=place < stop, other=0).to(tl.int64) * KV_HEADS + head
    token = tl.arange(0, PIECE)
    valid = place + token < stop
    row = page * PAGE + place % PAGE + token
    k = tl.load(k_data + row[:, None] * D + channel[None, :]).to(DOT)
    # zero times whatever lies behind the last token could be NaN
    v = tl.load(v_data + row[None, :] * D + channel[:, None], mask=valid[None, :], other=0.0).to(DOT)
    scores = tl.where(valid[:, None], tl.dot(k, query, input_precision="ieee") * scale_log2, -float("inf"))
    best = tl.max(scores, 0)
    p = tl.math.exp2(scores - tl.where(best == -float("inf"), 0.0, best)[None, :])
    weight = tl.sum(p, 0)
    some = tl.where(weight > 0, weight, 1.0)
    acc = tl.dot(v, p.to(DOT), input_precision="ieee") / some[None, :]
    row = part * GROUP + column
    tl.store(out + row[None, :] * D + channel[:, None], acc, mask=real)
    tl.store(lse + row, best + tl.math.log2(some), mask=column < GROUP)
    tl.store(owner + part, tl.where(place < stop, sequence, -1))


@jit("table_width", "budget", "first_slot", "sequences")
def _decode_kernel(
    q, k_data, k_scale, k_zero, v_data, v_scale, v_zero, table, tokens, out, lse, owner,
    end_k, end_v, end_table, end_tokens, table_width, budget, first_slot, sequences, scale_log2,
    K_INT4: tl.constexpr, K_FP8: tl.constexpr, V_INT4: tl.constexpr, V_FP8: tl.constexpr,
    RAGGED: tl.constexpr, BY_HEAD: tl.constexpr, SEQUENCES: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    K_DOT: tl.constexpr, V_DOT: tl.constexpr, P_SHIFT: tl.constexpr,
    END_WIDTH: tl.constexpr, END_DOT: tl.constexpr, PIECE: tl.constexpr,
    ASM: tl.constexpr, K_TEXT: tl.constexpr, V_TEXT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    QUARTER: tl.constexpr = D // 4
    slot = tl.program_id(0)
    head = tl.program_id(1)
    part = (first_slot + slot).to(tl.int64) * KV_HEADS + head
    PIECES: tl.constexpr = END_WIDTH * (PAGE // PIECE)
    if PIECES > 0:
        if slot < sequences * PIECES:
            _attend_piece(
                q, end_k, end_v, end_table, end_tokens, out, lse, owner, slot // PIECES, slot % PIECES, head, part,
                scale_log2, PIECE, END_WIDTH, KV_HEADS, GROUP, ROWS, D, PAGE, END_DOT,
            )  # fmt: skip
            return
        slot -= sequences * PIECES
    # Every program takes `unit` pages of one sequence. Rounding up costs each sequence at most one program more, for
    # which the grid has room beyond `budget`.
    each = tl.arange(0, SEQUENCES)
    list_of = each * KV_HEADS + head if BY_HEAD else each
    length = tl.load(tokens + list_of, mask=each < sequences, other=0)
    pages = tl.cdiv(length, PAGE)
    unit = tl.maximum(tl.cdiv(tl.sum(pages, 0), budget), 1)
    slots = tl.cdiv(pages, unit)
    last_slot = tl.cumsum(slots, 0)
    sequence = tl.sum((last_slot <= slot).to(tl.int32), 0)  # SEQUENCES or more when nothing is left to do
    mine = each == sequence
    begin = (slot - tl.sum(tl.where(mine, last_slot - slots, 0), 0)) * unit
    end = tl.minimum(begin + unit, tl.sum(tl.where(mine, pages, 0), 0))
    stop = tl.sum(tl.where(mine, length, 0), 0)
    tl.store(owner + part, tl.where(end > begin, sequence, -1))
    sequence = tl.minimum(sequence, sequences - 1)
    table += (sequence * KV_HEADS + head if BY_HEAD else sequence) * table_width

    # Everything is transposed, tokens or channels down and query heads across: what is read is then the left operand of
    # the tensor core, which goes from shared memory through registers without a layout change.
    column = tl.arange(0, ROWS)  # the query heads of this KV head, padded
    real = (column < GROUP)[None, :]
    token = tl.arange(0, PAGE)
    channel = tl.arange(0, D)
    pair = tl.arange(0, QUARTER)
    query = tl.load(
        q + (sequence * KV_HEADS * GROUP + head * GROUP + column)[None, :] * D + channel[:, None], mask=real, other=0.0
    )  # [D, ROWS]
    if K_INT4:
        query = query.to(tl.float32)
        largest = tl.max(tl.abs(query), 0)
        query = query / tl.where(largest > 0, largest, 1.0)[None, :]  # times a scale it fits float16
        q_scale = (largest * scale_log2)[None, :]
        origin = tl.where(channel < HALF, 1024.0, 64.0)[:, None]
    else:
        query = query.to(K_DOT)
        q_scale = scale_log2
        if K_FP8:
            q_scale = scale_log2 * tl.load(k_scale + head)

    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([PAGE, ROWS], tl.float32)  # kept per token: one reduction at the end instead of one a page
    if V_INT4:
        offset = tl.zeros([PAGE, ROWS], tl.float32)
        acc_0 = tl.zeros([QUARTER, ROWS], tl.float32)
        acc_1 = tl.zeros([QUARTER, ROWS], tl.float32)
        acc_2 = tl.zeros([QUARTER, ROWS], tl.float32)
        acc_3 = tl.zeros([QUARTER, ROWS], tl.float32)
    else:
        acc = tl.zeros([D, ROWS], tl.float32)
    for i in tl.range(begin, end, num_stages=STAGES):  # said here, so that scales are fetched ahead too
        page = tl.load(table + i).to(tl.int64) * KV_HEADS + head
        if K_INT4:
            units = tl.load(k_data + page * (PAGE * QUARTER) + token[:, None] * QUARTER + pair[None, :])
            step = tl.load(k_scale + page * D + channel).to(tl.float32)[:, None]
            zero = tl.load(k_zero + page * D + channel).to(tl.float32)[:, None]
            k_0, k_1, k_2, k_3 = _key_quarters(units, ASM, K_TEXT)
            k = tl.join(tl.join(k_0, k_2), tl.join(k_1, k_3))  # [PAGE, QUARTER, parity, half]
            k = tl.reshape(tl.permute(k, (0, 2, 3, 1)), [PAGE, D])
            folded = (query * step).to(K_DOT)
            moved = tl.sum(query * zero - folded.to(tl.float32) * origin, 0)
            folded = tl.permute(tl.reshape(folded, [2, QUARTER, 2, ROWS]), (2, 0, 1, 3))  # channels as in k
            scores = tl.dot(k, tl.reshape(folded, [D, ROWS]), input_precision="ieee")
            scores = (scores + moved[None, :]) * q_scale
        else:
            k = tl.load(k_data + page * (PAGE * D) + token[:, None] * D + channel[None, :]).to(K_DOT)
            scores = tl.dot(k, query, input_precision="ieee") * q_scale
        if RAGGED:
            valid = i * PAGE + token < stop
            scores = tl.where(valid[:, None], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 0))
        p = tl.math.exp2(scores - (new_best - P_SHIFT)[None, :])  # [PAGE, ROWS]
        shrink = tl.math.exp2(best - new_best)[None, :]
        best = new_best
        total = total * shrink + p
        if V_INT4:
            units = tl.load(v_data + page * (PAGE * QUARTER) + token[None, :] * QUARTER + pair[:, None])
            step = tl.load(v_scale + page * PAGE + token).to(tl.float32)[:, None]
            zero = tl.load(v_zero + page * PAGE + token).to(tl.float32)[:, None]
            v_0, v_1, v_2, v_3 = _value_quarters(units, ASM, V_TEXT)  # [QUARTER, PAGE]
            folded = (p * step).to(V_DOT)
            offset = offset * shrink + (p * zero - folded.to(tl.float32) * 128.0)
            # fma keeps the compiler from summing all pages within the tensor core, which rounds towards zero: times
            # 128, that drift would show.
            acc_0 = tl.fma(acc_0, shrink, tl.dot(v_0, folded, input_precision="ieee"))
            acc_1 = tl.fma(acc_1, shrink, tl.dot(v_1, folded, input_precision="ieee"))
            acc_2 = tl.fma(acc_2, shrink, tl.dot(v_2, folded, input_precision="ieee"))
            acc_3 = tl.fma(acc_3, shrink, tl.dot(v_3, folded, input_precision="ieee"))
        else:
            v_at = v_data + page * (PAGE * D) + token[None, :] * D + channel[:, None]  # [D, PAGE]
            if RAGGED:  # zero times whatever lies behind the last token could be NaN
                v = tl.load(v_at, mask=valid[None, :], other=0.0).to(V_DOT)
            else:
                v = tl.load(v_at).to(V_DOT)
            acc = tl.dot(v, p.to(V_DOT), acc * shrink, input_precision="ieee")

    weight = tl.sum(total, 0)
    inverse = 1.0 / tl.where(weight > 0, weight, 1.0)[None, :]
    row = part * GROUP + column
    target = out + row[None, :] * D
    if V_INT4:
        moved = tl.sum(offset, 0)[None, :]
        target += 2 * pair[:, None]
        tl.store(target, (acc_0 + moved) * inverse, mask=real)
        tl.store(target + HALF, (acc_1 + moved) * inverse, mask=real)
        tl.store(target + 1, (acc_2 + moved) * inverse, mask=real)
        tl.store(target + HALF + 1, (acc_3 + moved) * inverse, mask=real)
    else:
        if V_FP8:
            inverse = inverse * tl.load(v_scale + head)
        tl.store(target + channel[:, None], acc * inverse, mask=real)
    # in base 2; what has no owner is not read
    tl.store(lse + row, best - P_SHIFT + tl.math.log2(tl.where(weight > 0, weight, 1.0)), mask=column < GROUP)


@jit("slots")
def _merge_kernel(
    outs, lses, owner, sinks, out, slots,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    SINKS: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    channel = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    slot = tl.arange(0, SLOTS)
    mine = tl.load(owner + slot * (HEADS // GROUP) + head // GROUP, mask=slot < slots, other=-1) == sequence
    row = slot * HEADS + head
    each = tl.load(lses + row, mask=mine, other=-float("inf"))
    best = tl.max(each, 0)
    if SINKS:
        sink = tl.load(sinks + head) * LOG2E
        best = tl.maximum(best, sink)
    best = tl.where(best == -float("inf"), 0.0, best)  # nothing anywhere: weights 0, not NaN
    weight = tl.math.exp2(each - best)
    total = tl.sum(weight, 0)
    if SINKS:
        total += tl.math.exp2(sink - best)
    some = tl.where(total > 0, total, 1.0)
    values = tl.load(outs + row[:, None] * D + channel[None, :], mask=mine[:, None], other=0.0)
    tl.store(out + (sequence * HEADS + head) * D + channel, tl.sum(values * weight[:, None], 0) / some)


def _attend_triton(
    q: torch.Tensor, parts: Sequence[PagePart], scale: float, sinks: torch.Tensor | None
) -> torch.Tensor:
    sequences, heads, d = q.shape
    kv_heads = parts[0].k.data.shape[1]
    group = heads // kv_heads
    ends = parts[0] if len(parts) > 1 and _short(parts[0]) else None
    parts = parts if ends is None else parts[1:]
    # The grid depends on shapes alone: a captured CUDA graph serves every length.
    resident = [_programs(part) * processors(q.device) // kv_heads for part in parts]
    budgets = [max(1, n - sequences + 1) for n in resident]
    grids = [min(sequences * part.table.shape[-1], n + sequences - 1) for part, n in zip(parts, budgets, strict=True)]
    if ends is not None:
        grids[0] += sequences * ends.table.shape[1] * (PAGE // _PIECE)
    slots = sum(grids)
    outs = torch.empty((slots, heads, d), dtype=torch.float32, device=q.device)
    lses = torch.empty((slots, heads), dtype=torch.float32, device=q.device)
    owner = torch.empty((slots, kv_heads), dtype=torch.int32, device=q.device)
    first = 0
    for part, budget, grid in zip(parts, budgets, grids, strict=True):
        k, v = part.k, part.v
        k_dot, v_dot = _product_type(k), _product_type(v)
        end = (None,) * 4 if ends is None else (ends.k.data, ends.v.data, ends.table, ends.tokens)
        _decode_kernel[(grid, kv_heads)](
            q, _units(k), k.scale, k.zero, _units(v), v.scale, v.zero, part.table, part.tokens, outs, lses, owner,
            *end, part.table.shape[-1], budget, first, sequences, scale * LOG2E,
            K_INT4=k.kind == "int4_channel", K_FP8=k.kind == "fp8",
            V_INT4=v.kind == "int4_token", V_FP8=v.kind == "fp8",
            RAGGED="plain" == k.kind == v.kind, BY_HEAD=part.tokens.dim() == 2,
            SEQUENCES=triton.next_power_of_2(sequences),
            KV_HEADS=kv_heads, GROUP=group, ROWS=max(8, triton.next_power_of_2(group)), D=d, PAGE=PAGE,
            # Probabilities are scaled up before they are rounded to float16, so that the long tail does not underflow.
            K_DOT=k_dot, V_DOT=v_dot, P_SHIFT=14 if v_dot == tl.float16 else 0,
            ASM=not interpreted, K_TEXT=_KEY_QUARTERS, V_TEXT=_VALUE_QUARTERS, STAGES=_stages(part),
            END_WIDTH=0 if ends is None else ends.table.shape[1], PIECE=_PIECE,
            END_DOT=None if ends is None else _product_type(ends.k),
            num_warps=_warps(part), num_stages=_stages(part),
        )  # fmt: skip
        first, ends = first + grid, None
    out = torch.empty_like(q)
    _merge_kernel[(heads, sequences, d // 32)](
        outs, lses, owner, sinks, out, slots,
        SLOTS=triton.next_power_of_2(slots), HEADS=heads, GROUP=group, D=d, WIDE=32,
        SINKS=sinks is not None, LOG2E=LOG2E, num_warps=4,
    )  # fmt: skip
    return out


def _short(part: PagePart) -> bool:
    """Whether a part is the exact ends of sequences, which one launch attends to beside another part."""
    return part.k.kind == part.v.kind == "plain" and part.tokens.dim() == 1 and part.table.shape[1] <= 4


def _programs(part: PagePart) -> int:
    """Programs a processor holds at once, by shared memory and registers."""
    d = part.k.head_dim
    if "plain" in (part.k.kind, part.v.kind):
        return 1
    return min(8, 512 // d) if part.v.kind == "int4_token" else 2


def _warps(part: PagePart) -> int:
    """Few, for they wait for each other several times a page; no more than 16 rows of a quarter tile each."""
    return max(1, part.v.head_dim // 64) if part.v.kind == "int4_token" else 4


def _stages(part: PagePart) -> int:
    """Pages in flight for each program, plus two: the pipeliner spends a stage on the page table and one on use."""
    return 7 if part.k.kind == "int4_channel" or part.k.kind == part.v.kind == "fp8" else 5


def _units(pages: PageTensors) -> torch.Tensor:
    return pages.data.view(torch.int16) if pages.kind.startswith("int4") else pages.data


def _product_type(pages: PageTensors) -> object:
    """What products with these pages run in; codes and e4m3 are exact in it."""
    if pages.kind == "plain":
        return dot_dtype(pages.data)
    if interpreted:
        return tl.float32
    return tl.bfloat16 if pages.kind == "int4_token" else tl.float16
