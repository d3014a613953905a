"""Layer-major prefill: every layer runs over the whole prompt, in row chunks, before the next one starts.

So one layer's K and V stay exact while that layer attends and are quantized into pages once, after it; weights are
expanded once a layer; block selection sees the whole context; and nothing is ever [T, inner] or [T, vocabulary]. A
layer passes over the rows twice: keys and values first, then queries, attention and the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from lcconvert.kernels.rotary import rotary
from lcconvert.kernels.select_blocks import pool_keys
from lcconvert.runtime.attention import prefill_attention
from lcconvert.runtime.hidden import Chunk, HiddenStates
from lcconvert.runtime.kv_cache import PagePool, Sequence, StagedAppend
from lcconvert.runtime.model import Decoder
from lcconvert.runtime.products import MANY, Gemm, LayerWeights, Products
from lcconvert.runtime.rope import cos_sin
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy
from lcconvert.runtime.timing import PartTimer, part

MLP_ROWS = 8_192  # rows of a chunk whose inner activations exist at once
_TABLE_ROWS = 65_536  # positions whose angles exist in float64 at once

Progress = Callable[[int, int], None]  # layers done, layers in all


class Cancelled(Exception):
    """The caller asked to stop; the sequence is as it was before the call."""


@dataclass(frozen=True)
class PrefillSetup:
    """What stays the same from one prefill to the next."""

    model: Decoder
    layers: list[LayerWeights]
    pool: PagePool
    policy: AttentionPolicy
    alpha: torch.Tensor  # float32 [layers, Hq]
    gemm: Gemm
    chunk: int  # rows, a multiple of the page
    offload: bool  # hidden states in pinned host memory


def chunks_of(start: int, total: int, chunk: int) -> list[Chunk]:
    """Row ranges [begin, end) that cover start..total; all but the first begin at a multiple of the page."""
    borders = [start]
    if start % PAGE:
        borders.append(min(total, -(-start // PAGE) * PAGE))
    while borders[-1] < total:
        borders.append(min(total, borders[-1] + chunk))
    return [(a, b) for a, b in pairwise(borders) if a < b]


def run_prefill(
    setup: PrefillSetup,
    seq: Sequence,
    staged: StagedAppend,
    *,
    want_all: bool = False,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
    timer: PartTimer | None = None,
) -> torch.Tensor:
    """Runs `staged.new_ids` after what `seq` holds; writes K and V of every layer to `staged`.

    Returns the last layer's output, before the final norm: [T, H] with `want_all`, else the last row [1, H].
    Raises Cancelled between layers, and between the chunks of one.
    """
    spec, pool = setup.model.spec, setup.pool
    start, total = seq.length, staged.total
    chunks = chunks_of(start, total, setup.chunk)
    spans = [(begin - start, end - start) for begin, end in chunks]  # rows of the new tokens
    # by numpy, because torch.tensor of a million-element list keeps other threads out for a quarter of a second
    ids = torch.from_numpy(np.array(staged.new_ids, np.int64)).to(pool.device)
    hidden = HiddenStates(
        total - start, spec.hidden_size, dtype=pool.dtype, device=pool.device, chunk=setup.chunk,
        offload=setup.offload and not want_all, timer=timer,
    )  # fmt: skip
    hidden.fill(spans, lambda begin, end: setup.model.embed(ids[begin:end]))
    tables = _tables(setup.model, start, total, pool.device)
    k = torch.empty(total, spec.num_kv_heads, spec.head_dim, dtype=pool.dtype, device=pool.device)
    v = torch.empty_like(k)

    def check() -> None:
        if cancelled is not None and cancelled():
            raise Cancelled(f"stopped after {number} of {len(setup.layers)} layers")

    layer_pass = _LayerPass(setup, hidden, tables, k, v, start, timer, check)
    last = len(setup.layers) - 1
    try:
        for number in range(len(setup.layers)):
            check()
            with part(timer, "quantize"):
                pool.read_prefix(seq, number, k, v)
            with part(timer, "gemm"):
                few = total - start < MANY
                products = setup.layers[number].few() if few else setup.layers[number].many(setup.gemm)
            layer_pass.keys_and_values(number, products, spans)
            with part(timer, "quantize"):
                staged.store(number, k, v)
            if number < last or want_all:
                layer_pass.queries(number, products, spans)
                row = None
            else:
                row = layer_pass.last_row(number, products)
            del products
            if progress is not None:
                progress(number + 1, len(setup.layers))
    finally:
        hidden.close()
    return hidden.all() if row is None else row


@dataclass(frozen=True)
class _LayerPass:
    """The two passes of a layer over the rows of one prompt."""

    setup: PrefillSetup
    hidden: HiddenStates
    tables: list[tuple[torch.Tensor, torch.Tensor]]  # of every layer: cos and sin, float32 [T, D/2]
    k: torch.Tensor  # [S, Hkv, D]: the layer's exact keys, cached ones included
    v: torch.Tensor
    start: int  # cached tokens before the prompt
    timer: PartTimer | None
    check: Callable[[], None]  # raises when the prefill is cancelled

    def keys_and_values(self, number: int, products: Products, spans: list[Chunk]) -> None:
        layer, spec = self.setup.layers[number], self.setup.model.spec
        product = products.qkv.rows(spec.q_size, spec.q_size + 2 * spec.kv_size)
        cos, sin = self.tables[number]
        for begin, end, x in self.hidden.chunks(spans, write=False):
            normed = product.normed(x, layer.input_norm)
            with part(self.timer, "gemm"):
                both = product(normed)
            layer.norm_whole(both[:, : spec.kv_size], layer.k_norm)
            both = both.unflatten(1, (2, spec.num_kv_heads, spec.head_dim))
            rows = slice(self.start + begin, self.start + end)
            rotary(both[:, 0], cos[begin:end], sin[begin:end], norm=layer.head_norms[1], out=self.k[rows])
            self.v[rows] = both[:, 1]

    def queries(self, number: int, products: Products, spans: list[Chunk]) -> None:
        pooled = None
        if self.setup.policy.kind == "hybrid" and self.setup.layers[number].window is None:
            with part(self.timer, "selection"):
                pooled = pool_keys(self.k, self.setup.policy.pool)
        for begin, end, x in self.hidden.chunks(spans, write=True):
            self.check()
            self._finish(number, products, x, begin, end, pooled)

    def last_row(self, number: int, products: Products) -> torch.Tensor:
        """The layer's output [1, H] for the last token alone."""
        total = len(self.k) - self.start
        x = self.hidden.row(total - 1).clone()
        self._finish(number, products, x, total - 1, total, None)
        return x

    def _finish(
        self, number: int, products: Products, x: torch.Tensor, begin: int, end: int, pooled: torch.Tensor | None
    ) -> None:
        """Attention and MLP of rows begin..end, added to x in place."""
        setup, layer, spec = self.setup, self.setup.layers[number], self.setup.model.spec
        product = products.qkv.rows(0, spec.q_size)
        normed = product.normed(x, layer.input_norm)
        with part(self.timer, "gemm"):
            q = product(normed)
        del normed
        layer.norm_whole(q, layer.q_norm)
        q = q.unflatten(1, (spec.num_heads, spec.head_dim))
        cos, sin = self.tables[number]
        rotary(q, cos[begin:end], sin[begin:end], norm=layer.head_norms[0], out=q)
        first, last = self.start + begin, self.start + end
        attended = prefill_attention(
            q, self.k[:last], self.v[:last], q_offset=first, total=len(self.k), policy=setup.policy,
            alpha=setup.alpha[number], pooled=pooled, window=layer.window, sinks=layer.sinks,
            timer=self.timer,
        )  # fmt: skip
        taken = products.o.taken(attended)
        with part(self.timer, "gemm"):
            delta = products.o(taken)
        del q, attended, taken
        delta = layer.normed_out(delta, layer.attn_out_norm)
        for row in range(0, end - begin, MLP_ROWS):
            rows = slice(row, row + MLP_ROWS)
            block = x[rows]
            block += layer.mlp(products, block, delta[rows], self.timer)


def _tables(model: Decoder, start: int, total: int, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rotary tables of positions start..total for every layer, float32 [T, D/2] each; equal ones are shared."""
    spec = model.spec
    tables = {}
    for rope in spec.ropes:
        cos, sin = (torch.empty(total - start, spec.head_dim // 2, device=device) for _ in range(2))
        for begin in range(start, total, _TABLE_ROWS):
            positions = torch.arange(begin, min(begin + _TABLE_ROWS, total), device=device)
            rows = slice(begin - start, begin - start + len(positions))
            cos[rows], sin[rows] = cos_sin(rope, spec.head_dim, positions)
        tables[rope] = cos, sin
    return [tables[spec.rope_of(number)] for number in range(spec.num_layers)]
