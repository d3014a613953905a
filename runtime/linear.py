"""The linear layers an artifact can hold: 16/32-bit, int4 by groups, fp8 by channels. Packed weights stay packed.

Layouts are compressed-tensors' (`pack-quantized`, `float-quantized`), so the same bytes serve vLLM and transformers.
Left out: asymmetric int4, activation order, block scales; a checkpoint with those is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lcconvert.kernels.fp8 import expand_e4m3, fp8_matmul
from lcconvert.kernels.int4 import int4_matmul
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.families import FAMILIES


class Int4Linear(nn.Module):
    """y = x @ W.T + b with W symmetric int4: W[n, k] = code[n, k] * scale[n, k // group], code in [-8, 7].

    weight_packed int32 [N, K/8] (element i of a row at bit 4*(i%8) of word i//8, stored as code + 8),
    weight_scale [N, K/group] in the stored dtype, weight_shape int64 [2] = (N, K).
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, group_size: int):
        super().__init__()
        if in_features % group_size or group_size % 8:
            raise UserError(
                f"quantization_config: group size {group_size} does not divide the input width {in_features}; "
                "quantize with a group size that does"
            )
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        self.register_buffer("weight_packed", torch.empty(out_features, in_features // 8, dtype=torch.int32))
        self.register_buffer("weight_scale", torch.empty(out_features, in_features // group_size))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        y = int4_matmul(x.reshape(-1, self.in_features), self.weight_packed, self.weight_scale)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)


class Fp8Linear(nn.Module):
    """y = q(x) @ W.T + b with W e4m3 [N, K] times weight_scale [N, 1]; x is quantized to e4m3 per token as it comes, or
    with `exact_inputs` taken as it is."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, exact_inputs: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.exact_inputs = in_features, out_features, exact_inputs
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn))
        self.register_buffer("weight_scale", torch.empty(out_features, 1))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        rows, scale = x.reshape(-1, self.in_features), self.weight_scale.float()
        if self.exact_inputs:
            y = rows @ (expand_e4m3(self.weight) * scale).to(x.dtype).T
        else:
            y = fp8_matmul(rows, self.weight, scale, x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)


@dataclass(frozen=True)
class LinearFormat:
    """How one linear layer is stored; `group_size` is in input channels and only used by int4, `exact_inputs` (rows are
    multiplied as they are) only by fp8."""

    kind: str  # "int4" | "fp8"
    group_size: int = 0
    exact_inputs: bool = False


@dataclass(frozen=True)
class QuantLayout:
    """Which linear layers of a checkpoint are quantized, and how: read from `quantization_config`."""

    groups: tuple[tuple[tuple[str, ...], LinearFormat], ...] = ()
    ignore: tuple[str, ...] = ()
    joined: tuple[tuple[str, str], ...] = ()  # (part of a layer, what stores it, alone or with others); * is a number

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantLayout:
        """No quantization_config: an empty layout. UserError names the first scheme this runtime cannot run."""
        block = config.get("quantization_config")
        family = FAMILIES.get((config.get("architectures") or [""])[0])
        joined: tuple[tuple[str, str], ...] = ()
        if family:
            parts = ((part, whole) for whole, parts in family.fused.items() for part in parts)
            joined = (*parts, *((part, stored) for part, stored in family.names.items() if part.startswith("mlp.")))
        if not block:
            return cls(joined=joined)
        if (method := block.get("quant_method")) != "compressed-tensors":
            raise UserError(
                f"config.json: quant_method is {method!r}, only 'compressed-tensors' can be run; "
                "convert from the 16-bit checkpoint instead"
            )
        groups = []
        for name, group in (block.get("config_groups") or {}).items():
            groups.append((tuple(group["targets"]), _format_of(name, group)))
        return cls(tuple(groups), tuple(block.get("ignore") or ()), joined)

    def stored_name(self, module: str) -> str:
        """What the checkpoint calls `module`, or the whole that it is a part of."""
        for part, whole in self.joined:
            pattern = re.escape(part).replace(r"\*", r"(\d+)")
            if match := re.fullmatch(rf"(.*\.){pattern}", module):
                return match[1] + (whole.replace("*", match[2]) if "*" in part else whole)
        return module

    def format_of(self, module: str) -> LinearFormat | None:
        """The format of the linear layer called `module` (`model.layers.0.mlp.up_proj`), or None when it is plain.

        A part that is stored joined to others has the format of the whole.
        """
        module = self.stored_name(module)
        if any(matches(module, pattern) for pattern in self.ignore):
            return None
        for targets, form in self.groups:
            if any(target == "Linear" or matches(module, target) for target in targets):
                return form
        return None


def _format_of(name: str, group: dict[str, Any]) -> LinearFormat:
    weights = group.get("weights") or {}
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    if not weights.get("symmetric", True) or weights.get("actorder"):
        raise UserError(
            f"quantization_config.{name}: asymmetric or activation-ordered weights cannot be run; "
            "convert from the 16-bit checkpoint instead"
        )
    if (bits, kind, strategy) == (4, "int", "group"):
        return LinearFormat("int4", weights["group_size"])
    if (bits, kind, strategy) == (8, "float", "channel"):
        return LinearFormat("fp8", exact_inputs=not group.get("input_activations"))
    raise UserError(
        f"quantization_config.{name}: weights are {bits}-bit {kind} by {strategy}; "
        "expected 4-bit int by group or 8-bit float by channel"
    )


def matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern or module.endswith("." + pattern)


def make_linear(in_features: int, out_features: int, bias: bool, form: LinearFormat | None) -> nn.Module:
    if form is None:
        return nn.Linear(in_features, out_features, bias=bias)
    if form.kind == "int4":
        return Int4Linear(in_features, out_features, bias, form.group_size)
    return Fp8Linear(in_features, out_features, bias, form.exact_inputs)
