"""Rotary position embedding of queries and keys, as they lie in the merged q, k, v product, with optional head norm.

Layout is HF's half-split: channel i of a head turns with channel i + D/2, by tables cos and sin float32 [T, D/2].
`rotary` serves prefill, where keys go to their own tensor; `rotate_append` serves decode, where one launch rotates the
queries and puts the new key and value straight into their cache page.

The surprise: a normed head is rounded to its dtype before it turns, because that is what the models were trained with.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

import torch

from lcconvert.kernels.backend import jit, tl, triton, use_triton
from lcconvert.kernels.kv_pages import PAGE
from lcconvert.kernels.rms_norm import rms_norm_torch

HeadNorm = tuple[torch.Tensor, float]  # weight [D], eps


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    norm: HeadNorm | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, heads, D], rows at any stride, turned by cos and sin float32 [T, D/2] -> `out` [T, heads, D].

    `norm` is a root-mean-square norm over D that comes first. `out` may be x itself; None makes a new tensor.
    """
    tokens, _, d = x.shape
    _check_tables(cos, sin, tokens, d)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert x.stride(2) == out.stride(2) == 1
    assert norm is None or norm[0].shape == (d,)
    if use_triton(x) and _supported(d):
        _rotary_triton(x, cos, sin, norm, out)
    else:
        out.copy_(_rotate_torch(x, cos, sin, norm))
    return out


def rotate_append(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page: torch.Tensor,
    row: torch.Tensor,
    *,
    heads: int,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
) -> torch.Tensor:
    """qkv [S, (heads + 2 * Hkv) * D], one new token of S sequences -> queries [S, heads, D], normed and turned.

    The keys, normed and turned, and the values go to row `row[s]` of page `page[s]` (int32 [S], all distinct) of
    `k_pages` and `v_pages` [P, Hkv, 128, D]. cos and sin are float32 [S, D/2].
    """
    sequences = qkv.shape[0]
    _, kv_heads, rows, d = k_pages.shape
    _check_tables(cos, sin, sequences, d)
    assert rows == PAGE
    assert qkv.shape[1] == (heads + 2 * kv_heads) * d
    assert qkv.stride(1) == 1
    assert k_pages.shape == v_pages.shape
    assert k_pages.is_contiguous()
    assert v_pages.is_contiguous()
    assert k_pages.dtype == v_pages.dtype == qkv.dtype
    assert page.dtype == row.dtype == torch.int32
    assert page.shape == row.shape == (sequences,)
    assert (q_norm is None) == (k_norm is None)
    if use_triton(qkv) and _supported(d):
        return _rotate_append_triton(qkv, cos, sin, k_pages, v_pages, page, row, heads, q_norm, k_norm)
    q, k, v = qkv.view(sequences, -1, d).split((heads, kv_heads, kv_heads), dim=1)
    k_pages[page.long(), :, row.long()] = _rotate_torch(k, cos, sin, k_norm)
    v_pages[page.long(), :, row.long()] = v
    return _rotate_torch(q, cos, sin, q_norm)


