"""Attention of a few new queries over a paged cache: the part of decode that reads the whole context.

The cache comes in parts, each with its own format and page lists: typically the exact pages at both ends of a sequence
and the quantized pages between, all of them or those chosen for each KV head. Scales never touch the cached codes: key
scales and zero points fold into the query (q*s . code + q . z), value scales into the probabilities. One launch a part
writes partial results, one more joins them.

The surprise: programs are not dealt out evenly to sequences but to pages, so one long sequence among short ones still
fills the device; each partial result says which sequence it belongs to.
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


def attend_pages(q: torch.Tensor, parts: Sequence[PagePart], scale: float | None = None) -> torch.Tensor:
    """Attention of q [S, Hq, D] over the tokens of all parts together -> [S, Hq, D] in q's dtype.

    `scale` defaults to 1/sqrt(D). A sequence without a token gives zeros.
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
        return _attend_triton(q, parts, scale)
    return attend_pages_torch(q, parts, scale)


def attend_pages_torch(q: torch.Tensor, parts: Sequence[PagePart], scale: float) -> torch.Tensor:
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


# One 32-bit register holds four code bytes b3 b2 b1 b0, each two nibbles. 0x4300 | n is the bfloat16 128 + n, so
# masking the nibbles of two bytes into that pattern and subtracting 136 makes two exact values n - 8 per instruction.
_CENTRED_PAIRS = """
{
    .reg .b32 a, b, one, shift;
    mov.b32 one, 0x3F803F80;
    mov.b32 shift, 0xC308C308;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    lop3.b32 $0, a, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, b, 0x000F000F, 0x43004300, 0xEA;
    shr.b32 a, a, 4;
    shr.b32 b, b, 4;
    lop3.b32 $2, a, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $3, b, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, one, shift;
    fma.rn.bf16x2 $1, $1, one, shift;
    fma.rn.bf16x2 $2, $2, one, shift;
    fma.rn.bf16x2 $3, $3, one, shift;
}
"""


