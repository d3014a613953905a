"""Rotary position embedding: one reading of the config fields, one table, used by training, serving and export.

The frequencies are the float32 values every other engine computes, bit for bit; the angles are exact products of them
with the position in float64, and only cos/sin are rounded. A float32 angle has a step of 0.06 rad at position 1M, and
bfloat16 tables lose needles (MegaBeam, arXiv 2505.08651).

Left out on purpose: `dynamic` NTK, whose frequencies change with the length, so cached keys would carry old ones; and
LongRoPE's short/long switch: one static table (`long_factor`) serves every position.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from lcconvert.runtime.errors import UserError

KINDS = ("default", "linear", "yarn", "longrope", "llama3")
_ALIASES = {"su": "longrope", "mrope": "default"}
_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position"),
    "longrope": ("long_factor", "original_max_position"),
    "llama3": ("factor", "original_max_position", "low_freq_factor", "high_freq_factor"),
}
_CONFIG_NAME = {
    "original_max_position": "original_max_position_embeddings",
    "theta": "rope_theta",
    "kind": "rope_type",
    "partial": "partial_rotary_factor",
}
_READ_NAME = {v: k for k, v in _CONFIG_NAME.items()} | {"type": "kind"}


@dataclass(frozen=True)
class RopeSpec:
    """One rotary table, by the field names of HF's `rope_parameters` (shortened where ours are clearer).

    `factor` is the stretch s = L'/L; `attention_factor` multiplies cos and sin (None: the paper's formula for yarn
    and longrope, 1 otherwise); betas are in rotations over the original window (YaRN, arXiv 2309.00071); `short_factor`
    and `long_factor` divide the frequencies, one per pair (LongRoPE, arXiv 2402.13753). `partial` is the share of a
    head's channels that turn: the rest have frequency 0, and all of them with `partial` 0, a layer without RoPE.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float | None = None
    original_max_position: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial: float = 1.0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RopeSpec:
        """Reads v5 `rope_parameters` or legacy `rope_theta` + `rope_scaling`; UserError names a stray field."""
        found: dict[str, Any] = {}
        if config.get("rope_theta") is not None:
            found["rope_theta"] = config["rope_theta"]
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(scaling, dict):
            raise UserError(f"config.json: rope_parameters is {scaling!r}, expected an object")
        found.update({k: v for k, v in scaling.items() if v is not None})
        if config.get("partial_rotary_factor") is not None:
            found.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
        known = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in found.items():
            name = _READ_NAME.get(key, key)
            if name not in known:
                raise UserError(
                    f"config.json: RoPE field {key!r} is not understood and would change the positions; "
                    f"remove it if it has no effect, or use one of {', '.join(KINDS)}"
                )
            values[name] = tuple(float(x) for x in value) if isinstance(value, list) else value
        values["kind"] = kind = _ALIASES.get(values.get("kind", "default"), values.get("kind", "default"))
        if kind == "dynamic":
            raise UserError(
                "config.json: rope type 'dynamic' changes the frequencies with the length, which a KV cache cannot "
                "follow; remove the scaling and extend with --method ntk for a fixed table"
            )
        if kind not in KINDS:
            raise UserError(f"config.json: rope type is {kind!r}, expected one of {', '.join(KINDS)}")
        if kind in ("yarn", "longrope", "llama3"):
            top = config.get("original_max_position_embeddings")
            if top and values.setdefault("original_max_position", top) != top:
                raise UserError(
                    f"config.json: original_max_position_embeddings is {top} and {values['original_max_position']} in "
                    "the RoPE fields; they must agree, correct one"
                )
            values.setdefault("original_max_position", config.get("max_position_embeddings"))
        if kind == "longrope" and "factor" not in values and config.get("max_position_embeddings"):
            values["factor"] = config["max_position_embeddings"] / values["original_max_position"]
        if missing := [_CONFIG_NAME.get(n, n) for n in _NEEDS[kind] if values.get(n) is None]:
            raise UserError(f"config.json: rope type {kind!r} needs {missing[0]}, which is absent; add it")
        for name, value in values.items():
            numbers = value if isinstance(value, tuple) else () if name in ("kind", "truncate") else (value,)
            if any(isinstance(x, bool) or not isinstance(x, (int, float)) or not x > 0 for x in numbers):
                raise UserError(f"config.json: {_CONFIG_NAME.get(name, name)} is {value!r}, expected more than 0")
        if values.get("partial", 1.0) > 1:
            raise UserError(f"config.json: partial_rotary_factor is {values['partial']}, expected a share of a head")
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """`rope_parameters` (v5) and the legacy pair, every field explicit, to be merged into config.json."""
        scaling: dict[str, Any] = {"rope_type": self.kind}
        names = list(_NEEDS[self.kind])
        if self.kind == "yarn":
            names += ["attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"]
        if self.kind == "longrope":
            names += ["factor", "attention_factor", "short_factor"]
        for name in names:
            value = getattr(self, name)
            if name == "attention_factor":
                value = self.attention_scale
            if value is not None:
                scaling[_CONFIG_NAME.get(name, name)] = list(value) if isinstance(value, tuple) else value
        partial = {} if self.partial == 1 else {"partial_rotary_factor": self.partial}
        legacy = None if self.kind == "default" else dict(scaling)
        return {
            "rope_theta": self.theta,
            "rope_scaling": legacy,
            "rope_parameters": {"rope_theta": self.theta, **scaling, **partial},
            **partial,
        }

    def rotary_dim(self, head_dim: int) -> int:
        """Channels of a head that turn."""
        return int(head_dim * self.partial)

    @property
    def attention_scale(self) -> float:
        """The factor on cos and sin, as transformers infers it when `attention_factor` is absent."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        if self.kind == "yarn":
            if self.mscale and self.mscale_all_dim:
                return _mscale(self._factor, self.mscale) / _mscale(self._factor, self.mscale_all_dim)
            return _mscale(self._factor)
        if self.kind == "longrope" and self._factor > 1:
            return math.sqrt(1 + math.log(self._factor) / math.log(self._original))
        return 1.0

    @property
    def _factor(self) -> float:
        return 1.0 if self.factor is None else float(self.factor)

    @property
    def _original(self) -> int:
        assert self.original_max_position is not None
        return self.original_max_position


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def inv_freq(rope: RopeSpec, head_dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies in radians per token, float32 [head_dim/2], and the factor on cos and sin of those that are not 0.

    The float32 operations and their order are those of transformers' `ROPE_INIT_FUNCTIONS`, so the values are equal
    to the bit; tests hold this for every kind. Channels that do not turn come last.
    """
    dim = rope.rotary_dim(head_dim)
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim  # [R/2] of the R channels that turn
    wave = rope.theta**exponent
    if rope.kind == "default":
        freq = 1.0 / wave
    elif rope.kind == "linear":
        freq = 1.0 / wave / rope._factor
    elif rope.kind == "yarn":
        freq = _yarn(rope, wave, dim)
    elif rope.kind == "longrope":
        assert rope.long_factor is not None
        if len(rope.long_factor) != dim // 2:
            raise UserError(
                f"config.json: long_factor has {len(rope.long_factor)} values, expected {dim // 2}, half of the "
                "channels that turn"
            )
        freq = 1.0 / (torch.tensor(rope.long_factor, dtype=torch.float32) * wave)
    else:
        freq = _llama3(rope, 1.0 / wave)
    return F.pad(freq, (0, head_dim // 2 - len(freq))), rope.attention_scale


def _yarn(rope: RopeSpec, wave: torch.Tensor, dim: int) -> torch.Tensor:
    def pair_with(rotations: float) -> float:  # the pair that turns `rotations` times within the original window
        return dim * math.log(rope._original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp  # 1: frequency kept, 0: divided by the factor
    return 1.0 / (rope._factor * wave) * (1 - keep) + 1.0 / wave * keep


def _llama3(rope: RopeSpec, freq: torch.Tensor) -> torch.Tensor:
    assert rope.low_freq_factor is not None
    assert rope.high_freq_factor is not None
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / freq
    slow = wavelength > rope._original / low
    fast = wavelength < rope._original / high
    scaled = torch.where(slow, freq / rope._factor, freq)
    smooth = (rope._original / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / rope._factor + smooth * scaled
    return torch.where(~fast & ~slow, between, scaled)


def cos_sin(
    rope: RopeSpec, head_dim: int, positions: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables for int64 `positions` of any shape [...]: two tensors [..., head_dim/2] of `dtype` on their device."""
    freq, scale = inv_freq(rope, head_dim)
    return rotation(freq.to(positions.device, torch.float64), scale, positions, dtype)


def rotation(
    freq: torch.Tensor, scale: float, positions: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """`cos_sin` from frequencies float64 [D/2] that are on the positions' device already, as a CUDA graph needs."""
    angle = positions.to(torch.float64)[..., None] * freq
    scales = torch.full_like(freq, scale).masked_fill_(freq == 0, 1.0)  # what does not turn is not scaled either
    return (angle.cos() * scales).to(dtype), (angle.sin() * scales).to(dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [..., T, heads, D] by tables [..., T, D/2]; channel i pairs with i + D/2 (HF's half-split layout)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]  # [..., T, 1, D/2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
