"""Paged decode against plain float64 attention over the dequantized pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import close, run_on, storage  # noqa: F401

from lcconvert.kernels import backend
from lcconvert.kernels.kv_pages import (
    PAGE,
    PageTensors,
    dequantize_pages,
    quantize_fp8,
    quantize_k_int4,
    quantize_v_int4,
    store_16,
)
from lcconvert.kernels.paged_decode import merge_partials, paged_decode, paged_decode_torch


def pool(kind, seed, pages=5, heads=2, d=32, device="cpu"):
    generator = torch.manual_seed(seed)
    spread = torch.rand(heads, d, generator=generator) * 2
    x = torch.randn(pages, PAGE, heads, d, generator=generator) * spread
    x = (x + torch.randn(heads, d, generator=generator) * 2).to(device)
    if kind == "fp8":
        scale = (torch.rand(heads, generator=generator) * 0.3 + 0.1).to(device)  # differs by head, key, value; never 1
        return PageTensors("fp8", quantize_fp8(x, scale), scale)
    if kind == "plain":
        return PageTensors("plain", store_16(x if device == "cpu" else x.half()))
    return PageTensors(kind, *(quantize_k_int4 if kind == "int4_channel" else quantize_v_int4)(x))


def plain_attention(q, k, v, index):
    """float64 attention of q [Hq, D] over the listed pages -> (out, lse)."""
    group = q.shape[0] // k.data.shape[1]
    keys, values = (dequantize_pages(x, index).double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("hd,thd->ht", q.double(), keys) / q.shape[1] ** 0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values), scores.logsumexp(-1)


def table(rows, device="cpu"):
    """Page lists of unequal length -> (page_table, num_pages); unused entries are out of range."""
    out = torch.full((len(rows), max(map(len, rows))), 10**9, dtype=torch.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return out.to(device), torch.tensor([len(row) for row in rows], dtype=torch.int32, device=device)


LISTS = [[3, 1, 4], [0, 2, 2, 4, 1], [], [2]]
# Products run in float32 under the interpreter and in 16 bits on a GPU.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


@pytest.mark.parametrize("v_kind", ["plain", "fp8", "int4_token"])
@pytest.mark.parametrize("k_kind", ["plain", "fp8", "int4_channel"])
def test_every_pair_of_formats(device, k_kind, v_kind):
    k, v = pool(k_kind, 1, device=device), pool(v_kind, 2, device=device)
    q = torch.randn(len(LISTS), 6, 32, generator=torch.manual_seed(3)).to(device)
    out, lse = paged_decode(q, k, v, *table(LISTS, device))
    reference, reference_lse = paged_decode_torch(q, k, v, *table(LISTS, device), 32**-0.5)
    for s, row in enumerate(LISTS):
        if not row:
            assert (out[s] == 0).all()
            assert (lse[s] == -torch.inf).all()
            continue
        want, want_lse = plain_attention(q[s], k, v, torch.tensor(row, device=device))
        close(out[s], want, TOLERANCE[device])
        close(lse[s], want_lse, TOLERANCE[device])
        close(reference[s], want, 1e-4)
        close(reference_lse[s], want_lse, 1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(3, 3, 64), (8, 2, 128), (18, 2, 32)])
def test_head_shapes(device, heads, kv_heads, d):
    k, v = (pool(kind, 1, 3, kv_heads, d, device) for kind in ("int4_channel", "int4_token"))
    q = torch.randn(1, heads, d, generator=torch.manual_seed(3)).to(device)
    out, lse = paged_decode(q, k, v, *table([[2, 0]], device))
    want, want_lse = plain_attention(q[0], k, v, torch.tensor([2, 0], device=device))
    close(out[0], want, TOLERANCE[device])
    close(lse[0], want_lse, TOLERANCE[device])


def test_bfloat16_queries_and_pages(device):
    k = PageTensors("plain", pool("plain", 1, device=device).data.bfloat16())
    q = torch.randn(1, 4, 32, generator=torch.manual_seed(3)).to(device).bfloat16()
    out, _ = paged_decode(q, k, k, *table([[1, 0, 4]], device))
    assert out.dtype == torch.float32
    close(out[0], plain_attention(q[0], k, k, torch.tensor([1, 0, 4], device=device))[0], 2e-2)


def test_a_scale_of_ones_own(device):
    k, v = pool("int4_channel", 1, device=device), pool("int4_token", 2, device=device)
    q = torch.randn(1, 4, 32, generator=torch.manual_seed(3)).to(device)
    out, _ = paged_decode(q, k, v, *table([[1, 2]], device), scale=0.5)
    close(
        out[0], plain_attention(q[0] * 0.5 * 32**0.5, k, v, torch.tensor([1, 2], device=device))[0], TOLERANCE[device]
    )


@pytest.mark.parametrize("kind", ["int4", "plain"])
def test_pages_beyond_31_bits_of_offset(device, vast, kind):
    """The last page of a pool of more than 2^31 elements, which a 32-bit offset would miss."""
    d = 64
    if kind == "int4":
        data = vast(torch.uint8)
        data = data[: data.numel() // (PAGE * d // 2) * (PAGE * d // 2)].view(-1, 1, PAGE, d // 2)
        pages = len(data)
        extra = torch.zeros(1, dtype=torch.float16, device=device)
        k = PageTensors("int4_channel", data, extra.new_zeros(pages, 1, d), extra.new_zeros(pages, 1, d))
        v = PageTensors("int4_token", data, extra.new_zeros(pages, 1, PAGE), extra.new_zeros(pages, 1, PAGE))
        small_k, small_v = (pool(x.kind, 1, 1, 1, d, device) for x in (k, v))
        for big, small in ((k, small_k), (v, small_v)):
            big.scale[-1], big.zero[-1] = small.scale[0], small.zero[0]
        small_v = PageTensors("int4_token", small_k.data, small_v.scale, small_v.zero)  # keys and values share codes
    else:
        data = vast(torch.float16)
        data = data[: data.numel() // (PAGE * d) * (PAGE * d)].view(-1, 1, PAGE, d)
        pages = len(data)
        k = v = PageTensors("plain", data)
        small_k = small_v = pool("plain", 1, 1, 1, d, device)
    assert (pages - 1) * data[0].numel() >= 2**31
    data[-1] = small_k.data[0].to(data.dtype)
    q = torch.randn(1, 2, d, generator=torch.manual_seed(3)).to(device)
    out, _ = paged_decode(q, k, v, *table([[pages - 1]], device))
    close(out[0], plain_attention(q[0], small_k, small_v, torch.tensor([0], device=device))[0], 2e-2)


def test_parts_merge_into_the_whole(device):
    k, v = pool("int4_channel", 1, device=device), pool("int4_token", 2, device=device)
    q = torch.randn(1, 4, 32, generator=torch.manual_seed(3)).to(device)
    whole, whole_lse = paged_decode(q, k, v, *table([[0, 1, 2, 3]], device))
    parts = [paged_decode(q, k, v, *table([row], device)) for row in ([0, 1], [2], [3])]
    empty = (torch.zeros_like(whole), torch.full_like(whole_lse, -torch.inf))
    out, lse = merge_partials(*(torch.stack(x) for x in zip(*parts, empty)))
    close(out, whole, TOLERANCE[device])
    close(lse, whole_lse, TOLERANCE[device])
    out, lse = merge_partials(*(torch.stack(x) for x in (empty[:1] * 2, empty[1:] * 2)))
    assert torch.equal(out, empty[0])
    assert torch.equal(lse, empty[1])


def test_a_long_flat_tail_is_not_lost(device):
    """Many keys e^-15 below the best still weigh what they weigh, though float16 would round each of them off."""
    k = torch.zeros(40, PAGE, 1, 32)
    k[0, 0, 0] = 15.0 / 32**0.5
    v = torch.full_like(k, 2.0)
    v[0, 0, 0] = -2.0
    k, v = (x.to(device) for x in (k, v))
    scale = torch.tensor([1 / 32], device=device)
    k, v = (PageTensors("fp8", quantize_fp8(x, scale), scale) for x in (k, v))
    q = torch.ones(1, 1, 32, device=device)
    out, _ = paged_decode(q, k, v, *table([list(range(40))], device))
    want, _ = plain_attention(q[0], k, v, torch.arange(40, device=device))
    assert (out[0] + 2 - (want + 2)).abs().max() <= 0.02 * (want + 2).abs().max()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_where_pages_lie_does_not_matter(seed, lengths):
    """Moving every page and rewriting the tables gives the same result, in the same order of summation."""
    generator = torch.manual_seed(seed)
    k, v = pool("int4_channel", seed, 8, d=16), pool("int4_token", seed + 1, 8, d=16)
    rows = [torch.randperm(8, generator=generator)[:n].tolist() for n in lengths]
    moved = torch.randperm(8, generator=generator)
    place = moved.argsort().tolist()
    q = torch.randn(len(rows), 4, 16, generator=generator)
    shuffled = (PageTensors(x.kind, x.data[moved], x.scale[moved], x.zero[moved]) for x in (k, v))
    with backend.force("torch"):
        want = paged_decode(q, k, v, *table(rows))
        got = paged_decode(q, *shuffled, *table([[place[page] for page in row] for row in rows]))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
