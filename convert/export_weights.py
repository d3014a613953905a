"""Reads any checkpoint's linear layers in the two forms other engines take: plain values, or int4 codes and scales.

One layer is in memory at a time. Stored int4 codes are handed on untouched, so an exported model computes with the very
integers of the artifact; everything else that is asked for as int4 is rounded to nearest here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lcconvert.convert.round_to_nearest import quantize_rtn
from lcconvert.kernels.int4 import dequantize_int4, pack_int4
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import LinearFormat, QuantLayout
from lcconvert.runtime.model import check_finite
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.stored import decoder_source

GROUP_SIZES = (256, 128, 64, 32, 16)  # MatMulNBits: powers of two from 16


@dataclass(frozen=True)
class Int4Weight:
    """A weight [N, K] as `packed` int32 [N, K/8] (compressed-tensors order, code + 8) and `scale` [N, K/group]."""

    packed: torch.Tensor
    scale: torch.Tensor
    group_size: int


class ExportWeights:
    """The tensors of `source` by module name, each checked to be finite and counted as used."""

    def __init__(self, source: TensorSource):
        self.spec = ModelSpec.from_config(source.config)
        self.source = decoder_source(source, self.spec)
        self.layout = QuantLayout.from_config(source.config)
        self._used: set[str] = set()

    @property
    def stores_int4(self) -> bool:
        return any(form.kind == "int4" for _, form in self.layout.groups)

    def is_int4(self, module: str) -> bool:
        """Whether this linear layer is stored as int4."""
        form = self._form(module)
        return form is not None and form.kind == "int4"

    def plain(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        tensor = self.source.tensor(name)
        check_finite(name, tensor, self.source.name)
        self._used.add(name)
        return tensor

    def dense(self, module: str) -> torch.Tensor:
        """The weight [N, K] of a linear layer in a 16 or 32-bit float; packed formats are expanded to float32."""
        form = self._form(module)
        if form is None:
            return self.plain(f"{module}.weight")
        if form.kind == "fp8":
            return self.plain(f"{module}.weight").float() * self.plain(f"{module}.weight_scale").float()
        stored = self._stored_int4(module, form)
        return dequantize_int4(stored.packed, stored.scale, torch.float32)

    def int4(self, module: str, group_size: int) -> Int4Weight | None:
        """The weight as int4: the stored codes if there are any, else rounded now by groups of at most `group_size`.

        None for the layers that an int4 checkpoint itself keeps wider: that choice is not undone here.
        """
        if (form := self._form(module)) is not None and self.is_int4(module):
            return self._stored_int4(module, form)
        if self.stores_int4:
            return None
        weight = self.dense(module).float()
        group = next((g for g in GROUP_SIZES if g <= group_size and weight.shape[1] % g == 0), None)
        if group is None:
            raise UserError(
                f"{module}.weight of {self.source.name} has input width {weight.shape[1]}, which no int4 group size of "
                f"{', '.join(str(g) for g in reversed(GROUP_SIZES))} divides; export it with precision fp32"
            )
        codes, scale = quantize_rtn(weight, group, scale_dtype=torch.float32)
        return Int4Weight(pack_int4(codes), scale, group)

    def bias(self, module: str, present: bool) -> torch.Tensor | None:
        return self.plain(f"{module}.bias") if present else None

    def assert_all_used(self) -> None:
        """UserError naming the first tensor of the source that no part of the model read."""
        derived = (".rotary_emb.inv_freq", ".self_attn.k_scale", ".self_attn.v_scale")
        left = [n for n in sorted(set(self.source.names()) - self._used) if not n.endswith(derived)]
        if left and not (self.spec.tied_head and left == ["lm_head.weight"]):
            raise UserError(
                f"{self.source.name} holds tensor {left[0]} ({len(left)} not used), which a {self.spec.family} model "
                "of this config has no place for; config.json and weights do not belong together"
            )

    def _form(self, module: str) -> LinearFormat | None:
        return None if module == "lm_head" else self.layout.format_of(module)

    def _stored_int4(self, module: str, form: LinearFormat) -> Int4Weight:
        self._used.add(f"{module}.weight_shape")
        packed, scale = self.plain(f"{module}.weight_packed"), self.plain(f"{module}.weight_scale")
        return Int4Weight(packed, scale, form.group_size)
