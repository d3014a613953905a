"""Times the kernels at the shapes of Llama-3.1-8B beside what the card can do: `python -m lcconvert.kernels.bench`.

One JSON line a case. Memory-bound kernels report TB/s of the bytes they must read, the others TFLOP/s of the work they
must do (only listed blocks count, the diagonal as half). Ceilings are measured in the same run: a large copy and a
large matrix product. Medians over repeats, timed by events on the device.

The surprise: small weights would be timed out of the L2 cache, so the matrix-vector case walks over enough copies to
miss it, inside one CUDA graph so that launching does not count.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch

from lcconvert.kernels.int4 import int4_matmul
from lcconvert.kernels.kv_pages import PAGE, Kind, PageTensors, quantize_k_int4, quantize_v_int4
from lcconvert.kernels.paged_decode import PagePart, attend_pages
from lcconvert.kernels.select_blocks import pool_keys, select_blocks
from lcconvert.kernels.select_pages import select_pages
from lcconvert.kernels.sparse_prefill import BLOCK, BlockLists, block_sparse_attention

HEADS, KV_HEADS, D, HIDDEN, INNER = 32, 8, 128, 4096, 14336
GROUP = 128  # weights a scale covers


def milliseconds(run: Callable[[], object], repeats: int = 7, warm_up: int = 2) -> float:
    """Median device time of one call."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """`run` as one CUDA graph."""
    run()  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def ceilings() -> tuple[float, float]:
    """(TB/s read plus written by a 2 GiB copy, TFLOP/s of a bfloat16 product) of this card."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = milliseconds(lambda: a @ a)
    return 2 * source.nbytes / copy / 1e9, 2 * 8192**3 / product / 1e9