def _check_tables(cos: torch.Tensor, sin: torch.Tensor, tokens: int, d: int) -> None:
    assert cos.shape == sin.shape == (tokens, d // 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.is_contiguous()
    assert sin.is_contiguous()


def _supported(d: int) -> bool:
    return d >= 32 and d & (d - 1) == 0


def _rotate_torch(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: HeadNorm | None) -> torch.Tensor:
    """The reference: x [T, heads, D] -> a new tensor of its shape and dtype."""
    if norm is not None:
        x = rms_norm_torch(x, *norm)
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [T, 1, D/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@jit()
def _turned(first, second, cos, sin, weight, eps, NORM: tl.constexpr, HALF: tl.constexpr):
    # Both halves [heads, D/2] of some heads, cos and sin [1, D/2] -> the halves, normed and turned, float32.
    a, b = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        channel = tl.arange(0, HALF)
        factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        a = (a * factor * tl.load(weight + channel).to(tl.float32)[None]).to(first.dtype).to(tl.float32)
        b = (b * factor * tl.load(weight + HALF + channel).to(tl.float32)[None]).to(first.dtype).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@jit("heads")
def _rotary_kernel(
    x, cos, sin, weight, out, x_row, x_head, out_row, out_head, heads, eps,
    NORM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    real = (head < heads)[:, None]
    channel = tl.arange(0, HALF)
    cos_row = tl.load(cos + row * HALF + channel)[None]
    sin_row = tl.load(sin + row * HALF + channel)[None]
    source = x + row * x_row + head[:, None] * x_head + channel[None]
    first = tl.load(source, mask=real, other=0.0)
    second = tl.load(source + HALF, mask=real, other=0.0)
    first, second = _turned(first, second, cos_row, sin_row, weight, eps, NORM, HALF)
    target = out + row * out_row + head[:, None] * out_head + channel[None]
    tl.store(target, first.to(out.dtype.element_ty), mask=real)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask=real)


@jit("heads", "kv_heads")
def _rotate_append_kernel(
    qkv, cos, sin, q_weight, k_weight, q, k_pages, v_pages, page, page_row, qkv_stride, heads, kv_heads, q_eps, k_eps,
    NORM: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    # One head a program: heads of q first, then of k, then of v.
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, HALF)[None]
    source = qkv + sequence * qkv_stride + head * (2 * HALF) + channel
    first, second = tl.load(source), tl.load(source + HALF)
    cos_row = tl.load(cos + sequence * HALF + channel)
    sin_row = tl.load(sin + sequence * HALF + channel)
    place = tl.load(page + sequence).to(tl.int64) * kv_heads
    within = tl.load(page_row + sequence)
    if head < heads:
        a, b = _turned(first, second, cos_row, sin_row, q_weight, q_eps, NORM, HALF)
        target = q + (sequence * heads + head) * (2 * HALF) + channel
        tl.store(target, a.to(q.dtype.element_ty))
        tl.store(target + HALF, b.to(q.dtype.element_ty))
    elif head < heads + kv_heads:
        a, b = _turned(first, second, cos_row, sin_row, k_weight, k_eps, NORM, HALF)
        target = k_pages + ((place + head - heads) * PAGE + within) * (2 * HALF) + channel
        tl.store(target, a.to(k_pages.dtype.element_ty))
        tl.store(target + HALF, b.to(k_pages.dtype.element_ty))
    else:
        target = v_pages + ((place + head - heads - kv_heads) * PAGE + within) * (2 * HALF) + channel
        tl.store(target, first)
        tl.store(target + HALF, second)


def _rotary_triton(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: HeadNorm | None, out: torch.Tensor
) -> None:
    tokens, heads, d = x.shape
    block = min(triton.next_power_of_2(heads), 4096 // d if tokens > 64 else 2)
    weight, eps = (None, 0.0) if norm is None else norm
    _rotary_kernel[(tokens, triton.cdiv(heads, block))](
        x, cos, sin, weight, out, x.stride(0), x.stride(1), out.stride(0), out.stride(1), heads, eps,
        NORM=norm is not None, HALF=d // 2, HEADS=block, num_warps=4 if tokens > 64 else 1,
    )  # fmt: skip


def _rotate_append_triton(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
    page: torch.Tensor, row: torch.Tensor, heads: int, q_norm: HeadNorm | None, k_norm: HeadNorm | None,
) -> torch.Tensor:  # fmt: skip
    sequences, kv_heads, d = qkv.shape[0], k_pages.shape[1], k_pages.shape[3]
    q = torch.empty((sequences, heads, d), dtype=qkv.dtype, device=qkv.device)
    q_weight, q_eps = (None, 0.0) if q_norm is None else q_norm
    k_weight, k_eps = (None, 0.0) if k_norm is None else k_norm
    _rotate_append_kernel[(sequences, heads + 2 * kv_heads)](
        qkv, cos, sin, q_weight, k_weight, q, k_pages, v_pages, page, row, qkv.stride(0), heads, kv_heads,
        q_eps, k_eps, NORM=q_norm is not None, HALF=d // 2, PAGE=PAGE, num_warps=1,
    )  # fmt: skip
    return q
