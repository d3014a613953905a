"""Allocating, filling and growing the page tensors of one layer, for each way a page can be stored.

The arithmetic is the kernels'; this file only knows which of it belongs to which kind.
"""

from __future__ import annotations

import torch

from lcconvert.kernels import kv_pages
from lcconvert.kernels.kv_pages import Kind, PageTensors
from lcconvert.runtime.sidecar import PAGE


def empty_pages(
    kind: Kind,
    count: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    fp8_scale: torch.Tensor | None = None,
) -> PageTensors:
    """Zeroed storage for `count` pages of one layer's K or V; `fp8_scale` is float32 [heads], needed for fp8 alone."""

    def zeros(*shape: int, of: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, heads, *shape, dtype=of, device=device)

    if kind == "plain":
        return PageTensors(kind, zeros(PAGE, dim, of=dtype), None, None)
    if kind == "fp8":
        return PageTensors(kind, zeros(PAGE, dim, of=torch.float8_e4m3fn), fp8_scale, None)
    params = dim if kind == "int4_channel" else PAGE
    codes = zeros(PAGE, dim // 2, of=torch.uint8)
    return PageTensors(kind, codes, zeros(params, of=torch.float16), zeros(params, of=torch.float16))


def nbytes(pages: PageTensors) -> int:
    """Bytes that grow with the number of pages (an fp8 scale does not)."""
    params = 0 if pages.zero is None else 2 * pages.zero.nbytes
    return pages.data.nbytes + params


def write_pages(pages: PageTensors, index: torch.Tensor, x: torch.Tensor) -> None:
    """Stores exact x [P, 128, Hkv, D] into the pages numbered by `index` int64 [P]."""
    if pages.kind == "plain":
        pages.data[index] = kv_pages.store_16(x).to(pages.data.dtype)
    elif pages.kind == "fp8":
        assert pages.scale is not None
        codes = kv_pages.quantize_fp8(x, pages.scale)
        pages.data.view(torch.uint8)[index] = codes.view(torch.uint8)  # indexing is not defined for float8 everywhere
    else:
        assert pages.scale is not None
        assert pages.zero is not None
        quantize = kv_pages.quantize_k_int4 if pages.kind == "int4_channel" else kv_pages.quantize_v_int4
        pages.data[index], pages.scale[index], pages.zero[index] = quantize(x)


def grown(pages: PageTensors, count: int) -> PageTensors:
    """A copy with room for `count` pages, the old ones first."""
    old, heads, _, width = pages.data.shape
    dim = width if pages.kind in ("plain", "fp8") else 2 * width
    fp8_scale = pages.scale if pages.kind == "fp8" else None
    new = empty_pages(pages.kind, count, heads, dim, pages.data.dtype, pages.data.device, fp8_scale)
    new.data.view(torch.uint8)[:old] = pages.data.view(torch.uint8)
    if pages.zero is not None:
        assert pages.scale is not None
        assert new.scale is not None
        assert new.zero is not None
        new.scale[:old], new.zero[:old] = pages.scale, pages.zero
    return new
