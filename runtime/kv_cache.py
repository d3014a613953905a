"""The paged KV cache. Full pages of 128 tokens are quantized once and never rewritten; the two ends stay exact.

The first 128 tokens of a sequence (the attention sinks) and the newest, incomplete page are kept in the compute dtype.
Everything between lives in a pool shared by all sequences, so a fork costs a list of page numbers and two small copies.
An append is staged and committed at its end: a cancelled prefill leaves the sequence as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lcconvert.kernels.kv_pages import Kind, PageTensors, dequantize_pages
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.page_store import empty_pages, grown, nbytes, write_pages
from lcconvert.runtime.sidecar import PAGE, KVConfig
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec

_K_KIND: dict[str, Kind] = {"bf16": "plain", "fp8": "fp8", "int4": "int4_channel", "k8v4": "fp8"}
_V_KIND: dict[str, Kind] = {"bf16": "plain", "fp8": "fp8", "int4": "int4_token", "k8v4": "int4_token"}


@dataclass(eq=False)
class Sequence:
    """One context: token ids, the numbers of its full pages, and the exact ends [layers, 128, Hkv, D] of K and V."""

    sink_k: torch.Tensor
    sink_v: torch.Tensor
    tail_k: torch.Tensor
    tail_v: torch.Tensor
    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def tail_length(self) -> int:
        """Tokens in the newest page; 0 while everything fits into the sink page."""
        return max(self.length - PAGE, 0) - PAGE * len(self.pages)


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
    """Storage for the full pages of every sequence: per layer one K and one V `PageTensors` of `capacity` pages."""

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
        self.growable = growable
        k_kind, v_kind = _K_KIND[config.scheme], _V_KIND[config.scheme]
        self.k: list[PageTensors] = []
        self.v: list[PageTensors] = []
        for layer in range(spec.num_layers):
            k_scale, v_scale = (s.to(device) for s in scales[layer]) if scales else (None, None)
            self.k.append(empty_pages(k_kind, 0, spec.num_kv_heads, spec.head_dim, dtype, device, k_scale))
            self.v.append(empty_pages(v_kind, 0, spec.num_kv_heads, spec.head_dim, dtype, device, v_scale))
        self.users: list[int] = []  # sequences that hold page i
        self.unused: list[int] = []
        if capacity:
            self._grow(capacity)

    @property
    def capacity(self) -> int:
        return len(self.users)

    @property
    def bytes(self) -> int:
        return sum(nbytes(pages) for pages in (*self.k, *self.v))

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

    def write(self, layer: int, pages: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """Quantizes exact K and V [P, 128, Hkv, D] into the given pages of one layer."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        write_pages(self.k[layer], index, k)
        write_pages(self.v[layer], index, v)

    def _grow(self, more: int) -> None:
        first = self.capacity
        self.k = [grown(pages, first + more) for pages in self.k]
        self.v = [grown(pages, first + more) for pages in self.v]
        self.users += [0] * more
        self.unused += range(first + more - 1, first - 1, -1)  # lowest numbers are taken first

    def new_sequence(self) -> Sequence:
        shape = (self.spec.num_layers, PAGE, self.spec.num_kv_heads, self.spec.head_dim)
        ends = torch.zeros(4, *shape, dtype=self.dtype, device=self.device)
        return Sequence(ends[0], ends[1], ends[2], ends[3])

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence with the same content that shares the full pages."""
        self.hold(seq.pages)
        ends = torch.stack((seq.sink_k, seq.sink_v, seq.tail_k, seq.tail_v))  # a copy
        return Sequence(ends[0], ends[1], ends[2], ends[3], ids=list(seq.ids), pages=list(seq.pages))

    def free(self, seq: Sequence) -> None:
        self.release(seq.pages)
        seq.pages, seq.ids = [], []

    def read_prefix(self, seq: Sequence, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes the cached tokens of one layer into the first `seq.length` rows of k and v [S, Hkv, D]."""
        sink = min(seq.length, PAGE)
        k[:sink], v[:sink] = seq.sink_k[layer, :sink], seq.sink_v[layer, :sink]
        paged = PAGE * (1 + len(seq.pages))
        if seq.pages:
            index = torch.tensor(seq.pages, dtype=torch.int64, device=self.device)
            k[PAGE:paged] = dequantize_pages(self.k[layer], index, self.dtype)
            v[PAGE:paged] = dequantize_pages(self.v[layer], index, self.dtype)
        if seq.tail_length:
            k[paged : seq.length] = seq.tail_k[layer, : seq.tail_length]
            v[paged : seq.length] = seq.tail_v[layer, : seq.tail_length]

    def near(self, seq: Sequence, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The exact K and V of one layer: sink rows, then the newest page; [n, Hkv, D], n <= 256."""
        sink, tail = min(seq.length, PAGE), seq.tail_length
        if not tail:
            return seq.sink_k[layer, :sink], seq.sink_v[layer, :sink]
        k = torch.cat((seq.sink_k[layer, :sink], seq.tail_k[layer, :tail]))
        return k, torch.cat((seq.sink_v[layer, :sink], seq.tail_v[layer, :tail]))

    def append(self, seq: Sequence, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Puts the newest token's k and v [Hkv, D] of one layer in place; `ids` must already count that token."""
        row = seq.length - 1
        if row < PAGE:
            seq.sink_k[layer, row], seq.sink_v[layer, row] = k, v
        else:
            seq.tail_k[layer, row % PAGE], seq.tail_v[layer, row % PAGE] = k, v

    def seal(self, seq: Sequence) -> None:
        """After a decode step: turns the newest page into a quantized one when it is full."""
        if seq.tail_length == PAGE:
            (page,) = self.take(1)
            for layer in range(self.spec.num_layers):
                self.write(layer, [page], seq.tail_k[layer][None], seq.tail_v[layer][None])
            seq.pages.append(page)


class StagedAppend:
    """A prefill's writes, kept apart from the sequence until `commit`; `drop` undoes them."""

    def __init__(self, pool: PagePool, seq: Sequence, new_ids: list[int]):
        self.pool, self.seq, self.new_ids = pool, seq, new_ids
        self.total = seq.length + len(new_ids)
        self.first = len(seq.pages)
        self.full = max(self.total - PAGE, 0) // PAGE  # pages once all tokens are in
        self.new_pages = pool.take(self.full - self.first)
        self.sink_k, self.sink_v = seq.sink_k.clone(), seq.sink_v.clone()
        self.tail_k, self.tail_v = torch.zeros_like(seq.tail_k), torch.zeros_like(seq.tail_v)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes one layer's K and V of the whole context [total, Hkv, D], old rows included."""
        sink = min(self.total, PAGE)
        self.sink_k[layer, :sink], self.sink_v[layer, :sink] = k[:sink], v[:sink]
        begin, end = PAGE * (1 + self.first), PAGE * (1 + self.full)
        if self.new_pages:
            shape = (len(self.new_pages), PAGE)
            self.pool.write(layer, self.new_pages, k[begin:end].unflatten(0, shape), v[begin:end].unflatten(0, shape))
        if self.total > end:
            self.tail_k[layer, : self.total - end], self.tail_v[layer, : self.total - end] = k[end:], v[end:]

    def commit(self) -> None:
        seq = self.seq
        seq.sink_k, seq.sink_v, seq.tail_k, seq.tail_v = self.sink_k, self.sink_v, self.tail_k, self.tail_v
        seq.pages += self.new_pages
        seq.ids += self.new_ids

    def drop(self) -> None:
        self.pool.release(self.new_pages)
