"""What quantization has cost, measured against the 16-bit source on text that calibration never saw.

Three ways apart: the weights alone, the KV cache alone (the source's own weights, read back through the artifact's
cache), and both together as the artifact is served. A prefill attends with exact keys and values, so where the cache
counts the text is fed in steps, each of which reads all tokens before it from the cache. The arithmetic is
`validate`'s; needles are left to it, and so is what the hybrid policy skips, as a step's few queries see all blocks.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from lcconvert.convert.agreement import compare, read_reference
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.quantize_config import Gate
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.sidecar import AttentionPolicy, KVConfig, Sidecar
from lcconvert.runtime.source import FolderSource, TensorSource

STEP = 256  # tokens of a prefill that reads what came before from the cache


class _Rescaled:
    """A checkpoint with the KV-cache scales of another."""

    def __init__(self, source: TensorSource, scales: TensorSource):
        self._source = source
        self._scales = scales
        self._scaled = {name for name in scales.names() if name.endswith((".k_scale", ".v_scale"))}
        self.name, self.config, self.files = source.name, source.config, source.files

    def names(self) -> list[str]:
        return [*self._source.names(), *self._scaled]

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return (self._scales if name in self._scaled else self._source).info(name)

    def tensor(self, name: str) -> torch.Tensor:
        return (self._scales if name in self._scaled else self._source).tensor(name)


def check_lengths(gate: Gate, source: TensorSource) -> None:
    """UserError when `source` cannot be measured as `gate` asks."""
    if max(gate.lengths) > (limit := Sidecar.read(source).context.configured):
        raise UserError(
            f"the gate's lengths are {', '.join(map(str, gate.lengths))} tokens but {source.name} is configured for "
            f"{limit}; ask for shorter ones"
        )


def measure_loss(source: TensorSource, folder: Path, gate: Gate, device: torch.device) -> list[dict[str, Any]]:
    """For each length of `gate`: mean and 99th percentile of KL (nats), top-1 agreement and rise of perplexity (a
    share) of `weights`, `kv` and `together` in the artifact `folder` against its 16-bit source."""
    artifact = FolderSource(folder)
    sidecar = Sidecar.read(artifact)
    text = Haystack.load(gate.text)
    dense, exact = AttentionPolicy(), KVConfig(scheme="bf16")
    longest = max(gate.lengths)

    def load(of: TensorSource, kv: KVConfig, attention: AttentionPolicy) -> Engine:
        gc.collect()  # the engine before this one
        return Engine.load(of, device=device, kv=kv, attention=attention, max_context=longest)

    engine = load(_Rescaled(source, artifact), sidecar.kv, dense)
    references = [read_reference(engine, text.excerpt(engine.tokenizer, length, "the gate")) for length in gate.lengths]
    found: dict[str, list[dict[str, Any]]] = {"kv": [compare(engine, each, 0, step=STEP) for each in references]}
    del engine
    engine = load(artifact, exact, dense)
    found["weights"] = [compare(engine, each, 0) for each in references]
    del engine
    engine = load(artifact, sidecar.kv, sidecar.attention)
    found["together"] = [compare(engine, each, 0, step=STEP) for each in references]
    rows: list[dict[str, Any]] = []
    for number, length in enumerate(gate.lengths):
        row: dict[str, Any] = {"length": length, "text": text.name}
        for which in ("weights", "kv", "together"):
            result = found[which][number]
            figures = {name: result["prefill"][name] for name in ("mean_kl", "p99_kl", "top1")}
            row[which] = {
                name: round(v, 6) for name, v in ({**figures, "ppl_increase": result["ppl_increase"]}).items()
            }
        rows.append(row)
    return rows


def missed(gate: Gate, rows: list[dict[str, Any]]) -> list[str]:
    """One phrase for every bar of `gate` that a length misses."""
    bars = (
        ("perplexity rises by", "together", "ppl_increase", gate.ppl_max_increase, 1),
        ("KL is", "together", "mean_kl", gate.kl_max, 1),
        ("KL of the KV cache alone is", "kv", "mean_kl", gate.kv_kl_max, 1),
        ("top-1 agreement is", "together", "top1", gate.top1_min, -1),
    )
    return [
        f"{words} {row[which][name]:.4g} at {row['length']} tokens, the bar is {bar:g}"
        for row in rows
        for words, which, name, bar, sign in bars
        if bar is not None and not sign * row[which][name] <= sign * bar
    ]