@jit()
def _centred(codes, ASM: tl.constexpr, PAIRS: tl.constexpr):
    """uint8 codes -> (low nibble - 8, high nibble - 8), bfloat16 by bit tricks or float32 under the interpreter."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            PAIRS, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low = (codes & 15).to(tl.float32) - 8
        high = (codes >> 4).to(tl.float32) - 8
    return low, high


@jit("table_width", "budget", "first_slot", "sequences")
def _decode_kernel(
    q, k_data, k_scale, k_zero, v_data, v_scale, v_zero, table, tokens, out, lse, owner,
    table_width, budget, first_slot, sequences, scale_log2,
    K_INT4: tl.constexpr, K_FP8: tl.constexpr, V_INT4: tl.constexpr, V_FP8: tl.constexpr,
    RAGGED: tl.constexpr, BY_HEAD: tl.constexpr, SEQUENCES: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    K_DOT: tl.constexpr, V_DOT: tl.constexpr, P_SHIFT: tl.constexpr, ASM: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    slot = tl.program_id(0)
    head = tl.program_id(1)
    # Every program takes `unit` pages of one sequence. Rounding up costs each sequence at most one program more, which
    # the grid has room for.
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
    part = (first_slot + slot).to(tl.int64) * KV_HEADS + head
    tl.store(owner + part, tl.where(end > begin, sequence, -1))
    sequence = tl.minimum(sequence, sequences - 1)
    table += (sequence * KV_HEADS + head if BY_HEAD else sequence) * table_width

    # Everything is transposed, tokens or channels down and query heads across: the codes are then the left operand of
    # the tensor core, which goes from shared memory through registers without a layout change.
    column = tl.arange(0, ROWS)  # the query heads of this KV head, padded
    real = (column < GROUP)[None, :]
    token = tl.arange(0, PAGE)
    channel = tl.arange(0, D)
    half = tl.arange(0, HALF)
    q_column = q + (sequence * KV_HEADS * GROUP + head * GROUP + column)[None, :] * D
    if K_INT4:
        q_low = tl.load(q_column + half[:, None], mask=real, other=0.0).to(tl.float32) * scale_log2
        q_high = tl.load(q_column + HALF + half[:, None], mask=real, other=0.0).to(tl.float32) * scale_log2
    else:
        q_scale = scale_log2
        if K_FP8:
            q_scale = scale_log2 * tl.load(k_scale + head)
        q_all = tl.load(q_column + channel[:, None], mask=real, other=0.0).to(K_DOT)

    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([PAGE, ROWS], tl.float32)  # kept per token: one reduction at the end instead of one a page
    offset = tl.zeros([PAGE, ROWS], tl.float32)
    acc_low = tl.zeros([HALF, ROWS], tl.float32)
    acc_high = tl.zeros([HALF, ROWS], tl.float32)
    acc = tl.zeros([D, ROWS], tl.float32)
    for i in range(begin, end):
        page = tl.load(table + i).to(tl.int64) * KV_HEADS + head
        if V_INT4:  # asked for early: too narrow to be prefetched into shared memory
            step = tl.load(v_scale + page * PAGE + token).to(tl.float32)
            zero = tl.load(v_zero + page * PAGE + token).to(tl.float32) + 8 * step
        if K_INT4:
            codes = tl.load(k_data + page * (PAGE * HALF) + token[:, None] * HALF + half[None, :])
            s_low = tl.load(k_scale + page * D + half).to(tl.float32)
            s_high = tl.load(k_scale + page * D + HALF + half).to(tl.float32)
            # codes are used as n - 8, so the zero point moves by eight steps
            z_low = tl.load(k_zero + page * D + half).to(tl.float32) + 8 * s_low
            z_high = tl.load(k_zero + page * D + HALF + half).to(tl.float32) + 8 * s_high
            low, high = _centred(codes, ASM, PAIRS)
            scores = tl.dot(low, (q_low * s_low[:, None]).to(K_DOT), input_precision="ieee")
            scores = tl.dot(high, (q_high * s_high[:, None]).to(K_DOT), scores, input_precision="ieee")
            scores += tl.sum(q_low * z_low[:, None] + q_high * z_high[:, None], 0)[None, :]
        else:
            k = tl.load(k_data + page * (PAGE * D) + token[:, None] * D + channel[None, :]).to(K_DOT)
            scores = tl.dot(k, q_all, input_precision="ieee") * q_scale
        if RAGGED:
            valid = i * PAGE + token < stop
            scores = tl.where(valid[:, None], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 0))
        p = tl.math.exp2(scores - (new_best - P_SHIFT)[None, :])  # [PAGE, ROWS]
        shrink = tl.math.exp2(best - new_best)[None, :]
        best = new_best
        total = total * shrink + p
        if V_INT4:
            v_codes = tl.load(v_data + page * (PAGE * HALF) + token[None, :] * HALF + half[:, None])  # [HALF, PAGE]
            v_low, v_high = _centred(v_codes, ASM, PAIRS)
            offset = offset * shrink + p * zero[:, None]
            p_scaled = (p * step[:, None]).to(V_DOT)
            acc_low = tl.dot(v_low, p_scaled, acc_low * shrink, input_precision="ieee")
            acc_high = tl.dot(v_high, p_scaled, acc_high * shrink, input_precision="ieee")
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
    if V_INT4:
        moved = tl.sum(offset, 0)[None, :]
        tl.store(out + row[None, :] * D + half[:, None], (acc_low + moved) * inverse, mask=real)
        tl.store(out + row[None, :] * D + HALF + half[:, None], (acc_high + moved) * inverse, mask=real)
    else:
        if V_FP8:
            inverse = inverse * tl.load(v_scale + head)
        tl.store(out + row[None, :] * D + channel[:, None], acc * inverse, mask=real)
    # in base 2; what has no owner is not read
    tl.store(lse + row, best - P_SHIFT + tl.math.log2(tl.where(weight > 0, weight, 1.0)), mask=column < GROUP)


@jit("slots")
def _merge_kernel(
    outs, lses, owner, out, slots,
    SLOTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    channel = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    slot = tl.arange(0, SLOTS)
    mine = tl.load(owner + slot * (HEADS // GROUP) + head // GROUP, mask=slot < slots, other=-1) == sequence
    row = slot * HEADS + head
    each = tl.load(lses + row, mask=mine, other=-float("inf"))
    best = tl.max(each, 0)
    best = tl.where(best == -float("inf"), 0.0, best)  # nothing anywhere: weights 0, not NaN
    weight = tl.math.exp2(each - best)
    total = tl.sum(weight, 0)
    some = tl.where(total > 0, total, 1.0)
    values = tl.load(outs + row[:, None] * D + channel[None, :], mask=mine[:, None], other=0.0)
    tl.store(out + (sequence * HEADS + head) * D + channel, tl.sum(values * weight[:, None], 0) / some)


def _attend_triton(q: torch.Tensor, parts: Sequence[PagePart], scale: float) -> torch.Tensor:
    sequences, heads, d = q.shape
    kv_heads = parts[0].k.data.shape[1]
    group = heads // kv_heads
    # The grid depends on shapes alone: a captured CUDA graph serves every length.
    budgets = [max(1, _programs(part, q.device) // kv_heads) for part in parts]
    grids = [min(sequences * part.table.shape[-1], n + sequences - 1) for part, n in zip(parts, budgets, strict=True)]
    slots = sum(grids)
    outs = torch.empty((slots, heads, d), dtype=torch.float32, device=q.device)
    lses = torch.empty((slots, heads), dtype=torch.float32, device=q.device)
    owner = torch.empty((slots, kv_heads), dtype=torch.int32, device=q.device)
    first = 0
    for part, budget, grid in zip(parts, budgets, grids, strict=True):
        k, v = part.k, part.v
        k_dot, v_dot = _product_type(k), _product_type(v)
        _decode_kernel[(grid, kv_heads)](
            q, k.data, k.scale, k.zero, v.data, v.scale, v.zero, part.table, part.tokens, outs, lses, owner,
            part.table.shape[-1], budget, first, sequences, scale * LOG2E,
            K_INT4=k.kind == "int4_channel", K_FP8=k.kind == "fp8",
            V_INT4=v.kind == "int4_token", V_FP8=v.kind == "fp8",
            RAGGED="plain" == k.kind == v.kind, BY_HEAD=part.tokens.dim() == 2,
            SEQUENCES=triton.next_power_of_2(sequences),
            KV_HEADS=kv_heads, GROUP=group, ROWS=max(8, triton.next_power_of_2(group)), D=d, PAGE=PAGE,
            # Probabilities are scaled up before they are rounded to float16, so that the long tail does not underflow.
            K_DOT=k_dot, V_DOT=v_dot, P_SHIFT=14 if v_dot == tl.float16 else 0,
            ASM=not interpreted, PAIRS=_CENTRED_PAIRS, num_warps=4, num_stages=_stages(part),
        )  # fmt: skip
        first += grid
    out = torch.empty_like(q)
    _merge_kernel[(heads, sequences, d // 32)](
        outs, lses, owner, out, slots,
        SLOTS=triton.next_power_of_2(slots), HEADS=heads, GROUP=group, D=d, WIDE=32, num_warps=4,
    )  # fmt: skip
    return out


def _programs(part: PagePart, device: torch.device) -> int:
    """Programs the device holds at once, by shared memory."""
    return (1 if "plain" in (part.k.kind, part.v.kind) else 2) * processors(device)


def _stages(part: PagePart) -> int:
    """Pages in flight for each program, plus two: the pipeliner spends a stage on the page table and one on use."""
    return 5 if "plain" in (part.k.kind, part.v.kind) else 7


def _product_type(pages: PageTensors) -> object:
    """What products with these pages run in: e4m3 is exact in float16, centred codes in bfloat16."""
    if pages.kind == "plain":
        return dot_dtype(pages.data)
    if interpreted:
        return tl.float32
    return tl.float16 if pages.kind == "fp8" else tl.bfloat16
