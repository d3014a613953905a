"""KV cache pages: how 128 tokens of one layer's keys or values are stored, in 16, 8 or 4 bits.

Keys get a scale and zero point per channel over the page, because rotary channels carry large, slowly varying offsets
that per-token scales cannot absorb; values get one pair per token. Codes are split-half packed: byte j of a row is
channel j (low nibble) and channel j + D/2 (high), so a kernel needs no interleave. Nothing goes under 4 bits.

A Hadamard rotation of K before per-token scales is left out, because it lost. SmolLM2-135M in its own window, 2,048
tokens of prose in steps of 256 that read what came before from the cache, V per token throughout:

| K | KL, mean | KL, 99th percentile | same top token | perplexity |
|---|---|---|---|---|
| per channel and page (this) | 0.0031 | 0.035 | 97.1% | +0.32% |
| rotated, per token | 0.0042 | 0.062 | 96.4% | +0.40% |
| per token | 0.0067 | 0.064 | 96.0% | +0.73% |

The surprise: codes are made against the scale and zero point after they are rounded to float16, so what is stored
decodes consistently; a channel's minimum is `zero` and its maximum `zero + 15 * scale`, which page selection may use as
bounds.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lcconvert.kernels.backend import jit, tl, use_triton
from lcconvert.kernels.fp8 import E4M3_MAX, expand_e4m3

PAGE = 128  # tokens
Kind = Literal["plain", "fp8", "int4_channel", "int4_token"]
_CHUNK = 2**25  # elements quantized at once: bounds the float32 temporaries to a few hundred MB


@dataclass(frozen=True)
class PageTensors:
    """A pool of P pages of one layer's keys or values, for the decode kernel to index."""

    kind: Kind
    data: torch.Tensor  # [P, Hkv, 128, D] ("plain": 16/32-bit, "fp8": e4m3) or uint8 [P, Hkv, 128, D/2]
    scale: torch.Tensor | None = (
        None  # fp8: float32 [Hkv]; int4_channel: fp16 [P, Hkv, D]; int4_token: fp16 [P, Hkv, 128]
    )
    zero: torch.Tensor | None = None  # like scale, int4 only

    @property
    def head_dim(self) -> int:
        return self.data.shape[3] * (2 if self.kind.startswith("int4") else 1)

    def check(self) -> None:
        """Assert the layout every kernel relies on."""
        pages, heads, tokens, _ = self.data.shape
        assert tokens == PAGE
        assert self.data.is_contiguous()
        assert self.data.dtype == {"plain": self.data.dtype, "fp8": torch.float8_e4m3fn}.get(self.kind, torch.uint8)
        if self.kind == "plain":
            assert self.scale is None
            assert self.zero is None
            return
        shape = {"fp8": (heads,), "int4_channel": (pages, heads, self.head_dim), "int4_token": (pages, heads, PAGE)}
        for extra, wanted in ((self.scale, True), (self.zero, self.kind != "fp8")):
            assert (extra is not None) == wanted, f"{self.kind} pages: scale or zero missing or unexpected"
            if extra is not None:
                assert extra.shape == shape[self.kind], f"{tuple(extra.shape)} for {self.kind} pages"
                assert extra.is_contiguous()
                assert extra.dtype == (torch.float32 if self.kind == "fp8" else torch.float16)


