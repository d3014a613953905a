"""Experts that a checkpoint stores in one tensor for the whole layer, as gpt-oss does, and its MXFP4 weights.

`mlp.experts.gate_up_proj` is [E, H, 2I], inputs before outputs and gate and up in turn; `down_proj` is [E, I, H]; their
biases are [E, 2I] and [E, H]. MXFP4 (OCP Microscaling Formats 1.0) has outputs first: `_blocks` uint8 [E, N, K/32, 16],
two e2m1 values a byte and the earlier one in its low half, and `_scales` uint8 [E, N, K/32], powers of two less 127.
Their products have two bits of mantissa, so bfloat16 holds them exactly up to 2^128, its end.

Packed experts have no such form: in an artifact with packed weights every expert is by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.source import TensorSource

_WHOLE = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up|down)_proj(_bias|_blocks|_scales)?")
_EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.(weight|bias)")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def has_stacks(source: TensorSource) -> bool:
    return any(_WHOLE.fullmatch(name) for name in source.names())


class Unstacked:
    """`source` with every expert by itself: `mlp.experts.7.up_proj.weight` [I, H], in 16 or 32 bit.

    A layer's tensor is not read for one expert: of a file, only the pages in which that one lies are.
    """

    def __init__(self, source: TensorSource):
        self.name, self.files, self._source = source.name, source.files, source
        mx = (source.config.get("quantization_config") or {}).get("quant_method") == "mxfp4"
        self.config = {k: v for k, v in source.config.items() if not (mx and k == "quantization_config")}
        self._present = set(source.names())

    def names(self) -> list[str]:
        found: dict[str, None] = {}
        for name in self._source.names():
            if not (match := _WHOLE.fullmatch(name)):
                found[name] = None
                continue
            leaf = "bias" if match[3] == "_bias" else "weight"
            for number in range(self._source.info(name)[1][0]):
                for part in ("gate", "up") if match[2] == "gate_up" else ("down",):
                    found[f"{match[1]}{number}.{part}_proj.{leaf}"] = None
        return list(found)

    def stored_name(self, name: str) -> str:
        if not (match := _EXPERT.fullmatch(name)):
            return name
        whole = _whole_name(match)
        return f"{whole}_blocks" if f"{whole}_blocks" in self._present else whole

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if not (match := _EXPERT.fullmatch(name)):
            return self._source.info(name)
        stored = self.stored_name(name)
        dtype, shape = self._source.info(stored)
        parts = 1 if match[3] == "down" else 2
        if stored.endswith("_blocks"):
            return torch.bfloat16, (shape[1] // parts, shape[2] * shape[3] * 2)
        return dtype, (shape[1] // parts,) if match[4] == "bias" else (shape[2] // parts, shape[1])

    def tensor(self, name: str) -> torch.Tensor:
        if not (match := _EXPERT.fullmatch(name)):
            return self._source.tensor(name)
        stored, number = self.stored_name(name), int(match[2])
        rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[match[3]]
        whole = self._source.tensor(stored)[number]
        if stored.endswith("_blocks"):
            scales = stored.removesuffix("_blocks") + "_scales"
            if scales not in self._present or self._source.info(scales)[1] != self._source.info(stored)[1][:-1]:
                raise UserError(
                    f"{self.name}: tensor {scales} is missing or does not fit {stored}; the checkpoint is damaged, "
                    "fetch it again"
                )
            return decode_mxfp4(whole[rows], self._source.tensor(scales)[number][rows])
        return (whole[rows] if match[4] == "bias" else whole.T[rows]).contiguous()


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 blocks [N, G, 16] and scales [N, G] -> bfloat16 [N, 32 * G]; a scale of 255 is NaN, as the format says."""
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=blocks.device)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)  # [N, G, 32]
    scale = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    scale = scale.masked_fill(scales == 255, torch.nan)
    return (values[codes.int()] * scale[..., None]).flatten(-2).bfloat16()


def stacked(tensors: Iterable[tuple[str, torch.Tensor]], experts: int) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors` (name, value) with the `experts` of a layer in one tensor, which comes when it is complete."""
    waiting: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in tensors:
        if not (match := _EXPERT.fullmatch(name)):
            yield name, tensor
            continue
        stored = _whole_name(match)
        found = waiting.setdefault(stored, {})
        found[int(match[2]), match[3]] = tensor
        if len(found) == experts * (1 if match[3] == "down" else 2):
            yield stored, torch.stack([_joined(found, number) for number in range(experts)])
            del waiting[stored]
    assert not waiting, f"experts are missing of {', '.join(waiting)}"


def _whole_name(match: re.Match[str]) -> str:
    whole = "down" if match[3] == "down" else "gate_up"
    return f"{match[1]}{whole}_proj{'_bias' if match[4] == 'bias' else ''}"


def _joined(found: Mapping[tuple[int, str], torch.Tensor], number: int) -> torch.Tensor:
    """The rows of one expert, its inputs first."""
    if (number, "down") in found:
        rows = found[number, "down"]
    else:
        rows = torch.stack((found[number, "gate"], found[number, "up"]), 1).flatten(0, 1)
    return rows.T if rows.ndim == 2 else rows
