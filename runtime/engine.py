"""The engine: layer-major prefill, paged decode, generation.

A prompt runs layer by layer over all its tokens, in row chunks. So one layer's K and V stay exact while that layer
attends and are quantized into pages once, after it; an int4 layer is expanded once, not once a chunk; block selection
sees the whole context. Between layers the engine reports progress and can be cancelled, which leaves the sequence as
it was. One thread at a time may use an engine; the server gives it one of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from lcconvert.runtime.attention import PageTable, decode_attention, prefill_attention
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.kv_cache import PagePool, Sequence, StagedAppend, read_scales
from lcconvert.runtime.model import Decoder, load_decoder
from lcconvert.runtime.plan import GPU_CHUNK
from lcconvert.runtime.rope import cos_sin
from lcconvert.runtime.sampler import SamplingParams, sample
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy, KVConfig, Sidecar
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.tokenizer import Tokenizer
from lcconvert.runtime.units import format_count

CHUNK = {"cuda": GPU_CHUNK, "cpu": 4_096}  # rows of a prefill chunk; multiples of the page

Progress = Callable[[int, int], None]  # layers done, layers in all


class Cancelled(Exception):
    """The caller asked to stop; the sequence is as it was before the call."""


class ContextExceeded(UserError):
    """The prompt, or prompt plus answer, is longer than the engine's context."""


@dataclass(frozen=True)
class Piece:
    """One generated token: the text it completes (may be empty), its natural-log probability, why generation ended."""

    token: int
    text: str
    logprob: float
    finish: Literal["stop", "length"] | None = None


