"""The paged KV cache. Full pages of 128 tokens are quantized once and never rewritten; the two ends stay exact.

The first 128 tokens of a sequence (the attention sinks) and the newest, incomplete page are kept in the compute dtype,
as two exact pages of their own. Everything between lives in a pool shared by all sequences, so a fork costs a list of
page numbers and two small copies. All of it is addressed by page numbers in tensors that never move, which is what lets
a decode step be one CUDA graph. An append is staged and committed at its end: a cancelled prefill leaves the sequence
as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import torch

from lcconvert.kernels.kv_pages import Kind, PageTensors, dequantize_pages
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.page_store import empty_pages, grown, nbytes, write_pages
from lcconvert.runtime.sidecar import PAGE, KVConfig
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec

_K_KIND: dict[str, Kind] = {"bf16": "plain", "fp8": "fp8", "int4": "int4_channel", "k8v4": "fp8"}
_V_KIND: dict[str, Kind] = {"bf16": "plain", "fp8": "fp8", "int4": "int4_token", "k8v4": "int4_token"}


_serials = count(1)
EXACT_PAGES = 8  # exact pages reserved at first: four sequences
_READ = 1024  # pages dequantized at once: bounds the float32 temporaries


@dataclass(eq=False)
class Sequence:
    """One context: token ids, the numbers of its full pages, and of the exact pages that hold its two ends."""

    sink: int
    tail: int
    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    serial: int = field(default_factory=_serials.__next__)  # tells sequences apart when an address is used again

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def tail_length(self) -> int:
        """Tokens in the newest page; 0 while everything fits into the sink page."""
        return max(self.length - PAGE, 0) - PAGE * len(self.pages)

    @property
    def exact_length(self) -> int:
        """Tokens in the two exact pages."""
        return min(self.length, PAGE) + self.tail_length


def read_scales(source: TensorSource, spec: ModelSpec, scheme: str) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """Per-head fp8 scales (k, v), float32 [Hkv] each, a pair a layer; None when `scheme` stores nothing in fp8.

    Names and meaning are vLLM's: `model.layers.N.self_attn.k_scale`, stored value = value / scale. An absent, zero or
    non-finite scale is a UserError: engines that fall back to 1.0 lose accuracy without a word.
    """
    if _K_KIND[scheme] != "fp8" and _V_KIND[scheme] != "fp8":
        return None
    pairs = []
    for layer in range(spec.num_layers):
        pair = []
        for which in ("k", "v"):
            name = f"model.layers.{layer}.self_attn.{which}_scale"
            if name not in source.names():
                raise UserError(f"{source.name} has no {name}, which KV scheme {scheme!r} needs; quantize it again")
            scale = source.tensor(name).float().reshape(-1).expand(spec.num_kv_heads).contiguous()
            if not (torch.isfinite(scale).all() and (scale > 0).all()):
                raise UserError(
                    f"{name} of {source.name} is {scale.tolist()}, expected positive numbers; quantize again"
                )
            pair.append(scale)
        pairs.append((pair[0], pair[1]))
    return pairs


class PagePool:
    """Storage for every sequence: per layer K and V `PageTensors` of `capacity` full pages, and of the exact pages.

    `generation` changes whenever the tensors move, which a captured CUDA graph has to know.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: KVConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        scales: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        capacity: int = 0,
        growable: bool = True,
    ):
        self.spec, self.config, self.device, self.dtype = spec, config, device, dtype
        self.growable, self.generation = growable, 0
        k_kind, v_kind = _K_KIND[config.scheme], _V_KIND[config.scheme]
        self.k: list[PageTensors] = []
        self.v: list[PageTensors] = []
        for layer in range(spec.num_layers):
            k_scale, v_scale = (s.to(device) for s in scales[layer]) if scales else (None, None)
            self.k.append(empty_pages(k_kind, 0, spec.num_kv_heads, spec.head_dim, dtype, device, k_scale))
            self.v.append(empty_pages(v_kind, 0, spec.num_kv_heads, spec.head_dim, dtype, device, v_scale))
        exact = [
            [empty_pages("plain", 0, spec.num_kv_heads, spec.head_dim, dtype, device) for _ in range(spec.num_layers)]
            for _ in range(2)
        ]
        self.exact_k, self.exact_v = exact
        self.users: list[int] = []  # sequences that hold page i
        self.unused: list[int] = []
        self._exact_unused: list[int] = []
        self._grow_exact(EXACT_PAGES)
        if capacity:
            self._grow(capacity)

    @property
    def capacity(self) -> int:
        return len(self.users)

    @property
    def bytes(self) -> int:
        """Of the full pages; the few exact ones are `exact_bytes`."""
        return sum(nbytes(pages) for pages in (*self.k, *self.v))

    @property
    def exact_bytes(self) -> int:
        return sum(nbytes(pages) for pages in (*self.exact_k, *self.exact_v))

    def bytes_per_token(self) -> float:
        """Bytes a token of a full page takes over all layers, scales and zero points included."""
        heads, dim = self.spec.num_kv_heads, self.spec.head_dim
        page = 0
        for kind in (_K_KIND[self.config.scheme], _V_KIND[self.config.scheme]):
            page += nbytes(empty_pages(kind, 1, heads, dim, self.dtype, torch.device("cpu")))
        return self.spec.num_layers * page / PAGE

    def take(self, count: int) -> list[int]:
        """`count` page numbers, each with one user; grows the pool when allowed, else UserError."""
        if count > len(self.unused):
            if not self.growable:
                raise UserError(
                    f"the KV cache holds {self.capacity * PAGE} tokens and {len(self.unused) * PAGE} are free, "
                    f"{count * PAGE} are needed; end another request or start with a larger --max-context"
                )
            self._grow(max(count - len(self.unused), self.capacity // 2, 16))
        taken = [self.unused.pop() for _ in range(count)]
        for page in taken:
            self.users[page] = 1
        return taken

    def hold(self, pages: list[int]) -> None:
        for page in pages:
            self.users[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                self.unused.append(page)

    def write(self, layer: int, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Quantizes exact K and V [P, 128, Hkv, D] of one layer into the pages numbered by `index` int64 [P]."""
        write_pages(self.k[layer], index, k)
        write_pages(self.v[layer], index, v)

    def _grow(self, more: int) -> None:
        first = self.capacity
        for layers in (self.k, self.v):
            for layer, pages in enumerate(layers):  # one at a time: old and new of a single layer exist together
                layers[layer] = grown(pages, first + more)
        self.users += [0] * more
        self.unused += range(first + more - 1, first - 1, -1)  # lowest numbers are taken first
        self.generation += 1

    def _grow_exact(self, more: int) -> None:
        first = len(self.exact_k[0].data)
        for layers in (self.exact_k, self.exact_v):
            for layer, pages in enumerate(layers):
                layers[layer] = grown(pages, first + more)
        self._exact_unused += range(first + more - 1, first - 1, -1)
        self.generation += 1

    def take_exact(self) -> int:
        """The number of a free exact page."""
        if not self._exact_unused:
            self._grow_exact(len(self.exact_k[0].data))
        return self._exact_unused.pop()

    def release_exact(self, *pages: int) -> None:
        self._exact_unused += pages

    def new_sequence(self) -> Sequence:
        return Sequence(self.take_exact(), self.take_exact())

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence with the same content that shares the full pages."""
        self.hold(seq.pages)
        twin = Sequence(self.take_exact(), self.take_exact(), ids=list(seq.ids), pages=list(seq.pages))
        for pages in (*self.exact_k, *self.exact_v):
            pages.data[twin.sink], pages.data[twin.tail] = pages.data[seq.sink], pages.data[seq.tail]
        return twin

    def free(self, seq: Sequence) -> None:
        """Gives everything back; the sequence must not be used again. A second call does nothing."""
        if seq.sink < 0:
            return
        self.release(seq.pages)
        self.release_exact(seq.sink, seq.tail)
        seq.pages, seq.ids, seq.sink, seq.tail = [], [], -1, -1

    def read_prefix(self, seq: Sequence, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes the cached tokens of one layer into the first `seq.length` rows of k and v [S, Hkv, D]."""
        sink, tail = min(seq.length, PAGE), seq.tail_length
        paged = PAGE * (1 + len(seq.pages))
        for out, full, exact in ((k, self.k[layer], self.exact_k[layer]), (v, self.v[layer], self.exact_v[layer])):
            out[:sink] = exact.data[seq.sink, :, :sink].transpose(0, 1)
            for first in range(0, len(seq.pages), _READ):
                some = torch.tensor(seq.pages[first : first + _READ], dtype=torch.int64, device=self.device)
                begin = PAGE * (1 + first)
                out[begin : begin + PAGE * len(some)] = dequantize_pages(full, some, self.dtype)
            out[paged : paged + tail] = exact.data[seq.tail, :, :tail].transpose(0, 1)

    def seal(self, seq: Sequence) -> None:
        """After a decode step: turns the newest page into a quantized one when it is full."""
        if seq.tail_length == PAGE:
            (page,) = self.take(1)
            index = torch.tensor([page], device=self.device)
            for layer in range(self.spec.num_layers):
                k, v = (pages[layer].data[seq.tail].transpose(0, 1)[None] for pages in (self.exact_k, self.exact_v))
                self.write(layer, index, k, v)
            seq.pages.append(page)


class StagedAppend:
    """A prefill's writes, kept apart from the sequence until `commit`; `drop` undoes them."""

    def __init__(self, pool: PagePool, seq: Sequence, new_ids: list[int]):
        self.pool, self.seq, self.new_ids = pool, seq, new_ids
        self.total = seq.length + len(new_ids)
        self.first = len(seq.pages)
        self.full = max(self.total - PAGE, 0) // PAGE  # pages once all tokens are in
        self.new_pages = pool.take(self.full - self.first)
        self.sink, self.tail = pool.take_exact(), pool.take_exact()
        self._index = torch.tensor(self.new_pages, dtype=torch.int64, device=pool.device)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes one layer's K and V of the whole context [total, Hkv, D], old rows included."""
        pool, sink = self.pool, min(self.total, PAGE)
        begin, end = PAGE * (1 + self.first), PAGE * (1 + self.full)
        for exact, rows in ((pool.exact_k[layer], k), (pool.exact_v[layer], v)):
            exact.data[self.sink, :, :sink] = rows[:sink].transpose(0, 1)
            if self.total > end:
                exact.data[self.tail, :, : self.total - end] = rows[end : self.total].transpose(0, 1)
        if self.new_pages:
            shape = (len(self.new_pages), PAGE)
            pool.write(layer, self._index, k[begin:end].unflatten(0, shape), v[begin:end].unflatten(0, shape))

    def commit(self) -> None:
        seq = self.seq
        self.pool.release_exact(seq.sink, seq.tail)
        seq.sink, seq.tail = self.sink, self.tail
        seq.pages += self.new_pages
        seq.ids += self.new_ids

    def drop(self) -> None:
        self.pool.release(self.new_pages)
        self.pool.release_exact(self.sink, self.tail)
