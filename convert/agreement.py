"""How far an artifact has moved from its reference: KL, top-1 agreement and loss on the same tokens, teacher-forced.

The two models are never in memory together. Of the reference only its final hidden states and its output projection
are kept (a vocabulary-wide row is 10 to 100 times larger than a hidden one); logits of both are made and compared
in blocks of 512 rows. A prefill computes with exact keys and values, so the last tokens are also compared on the
decode path, one by one through the artifact's quantized KV cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lcconvert.convert.perplexity import BLOCK
from lcconvert.runtime.engine import Engine


@dataclass(frozen=True)
class Reference:
    """What is left of a reference model after its forward pass over `ids`."""

    ids: list[int]
    hidden: torch.Tensor  # normed, [T-1, H]: states that predict ids[1:]
    head: torch.Tensor  # [V, H]

    def log_probs(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        """float32 [end-begin, V] for positions begin..end-1, on `device`."""
        logits = F.linear(self.hidden[begin:end].to(device), self.head.to(device)).float()
        return logits.log_softmax(-1)


def read_reference(engine: Engine, ids: list[int]) -> Reference:
    """Runs the reference once over `ids`; the engine can be dropped afterwards."""
    seq = engine.new_sequence()
    try:
        hidden = engine.prefill(seq, ids[:-1], want="all")
    finally:
        engine.free(seq)
    return Reference(ids, hidden, engine.model.head_weight.detach())


def compare(engine: Engine, reference: Reference, decode_tokens: int, *, step: int | None = None) -> dict[str, Any]:
    """Agreement over all positions, by position, and over the last `decode_tokens` on the decode path.

    With `step` the ids are prefilled so many at a time, which read those before them from the quantized cache.
    """
    ids = reference.ids
    seq = engine.new_sequence()
    step = step or len(ids)
    try:
        parts = [
            engine.prefill(seq, ids[i : min(i + step, len(ids) - 1)], want="all") for i in range(0, len(ids) - 1, step)
        ]
        hidden = torch.cat(parts)
        rows = [
            _compare_rows(
                reference.log_probs(i, min(i + BLOCK, len(hidden)), engine.device),
                engine.logits(hidden[i : i + BLOCK]),
                torch.tensor(ids[i + 1 : min(i + BLOCK, len(hidden)) + 1], device=engine.device),
            )
            for i in range(0, len(hidden), BLOCK)
        ]
    finally:
        engine.free(seq)
    table = torch.cat(rows)  # [T-1, 4]
    buckets, start, end = [], 1, 256
    while start <= len(table):
        buckets.append(_bucket(table[start - 1 : end - 1], start, min(end, len(table) + 1)))
        start, end = end, end * 2
    whole = _bucket(table, 1, len(table) + 1)
    decode = _decode_path(engine, reference, decode_tokens) if decode_tokens else None
    return {
        "tokens": len(table),
        "prefill": whole,
        "by_position": buckets,
        "decode": decode,
        "ppl_increase": math.expm1(min(whole["nll"] - whole["reference_nll"], 700.0)),
    }


def _decode_path(engine: Engine, reference: Reference, count: int) -> dict[str, float]:
    ids = reference.ids
    first = len(ids) - 1 - count  # position of the first state on the decode path
    seq = engine.new_sequence()
    rows = []
    try:
        engine.prefill(seq, ids[:first])
        for i in range(first, len(ids) - 1):
            logits = engine.decode(seq, ids[i])[None]
            target = torch.tensor([ids[i + 1]], device=engine.device)
            rows.append(_compare_rows(reference.log_probs(i, i + 1, engine.device), logits, target))
    finally:
        engine.free(seq)
    return _bucket(torch.cat(rows), first + 1, len(ids))


def _compare_rows(reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Reference log-probabilities and logits [R, V] -> float64 [R, 4]: KL, same top token, NLL, reference NLL."""
    ours = logits.log_softmax(-1)
    kl = F.kl_div(ours, reference, reduction="none", log_target=True).sum(-1)
    same = ours.argmax(-1) == reference.argmax(-1)
    nll = -ours.gather(-1, targets[:, None])[:, 0]
    reference_nll = -reference.gather(-1, targets[:, None])[:, 0]
    return torch.stack((kl.double(), same.double(), nll.double(), reference_nll.double()), dim=1).cpu()


def _bucket(table: torch.Tensor, start: int, end: int) -> dict[str, float]:
    kl, same, nll, reference_nll = table.unbind(1)
    return {
        "start": start,
        "end": end,
        "mean_kl": max(float(kl.mean()), 0.0),
        "p99_kl": max(float(kl.quantile(0.99)), 0.0),
        "top1": float(same.mean()),
        "nll": float(nll.mean()),
        "reference_nll": float(reference_nll.mean()),
    }
