"""The document `lcconvert bench` writes, and its view for a terminal. The JSON is the record; the text is made from it.

Every field is always there, None where it was not measured or does not apply, so that two documents compare key by key.
Seconds, bytes and rates are plain numbers in base units: TFLOP/s and TB/s are decimal, as cards are sold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lcconvert.runtime.units import format_bytes, format_count

FORMAT = 1


@dataclass(frozen=True)
class Ceilings:
    """What the card reached in this process: TB/s read plus written by a large copy, TFLOP/s of large products."""

    copy_tb: float
    bf16_tflops: float
    fp8_tflops: float | None


@dataclass(frozen=True)
class Model:
    name: str
    parameters: int
    weight_bytes: int
    variant: str
    dtype: str
    gemm: str  # "fp8" or "16-bit": how int4 layers multiply in prefill
    kv: str
    kv_bytes_per_token: float
    policy: dict[str, Any]  # the AttentionPolicy; alpha is left out when it is a table


@dataclass(frozen=True)
class WarmUp:
    """What ran before the clock: a whole short prompt with two decode steps, then one layer of the longest prompt."""

    tokens: int
    seconds: float
    longest_layer_seconds: float | None


@dataclass(frozen=True)
class Part:
    """One part of a prefill. A rate and its ceiling are TFLOP/s or TB/s, by `unit`; floor = work at the ceiling."""

    name: str
    seconds: float
    flops: float | None = None
    bytes: float | None = None
    unit: str | None = None
    rate: float | None = None
    ceiling: float | None = None
    floor_seconds: float | None = None


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes. GPU: what tensors took and what PyTorch reserved; None on a CPU. host: resident memory of the
    process, libraries included; pinned: page-locked host memory."""

    gpu: int | None
    gpu_reserved: int | None
    pinned: int | None
    host: int


@dataclass(frozen=True)
class Prefill:
    """density: attended key blocks as a share of the causal ones, the dense end included, as counted from the lists."""

    context: int
    seconds: float
    tokens_per_second: float
    density: float
    parts: list[Part]
    floor_seconds: float | None
    memory: Memory
    predicted_gpu: int | None
    predicted_pinned: int | None


@dataclass(frozen=True)
class Decode:
    """Median step after a prompt of `context` tokens; `bytes` is what a step must read."""

    context: int
    policy: str  # "dense" or "page-sparse"
    steps: int
    seconds_per_token: float
    slowest_seconds: float
    tokens_per_second: float
    bytes: float
    tb_per_second: float
    ceiling: float | None
    floor_seconds: float | None
    memory: Memory


@dataclass(frozen=True)
class Compared:
    """An alternative on the same shape; the numbers are None when memory did not suffice."""

    method: str  # "sdpa" or "transformers"
    context: int
    out_of_memory: bool
    prefill_seconds: float | None = None
    decode_seconds_per_token: float | None = None
    weight_bytes: int | None = None
    peak_gpu: int | None = None
    attention_tflops: dict[str, float] | None = None  # of one layer over `longest` keys, by PyTorch's backends
    longest: int | None = None
    computed_longest_seconds: float | None = None  # a prefill of `longest` tokens at that rate: a lower bound


@dataclass(frozen=True)
class Growth:
    """Prefill time from the shortest to the longest context: a dense policy tends to the square of `tokens`."""

    tokens: float
    seconds: float


@dataclass(frozen=True)
class Report:
    lcconvert: str
    date: str  # UTC, ISO 8601
    device: str
    torch: str
    triton: str | None
    arguments: dict[str, Any]
    ceilings: Ceilings | None
    model: Model
    warm_up: WarmUp
    prefill: list[Prefill]
    decode: list[Decode]
    growth: Growth | None
    compare: list[Compared]

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}


