"""The engine: prefill, decode and generation over one loaded model, its page pool and its attention policy.

A prefill reports progress and can be cancelled between its layers, which leaves the sequence as it was; other sequences
may decode meanwhile, from the progress callback. One thread at a time may use an engine; the server gives it one of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from lcconvert.runtime.answer import Answer, Piece
from lcconvert.runtime.decode import MOST_SEQUENCES, DecodeStep
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.grammar import Constraint
from lcconvert.runtime.kv_cache import PagePool, Sequence, StagedAppend, read_scales
from lcconvert.runtime.model import Decoder, load_decoder
from lcconvert.runtime.plan import MemoryPlan, plan_for_source
from lcconvert.runtime.prefill import Cancelled, PrefillSetup, Progress, run_prefill
from lcconvert.runtime.products import Gemm, LayerWeights
from lcconvert.runtime.sampler import SamplingParams
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy, KVConfig, Sidecar
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.timing import PartTimer
from lcconvert.runtime.tokenizer import Tokenizer
from lcconvert.runtime.units import format_count

__all__ = ["Answer", "Cancelled", "ContextExceeded", "Engine", "Piece", "Progress"]
CPU_CHUNK = 4_096  # rows of a prefill chunk where memory is not what limits it


class ContextExceeded(UserError):
    """The prompt, or prompt plus answer, is longer than the engine's context."""


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
        gemm: Gemm = "16-bit",
        chunk: int = CPU_CHUNK,
        offload: bool = False,
    ):
        """`gemm`: how int4 layers multiply in prefill. `chunk`: prefill rows at a time, a multiple of 128. `offload`:
        a prompt's hidden states live in pinned host memory (CUDA only)."""
        self.model, self._tokenizer, self.pool, self.attention = model, tokenizer, pool, attention
        self.spec, self.name, self.max_context, self.eos_ids = model.spec, name, max_context, eos_ids
        self.device, self.dtype, self.kv, self.gemm = pool.device, pool.dtype, pool.config, gemm
        self.chunk, self.offload = chunk, offload
        self.layers = [LayerWeights(layer) for layer in model.layers]  # as prefill and decode multiply with them
        self._alpha = torch.tensor(
            [attention.alpha_of(layer, self.spec.num_heads) for layer in range(self.spec.num_layers)],
            device=self.device,
        )  # [layers, Hq]
        if offload:  # locking gigabytes of host memory takes seconds; PyTorch keeps the block for the prefills
            torch.empty(max_context, self.spec.hidden_size, dtype=self.dtype, pin_memory=True)
        self._decode = DecodeStep(model, self.layers, pool, attention)

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
        gpu_bytes: int | None = None,
    ) -> Engine:
        """Loads `source`. None takes: CUDA if there is one; bfloat16 there and float32 on a CPU; KV scheme, policy and
        context from the artifact's sidecar; what is free of the GPU. On a GPU the pages for `max_context` are reserved
        at once, and a context that cannot fit into `gpu_bytes` is refused before anything is read."""
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
        sidecar = Sidecar.read(source)
        kv = kv or sidecar.kv
        policy = attention or sidecar.attention
        limit = max_context or sidecar.context.configured
        if limit > sidecar.context.configured:
            raise ContextExceeded(
                f"{source.name} is configured for {format_count(sidecar.context.configured)} tokens, "
                f"{format_count(limit)} were asked for; extend it first"
            )
        on_gpu = where.type == "cuda"
        gemm: Gemm = "fp8" if sidecar.prefill_gemm == "fp8" and has_fp8(where) else "16-bit"
        plan: MemoryPlan | None = None
        if on_gpu:
            torch.cuda.empty_cache()  # what a model before this one left behind counts as free
            budget = gpu_bytes or torch.cuda.mem_get_info(where)[0]
            plan = plan_for_source(source, kv, policy, limit, gemm=gemm, dtype=dtype, gpu_bytes=budget)
            plan.check(source.name)
        model = load_decoder(source, device=where, dtype=dtype)
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
        return cls(
            model,
            tokenizer,
            pool,
            policy,
            name=source.name,
            max_context=limit,
            eos_ids=eos,
            gemm=gemm,
            chunk=plan.chunk_rows if plan else CPU_CHUNK,
            offload=plan.offload if plan else False,
        )

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer.json; add the tokenizer files of the original model")
        return self._tokenizer

    def new_sequence(self) -> Sequence:
        return self.pool.new_sequence()

    @torch.inference_mode()
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
        timer: PartTimer | None = None,
    ) -> torch.Tensor:
        """Appends `ids` to `seq`. "last": float32 logits [V] after the last id; "all": normed hidden states [T, H].

        Raises ContextExceeded before any work, and Cancelled between layers. `progress` is called between layers, and
        may decode other sequences. `timer` collects where the time goes.
        """
        total = seq.length + len(ids)
        if not ids:
            raise UserError("the prompt is empty; give at least one token")
        if total > self.max_context:
            raise ContextExceeded(
                f"the context would be {total} tokens, the limit is {self.max_context}; shorten the prompt or "
                "serve a longer context"
            )
        setup = PrefillSetup(
            self.model, self.layers, self.pool, self.attention, self._alpha, self.gemm, self.chunk, self.offload
        )
        if timer is not None:
            timer.start()
        staged = StagedAppend(self.pool, seq, ids)
        try:
            hidden = run_prefill(
                setup, seq, staged, want_all=want == "all", progress=progress, cancelled=cancelled, timer=timer
            )
        except BaseException:
            staged.drop()
            raise
        staged.commit()
        normed = self.model.model.norm(hidden)
        result = normed if want == "all" else self.model.logits(normed[0])
        if timer is not None:
            timer.stop()
        return result

    def decode(self, seq: Sequence, token: int) -> torch.Tensor:
        """Appends one token and returns the float32 logits [V] after it."""
        return self.decode_batch([seq], [token])[0]

    @torch.inference_mode()
    def decode_batch(self, seqs: list[Sequence], tokens: list[int]) -> torch.Tensor:
        """Appends one token to each of up to 8 different sequences: float32 logits [S, V] after them."""
        if len(seqs) > MOST_SEQUENCES:
            raise ValueError(f"{len(seqs)} sequences in one step, {MOST_SEQUENCES} is the most")
        if any(seq.length >= self.max_context for seq in seqs):
            raise ContextExceeded(f"the context is full at {self.max_context} tokens; serve a longer context")
        return self._decode(seqs, tokens)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normed hidden states [T, H] -> float32 logits [T, V]; pass at most a few hundred rows."""
        return self.model.logits(hidden)

    def answer(self, params: SamplingParams, constraint: Constraint | None = None) -> Answer:
        """The state of one new answer in this model's vocabulary."""
        return Answer(params, self.tokenizer, self.eos_ids, constraint)

    def generate(
        self,
        ids: list[int],
        params: SamplingParams,
        *,
        seq: Sequence | None = None,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[Piece]:
        """Prefills `ids` (on top of `seq` when given) and yields a Piece a token, as `Answer.push` makes them.

        The last piece has `finish`: "stop" for an end token or stop string, "length" for `max_tokens` or a full
        context. A sequence made here is freed at the end; a given one keeps the answer but for its last token.
        """
        own = seq is None
        seq = self.new_sequence() if seq is None else seq
        try:
            logits = self.prefill(seq, ids, progress=progress, cancelled=cancelled)
            answer = self.answer(params)
            while True:
                if cancelled is not None and cancelled():
                    raise Cancelled(f"stopped after {answer.count} tokens")
                piece = answer.push(logits, full=seq.length >= self.max_context)
                yield piece
                if piece.finish is not None:
                    return
                logits = self.decode(seq, piece.token)
        finally:
            if own:
                self.free(seq)

    def kv_bytes_per_token(self) -> float:
        """Bytes a token takes in a full page, all layers."""
        return self.pool.bytes_per_token()

    def memory(self) -> dict[str, Any]:
        """Bytes: `weights`, `kv_pool`, and on a GPU `peak_gpu` since the process began or the last reset."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        pages = self.pool.bytes + self.pool.exact_bytes
        report: dict[str, Any] = {"weights": sum(t.nbytes for t in tensors), "kv_pool": pages}
        if self.device.type == "cuda":
            report["peak_gpu"] = torch.cuda.max_memory_allocated(self.device)
        return report


def has_fp8(device: torch.device) -> bool:
    """Whether a GPU multiplies e4m3 (Ada and Hopper on); False for a CPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
