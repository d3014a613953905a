"""Tuning on questions about one long text that is read once and then held still: a million real keys at every update.

Windows that fit into a training step teach distances (PoSE) but not the crowd: at 1M a fact competes with a million
keys. A real step at that length takes minutes. Here the text is read without gradient, layer by layer, and its keys and
values are kept; a batch of questions then attends to them and to itself, and only what the question does is learnt.

The approximation: keys and values are those of the weights before the text was read, and updates about it do not move
them, so the gradient of how the text itself is read is missing. The next text is read with the new weights. With the
hybrid policy the text is read by block-sparse attention, the questions still attend to every key.

Surprising rule: the two partial results are joined by their log-sums, and both backward passes get the joined output
and sum, which makes each partial gradient exact (as in ring attention, arXiv 2310.01889).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lcconvert.convert.shards import Shards
from lcconvert.kernels.select_blocks import pool_keys
from lcconvert.runtime.attention import prefill_attention
from lcconvert.runtime.banded import banded_attention
from lcconvert.runtime.model import Decoder, layer_tables
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy

_CHUNK = 512 * PAGE  # rows of the text whose activations exist at once
_PARTS = 16  # stretches of keys that are attended side by side: a few questions alone do not fill a GPU


@dataclass(frozen=True)
class Prefix:
    """Rotated keys and values of a text of `length` tokens: a pair of [S, Hkv, D] a layer, in the compute dtype."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def length(self) -> int:
        return len(self.layers[0][0])


@torch.no_grad()
def read_prefix(
    decoder: Decoder, ids: torch.Tensor, policy: AttentionPolicy, dtype: torch.dtype, shards: Shards | None = None
) -> Prefix:
    """Reads ids int64 [S] from position 0 by `policy`; run it under the autocast that training uses, if any.

    The processes of `shards` read it together: each some rows, and every one gets all keys and values.
    """
    shards = shards or Shards()
    spec, length = decoder.spec, len(ids)
    tables = layer_tables(spec, torch.arange(length, device=ids.device))
    x = decoder.embed(ids).clone()
    layers = []
    for number, (layer, (cos, sin)) in enumerate(zip(decoder.layers, tables)):
        k, v = (ids.new_empty((length, spec.num_kv_heads, spec.head_dim), dtype=dtype) for _ in range(2))
        spans = [slice(begin, min(begin + _CHUNK, length)) for begin in range(0, length, _CHUNK)]
        own = [span for part, span in enumerate(spans) if shards.owner(part) == shards.rank]
        for span in own:
            k[span], v[span] = layer.self_attn.key_value(layer.input_layernorm(x[span]), cos[span], sin[span])
        for part, span in enumerate(spans):
            shards.hand_out(k[span], shards.owner(part))
            shards.hand_out(v[span], shards.owner(part))
        pooled = pool_keys(k, policy.pool) if policy.kind == "hybrid" else None
        alpha = torch.tensor(policy.alpha_of(number, spec.num_heads), device=ids.device)
        for span in own:
            q = layer.self_attn.query(layer.input_layernorm(x[span]), cos[span], sin[span]).to(dtype)
            attn = prefill_attention(
                q, k[: span.stop], v[: span.stop],
                q_offset=span.start, total=length, policy=policy, alpha=alpha, pooled=pooled,
                window=layer.window,
            )  # fmt: skip
            x[span] = layer.finish(x[span], attn)
        layers.append((k, v))
    return Prefix(layers)


def hidden_after(decoder: Decoder, prefix: Prefix, ids: torch.Tensor) -> torch.Tensor:
    """int64 ids [B, T], each row going on after `prefix` by itself -> hidden states after the final norm [B, T, H]."""
    positions = torch.arange(prefix.length, prefix.length + ids.shape[1], device=ids.device).expand_as(ids)
    tables = layer_tables(decoder.spec, positions)
    x = decoder.embed(ids)
    for layer, (k, v), (cos, sin) in zip(decoder.layers, prefix.layers, tables):
        after = attend_after if layer.window is None else partial(attend_within, window=layer.window)
        x = layer(x, cos, sin, partial(after, prefix_k=k, prefix_v=v))
    return decoder.model.norm(x)


def attend_after(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, prefix_k: torch.Tensor, prefix_v: torch.Tensor
) -> torch.Tensor:
    """Attention of q [B, T, Hq, D] to all of prefix_k and prefix_v [S, Hkv, D] and causally to k and v [B, T, Hkv, D].

    Computed in the dtype of the prefix, sums in float32; returns [B, T, Hq, D]. The prefix gets no gradient.
    """
    out: torch.Tensor = _AttendAfter.apply(*(x.to(prefix_k.dtype) for x in (q, k, v)), prefix_k, prefix_v)
    return out