def render(report: Report) -> str:
    """A few lines a context; what was not measured is left out."""
    model, limits = report.model, report.ceilings
    lines = [
        f"{model.name} {model.variant} on {report.device}, {model.dtype}, {model.policy['kind']} prefill, "
        f"{format_bytes(model.weight_bytes)} of weights, KV {model.kv} of {model.kv_bytes_per_token:,.0f} bytes a token"
    ]
    if limits:
        fp8 = f", fp8 {limits.fp8_tflops:.0f}" if limits.fp8_tflops else ""
        lines.append(
            f"  ceilings here: copy {limits.copy_tb:.2f} TB/s, products bf16 {limits.bf16_tflops:.0f}{fp8} TFLOP/s"
        )
    warm = report.warm_up
    layer = (
        f", one layer of the longest prompt {_time(warm.longest_layer_seconds)}" if warm.longest_layer_seconds else ""
    )
    lines.append(f"  warm-up of {format_count(warm.tokens)} tokens: {_time(warm.seconds)}{layer}")
    for prefill in report.prefill:
        lines += _prefill(prefill)
        lines += [_decode(row) for row in report.decode if row.context == prefill.context]
    if growth := report.growth:
        lines.append(f"  {growth.tokens:g} times the tokens took {growth.seconds:.1f} times the prefill")
    return "\n".join(lines + [_compared(row) for row in report.compare])


def _prefill(row: Prefill) -> list[str]:
    floor = f", floor {_time(row.floor_seconds)}" if row.floor_seconds else ""
    lines = [
        f"  prefill of {format_count(row.context)} tokens: {_time(row.seconds)}{floor}, "
        f"{row.tokens_per_second:,.0f} tokens/s, attention density {row.density:.2%}"
    ]
    for part in row.parts:
        rate = f"  {part.rate:.3g} {part.unit}" if part.rate else ""
        ceiling = f" of {part.ceiling:.3g}, floor {_time(part.floor_seconds or 0)}" if rate and part.ceiling else ""
        lines.append(f"    {part.name:10}{_time(part.seconds):>9}{rate}{ceiling}")
    return [*lines, f"    {_memory(row.memory, row.predicted_gpu, row.predicted_pinned)}"]


def _memory(memory: Memory, predicted_gpu: int | None, predicted_pinned: int | None) -> str:
    parts = []
    if memory.gpu is not None:
        expected = ""
        if predicted_gpu:
            expected = f" (predicted {format_bytes(predicted_gpu)}, {predicted_gpu / memory.gpu - 1:+.1%})"
        parts.append(
            f"peak GPU {format_bytes(memory.gpu)}{expected}, reserved {format_bytes(memory.gpu_reserved or 0)}"
        )
        expected = f" (predicted {format_bytes(predicted_pinned)})" if predicted_pinned else ""
        parts.append(f"pinned host {format_bytes(memory.pinned or 0)}{expected}")
    return ", ".join([*parts, f"peak host {format_bytes(memory.host)}"])


def _decode(row: Decode) -> str:
    ceiling = f" of {row.ceiling:.2f}, floor {_time(row.floor_seconds or 0)}" if row.ceiling else ""
    return (
        f"    decode, {row.policy}: {row.tokens_per_second:.1f} tokens/s ({_time(row.seconds_per_token)}), "
        f"{format_bytes(row.bytes)} a token at {row.tb_per_second:.3g} TB/s{ceiling}"
    )


def _compared(row: Compared) -> str:
    start = f"  {row.method} at {format_count(row.context)} tokens: "
    if row.out_of_memory:
        return start + "out of memory"
    parts = [f"prefill {_time(row.prefill_seconds or 0)}"]
    if row.decode_seconds_per_token:
        parts.append(f"decode {1 / row.decode_seconds_per_token:.1f} tokens/s")
    if row.peak_gpu:
        parts.append(f"peak GPU {format_bytes(row.peak_gpu)}")
    for backend, rate in (row.attention_tflops or {}).items():
        parts.append(f"one layer's attention by {backend} {rate:.3g} TFLOP/s")
    if row.computed_longest_seconds:
        parts.append(f"{format_count(row.longest or 0)} would take at least {_time(row.computed_longest_seconds)}")
    return start + ", ".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