def _affine4(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [P, Hkv, 128, D] -> codes uint8 [P, Hkv, 128, D/2], scale and zero fp16, reduced over `dim`."""
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale, zero = ((high - low) / 15.0).half(), low.half()
    step = scale.float()
    step = torch.where(step > 0, step, torch.ones_like(step))
    codes = (x - zero.float()).div_(step).add_(0.5).floor_().clamp_(0, 15).to(torch.uint8)
    half = x.shape[-1] // 2
    return codes[..., :half] | (codes[..., half:] << 4), scale.squeeze(dim), zero.squeeze(dim)


def _quantize_int4(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pages, tokens, heads, d = _page_shape(x)
    assert d % 2 == 0
    codes = torch.empty((pages, heads, tokens, d // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((pages, heads, d if dim == 2 else tokens), dtype=torch.float16, device=x.device)
    zero = torch.empty((pages, heads, d if dim == 2 else tokens), dtype=torch.float16, device=x.device)
    if use_triton(x) and x.stride(3) == 1 and d & (d - 1) == 0:
        _quantize_kernel[(pages, heads)](
            x, codes, scale, zero, x.stride(0), x.stride(1), x.stride(2), D=d, PAGE=tokens, BY_CHANNEL=dim == 2
        )
        return codes, scale, zero
    step = max(1, _CHUNK // (tokens * heads * d))
    for start in range(0, pages, step):
        part = slice(start, start + step)
        codes[part], scale[part], zero[part] = _affine4(x[part].transpose(1, 2), dim)
    return codes, scale, zero


@jit()
def _quantize_kernel(
    x, codes, scale, zero, x_page, x_token, x_head, D: tl.constexpr, PAGE: tl.constexpr, BY_CHANNEL: tl.constexpr
):
    HALF: tl.constexpr = D // 2
    page = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    unit = page * tl.num_programs(1) + head
    token = tl.arange(0, PAGE)
    half = tl.arange(0, HALF)
    source = x + page * x_page + head * x_head + token[:, None] * x_token + half[None, :]
    low = tl.load(source).to(tl.float32)  # [PAGE, HALF]
    high = tl.load(source + HALF).to(tl.float32)
    if BY_CHANNEL:
        low_codes, low_scale, low_zero = _affine(low, tl.min(low, 0), tl.max(low, 0), 0)
        high_codes, high_scale, high_zero = _affine(high, tl.min(high, 0), tl.max(high, 0), 0)
        tl.store(scale + unit * D + half, low_scale)
        tl.store(scale + unit * D + HALF + half, high_scale)
        tl.store(zero + unit * D + half, low_zero)
        tl.store(zero + unit * D + HALF + half, high_zero)
    else:
        smallest = tl.minimum(tl.min(low, 1), tl.min(high, 1))
        largest = tl.maximum(tl.max(low, 1), tl.max(high, 1))
        low_codes, row_scale, row_zero = _affine(low, smallest, largest, 1)
        high_codes, row_scale, row_zero = _affine(high, smallest, largest, 1)
        tl.store(scale + unit * PAGE + token, row_scale)
        tl.store(zero + unit * PAGE + token, row_zero)
    target = codes + unit * (PAGE * HALF) + token[:, None] * HALF + half[None, :]
    tl.store(target, low_codes | (high_codes << 4))


@jit()
def _affine(x, smallest, largest, AXIS: tl.constexpr):
    scale = tl.div_rn(largest - smallest, 15.0).to(tl.float16)
    zero = smallest.to(tl.float16)
    step = scale.to(tl.float32)
    step = tl.expand_dims(tl.where(step > 0, step, 1.0), AXIS)
    steps = tl.floor(tl.div_rn(x - tl.expand_dims(zero.to(tl.float32), AXIS), step) + 0.5)
    return tl.minimum(tl.maximum(steps, 0.0), 15.0).to(tl.uint8), scale, zero


def _page_shape(x: torch.Tensor) -> tuple[int, int, int, int]:
    assert x.shape[1:2] == (PAGE,), f"pages are [P, {PAGE}, Hkv, D], got {tuple(x.shape)}"
    pages, tokens, heads, d = x.shape
    return pages, tokens, heads, d


def quantize_k_int4(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k [P, 128, Hkv, D] -> codes uint8 [P, Hkv, 128, D/2], scale fp16 [P, Hkv, D], zero fp16 [P, Hkv, D].

    k ~= code * scale + zero per channel of a page, codes 0..15.
    """
    return _quantize_int4(k, 2)


def quantize_v_int4(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """v [P, 128, Hkv, D] -> codes uint8 [P, Hkv, 128, D/2], scale fp16 [P, Hkv, 128], zero fp16 [P, Hkv, 128]."""
    return _quantize_int4(v, 3)


def quantize_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [P, 128, Hkv, D] with scale float32 [Hkv] -> e4m3 [P, Hkv, 128, D] of x / scale, saturating at 448."""
    pages, tokens, heads, d = _page_shape(x)
    assert scale.shape == (heads,)
    assert scale.dtype == torch.float32
    out = torch.empty((pages, heads, tokens, d), dtype=torch.float8_e4m3fn, device=x.device)
    step = max(1, _CHUNK // (tokens * heads * d))
    for start in range(0, pages, step):
        part = x[start : start + step].transpose(1, 2).float() / scale[:, None, None]
        out[start : start + step] = part.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return out


def store_16(x: torch.Tensor) -> torch.Tensor:
    """x [P, 128, Hkv, D] -> [P, Hkv, 128, D], same dtype."""
    _page_shape(x)
    return x.transpose(1, 2).contiguous()


def expand_codes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., D/2] -> float32 [..., D], values 0..15 in channel order."""
    out = torch.empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=torch.float32, device=codes.device)
    out[..., : codes.shape[-1]] = codes & 15
    out[..., codes.shape[-1] :] = codes >> 4
    return out


def dequantize_k_int4(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Inverse of `quantize_k_int4`: -> [P, 128, Hkv, D] of `dtype`."""
    values = expand_codes(codes).mul_(scale.float()[:, :, None]).add_(zero.float()[:, :, None])
    return values.to(dtype).transpose(1, 2)


def dequantize_v_int4(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Inverse of `quantize_v_int4`: -> [P, 128, Hkv, D] of `dtype`."""
    values = expand_codes(codes).mul_(scale.float()[..., None]).add_(zero.float()[..., None])
    return values.to(dtype).transpose(1, 2)


def dequantize_fp8(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Inverse of `quantize_fp8`: -> [P, 128, Hkv, D] of `dtype`."""
    return expand_e4m3(data).mul_(scale[:, None, None]).to(dtype).transpose(1, 2)


def dequantize_pages(pages: PageTensors, index: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The listed pages (int64 [n]) of a pool in token order: [n * 128, Hkv, D] of `dtype`."""
    data = pages.data.view(torch.uint8)[index].view(pages.data.dtype) if pages.kind == "fp8" else pages.data[index]
    if pages.kind == "plain":
        out = data.to(dtype).transpose(1, 2)
    elif pages.kind == "fp8":
        assert pages.scale is not None
        out = dequantize_fp8(data, pages.scale, dtype)
    else:
        assert pages.scale is not None
        assert pages.zero is not None
        expand = dequantize_k_int4 if pages.kind == "int4_channel" else dequantize_v_int4
        out = expand(data, pages.scale[index], pages.zero[index], dtype)
    return out.flatten(0, 1)
