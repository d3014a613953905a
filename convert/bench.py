"""`lcconvert bench`: prefill and decode of random tokens, timed on this machine, with the memory they took."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch

from lcconvert.convert.generate import load_engine
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.units import format_bytes, format_count


def bench(
    src: str, *, context: int, decode: int, kv: str | None, attention: str | None, device: str | None
) -> dict[str, Any]:
    """Seconds, tokens per second and bytes; the median of the decode steps, the one prefill after a short warm-up."""
    engine = load_engine(src, kv=kv, attention=attention, device=device)
    if context + decode > engine.max_context:
        raise UserError(
            f"context {context} plus {decode} decoded tokens exceeds the {engine.max_context} of {engine.name}; "
            "give a smaller --context"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, engine.spec.vocab_size, (context,), generator=generator).tolist()
    _timed(engine, lambda: engine.prefill(engine.new_sequence(), ids[:256]))
    seq = engine.new_sequence()
    prefill = _timed(engine, lambda: engine.prefill(seq, ids))
    steps = sorted(_timed(engine, lambda: engine.decode(seq, ids[0])) for _ in range(decode))
    step = steps[len(steps) // 2] if steps else float("nan")
    return {
        "source": engine.name,
        "device": torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu",
        "dtype": str(engine.dtype).removeprefix("torch."),
        "kv": engine.kv.scheme,
        "attention": engine.attention.kind,
        "context": context,
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": context / prefill,
        "decode_seconds_per_token": step,
        "decode_tokens_per_second": 1 / step,
        "kv_bytes_per_token": engine.kv_bytes_per_token(),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **engine.memory(),
    }


def _timed(engine: Engine, work: Any) -> float:
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def render(result: dict[str, Any]) -> str:
    memory = ", ".join(f"{key.replace('_', ' ')} {format_bytes(result[key])}" for key in result if key in _MEMORY)
    return "\n".join(
        [
            f"{result['source']} on {result['device']}, {result['dtype']}, KV {result['kv']}, {result['attention']}",
            f"  prefill of {format_count(result['context'])} tokens: {result['prefill_seconds']:.2f} s, "
            f"{result['prefill_tokens_per_second']:,.0f} tokens/s",
            f"  decode: {1000 * result['decode_seconds_per_token']:.1f} ms a token, "
            f"{result['decode_tokens_per_second']:.1f} tokens/s",
            f"  KV {result['kv_bytes_per_token']:,.0f} bytes a token; {memory}",
        ]
    )


_MEMORY = ("weights", "kv_pool", "peak_gpu", "peak_host_bytes")