class Engine:
    """A loaded model, its KV page pool and its attention policy."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None,
        pool: PagePool,
        attention: AttentionPolicy,
        *,
        name: str,
        max_context: int,
        eos_ids: frozenset[int],
    ):
        self.model, self._tokenizer, self.pool, self.attention = model, tokenizer, pool, attention
        self.spec, self.name, self.max_context, self.eos_ids = model.spec, name, max_context, eos_ids
        self.device, self.dtype, self.kv = pool.device, pool.dtype, pool.config
        self.chunk = CHUNK[self.device.type]

    @classmethod
    def load(
        cls,
        source: TensorSource,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        kv: KVConfig | None = None,
        attention: AttentionPolicy | None = None,
        max_context: int | None = None,
    ) -> Engine:
        """Loads `source`. None takes: CUDA if there is one; bfloat16 there and float32 on a CPU; KV scheme, policy and
        context from the artifact's sidecar. On a GPU the pages for `max_context` are reserved at once."""
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        sidecar = Sidecar.read(source)
        kv = kv or sidecar.kv
        model = load_decoder(source, device=where, dtype=dtype)
        limit = max_context or sidecar.context.configured
        if limit > sidecar.context.configured:
            raise ContextExceeded(
                f"{source.name} is configured for {format_count(sidecar.context.configured)} tokens, "
                f"{format_count(limit)} were asked for; extend it first"
            )
        on_gpu = where.type == "cuda"
        pool = PagePool(
            model.spec,
            kv,
            device=where,
            dtype=dtype,
            scales=read_scales(source, model.spec, kv.scheme),
            capacity=-(-limit // PAGE) if on_gpu else 0,
            growable=not on_gpu,
        )
        tokenizer = Tokenizer.from_files(source.files) if "tokenizer.json" in source.files else None
        eos = frozenset(model.spec.eos_ids) | frozenset(tokenizer.eos_ids if tokenizer else ())
        policy = attention or sidecar.attention
        return cls(model, tokenizer, pool, policy, name=source.name, max_context=limit, eos_ids=eos)

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer.json; add the tokenizer files of the original model")
        return self._tokenizer

    def new_sequence(self) -> Sequence:
        return self.pool.new_sequence()

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence with the same cached context: many questions on one prefill."""
        return self.pool.fork(seq)

    def free(self, seq: Sequence) -> None:
        self.pool.free(seq)

    @torch.inference_mode()
    def prefill(
        self,
        seq: Sequence,
        ids: list[int],
        *,
        want: Literal["last", "all"] = "last",
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> torch.Tensor:
        """Appends `ids` to `seq`. "last": float32 logits [V] after the last id; "all": normed hidden states [T, H].

        Raises ContextExceeded before any work, and Cancelled between layers.
        """
        start, total = seq.length, seq.length + len(ids)
        if not ids:
            raise UserError("the prompt is empty; give at least one token")
        if total > self.max_context:
            raise ContextExceeded(
                f"the context would be {total} tokens, the limit is {self.max_context}; shorten the prompt or "
                "serve a longer context"
            )
        staged = StagedAppend(self.pool, seq, ids)
        try:
            hidden = self._run_layers(seq, staged, start, total, want, progress, cancelled)
        except BaseException:
            staged.drop()
            raise
        staged.commit()
        if want == "all":
            return self.model.model.norm(hidden)
        return self.model.logits(self.model.model.norm(hidden[-1]))

    def _run_layers(
        self,
        seq: Sequence,
        staged: StagedAppend,
        start: int,
        total: int,
        want: str,
        progress: Progress | None,
        cancelled: Callable[[], bool] | None,
    ) -> torch.Tensor:
        spec, layers = self.spec, self.model.layers
        x = self.model.model.embed_tokens(torch.tensor(staged.new_ids, device=self.device))  # [T, H]
        positions = torch.arange(start, total, device=self.device)
        cos, sin = cos_sin(spec.rope, spec.head_dim, positions)  # [T, D/2] float32
        k = torch.empty(total, spec.num_kv_heads, spec.head_dim, dtype=self.dtype, device=self.device)
        v = torch.empty_like(k)
        chunks = self._chunks(start, total)
        for number, layer in enumerate(layers):
            if cancelled is not None and cancelled():
                raise Cancelled(f"stopped after {number} of {len(layers)} layers")
            self.pool.read_prefix(seq, number, k, v)
            for begin, end in chunks:
                rows = slice(begin - start, end - start)
                normed = layer.input_layernorm(x[rows])
                k[begin:end], v[begin:end] = layer.self_attn.key_value(normed, cos[rows], sin[rows])
            staged.store(number, k, v)
            last_only = want == "last" and number == len(layers) - 1
            for begin, end in [(total - 1, total)] if last_only else chunks:
                rows = slice(begin - start, end - start)
                q = layer.self_attn.query(layer.input_layernorm(x[rows]), cos[rows], sin[rows])
                attn = prefill_attention(
                    q, k[:end], v[:end], q_offset=begin, total=total, policy=self.attention, layer=number
                )
                x[rows] = layer.finish(x[rows], attn)
            if progress is not None:
                progress(number + 1, len(layers))
        return x

    def _chunks(self, start: int, total: int) -> list[tuple[int, int]]:
        """Row ranges [begin, end) that cover start..total; all but the first begin at a multiple of the page."""
        borders = [start]
        if start % PAGE:
            borders.append(min(total, -(-start // PAGE) * PAGE))
        while borders[-1] < total:
            borders.append(min(total, borders[-1] + self.chunk))
        return [(a, b) for a, b in pairwise(borders) if a < b]

    @torch.inference_mode()
    def decode(self, seq: Sequence, token: int) -> torch.Tensor:
        """Appends one token and returns the float32 logits [V] after it."""
        if seq.length >= self.max_context:
            raise ContextExceeded(f"the context is full at {self.max_context} tokens; serve a longer context")
        seq.ids.append(token)
        spec = self.spec
        x = self.model.model.embed_tokens(torch.tensor([token], device=self.device))  # [1, H]
        position = torch.tensor([seq.length - 1], device=self.device)
        cos, sin = cos_sin(spec.rope, spec.head_dim, position)
        table = PageTable.of(seq, self.device)
        for number, layer in enumerate(self.model.layers):
            q, k, v = layer.qkv(x, cos, sin)
            self.pool.append(seq, number, k[0], v[0])
            x = layer.finish(x, decode_attention(q[0], self.pool, seq, table, number)[None])
        self.pool.seal(seq)
        return self.model.logits(self.model.model.norm(x[0]))

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normed hidden states [T, H] -> float32 logits [T, V]; pass at most a few hundred rows."""
        return self.model.logits(hidden)

    def generate(
        self,
        ids: list[int],
        params: SamplingParams,
        *,
        seq: Sequence | None = None,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Piece]:
        """Prefills `ids` (on top of `seq` when given) and yields a Piece a token.

        Text that may be the beginning of a stop string is held back until it is decided; a stop string itself is never
        yielded. The last piece has `finish`: "stop" for an end token or stop string, "length" for `max_tokens` or a
        full context. A sequence made here is freed at the end; a given one keeps the answer but for
        its last token.
        """
        own = seq is None
        seq = self.new_sequence() if seq is None else seq
        try:
            logits = self.prefill(seq, ids, progress=progress, cancelled=cancelled)
            generator, stream, held = params.generator(), self.tokenizer.stream(), ""
            for count in range(1, params.max_tokens + 1):
                if cancelled is not None and cancelled():
                    raise Cancelled(f"stopped after {count - 1} tokens")
                token, logprob = sample(logits, params, generator)
                if token in self.eos_ids:
                    yield Piece(token, held + stream.flush(), logprob, "stop")
                    return
                held += stream.push(token)
                full = count == params.max_tokens or seq.length >= self.max_context
                if full:
                    held += stream.flush()
                text, held, stopped = _cut_at_stop(held, params.stop)
                if stopped:
                    yield Piece(token, text, logprob, "stop")
                    return
                if full:
                    yield Piece(token, text + held, logprob, "length")
                    return
                yield Piece(token, text, logprob)
                logits = self.decode(seq, token)
        finally:
            if own:
                self.free(seq)

    def kv_bytes_per_token(self) -> float:
        """Bytes a token takes in a full page, all layers."""
        return self.pool.bytes_per_token()

    def memory(self) -> dict[str, Any]:
        """Bytes: `weights`, `kv_pool`, and on a GPU `peak_gpu` since the process began or the last reset."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        report: dict[str, Any] = {"weights": sum(t.nbytes for t in tensors), "kv_pool": self.pool.bytes}
        if self.device.type == "cuda":
            report["peak_gpu"] = torch.cuda.max_memory_allocated(self.device)
        return report


def _cut_at_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str, bool]:
    """(text to give out, text to hold back, whether a stop string was met)."""
    found = min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=-1)
    if found >= 0:
        return text[:found], "", True
    longest = max((len(stop) for stop in stops), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return text[:-size], text[-size:], False
    return text, "", False