def fp8_ceiling() -> float | None:
    """TFLOP/s of an e4m3 product with one scale a tensor and fast accumulation; None where the card has no e4m3."""
    if torch.cuda.get_device_capability() < (8, 9):
        return None
    a = torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    product = milliseconds(lambda: torch._scaled_mm(a, a.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
    return 2 * 8192**3 / product / 1e9


def matrix_vector(n: int, k: int, memory: float) -> dict[str, object]:
    size = n * k // 2 + 2 * n * k // GROUP
    copies = max(2, 2**28 // size)
    packed = torch.randint(-(2**31), 2**31 - 1, (copies, n, k // 8), dtype=torch.int32, device="cuda")
    scale = torch.rand(copies, n, k // GROUP, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1, k, dtype=torch.bfloat16, device="cuda")

    def walk() -> None:
        for i in range(copies):
            int4_matmul(x, packed[i], scale[i])

    time = milliseconds(captured(walk)) / copies
    return {"kernel": "int4_matmul", "case": f"1x{k} by {n}x{k} g{GROUP}", "ms": time, **rate(size, time, memory)}


def rate(size: int, time: float, memory: float) -> dict[str, float]:
    return {"TB/s": size / time / 1e9, "ceiling TB/s": memory, "of ceiling": size / time / 1e9 / memory}


def random_pages(kind: Kind, pages: int) -> PageTensors:
    if kind == "plain":
        return PageTensors(kind, torch.randn(pages, KV_HEADS, PAGE, D, dtype=torch.bfloat16, device="cuda"))
    if kind == "fp8":
        bits = torch.randint(0, 0x7F, (pages, KV_HEADS, PAGE, D), dtype=torch.uint8, device="cuda")
        return PageTensors(kind, bits.view(torch.float8_e4m3fn), torch.full((KV_HEADS,), 0.01, device="cuda"))
    codes = torch.randint(0, 256, (pages, KV_HEADS, PAGE, D // 2), dtype=torch.uint8, device="cuda")
    shape = (pages, KV_HEADS, D if kind == "int4_channel" else PAGE)
    scale = torch.rand(shape, dtype=torch.float16, device="cuda") * 0.2 + 0.1
    return PageTensors(kind, codes, scale, torch.randn(shape, dtype=torch.float16, device="cuda"))


def decode(name: str, k_kind: Kind, v_kind: Kind, tokens: int, memory: float) -> dict[str, object]:
    pages = tokens // PAGE
    k, v = random_pages(k_kind, pages), random_pages(v_kind, pages)
    q = torch.randn(1, HEADS, D, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(pages, device="cuda").to(torch.int32)[None]
    part = PagePart(k, v, table, torch.tensor([tokens], dtype=torch.int32, device="cuda"))
    time = milliseconds(captured(lambda: attend_pages(q, [part])))
    size = sum(x.nbytes for pool in (k, v) for x in (pool.data, pool.scale, pool.zero) if x is not None)
    return {"kernel": "attend_pages", "case": f"{name}, {tokens} tokens", "ms": time, **rate(size, time, memory)}


def sparse_decode(tokens: int, share: float, memory: float) -> list[dict[str, object]]:
    """Page selection, and attention to the pages it chose."""
    pages = tokens // PAGE
    k, v = random_pages("int4_channel", pages), random_pages("int4_token", pages)
    assert k.scale is not None
    assert k.zero is not None
    q = torch.randn(1, HEADS, D, dtype=torch.bfloat16, device="cuda")
    table = torch.randperm(pages, device="cuda").to(torch.int32)[None]
    count = torch.tensor([pages], dtype=torch.int32, device="cuda")
    select = partial(select_pages, q, k, table, count, share=share, at_least=64, newest=4)
    part = PagePart(k, v, *select())
    size = sum(x.nbytes for pool in (k, v) for x in (pool.data, pool.scale, pool.zero) if x is not None)
    attended = int(part.tokens.sum()) // PAGE / (pages * KV_HEADS)
    out: list[dict[str, object]] = []
    for name, run, read in (
        ("select_pages", select, k.scale.nbytes + k.zero.nbytes),
        ("attend_pages", lambda: attend_pages(q, [part]), size * attended),
    ):
        time = milliseconds(captured(run))
        out.append(
            {"kernel": name, "case": f"{share:.0%} of {tokens} tokens", "ms": time, **rate(int(read), time, memory)}
        )
    return out


def overlapping_lists(keys: int, density: float) -> BlockLists:
    """Causal lists of a given density, one for all heads: a sink, a run before the diagonal, the rest spread out."""
    tiles = keys // BLOCK
    rows = []
    for tile in range(tiles):
        wanted = min(tile + 1, max(4, round(density * (tile + 1))))
        local = range(max(0, tile + 1 - max(1, wanted // 4)), tile + 1)
        spread = torch.linspace(0, max(0, local[0] - 1), max(1, wanted - len(local))).long().tolist()
        rows.append(sorted({*spread, *local}))
    index = torch.zeros(tiles, max(map(len, rows)), dtype=torch.int32)
    for tile, row in enumerate(rows):
        index[tile, : len(row)] = torch.tensor(row, dtype=torch.int32)
    count = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return BlockLists(index.expand(HEADS, -1, -1).contiguous().cuda(), count.expand(HEADS, -1).contiguous().cuda())


def prefill(keys: int, density: float, products: float) -> list[dict[str, object]]:
    q = torch.randn(keys, HEADS, D, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(keys, KV_HEADS, D, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    lists = overlapping_lists(keys, density)
    blocks = int(lists.count.sum()) - lists.count.numel() / 2
    work = blocks * BLOCK * BLOCK * D * 4
    time = milliseconds(lambda: block_sparse_attention(q, k, v, lists, 0))
    case = f"{keys} tokens, density {density:.0%}"
    out: list[dict[str, object]] = [
        {"kernel": "block_sparse_attention", "case": case, "ms": time, "TFLOP/s": work / time / 1e9,
         "ceiling TFLOP/s": products, "of ceiling": work / time / 1e9 / products}
    ]  # fmt: skip
    chunk, pooled = 16384, pool_keys(k)
    alpha = torch.full((HEADS,), 0.2, device="cuda")
    start = keys - chunk
    time = milliseconds(
        lambda: select_blocks(
            q[start:], k, q_offset=start, alpha=alpha, sink_blocks=2, local_blocks=4, dense_from=keys, min_blocks=0,
            max_blocks=keys // BLOCK // 8, pooled=pooled,
        )
    )  # fmt: skip
    work = chunk * (keys - chunk / 2) / 32 * HEADS * D * 2
    out.append(
        {"kernel": "select_blocks", "case": f"{chunk} queries at the end of {keys} tokens", "ms": time,
         "TFLOP/s": work / time / 1e9, "ceiling TFLOP/s": products, "of ceiling": work / time / 1e9 / products}
    )  # fmt: skip
    return out


def quantizers(tokens: int, memory: float) -> list[dict[str, object]]:
    x = torch.randn(tokens // PAGE, PAGE, KV_HEADS, D, dtype=torch.bfloat16, device="cuda")
    out: list[dict[str, object]] = []
    for quantize in (quantize_k_int4, quantize_v_int4):
        written = sum(part.nbytes for part in quantize(x))
        time = milliseconds(partial(quantize, x))
        size = x.nbytes + written
        out.append({"kernel": quantize.__name__, "case": f"{tokens} tokens", "ms": time, **rate(size, time, memory)})
    return out


def bench_kernels() -> list[dict[str, object]]:
    """Run every case on the current CUDA device and return one record each; needs about 20 GB free."""
    memory, products = ceilings()
    cases: list[dict[str, object]] = []
    for n, k in ((HIDDEN, HIDDEN), (KV_HEADS * D, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)):
        cases.append(matrix_vector(n, k, memory))
    schemes: list[tuple[str, Kind, Kind]] = [
        ("int4", "int4_channel", "int4_token"), ("k8v4", "fp8", "int4_token"), ("fp8", "fp8", "fp8"),
        ("bf16", "plain", "plain"),
    ]  # fmt: skip
    for tokens in (2**17, 2**19, 2**20):
        cases.extend(decode(name, k_kind, v_kind, tokens, memory) for name, k_kind, v_kind in schemes)
    cases.extend(sparse_decode(2**20, 0.04, memory))
    cases.extend(prefill(2**17, 0.10, products))
    cases.extend(quantizers(2**17, memory))
    return cases


if __name__ == "__main__":
    if not torch.cuda.is_available():
        print("kernels.bench needs an NVIDIA GPU and found none; run it on a machine with one", file=sys.stderr)
        raise SystemExit(2)
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    for case in bench_kernels():
        print(json.dumps({key: round(x, 4) if isinstance(x, float) else x for key, x in case.items()}))
