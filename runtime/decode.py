"""One token for each of a few sequences: the whole step is a fixed list of kernels, on a GPU one CUDA graph.

Everything that changes from step to step (tokens, positions, page numbers, lengths) is read from a few small tensors
that never move; the grids depend on shapes alone. A graph is captured for each number of sequences on its first step,
and again when the page pool has grown. On a CPU the same function runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lcconvert.kernels.kv_pages import PageTensors, dequantize_pages
from lcconvert.kernels.paged_decode import PagePart, attend_pages
from lcconvert.kernels.rms_norm import rms_norm
from lcconvert.kernels.rotary import rotate_append
from lcconvert.kernels.select_pages import select_pages
from lcconvert.runtime.banded import masked_attention
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.kv_cache import PagePool, Sequence
from lcconvert.runtime.model import Decoder
from lcconvert.runtime.paths import fixed_step
from lcconvert.runtime.products import LayerWeights
from lcconvert.runtime.rope import inv_freq, rotation
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy

MOST_SEQUENCES = 8  # in one step
_ID, _POSITION, _PAGE, _ROW, _SINK, _TAIL, _EXACT, _FULL = range(8)  # columns of the step's numbers


@dataclass(frozen=True)
class StepInputs:
    """What a step reads: numbers int64 [S, 8] (see the column names) and the full pages int32 [S, W] of each one."""

    numbers: torch.Tensor
    table: torch.Tensor


Step = Callable[[StepInputs], torch.Tensor]


class DecodeStep:
    """Appends one token to each of up to `MOST_SEQUENCES` sequences and returns the logits after it."""

    def __init__(self, model: Decoder, layers: list[LayerWeights], pool: PagePool, policy: AttentionPolicy):
        if policy.decode_share is not None and pool.config.scheme != "int4":
            raise UserError(
                f"decode_share is {policy.decode_share} but the KV scheme is {pool.config.scheme!r}; only int4 keys "
                "carry the page bounds that page-sparse decode needs, use scheme 'int4' or leave decode_share out"
            )
        self._model, self._layers, self._pool, self._policy = model, layers, pool, policy
        self._products = [layer.few() for layer in layers]
        self._ropes = {}  # float64 frequencies [D/2] on the device, and the factor on cos and sin
        for rope in model.spec.ropes:
            freq, scale = inv_freq(rope, model.spec.head_dim)
            self._ropes[rope] = freq.to(pool.device, torch.float64), scale
        self._graphs: dict[int, _Graph] = {}
        # Elsewhere PyTorch stands in for a kernel, and may wait for the device, which a capture forbids.
        self._capturable = pool.device.type == "cuda" and pool.dtype != torch.float32 and fixed_step(model.spec)

    def __call__(self, seqs: list[Sequence], tokens: list[int]) -> torch.Tensor:
        """float32 logits [S, V]. The sequences are different ones."""
        assert len(seqs) == len(tokens) <= MOST_SEQUENCES
        for seq, token in zip(seqs, tokens, strict=True):
            seq.ids.append(token)
        numbers = [self._numbers(seq, token) for seq, token in zip(seqs, tokens, strict=True)]
        if self._capturable:
            logits = self._replay(seqs, numbers)
        else:
            logits = self._step(self._fresh(seqs, numbers))
        for seq in seqs:
            self._pool.seal(seq)
        return logits

    @staticmethod
    def _numbers(seq: Sequence, token: int) -> list[int]:
        position = seq.length - 1  # `ids` counts the token already
        page = seq.sink if position < PAGE else seq.tail
        return [token, position, page, position % PAGE, seq.sink, seq.tail, seq.exact_length, PAGE * len(seq.pages)]

    def _fresh(self, seqs: list[Sequence], numbers: list[list[int]]) -> StepInputs:
        width = max(1, max(len(seq.pages) for seq in seqs))
        table = torch.zeros(len(seqs), width, dtype=torch.int32)
        for row, seq in zip(table, seqs, strict=True):
            row[: len(seq.pages)] = torch.tensor(seq.pages, dtype=torch.int32)
        device = self._pool.device
        return StepInputs(torch.tensor(numbers, dtype=torch.int64, device=device), table.to(device))

    def _replay(self, seqs: list[Sequence], numbers: list[list[int]]) -> torch.Tensor:
        graph = self._graphs.get(len(seqs))
        if graph is None or graph.generation != self._pool.generation:
            self._graphs.pop(len(seqs), None)
            graph = _Graph(self._pool, len(seqs))
            self._graphs[len(seqs)] = graph
        return graph.run(self._step, seqs, numbers)

    def _step(self, inputs: StepInputs) -> torch.Tensor:
        spec, numbers = self._model.spec, inputs.numbers
        small = numbers.to(torch.int32)
        page, row, exact_tokens, full_tokens = (small[:, i].contiguous() for i in (_PAGE, _ROW, _EXACT, _FULL))
        full_pages = full_tokens // PAGE
        exact_table = small[:, _SINK : _TAIL + 1].contiguous()
        tables = {rope: rotation(*table, numbers[:, _POSITION]) for rope, table in self._ropes.items()}
        x = self._model.embed(numbers[:, _ID])  # [S, H]
        delta = None
        for number, (layer, products) in enumerate(zip(self._layers, self._products, strict=True)):
            exact = PagePart(self._pool.exact_k[number], self._pool.exact_v[number], exact_table, exact_tokens)
            cos, sin = tables[spec.rope_of(number)]
            qkv = products.qkv(products.qkv.normed(x, layer.input_norm, delta))
            layer.norm_whole(qkv[:, : spec.q_size], layer.q_norm)
            layer.norm_whole(qkv[:, spec.q_size : spec.q_size + spec.kv_size], layer.k_norm)
            q_norm, k_norm = layer.head_norms
            q = rotate_append(
                qkv, cos, sin, exact.k.data, exact.v.data, page, row, heads=spec.num_heads, q_norm=q_norm, k_norm=k_norm
            )
            if layer.window is None:
                full = self._full_part(number, q, inputs.table, full_tokens, full_pages)
                attended = attend_pages(q, [exact, full], sinks=layer.sinks)
            else:
                attended = self._within_window(number, q, inputs, layer.window, layer.sinks)
            delta = layer.normed_out(products.o(attended.flatten(1)), layer.attn_out_norm)
            delta = layer.mlp(products, x, delta)
        norm = self._model.model.norm
        return F.linear(rms_norm(x, norm.factor, norm.eps, delta=delta), self._model.head_weight).float()

    def _within_window(
        self, number: int, q: torch.Tensor, inputs: StepInputs, window: int, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of q [S, Hq, D] over the newest `window` tokens, their pages expanded -> [S, Hq, D].

        As many pages as a window can touch are always read, and masked where they are not there, so that shapes do
        not change from step to step.
        """
        pool, numbers, table = self._pool, inputs.numbers, inputs.table
        pages, within = numbers[:, _FULL] // PAGE, torch.arange(PAGE, device=q.device)
        reach = -(-(window - 1) // PAGE) if pool.capacity else 0
        back = torch.arange(reach, 0, -1, device=q.device)
        listed = pages[:, None] - back  # [S, n]: the last n full pages of each sequence, negative where it has fewer
        chosen = table.long().gather(1, listed.clamp(0, table.shape[1] - 1))
        starts = torch.cat((torch.zeros_like(pages)[:, None], PAGE * (1 + listed), PAGE * (1 + pages)[:, None]), 1)
        real = torch.cat((torch.ones_like(pages, dtype=torch.bool)[:, None], listed >= 0, pages[:, None] >= 0), 1)
        position = starts[..., None] + within  # [S, n + 2, 128]: of the first page, the listed ones, the newest one
        newest = numbers[:, _POSITION, None, None]
        mask = real[..., None] & (position <= newest) & (position > newest - window)
        mask = mask.flatten(1)  # [S, (n + 2) * 128]

        def gathered(exact: PageTensors, full: PageTensors) -> torch.Tensor:
            ends = exact.data[numbers[:, _SINK : _TAIL + 1]].transpose(2, 3)  # [S, 2, 128, Hkv, D]
            middle = dequantize_pages(full, chosen.flatten(), q.dtype).view(*chosen.shape, PAGE, *ends.shape[3:])
            rows = torch.cat((ends[:, :1], middle, ends[:, 1:]), 1).flatten(1, 2)
            return rows.masked_fill(~mask[..., None, None], 0.0)  # what was never written may be NaN

        k, v = gathered(pool.exact_k[number], pool.k[number]), gathered(pool.exact_v[number], pool.v[number])
        return masked_attention(q[:, None], k, v, mask[:, None, None], sinks)[:, 0]

    def _full_part(
        self, number: int, q: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor, pages: torch.Tensor
    ) -> PagePart:
        k, v, policy = self._pool.k[number], self._pool.v[number], self._policy
        if policy.decode_share is None:
            return PagePart(k, v, table, tokens)
        chosen = select_pages(
            q, k, table, pages,
            share=policy.decode_share, at_least=policy.decode_pages, newest=policy.decode_newest,
        )  # fmt: skip
        return PagePart(k, v, *chosen)


class _Graph:
    """The captured step of a fixed number of sequences over a pool that does not move."""

    def __init__(self, pool: PagePool, size: int):
        self.generation = pool.generation
        table = torch.zeros(size, max(1, pool.capacity), dtype=torch.int32, device=pool.device)
        self._inputs = StepInputs(torch.zeros(size, 8, dtype=torch.int64, device=pool.device), table)
        self._staging = torch.zeros(size, 8, dtype=torch.int64, pin_memory=True)
        self._copied = torch.cuda.Event()
        self._resident: list[tuple[int, int]] = [(0, 0)] * size  # whose pages a row of the table holds, and how many
        self._logits = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, step: Step, seqs: list[Sequence], numbers: list[list[int]]) -> torch.Tensor:
        """Logits of `step`, which is not kept: a graph that held its owner would hold the GPU's memory with it."""
        self._copied.synchronize()  # the last step's numbers have left the staging buffer
        self._staging.copy_(torch.tensor(numbers, dtype=torch.int64))
        self._inputs.numbers.copy_(self._staging, non_blocking=True)
        self._copied.record()
        for row, seq in enumerate(seqs):
            self._refresh(row, seq)
        if self._graph is None:
            self._capture(step)
        assert self._graph is not None
        self._graph.replay()
        return self._logits.clone()

    def _refresh(self, row: int, seq: Sequence) -> None:
        key, known = self._resident[row]
        if key != seq.serial or known > len(seq.pages):
            known = 0
        if known < len(seq.pages):
            more = torch.tensor(seq.pages[known:], dtype=torch.int32)
            self._inputs.table[row, known : len(seq.pages)] = more.to(self._inputs.table.device)
        self._resident[row] = (seq.serial, len(seq.pages))

    def _capture(self, step: Step) -> None:
        # A step may run twice on the same inputs: it writes the token's key and value to the same place.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(self._inputs)  # compiles what is not compiled yet, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = step(self._inputs)
        self._graph = graph
