"""The decoder's training pass for sequences whose activations do not fit: layer by layer, in tiles of tokens.

A layer keeps its input and the output of its attention, each on the device, in host memory or (attention only) not at
all; the backward pass computes the rest again. All but the attention works on a tile of tokens at a time, so nothing as
wide as the MLP ever exists for the whole sequence, and the attention on the query heads of one KV head at a time, so
that a kernel's workspace is that of one group. Gradients of weights are summed over tiles in float32.

The hidden states between layers are in the precision of the forward pass (autocast's, if it is on), where the plain
pass keeps them in that of the embeddings. A layer's attention may be any differentiable function of q, k and v.

Surprising rule: the gradient of a layer's input is written over that of its output. The graph is a chain, nobody else
reads it, and a copy would be another [B, T, H].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lcconvert.convert.shelf import Kept, Shelf, without_gaps
from lcconvert.runtime.model import Attend, Decoder, Layer, layer_tables

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Keep:
    """Where one layer's input and attention output wait for the backward pass; "again": computed a second time."""

    inputs: Literal["device", "host"] = "device"
    attention: Literal["device", "host", "again"] = "device"


@dataclass(frozen=True)
class Streaming:
    """How a pass is streamed: `keeps` for every layer; `tile` tokens, of all rows together, in wide form at once."""

    shelf: Shelf
    keeps: Sequence[Keep]
    tile: int

    def width(self, x: torch.Tensor) -> int:
        """Tokens of every row of x [B, T, H] in a tile."""
        return max(1, self.tile // x.shape[0])

    def rows(self, x: torch.Tensor) -> list[slice]:
        """Tiles of x [B, T, H] along T."""
        return [slice(start, start + self.width(x)) for start in range(0, x.shape[1], self.width(x))]


def streamed_hidden(
    decoder: Decoder,
    ids: torch.Tensor,
    positions: torch.Tensor,
    streaming: Streaming,
    attend_of: Callable[[Layer], Attend | None] | None = None,
) -> torch.Tensor:
    """`decoder(ids, positions)` for training: int64 [B, T] -> hidden states after the final norm [B, T, H].

    `attend_of` gives a layer another attention, as in the decoder.
    """
    x = decoder.embed(ids)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    record = None
    tables = layer_tables(decoder.spec, positions)
    for layer, table, keep in zip(decoder.layers, tables, streaming.keeps, strict=True):
        attend = (attend_of(layer) if attend_of else None) or layer.attend
        record = _Record(layer, attend, table, streaming, keep, record)
        x = _StreamedLayer.apply(x, record, *record.weights)
    parts = x.split(streaming.width(x), dim=1)
    norms = [checkpoint(decoder.model.norm, part, use_reentrant=False) for part in parts]
    return torch.cat(norms, dim=1)


@dataclass
class _Record:
    """A layer's part of one pass: how to compute it, and what it keeps."""

    layer: Layer
    attend: Attend
    tables: tuple[torch.Tensor, torch.Tensor]  # [B, T, D/2]
    streaming: Streaming
    keep: Keep
    before: _Record | None
    input: Kept | None = None
    attention: list[_Attention] = field(default_factory=list)

    @property
    def weights(self) -> list[torch.Tensor]:
        return [weight for weight in self.layer.parameters() if weight.requires_grad]

    def qkv(self, x: torch.Tensor, rows: slice) -> QKV:
        cos, sin = self.tables
        return self.layer.qkv(x, cos[:, rows], sin[:, rows])

    @torch.no_grad()
    def groups(self, x: torch.Tensor) -> list[QKV]:
        """q [B, T, Hq / Hkv, D], k and v [B, T, 1, D] of every KV head, each a tensor of its own."""
        found: list[QKV] = []
        for rows in self.streaming.rows(x):
            parts = self.qkv(x[:, rows], rows)
            count = parts[1].shape[-2]
            if not found:
                shapes = [(*x.shape[:2], part.shape[-2] // count, part.shape[-1]) for part in parts]
                found = [_of_three(x.new_empty(shape) for shape in shapes) for _ in range(count)]
            for whole, *pieces in zip(found, *(part.chunk(count, dim=-2) for part in parts)):
                for tensor, piece in zip(whole, pieces):
                    tensor[:, rows] = piece
        return found

    def attended(self, qkv: QKV) -> torch.Tensor:
        """Attention output [B, T, heads, D] of one group in the forward pass."""
        if self.keep.attention == "again" or self.layer.window is not None:  # within a window it costs little
            with torch.no_grad():
                return self.attend(*qkv)
        out, kept = _attention(self.attend, qkv, self.streaming.shelf, on_host=self.keep.attention == "host")
        self.attention.append(kept)
        return out

    def fetch(self) -> None:
        """Starts the way back of everything that is in host memory."""
        assert self.input is not None
        for kept in (self.input, *(kept for attention in self.attention for kept in attention.kept)):
            self.streaming.shelf.fetch(kept)


class _StreamedLayer(torch.autograd.Function):
    """x [B, T, H] -> the layer's output; the trained weights are inputs so that autograd gets their gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, record: _Record, *weights: torch.Tensor) -> torch.Tensor:
        ctx.record, ctx.shape, ctx.autocast = record, x.shape, _autocast_state(x)
        with _autocast(x, ctx.autocast):
            qkv = record.groups(x)
            outs = [record.attended(qkv.pop(0)) for _ in range(len(qkv))]
            y = torch.empty_like(x)
            for rows in record.streaming.rows(x):
                attn = torch.cat([out[:, rows] for out in outs], dim=-2)
                y[:, rows] = record.layer.finish(x[:, rows], attn.flatten(-2))
        record.input = record.streaming.shelf.put(x, on_host=record.keep.inputs == "host")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        record: _Record = ctx.record
        layer, shelf = record.layer, record.streaming.shelf
        record.fetch()
        if record.before is not None:
            record.before.fetch()
        assert record.input is not None
        x = shelf.take(record.input).view(ctx.shape)
        gradients = _Gradients(record.weights)
        with _autocast(x, ctx.autocast):
            qkv = record.groups(x)
            attention = record.attention or [_attention(record.attend, each, shelf, on_host=False)[1] for each in qkv]
            outs = [each.out for each in attention]
            grad_outs = [torch.empty_like(out, memory_format=torch.contiguous_format) for out in outs]
            for rows in record.streaming.rows(x):
                attn = torch.cat([out[:, rows] for out in outs], dim=-2)
                grad[:, rows], grad_attn = gradients.of_tile(
                    lambda x, attn: (layer.finish(x, attn.flatten(-2)),), (x[:, rows], attn), (grad[:, rows],)
                )
                for whole, part in zip(grad_outs, grad_attn.chunk(len(grad_outs), dim=-2)):
                    whole[:, rows] = part
            del outs, attn, grad_attn
            grad_qkv = [attention.pop(0).gradients(qkv.pop(0), grad_outs.pop(0)) for _ in range(len(qkv))]
            for rows in record.streaming.rows(x):
                parts = [torch.cat([part[:, rows] for part in whole], dim=-2) for whole in zip(*grad_qkv)]
                (grad_x,) = gradients.of_tile(lambda x, rows=rows: record.qkv(x, rows), (x[:, rows],), parts)
                grad[:, rows] += grad_x
        ctx.record = record.input = None
        return grad, None, *gradients.sums()


class _Gradients:
    """Gradients of `weights`, summed over tiles in float32."""

    def __init__(self, weights: Sequence[torch.Tensor]):
        self._weights = weights
        self._sums: list[torch.Tensor | None] = [None] * len(weights)

    def of_tile(
        self,
        compute: Callable[..., Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of `inputs`, where `grads` are those of what `compute` makes of them."""
        with torch.enable_grad():
            leaves = [each.detach().requires_grad_() for each in inputs]
            made = compute(*leaves)
            found = torch.autograd.grad(made, [*leaves, *self._weights], grads, allow_unused=True)
        for number, part in enumerate(found[len(leaves) :]):
            if part is None:
                continue
            before = self._sums[number]
            self._sums[number] = part.float() if before is None else before.add_(part)
        return found[: len(leaves)]

    def sums(self) -> list[torch.Tensor | None]:
        """In the dtypes of the weights; None for one that nothing depends on."""
        return [None if total is None else total.to(w.dtype) for w, total in zip(self._weights, self._sums)]


@dataclass
class _Attention:
    """The attention of one group, and the graph behind it, of which everything but q, k and v is on the shelf."""

    shelf: Shelf
    graph: tuple[GradientEdge, list[GradientEdge]]  # where the output came from, and q, k and v
    again: list[torch.Tensor]  # q, k and v for the graph, while its backward pass runs
    kept: list[Kept]  # the output is the last one
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def out(self) -> torch.Tensor:
        """[B, T, heads, D], back on the device."""
        return self.shelf.take(self.kept[-1]).as_strided(self.shape, self.stride)

    def gradients(self, qkv: QKV, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of q, k and v, which are given again; once only."""
        self.again.extend(qkv)
        out, inputs = self.graph
        return torch.autograd.grad(out, inputs, grad)


def _attention(attend: Attend, qkv: QKV, shelf: Shelf, *, on_host: bool) -> tuple[torch.Tensor, _Attention]:
    """The output [B, T, heads, D] for one group, and what its backward pass needs."""
    own = {tensor.untyped_storage().data_ptr(): number for number, tensor in enumerate(qkv)}
    saved: dict[tuple[int, int], Kept] = {}
    again: list[torch.Tensor] = []

    def put(tensor: torch.Tensor) -> Kept:
        key = (tensor.data_ptr(), tensor.numel())
        if key not in saved:
            saved[key] = shelf.put(tensor, on_host=on_host)
        return saved[key]

    def pack(tensor: torch.Tensor) -> tuple[Any, ...]:
        number = own.get(tensor.untyped_storage().data_ptr())
        if number is not None:
            return number, tensor.shape, tensor.stride(), tensor.storage_offset()
        tensor = without_gaps(tensor)
        return put(tensor), tensor.shape, tensor.stride(), 0

    def unpack(packed: tuple[Any, ...]) -> torch.Tensor:
        which, shape, stride, offset = packed
        return (again[which] if isinstance(which, int) else shelf.take(which)).as_strided(shape, stride, offset)

    with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
        inputs = _Mark.apply(torch.empty(0, requires_grad=True), *qkv)
        made = attend(*inputs)
    out = without_gaps(made.detach())
    last = put(out)
    kept = [*(each for each in saved.values() if each is not last), last]
    graph = get_gradient_edge(made), [get_gradient_edge(each) for each in inputs]
    return out, _Attention(shelf, graph, again, kept, out.shape, out.stride())


class _Mark(torch.autograd.Function):
    """q, k and v as they are, at a place in the graph that holds none of them."""

    @staticmethod
    def forward(ctx: Any, start: torch.Tensor, *qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(each.view_as(each) for each in qkv)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(grads))


def _of_three(tensors: Iterable[torch.Tensor]) -> QKV:
    q, k, v = tensors
    return q, k, v


def _autocast_state(x: torch.Tensor) -> tuple[bool, torch.dtype]:
    kind = x.device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _autocast(x: torch.Tensor, state: tuple[bool, torch.dtype]) -> torch.autocast:
    """As it was in the forward pass, without its cache: a weight cast while no gradient is wanted would stay in it."""
    enabled, dtype = state
    return torch.autocast(x.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)
