"""Attention of a few new queries over a paged, quantized cache: the part of decode that reads the whole context.

Scales never touch the cached codes: key scales and zero points fold into the query (q*s . code + q . z), value scales
into the probabilities. Pages are listed per sequence and are all full; the newest, partial page is attended elsewhere
and joined with `merge_partials`, which is why every result comes with its natural-log sum of exponentials.

The surprise: a sequence with no pages gives zeros and lse = -inf, so joining it changes nothing.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch

from lcconvert.kernels.backend import LN2, LOG2E, dot_dtype, interpreted, jit, processors, tl, triton, use_triton
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
    assert k.kind != "int4_token", "no kernel for keys by token"
    assert v.kind != "int4_channel", "no kernel for values by channel"
    assert k.data.shape[:3] == v.data.shape[:3]
    assert k.head_dim == v.head_dim == d
    assert heads % k.data.shape[1] == 0
    assert q.is_contiguous()
    assert q.is_floating_point()
    assert page_table.dtype == num_pages.dtype == torch.int32
    assert page_table.is_contiguous()
    assert page_table.shape[0] == num_pages.shape[0] == sequences
    scale = d**-0.5 if scale is None else scale
    if use_triton(q) and d in (32, 64, 128) and (k.kind != "plain" or dot_dtype(k.data) is not None):
        return _paged_decode_triton(q, k, v, page_table, num_pages, scale)
    return paged_decode_torch(q, k, v, page_table, num_pages, scale)


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
    """Join attention over disjoint key sets: outs [n, S, Hq, D], lses [n, S, Hq] -> out [S, Hq, D], lse [S, Hq]."""
    assert outs.shape[:3] == lses.shape
    assert outs.dtype == lses.dtype == torch.float32
    if use_triton(outs) and outs.is_contiguous() and lses.is_contiguous():
        return _merge_triton(outs, lses)
    lse = torch.logsumexp(lses, dim=0)
    weight = torch.exp(lses - torch.where(lse == -torch.inf, 0.0, lse))  # an empty set weighs 0, not NaN
    return (outs * weight[..., None]).sum(0), lse


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


@jit("table_width", "splits")
def _decode_kernel(
    q, k_data, k_scale, k_zero, v_data, v_scale, v_zero, page_table, num_pages, out, lse,
    table_width, splits, scale_log2,
    K_INT4: tl.constexpr, K_FP8: tl.constexpr, V_INT4: tl.constexpr, V_FP8: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    K_DOT: tl.constexpr, V_DOT: tl.constexpr, P_SHIFT: tl.constexpr, ASM: tl.constexpr, PAIRS: tl.constexpr,
    LN2: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    count = tl.load(num_pages + sequence)
    share = tl.cdiv(count, splits)
    begin = split * share
    end = tl.minimum(begin + share, count)

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
        page = tl.load(page_table + sequence * table_width + i).to(tl.int64) * KV_HEADS + head
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
            v = tl.load(v_data + page * (PAGE * D) + token[None, :] * D + channel[:, None]).to(V_DOT)  # [D, PAGE]
            acc = tl.dot(v, p.to(V_DOT), acc * shrink, input_precision="ieee")

    # An empty share leaves weight 0 and lse -inf.
    weight = tl.sum(total, 0)
    some = weight > 0
    inverse = 1.0 / tl.where(some, weight, 1.0)[None, :]
    part = ((split * tl.num_programs(2) + sequence) * KV_HEADS * GROUP + head * GROUP + column).to(tl.int64)
    if V_INT4:
        moved = tl.sum(offset, 0)[None, :]
        tl.store(out + part[None, :] * D + half[:, None], (acc_low + moved) * inverse, mask=real)
        tl.store(out + part[None, :] * D + HALF + half[:, None], (acc_high + moved) * inverse, mask=real)
    else:
        if V_FP8:
            inverse = inverse * tl.load(v_scale + head)
        tl.store(out + part[None, :] * D + channel[:, None], acc * inverse, mask=real)
    natural = (best - P_SHIFT + tl.math.log2(tl.where(some, weight, 1.0))) * LN2
    tl.store(lse + part, tl.where(some, natural, -float("inf")), mask=column < GROUP)


@jit("parts", "rows")
def _merge_kernel(outs, lses, out, lse, parts, rows, PARTS: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    channel = tl.arange(0, D)
    present = part < parts
    each = tl.load(lses + part * rows + row, mask=present, other=-float("inf"))
    best = tl.max(each, 0)
    best = tl.where(best == -float("inf"), 0.0, best)  # nothing anywhere: weights 0, not NaN
    weight = tl.exp(each - best)
    total = tl.sum(weight, 0)
    values = tl.load(outs + (part[:, None] * rows + row) * D + channel[None, :], mask=present[:, None], other=0.0)
    some = tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + channel, tl.sum(values * weight[:, None], 0) / some)
    tl.store(lse + row, tl.where(total > 0, best + tl.log(some), -float("inf")))


def _merge_triton(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts, sequences, heads, d = outs.shape
    out = torch.empty((sequences, heads, d), dtype=torch.float32, device=outs.device)
    lse = torch.empty((sequences, heads), dtype=torch.float32, device=outs.device)
    rows = sequences * heads
    _merge_kernel[(rows,)](outs, lses, out, lse, parts, rows, PARTS=triton.next_power_of_2(parts), D=d, num_warps=4)
    return out, lse


def _paged_decode_triton(
    q: torch.Tensor, k: PageTensors, v: PageTensors, page_table: torch.Tensor, num_pages: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, heads, d = q.shape
    kv_heads = k.data.shape[1]
    group = heads // kv_heads
    # Programs that fit a processor and pages in flight for each, by shared memory. The pipeliner spends two stages a
    # page, the first to read the page table. The grid depends on shapes alone: a captured CUDA graph serves every
    # length.
    resident, stages = (1, 5) if "plain" in (k.kind, v.kind) else (2, 7)
    splits = max(1, min(page_table.shape[1], resident * processors(q.device) // (sequences * kv_heads)))
    out = torch.empty((splits, sequences, heads, d), dtype=torch.float32, device=q.device)
    lse = torch.empty((splits, sequences, heads), dtype=torch.float32, device=q.device)
    k_dot, v_dot = _product_type(k), _product_type(v)
    _decode_kernel[(splits, kv_heads, sequences)](
        q, k.data, k.scale, k.zero, v.data, v.scale, v.zero, page_table, num_pages, out, lse,
        page_table.shape[1], splits, scale * LOG2E,
        K_INT4=k.kind == "int4_channel", K_FP8=k.kind == "fp8", V_INT4=v.kind == "int4_token", V_FP8=v.kind == "fp8",
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(8, triton.next_power_of_2(group)), D=d, PAGE=PAGE,
        # Probabilities are scaled up before they are rounded to float16, so that the long tail does not underflow.
        K_DOT=k_dot, V_DOT=v_dot, P_SHIFT=14 if v_dot == tl.float16 else 0,
        ASM=not interpreted, PAIRS=_CENTRED_PAIRS, LN2=LN2, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return _merge_triton(out, lse)


def _product_type(pages: PageTensors) -> object:
    """What products with these pages run in: e4m3 is exact in float16, centred codes in bfloat16."""
    if pages.kind == "plain":
        return dot_dtype(pages.data)
    if interpreted:
        return tl.float32
    return tl.float16 if pages.kind == "fp8" else tl.bfloat16
