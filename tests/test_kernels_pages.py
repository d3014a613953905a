"""Page selection against a sort of the bounds, and the bounds against the keys they bound."""

import pytest
import torch
from kernel_tools import run_on, storage  # noqa: F401

from lcconvert.kernels.kv_pages import PAGE, PageTensors, dequantize_pages, quantize_k_int4
from lcconvert.kernels.select_pages import page_bounds_torch, select_pages


def keys(pages, heads=2, d=32, seed=1, device="cpu"):
    """Pages whose channels have offsets of their own that drift from page to page, as rotary channels do."""
    generator = torch.manual_seed(seed)
    offset = torch.randn(1, 1, heads, d, generator=generator) * 3 + torch.randn(pages, 1, heads, d, generator=generator)
    x = torch.randn(pages, PAGE, heads, d, generator=generator) + offset
    return PageTensors("int4_channel", *quantize_k_int4(x.to(device)))


def table_of(rows, width, device):
    """Page lists -> (table, pages); unused entries are out of range."""
    table = torch.full((len(rows), width), 10**9, dtype=torch.int32)
    for s, row in enumerate(rows):
        table[s, : len(row)] = torch.as_tensor(row, dtype=torch.int32)
    return table.to(device), torch.tensor([len(row) for row in rows], dtype=torch.int32, device=device)


def chosen(result):
    out, tokens = result
    return [[row[: count // PAGE].tolist() for row, count in zip(*pair)] for pair in zip(out, tokens.tolist())]


def queries(sequences, heads, d, device):
    return torch.randn(sequences, heads, d, generator=torch.manual_seed(3)).to(device)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "share", "at_least"), [(6, 2, 32, 0.3, 1), (3, 3, 64, 0.5, 2), (8, 2, 128, 0.05, 6)]
)
def test_the_best_bounds_are_chosen(device, heads, kv_heads, d, share, at_least):
    k = keys(24, kv_heads, d, device=device)
    generator = torch.manual_seed(5)
    rows = [torch.randperm(24, generator=generator)[:n].tolist() for n in (20, 0, 1, 3, 24)]
    table, pages = table_of(rows, 24, device)
    q = queries(len(rows), heads, d, device)
    got = select_pages(q, k, table, pages, share=share, at_least=at_least, newest=2)
    assert got[0].shape[2] == max(at_least, 2, int(-(-share * 24 // 1)))
    for s, row in enumerate(rows):
        wanted = min(len(row), max(at_least, 2, int(-(-share * len(row) // 1))))
        keys64 = dequantize_bounds(k, row, device)
        for head in range(kv_heads):
            group = q[s, head * (heads // kv_heads) : (head + 1) * (heads // kv_heads)].double()
            bound = (group[:, None] * torch.where(group[:, None] > 0, keys64[1][:, head], keys64[0][:, head])).sum(-1)
            bound = bound.amax(0)
            bound[max(0, len(row) - 2) :] = torch.inf
            best = sorted(bound.argsort(descending=True, stable=True)[:wanted].tolist())
            assert chosen(got)[s][head] == [row[i] for i in best]
    again = select_pages(q, k, table, pages, share=share, at_least=at_least, newest=2)
    assert chosen(again) == chosen(got)


def dequantize_bounds(k, row, device):
    """Smallest and largest value [n, Hkv, D] each channel of the listed pages can store, in float64."""
    index = torch.tensor(row, dtype=torch.long, device=device)
    low = k.zero[index].double()
    return low, low + 15 * k.scale[index].double()


def test_no_key_exceeds_its_bound():
    k = keys(8)
    q = queries(1, 6, 32, "cpu")[0]
    index = torch.arange(8)
    bound = page_bounds_torch(q, k, index)  # [Hkv, n]
    values = dequantize_pages(k, index).unflatten(0, (8, PAGE))  # [n, 128, Hkv, D]
    products = torch.einsum("hgd,nthd->hgnt", q.view(2, 3, 32), values).amax((1, 3))
    assert (products <= bound + 1e-4).all()
    assert (bound - products).min() < bound.abs().max()


def test_of_equals_the_earlier_are_chosen(device):
    k = keys(1, device=device)
    k = PageTensors(k.kind, *(x.expand(40, *x.shape[1:]).contiguous() for x in (k.data, k.scale, k.zero)))
    table, pages = table_of([range(40)], 40, device)
    got = select_pages(queries(1, 4, 32, device), k, table, pages, share=0.25, at_least=1, newest=3)
    assert chosen(got) == [[[*range(7), 37, 38, 39]] * 2]


@pytest.mark.parametrize("share", [0.04, 0.3, 1.0])
def test_a_share_is_rounded_up_once(device, share):
    k = keys(1, heads=1, device=device)
    for count in (1, 10, 25, 26, 100):
        table, pages = table_of([[0] * count], 100, device)
        _, tokens = select_pages(queries(1, 1, 32, device), k, table, pages, share=share, at_least=1, newest=1)
        assert tokens.tolist() == [[PAGE * max(1, -(-round(share * 100) * count // 100))]]


class OnlyBounds(PageTensors):
    """Pages whose codes would not fit: selection never reads them."""

    def check(self):
        assert self.scale.shape == self.zero.shape


def test_pages_beyond_31_bits_of_offset(device, vast):
    """The best page is the last one, whose scales lie behind what 32 bits reach."""
    d = 128
    scale = vast(torch.float16)
    scale = scale[: scale.numel() // d * d].view(-1, 1, d)
    count = len(scale)
    assert (count - 1) * d >= 2**31
    k = OnlyBounds("int4_channel", scale.new_empty(1, 1, PAGE, d // 2, dtype=torch.uint8), scale, scale)
    scale[0], scale[1], scale[-1] = 1, 2, 3
    table, pages = table_of([[0, 1, count - 1]], 3, device)
    q = torch.ones(1, 1, d, device=device)
    assert chosen(select_pages(q, k, table, pages, share=0.1, at_least=1, newest=0)) == [[[count - 1]]]
