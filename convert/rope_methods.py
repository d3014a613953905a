"""How each method stretches a model's rotary positions from the length it was trained at to the target.

Everything a method does is visible in the `RopeSpec` it returns: no method changes the model's code, and every result
is one static table that transformers, vLLM and our runtime read alike from config.json. "dynamic" (a table that changes
with the prompt's length) is not offered because keys cached under one table are wrong under the next.

Surprising rule: `ntk` and `theta` only change the base, so a source that is already scaled (Llama 3.1) keeps its
scaling under the larger base; the other methods start from an unscaled source or continue their own kind.

L is the trained length, L' the context, s = L'/L, d the head size and i = 0..d/2-1 the pair, rotating by theta^(-2i/d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lcconvert.convert.extend_config import Method
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.rope import RopeSpec


def extend_rope(
    rope: RopeSpec,
    method: Method,
    *,
    head_dim: int,
    trained: int,
    context: int,
    factors: Sequence[float] | None = None,
    attention_factor: float | None = None,
) -> RopeSpec:
    """The RoPE of the extended model.

    linear: every pair slowed by s (position interpolation, arXiv 2306.15595).
    ntk: theta' = theta * s^(d/(d-2)), the slowest pair slowed by exactly s.
    theta: theta' = theta^(ln(L'/2pi) / ln(L/2pi)), the last pair to turn fully in training slowed by s (2310.05209).
    yarn: fast pairs kept, slow ones slowed by s, cos and sin times 0.1 ln s + 1 (2309.00071).
    longrope: pair i slowed by `factors[i]`, cos and sin times sqrt(1 + ln s / ln L) (2402.13753); both of the
        format's tables are this one, so that nothing switches at L.
    llama3: wavelengths over L slowed by s, under L/4 kept, blended between.

    `attention_factor` replaces the factor on cos and sin of yarn and longrope.
    Raises UserError when context <= trained, an argument does not belong to the method, or the method cannot continue
    the source's own scaling.
    """
    if context <= trained:
        raise UserError(
            f"context is {context} tokens but the source already reads {trained}; ask for more than {trained}"
        )
    if factors is not None and method != "longrope":
        raise UserError(f"per-pair factors were given with method {method!r}; only longrope uses them, remove them")
    if attention_factor is not None:
        if method not in ("yarn", "longrope"):
            raise UserError(
                f"attention_factor {attention_factor} was given with method {method!r}; "
                "only yarn and longrope have one, remove it"
            )
        plain = extend_rope(rope, method, head_dim=head_dim, trained=trained, context=context, factors=factors)
        return replace(plain, attention_factor=attention_factor)
    scale = context / trained
    if method == "ntk":
        return _larger_base(rope, rope.theta * scale ** (head_dim / (head_dim - 2)))
    if method == "theta":
        turns = math.log(context / (2 * math.pi)) / math.log(trained / (2 * math.pi))
        return _larger_base(rope, rope.theta**turns)
    if method == "longrope":
        _require(rope, rope.kind == "default", method)
        return _longrope(rope, head_dim, trained, scale, factors)
    if rope.kind == method:
        return _continue_scaling(rope, scale, context)
    _require(rope, rope.kind == "default", method)
    if method == "linear":
        return RopeSpec(kind="linear", theta=rope.theta, factor=scale)
    if method == "llama3":
        return RopeSpec(
            kind="llama3",
            theta=rope.theta,
            factor=scale,
            original_max_position=trained,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        )
    return RopeSpec(kind="yarn", theta=rope.theta, factor=scale, original_max_position=trained)


def default_longrope_factors(theta: float, head_dim: int, trained: int, scale: float) -> tuple[float, ...]:
    """A starting point where the paper searches: YaRN's blend (32 and 1 turns, unrounded) read as a slow-down per pair.

    Returns d/2 numbers rising from 1 (pairs that turned 32 times or more in training) to s (less than one turn).
    """
    factors = []
    for pair in range(head_dim // 2):
        turns = trained * theta ** (-2 * pair / head_dim) / (2 * math.pi)
        kept = min(1.0, max(0.0, math.log(turns) / math.log(32)))  # 1: keep the pair's speed, 0: slow it by s
        factors.append(1.0 / (kept + (1.0 - kept) / scale))
    return tuple(factors)


def _longrope(rope: RopeSpec, head_dim: int, trained: int, scale: float, factors: Sequence[float] | None) -> RopeSpec:
    table = tuple(factors) if factors is not None else default_longrope_factors(rope.theta, head_dim, trained, scale)
    if len(table) != head_dim // 2 or min(table) < 1.0:
        raise UserError(
            f"longrope got {len(table)} factors with a least value of {min(table, default=0.0):g}, "
            f"expected {head_dim // 2} factors of at least 1; give one per rotary pair"
        )
    return RopeSpec(
        kind="longrope",
        theta=rope.theta,
        factor=scale,
        original_max_position=trained,
        short_factor=table,
        long_factor=table,
    )


def _larger_base(rope: RopeSpec, theta: float) -> RopeSpec:
    _require(rope, rope.kind != "longrope", "")
    return replace(rope, theta=theta)


def _continue_scaling(rope: RopeSpec, scale: float, context: int) -> RopeSpec:
    if rope.kind != "yarn":
        return replace(rope, factor=(rope.factor or 1.0) * scale)
    assert rope.original_max_position is not None  # RopeSpec.from_config fills it for yarn
    return replace(rope, factor=context / rope.original_max_position, attention_factor=None)


def _require(rope: RopeSpec, holds: bool, method: str) -> None:
    if holds:
        return
    if rope.kind == "longrope":
        raise UserError(
            "the source's rope type is 'longrope', whose per-pair factors were searched for its own length; "
            "extend the checkpoint that it was made from"
        )
    raise UserError(
        f"the source's rope type is {rope.kind!r}, which method {method!r} cannot continue; "
        f"use --method {rope.kind} or --method theta"
    )
