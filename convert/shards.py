"""Sequences that lie in pieces on several GPUs, and exact causal attention over them.

A sequence is cut into 2 N chunks for N processes and process r holds the r-th from the front and the r-th from the
back: under the causal mask every one then has the same work. Everything but attention works on tokens one by one; in
attention a process gathers the rotated keys and values of all, attends with its own rows, and joins the result of its
diagonal block and of what lies before it by their log-sums (ring attention, arXiv 2310.01889, with one exchange instead
of a ring: with grouped heads K and V of one layer are small beside the activations). The backward pass gathers again
rather than keep them, gives the joined output and sum to both kernels, which makes each partial gradient exact, and
sums the gradients of K and V where they belong.

Why not PyTorch's context_parallel: it replaces scaled_dot_product_attention everywhere while it is active, so short
replayed pieces and windowed layers would be cut as well; it has no CPU kernel, so no test could run it; and accelerate
offers it only together with sharded weights. Launch, wrapping, optimizer and checkpoints are accelerate's all the same.

Surprising rule: rows are padded at the end to whole chunks. Under a causal mask no token sees what follows it, so
padding of weight zero changes neither loss nor gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lcconvert.runtime.banded import banded_attention
from lcconvert.runtime.model import Attend, Layer

# renamed in torch 2.13, which warns of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Shards:
    """What process `rank` of the `size` that share every sequence holds of it; size 1 is a whole sequence."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks, of 2 * size, that are held here."""
        return self.rank, 2 * self.size - 1 - self.rank

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> what is held here, [B, 2 S, ...] with S = T / (2 size) rounded up; padding is zero."""
        if self.size == 1:
            return x
        rows = -(-x.shape[1] // (2 * self.size))
        padding = 2 * self.size * rows - x.shape[1]
        x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, padding))
        return x.unflatten(1, (2 * self.size, rows))[:, self.chunks].flatten(1, 2)

    def dealt(self, pieces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole pieces [P, ...] one after the other to each process: those of this one, and a weight for each.

        Every process gets equally many, because each must take part in every exchange; a weight of 0 marks a repeat.
        """
        mine = torch.arange(self.rank, -(-len(pieces) // self.size) * self.size, self.size, device=pieces.device)
        return pieces[mine % len(pieces)], (mine < len(pieces)).float()

    def owner(self, part: int) -> int:
        """The process that works on the `part`-th of any number of stretches of a text, to and fro for balance."""
        place = part % (2 * self.size)
        return min(place, 2 * self.size - 1 - place)

    def hand_out(self, x: torch.Tensor, owner: int) -> None:
        """Overwrites `x` in every process with that of `owner`."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=owner)

    def attend_of(self, layer: Layer) -> Attend | None:
        """The causal attention of `layer` over sequences of which `local` rows are given; None for its own."""
        if self.size == 1:
            return None
        return partial(_windowed, shards=self, window=layer.window) if layer.window else partial(_full, shards=self)


def _full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, shards: Shards) -> torch.Tensor:
    """q [B, 2 S, Hq, D], k and v [B, 2 S, Hkv, D] -> [B, 2 S, Hq, D], computed in the dtype of v."""
    out: torch.Tensor = _ShardedAttention.apply(q.to(v.dtype), k.to(v.dtype), v, shards)
    return out


def _windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, shards: Shards, window: int) -> torch.Tensor:
    """Like `_full` within a window. What it gathers is forgotten and gathered again in the backward pass."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = _Gathered.apply(torch.stack((k, v)), shards)
        rows, parts = q.shape[1] // 2, []
        for chunk, query in zip(shards.chunks, q.split(rows, dim=1)):
            seen = slice(max(0, chunk * rows - window), (chunk + 1) * rows)
            parts.append(banded_attention(query, keys[:, seen], values[:, seen], window))
        return torch.cat(parts, dim=1)

    out: torch.Tensor = checkpoint(attend, q.to(v.dtype), k.to(v.dtype), v, use_reentrant=False)
    return out


class _Gathered(torch.autograd.Function):
    """[2, B, 2 S, H, D] of this process -> [2, B, T, H, D] in the order of the sequence."""

    @staticmethod
    def forward(ctx: Any, kv: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards = shards
        return _gather(kv, shards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scatter(grad.float(), ctx.shards).to(grad.dtype), None


class _ShardedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shards: Shards) -> torch.Tensor:
        keys, values = _heads_first(_gather(torch.stack((k, v)), shards))
        rows = q.shape[1] // 2
        outs, sums, ctx.extras = [], [], []
        for chunk, query in zip(shards.chunks, q.split(rows, dim=1)):
            out, lse, extra = _attend_chunk(_heads_first(query), keys, values, chunk * rows)
            outs.append(out.transpose(1, 2))
            sums.append(lse)
            ctx.extras.append(extra)
        joined = torch.cat(outs, dim=1)
        ctx.save_for_backward(q, k, v, joined, *sums)
        ctx.shards = shards
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, joined, *sums = ctx.saved_tensors
        shards, rows = ctx.shards, q.shape[1] // 2
        gathered = _heads_first(_gather(torch.stack((k, v)), shards))
        grad_kv = torch.zeros(gathered.shape, dtype=torch.float32, device=q.device)  # [2, B, Hkv, T, D]
        grad_q = []
        for number, chunk in enumerate(shards.chunks):
            span = slice(number * rows, (number + 1) * rows)
            query, out, wanted = (_heads_first(x[:, span]) for x in (q, joined, grad))
            grad_query = _attend_chunk_backward(
                wanted, query, gathered, out, sums[number], ctx.extras[number], chunk * rows, grad_kv
            )
            grad_q.append(grad_query.transpose(1, 2))
        grad_k, grad_v = _scatter(grad_kv.transpose(2, 3), shards).to(k.dtype)
        return torch.cat(grad_q, dim=1), grad_k, grad_v, None


def _gather(x: torch.Tensor, shards: Shards) -> torch.Tensor:
    """[2, B, 2 S, H, D] of every process -> [2, B, T, H, D] in the order of the sequence, T = 2 S * size."""
    everyone = x.new_empty((shards.size, *x.shape))
    _all_gather(everyone.flatten(0, 1), x.contiguous(), group=shards.group)
    chunks = everyone.unflatten(3, (2, -1)).movedim(0, 2)  # [2, B, size, 2, S, H, D]
    order = torch.arange(shards.size, device=x.device)
    owners, halves = torch.cat((order, order.flip(0))), torch.arange(2, device=x.device).repeat_interleave(shards.size)
    return chunks[:, :, owners, halves].flatten(2, 3)


def _scatter(x: torch.Tensor, shards: Shards) -> torch.Tensor:
    """The sum over processes of [2, B, T, H, D] -> of it the rows that are held here, [2, B, 2 S, H, D]."""
    order = torch.arange(2 * shards.size, device=x.device)
    owned = torch.stack((order[: shards.size], order.flip(0)[: shards.size]), dim=1)  # [size, 2]
    chunks = x.unflatten(2, (2 * shards.size, -1))[:, :, owned]  # [2, B, size, 2, S, H, D]
    chunks = chunks.movedim(2, 0).flatten(3, 4).contiguous()
    own = torch.empty_like(chunks[0])
    _reduce_scatter(own, chunks.flatten(0, 1), group=shards.group)
    return own


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[..., T, H, D] -> [..., H, T, D] in memory."""
    return x.transpose(-2, -3).contiguous()


def _attend_chunk(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, begin: int
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[Any, ...]]]:
    """q [B, Hq, S, D], the rows from `begin` of the sequence of keys and values [B, Hkv, T, D] -> out, log-sums
    float32 [B, Hq, S], and what the kernels want again. The query heads of a KV head are more rows before the block."""
    group = q.shape[1] // keys.shape[1]
    block = slice(begin, begin + q.shape[2])
    near, near_lse, extra = _attend(q, _spread(keys[:, :, block], group), _spread(values[:, :, block], group), True)
    if not begin:
        return near, near_lse, [extra]
    far, far_lse, further = _attend(_folded(q, keys), keys[:, :, :begin], values[:, :, :begin], False)
    far, far_lse = far.reshape(q.shape), far_lse.reshape(near_lse.shape)
    lse = torch.logaddexp(near_lse, far_lse)
    out = (near_lse - lse).exp()[..., None] * near + (far_lse - lse).exp()[..., None] * far
    return out.to(q.dtype), lse, [extra, further]


def _attend_chunk_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    gathered: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    extras: list[tuple[Any, ...]],
    begin: int,
    grad_kv: torch.Tensor,
) -> torch.Tensor:
    """The gradient of q; those of keys and values are added to `grad_kv`, float32 of the shape of `gathered`."""
    keys, values = gathered
    group = q.shape[1] // keys.shape[1]
    block = slice(begin, begin + q.shape[2])
    k, v = (_spread(x[:, :, block], group) for x in (keys, values))
    grad_q, *near = _attend_backward(grad, q, k, v, out, lse, extras[0], True)
    for total, part in zip(grad_kv, near):
        total[:, :, block] += part.unflatten(1, (-1, group)).sum(2, dtype=torch.float32)
    if not begin:
        return grad_q
    k, v = (x[:, :, :begin] for x in (keys, values))
    grad, q_rows, out, lse = (_folded(x, keys) for x in (grad, q, out, lse))
    far_q, *far = _attend_backward(grad, q_rows, k, v, out, lse, extras[1], False)
    for total, part in zip(grad_kv, far):
        total[:, :, :begin] += part
    return grad_q + far_q.reshape(q.shape)


def _spread(x: torch.Tensor, group: int) -> torch.Tensor:
    """[B, Hkv, S, D] -> [B, Hkv * group, S, D]."""
    return x.repeat_interleave(group, dim=1)


def _folded(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[B, Hq, S, ...] -> [B, Hkv, G * S, ...]: unmasked rows may stand in any order."""
    return x.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    """[B, H, R, D] over [B, H, S, D] -> out, natural log-sums float32 [B, H, R], and what the backward pass wants."""
    if not q.is_cuda:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, lse, ()
    # cuDNN: the fastest backward pass on Hopper; its sums come as [B, H, R, 1] or [B, H, R]
    out, lse, *rest = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    cum_q, cum_k, max_q, max_k, seed, offset = rest[:6]
    return out, lse.view(out.shape[:3]), (lse.ndim, seed, offset, cum_q, cum_k, max_q, max_k)


def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    extra: tuple[Any, ...],
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; `out` and `lse` are those of the joined softmax."""
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    if not q.is_cuda:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(grad, q, k, v, out, lse, 0.0, causal)
        return grads
    ndim, seed, offset, cum_q, cum_k, max_q, max_k = extra
    lse = lse if ndim == 3 else lse[..., None]
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.contiguous(), seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal
    )
    return grads