def attend_within(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, prefix_k: torch.Tensor, prefix_v: torch.Tensor, window: int
) -> torch.Tensor:
    """`attend_after` of a layer that sees `window` tokens: the end of the prefix is all it can reach."""
    reach = max(0, len(prefix_k) - window + 1)
    k, v = (
        torch.cat((far[reach:].expand(len(near), -1, -1, -1), near.to(far.dtype)), 1)
        for far, near in ((prefix_k, k), (prefix_v, v))
    )
    return banded_attention(q.to(k.dtype), k, v, window)


class _AttendAfter(torch.autograd.Function):
    """Rows are laid out [Hkv, R, D], R = B * T * G: the G query heads that share a KV head are more rows of it."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prefix_k: torch.Tensor,
        prefix_v: torch.Tensor,
    ) -> torch.Tensor:
        far, far_lse, extra = _attend(_spread(_rows(q, k), prefix_k), _parts(prefix_k), _parts(prefix_v))
        scores, values = _own_scores(q, k), v.float()
        own_lse = _as_rows(scores.logsumexp(-1))
        lse = torch.logaddexp(far_lse.logsumexp(0), own_lse)  # [Hkv, R]
        out = ((far_lse - lse).exp()[..., None] * far.float()).sum(0)
        near = torch.einsum("bhgts,bshd->bthgd", (scores - _as_scores(lse, q, k)[..., None]).exp(), values)
        joined = _from_rows(out, q, k) + near.reshape(q.shape)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, joined.to(q.dtype), lse)
        ctx.extra = extra
        return joined.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, out, lse = ctx.saved_tensors
        grads, queries, outs = (_spread(_rows(x.to(q.dtype), k), prefix_k) for x in (grad, q, out))
        lses = lse.expand(len(queries), -1, -1).contiguous()
        far = _attend_backward(grads, queries, outs, _parts(prefix_k), _parts(prefix_v), lses, ctx.extra)
        # the question's own tokens, a few dozen: plain formulas
        grad32, scale = grad.float(), 1.0 / math.sqrt(q.shape[-1])
        shape = (*q.shape[:2], k.shape[2], -1, q.shape[-1])  # B, T, Hkv, G, D
        p = (_own_scores(q, k) - _as_scores(lse, q, k)[..., None]).exp()  # [B, Hkv, G, T, T]
        delta = (grad32 * out.float()).sum(-1).view(shape[:-1]).permute(0, 2, 3, 1)  # [B, Hkv, G, T]
        ds = p * (torch.einsum("bthgd,bshd->bhgts", grad32.view(shape), v.float()) - delta[..., None]) * scale
        grad_q = torch.einsum("bhgts,bshd->bthgd", ds, k.float()).reshape(q.shape)
        grad_k = torch.einsum("bhgts,bthgd->bshd", ds, q.float().view(shape))
        grad_v = torch.einsum("bhgts,bthgd->bshd", p, grad32.view(shape))
        grad_q = grad_q + _from_rows(far.float().sum(0), q, k)
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _own_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scaled causal scores float32 [B, Hkv, G, T, T]."""
    grouped = q.float().unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bthgd,bshd->bhgts", grouped, k.float()) / math.sqrt(q.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf)


def _rows(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B, T, Hq, D] -> [Hkv, B * T * G, D]."""
    return x.unflatten(2, (k.shape[2], -1)).permute(2, 0, 1, 3, 4).flatten(1, 3)


def _from_rows(rows: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    batch, tokens, heads, width = q.shape
    return rows.view(k.shape[2], batch, tokens, -1, width).permute(1, 2, 0, 3, 4).reshape(batch, tokens, heads, width)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """[B, Hkv, G, T] -> [Hkv, B * T * G]."""
    return x.permute(1, 0, 3, 2).flatten(1)


def _as_scores(rows: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[Hkv, B * T * G] -> [B, Hkv, G, T]."""
    return rows.view(k.shape[2], q.shape[0], q.shape[1], -1).permute(1, 0, 3, 2)


def _parts(x: torch.Tensor) -> torch.Tensor:
    """Keys or values [S, Hkv, D] -> [P, Hkv, S / P, D], without a copy."""
    return x.unflatten(0, (math.gcd(len(x), _PARTS), -1)).transpose(1, 2)


def _spread(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """[Hkv, R, D] -> [P, Hkv, R, D], once for every part of `keys`."""
    return rows.expand(math.gcd(len(keys), _PARTS), *rows.shape).contiguous()


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    """Unmasked attention [P, H, R, D] over [P, H, S, D] -> out, natural-log sums float32 [P, H, R], and what the
    backward pass of the kernel wants besides."""
    if q.is_cuda:
        out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse, tuple(rest[:6])  # cumulative lengths, longest lengths, dropout's seed and offset
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse, ()


def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    out: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    extra: tuple[Any, ...],
) -> torch.Tensor:
    """Gradient of q [P, H, R, D]; `out` and `lse` are those of the joined softmax."""
    if q.is_cuda:
        cum_q, cum_k, max_q, max_k, seed, offset = extra
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        grad_q, *_ = backward(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset)
    else:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_q, *_ = backward(grad, q, k, v, out, lse, 0.0, False)
    result: torch.Tensor = grad_q
    return result
