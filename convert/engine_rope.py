"""The rotary table another engine makes of an artifact's config.json, and how far it is from the exact one.

All of them start from the same float32 frequencies and part afterwards: on the angle (ours is a float64 product with
the position, theirs float32; llama.cpp multiplies its way from pair to pair), on the type the table is kept in, and on
the factor on cos and sin, where some do not read `attention_factor`. At position 1,048,575 a float32 angle alone is off
by up to 0.06 rad, so the same config does not mean the same angles; this says by how much.

Left out: what a kernel does with the table afterwards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lcconvert.runtime.rope import RopeSpec, cos_sin, inv_freq
from lcconvert.runtime.spec import ModelSpec


@dataclass(frozen=True)
class EngineRope:
    """`scale` multiplies cos and sin; `stored` is the table's type; `error` is the largest difference of cos or sin
    from the exact table at a position."""

    kind: str
    theta: float
    factor: float | None
    original_context: int | None
    scale: float
    stored: str
    error: dict[int, float]


def engine_rope(engine: str, spec: ModelSpec, dtype: torch.dtype) -> EngineRope:
    """The table of `engine` for a model computing in `dtype`, compared at the old window's end and the context's."""
    rope, positions = spec.rope, compared_positions(spec, spec.max_position)
    scale = engine_scale(engine, rope, spec.max_position)
    kept = torch.float32 if engine in ("llama.cpp", "onnxruntime") else dtype
    angle = _angles(engine, rope, spec.head_dim, positions)
    exact = torch.stack(cos_sin(rope, spec.head_dim, positions, torch.float64))
    turns = inv_freq(rope, spec.head_dim)[0] != 0  # the rest of a head is left as it is
    scales = torch.where(turns, torch.tensor(scale, dtype=torch.float64), 1.0)
    table = torch.stack((angle.cos() * scales, angle.sin() * scales)).to(kept).double()
    error = (table - exact).abs().amax((0, 2))
    return EngineRope(
        kind=rope.kind,
        theta=rope.theta,
        factor=rope.factor,
        original_context=rope.original_max_position,
        scale=scale,
        stored=str(kept).removeprefix("torch."),
        error={int(at): float(off) for at, off in zip(positions, error)},
    )


def compared_positions(spec: ModelSpec, context: int) -> torch.Tensor:
    """The first turn, the old window's end, the middle and the end of `context`: int64, ascending."""
    last = context - 1
    return torch.tensor(sorted({min(1, last), min(spec.rope.original_max_position or last, last), last // 2, last}))


def engine_scale(engine: str, rope: RopeSpec, context: int) -> float:
    """The factor on cos and sin. SGLang fills in YaRN's by formula, both vLLM and SGLang LongRoPE's by theirs."""
    if rope.kind == "longrope" and engine in ("vllm", "sglang"):
        assert rope.original_max_position is not None
        stretch = context / rope.original_max_position
        return math.sqrt(1 + math.log(stretch) / math.log(rope.original_max_position)) if stretch > 1 else 1.0
    if rope.kind == "yarn" and engine == "sglang":
        return replace(rope, attention_factor=None).attention_scale
    return rope.attention_scale


def _angles(engine: str, rope: RopeSpec, head_dim: int, positions: torch.Tensor) -> torch.Tensor:
    """[P] -> [P, D/2], in the precision of the engine; onnxruntime gets our own table."""
    freq, _ = inv_freq(rope, head_dim)
    if engine == "onnxruntime":
        return positions.double()[:, None] * freq.double()
    if engine != "llama.cpp":
        return positions.float()[:, None] * freq
    step = torch.tensor(rope.theta ** (-2.0 / head_dim), dtype=torch.float32)
    ratio = freq / inv_freq(RopeSpec(theta=rope.theta), head_dim)[0]
    powers = step.expand(len(positions), head_dim // 2 - 1)
    return torch.cat((positions.float()[:, None], powers), 1).cumprod(1) * ratio
