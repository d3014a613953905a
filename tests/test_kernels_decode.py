"""Attention over pages against plain float64 attention over the dequantized tokens."""

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
from lcconvert.kernels.paged_decode import PagePart, attend_pages, attend_pages_torch


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


def attention(q, parts, scale=None):
    """float64 attention of q [S, Hq, D] over every part's tokens, head by head -> [S, Hq, D]."""
    sequences, heads, d = q.shape
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(sequences, heads, d, dtype=torch.float64, device=q.device)
    for s in range(sequences):
        for h in range(heads):
            rows = [kv_rows(part, s, h // (heads // part.k.data.shape[1])) for part in parts]
            keys, values = (torch.cat(x) for x in zip(*rows))
            if len(keys):
                out[s, h] = (keys @ q[s, h].double() * scale).softmax(0) @ values
    return out


def kv_rows(part, s, head):
    """Keys and values [n, D] one KV head of a sequence attends to, in float64."""
    table, tokens = part.table[s], part.tokens[s]
    if table.dim() == 2:
        table, tokens = table[head], tokens[head]
    index = table[: -(-int(tokens) // PAGE)].long()
    return (dequantize_pages(pages, index)[: int(tokens), head].double() for pages in (part.k, part.v))


def listed(rows, device="cpu"):
    """Page lists of unequal length, in full -> (table, tokens); unused entries are out of range."""
    out = torch.full((len(rows), max(map(len, rows))), 10**9, dtype=torch.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return out.to(device), torch.tensor([PAGE * len(row) for row in rows], dtype=torch.int32, device=device)


def queries(sequences, heads, d, device, dtype=torch.float32):
    return torch.randn(sequences, heads, d, generator=torch.manual_seed(3)).to(device, dtype)


def exact(tokens, device, seed=5, **shape):
    """Two plain pages a sequence with `tokens` tokens in them; the rest is NaN, as fresh memory may be."""
    k, v = (pool("plain", seed + i, 2 * len(tokens), device=device, **shape) for i in range(2))
    table = torch.arange(2 * len(tokens), dtype=torch.int32).view(-1, 2)
    for s, count in enumerate(tokens):
        for pages in (k, v):
            own = pages.data[2 * s : 2 * s + 2].transpose(1, 2).flatten(0, 1)  # [256, Hkv, D], a copy
            own[count:] = torch.nan
            pages.data[2 * s : 2 * s + 2] = own.unflatten(0, (2, PAGE)).transpose(1, 2)
    return PagePart(k, v, table.to(device), torch.tensor(tokens, dtype=torch.int32, device=device))


LISTS = [[3, 1, 4], [0, 2, 2, 4, 1], [], [2]]
# Products run in float32 under the interpreter and in 16 bits on a GPU.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


@pytest.mark.parametrize("v_kind", ["plain", "fp8", "int4_token"])
@pytest.mark.parametrize("k_kind", ["plain", "fp8", "int4_channel"])
def test_every_pair_of_formats(device, k_kind, v_kind):
    part = PagePart(pool(k_kind, 1, device=device), pool(v_kind, 2, device=device), *listed(LISTS, device))
    q = queries(len(LISTS), 6, 32, device)
    out, want = attend_pages(q, [part]), attention(q, [part])
    assert (out[2] == 0).all()
    close(out, want, TOLERANCE[device])
    close(attend_pages_torch(q, [part], 32**-0.5), want, 1e-4)
    assert torch.equal(attend_pages(q, [part]), out)


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(3, 3, 64), (8, 2, 128), (18, 2, 32)])
def test_head_shapes(device, heads, kv_heads, d):
    k, v = (pool(kind, 1, 3, kv_heads, d, device) for kind in ("int4_channel", "int4_token"))
    parts = [exact([130], device, heads=kv_heads, d=d), PagePart(k, v, *listed([[2, 0]], device))]
    q = queries(1, heads, d, device)
    close(attend_pages(q, parts), attention(q, parts), TOLERANCE[device])


def test_both_ends_and_the_middle(device):
    """What decode calls: exact pages, one of them partly filled, and quantized pages chosen for each KV head."""
    k, v = pool("int4_channel", 1, device=device), pool("int4_token", 2, device=device)
    table = torch.full((4, 2, 3), 10**9, dtype=torch.int32)
    pages = torch.tensor([[3, 1], [0, 0], [2, 0], [1, 1]])
    for s in range(4):
        for head in range(2):
            table[s, head, : pages[s, head]] = torch.randperm(5)[: pages[s, head]].int()
    middle = PagePart(k, v, table.to(device), (pages * PAGE).int().to(device))
    parts = [exact([256, 0, 1, 129], device), middle]
    q = queries(4, 6, 32, device)
    out, want = attend_pages(q, parts), attention(q, parts)
    assert (out[1] == 0).all()
    close(out, want, TOLERANCE[device])
    close(attend_pages_torch(q, parts, 32**-0.5), want, 1e-4)
    assert torch.equal(attend_pages(q, parts), out)


def test_sinks(device):
    """As one more score of each head, of no value; far above the others, among them and far below."""
    k, v = pool("int4_channel", 1, device=device), pool("int4_token", 2, device=device)
    parts = [exact([256, 0, 1, 129], device), PagePart(k, v, *listed([[3, 1], [], [], [2]], device))]
    q, sinks = queries(4, 6, 32, device), torch.tensor([-80.0, -1.0, 0.5, 3.0, 8.0, 80.0], device=device)
    keys = [[torch.cat([next(iter(kv_rows(part, s, h // 3))) for part in parts]) for h in range(6)] for s in range(4)]
    lse = torch.stack([
        torch.stack([(rows @ q[s, h].double() * 32**-0.5).logsumexp(0) for h, rows in enumerate(keys[s])])
        for s in range(4)
    ])  # fmt: skip
    want = attention(q, parts) * torch.sigmoid(lse - sinks)[..., None]
    close(attend_pages(q, parts, sinks=sinks), want, TOLERANCE[device])
    close(attend_pages_torch(q, parts, 32**-0.5, sinks), want, 1e-4)


def test_one_long_sequence_among_short_ones(device):
    k, v = pool("int4_channel", 1, device=device), pool("int4_token", 2, device=device)
    rows = [[1], [], [2, 4, 0, 1, 3] * 8, [3, 3], [4]]
    part = PagePart(k, v, *listed(rows, device))
    q = queries(len(rows), 2, 32, device)
    close(attend_pages(q, [part]), attention(q, [part]), TOLERANCE[device])


def test_bfloat16_queries_and_pages(device):
    k = PageTensors("plain", pool("plain", 1, device=device).data.bfloat16())
    q = queries(1, 4, 32, device, torch.bfloat16)
    part = PagePart(k, k, *listed([[1, 0, 4]], device))
    out = attend_pages(q, [part])
    assert out.dtype == torch.bfloat16
    close(out, attention(q, [part]), 2e-2)


def test_a_scale_of_ones_own(device):
    k, v = pool("int4_channel", 1, device=device), pool("int4_token", 2, device=device)
    q = queries(1, 4, 32, device)
    part = PagePart(k, v, *listed([[1, 2]], device))
    close(attend_pages(q, [part], scale=0.5), attention(q, [part], 0.5), TOLERANCE[device])


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
    q = queries(1, 2, d, device)
    want = attention(q, [PagePart(small_k, small_v, *listed([[0]], device))])
    close(attend_pages(q, [PagePart(k, v, *listed([[pages - 1]], device))]), want, 2e-2)


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
    part = PagePart(k, v, *listed([list(range(40))], device))
    want = attention(q, [part])
    assert (attend_pages(q, [part]) - want).abs().max() <= 0.02 * (want + 2).abs().max()


def test_long_sums_do_not_drift(device):
    """Pages listed a thousand times over weigh what they weigh once, in the small mean that a flat attention leaves."""
    k = pool("int4_channel", 1, 8, 8, 128, device)
    noise = torch.randn(8, PAGE, 8, 128, generator=torch.manual_seed(2)).to(device)
    v = PageTensors("int4_token", *quantize_v_int4(noise))
    q = queries(1, 8, 128, device) * 0.01
    pages = list(range(8))
    want = attention(q, [PagePart(k, v, *listed([pages], device))])
    times = {"cpu": 2, "cuda": 1024}[device]
    got = attend_pages(q, [PagePart(k, v, *listed([pages * times], device))])
    close(got, want, 5e-3)


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
        want = attend_pages(q, [PagePart(k, v, *listed(rows))])
        got = attend_pages(q, [PagePart(*shuffled, *listed([[place[page] for page in row] for row in rows]))])
    assert torch.equal(got, want)


@pytest.mark.parametrize(("k_kind", "v_kind"), [("int4_channel", "int4_token"), ("fp8", "int4_token"), ("fp8", "fp8")])
def test_a_million_tokens(device, k_kind, v_kind):
    """The last query of a 1M context against float64 attention over the dequantized tokens: within 1%, twice alike."""
    pages = 8190 if device == "cuda" else 3
    d = 128 if device == "cuda" else 32
    k, v = (pool(kind, seed, pages, d=d, device=device) for seed, kind in enumerate((k_kind, v_kind)))
    table = torch.randperm(pages, generator=torch.manual_seed(6)).to(device, torch.int32)[None]
    far = PagePart(k, v, table, torch.tensor([PAGE * pages], dtype=torch.int32, device=device))
    q = queries(1, 8, d, device, torch.float32 if device == "cpu" else torch.bfloat16)
    parts = [exact([255], device, d=d), far]
    got = attend_pages(q, parts)
    close(got, attention(q, parts), 1e-2)
    assert torch.equal(got, attend_pages(q, parts))
