"""Reads checkpoints that other tools quantized as if they were plain: GPTQ, AWQ, compressed-tensors, scaled fp8.

Every layout comes down to one: integers or e4m3 values q [N, K], a scale and maybe a zero point for each output and
group of inputs, and which group an input is of. A weight is (q - zero) * scale in float32, which holds that product of
few bits exactly (of a float32 scale to its rounding). What a layer has in common with our own layouts, symmetric int4
by whole groups and e4m3 by outputs, can be taken over without rounding again; `kept` says which layers those are.

Left out: other codes (FP4, bitsandbytes, HQQ), 2:4 sparsity, rotated activations; they are refused by name. How a
source rounds activations is dropped. The surprising rule: GPTQ's first format stores zero points less one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.families import FAMILIES
from lcconvert.runtime.linear import LinearFormat, QuantLayout
from lcconvert.runtime.model import Decoder
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.stacked import Unstacked, has_stacks

_METHODS = ("gptq", "awq", "compressed-tensors", "fp8")
_MARKS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")  # a module with one of these is quantized
_PARTS = {
    *("qweight", "qzeros", "scales", "g_idx"),
    *("weight_packed", "weight_shape", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
}
_AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the output i of eight is


@dataclass(frozen=True)
class Codes:
    """A weight [N, K]. `read` gives its values, int8 or e4m3; scale [N, G] as stored, zero likewise in units of a code
    or None for 0; group: int64 [K], the group of each input."""

    shape: tuple[int, int]
    bits: int
    read: Callable[[], torch.Tensor]
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: torch.Tensor
    floating: bool = False

    def weight(self) -> torch.Tensor:
        """float32 [N, K]."""
        values = self.read().float()
        if self.zero is not None:
            values -= self.zero.float()[:, self.group]
        return values.mul_(self.scale.float()[:, self.group])

    @property
    def form(self) -> LinearFormat | None:
        """The layout of ours that stores exactly this; None for all others."""
        columns, groups = self.shape[1], self.scale.shape[1]
        if (self.zero is not None and self.zero.any()) or not torch.isfinite(scale := self.scale.float()).all():
            return None
        if not scale.all():
            return None
        if self.floating:
            return LinearFormat("fp8") if groups == 1 else None
        size = columns // groups
        whole = self.bits == 4 and columns % groups == 0 and size % 8 == 0
        return LinearFormat("int4", size) if whole and torch.equal(self.group, _in_turn(columns, size)) else None


def decoded(source: TensorSource) -> TensorSource:
    """`source` with plain weights: itself where it has them."""
    if not (block := source.config.get("quantization_config")):
        return source
    return Unstacked(source) if block.get("quant_method") == "mxfp4" and has_stacks(source) else DecodedSource(source)


class DecodedSource:
    """`source`, a checkpoint with a `quantization_config`, with plain float32 weights in place of packed ones.

    Beside the names it lists, `X.weight_codes` (int8 or e4m3 [N, K]) and `X.weight_scale` ([N, G]) can be read of the
    layers X in `kept`. UserError names a method or layout that cannot be decoded, or a part that is missing.
    """

    def __init__(self, source: TensorSource):
        self.name, self.files = source.name, source.files
        self.config = {key: value for key, value in source.config.items() if key != "quantization_config"}
        self.block: dict[str, Any] = source.config["quantization_config"]
        self.method = str(self.block.get("quant_method"))
        self._source, self._raw = source, set(source.names())
        _refuse_unknown(source.name, self.method, self.block)
        self._modules = {
            module for module, _, leaf in (name.rpartition(".") for name in self._raw) if leaf in _MARKS and module
        }
        self._names = self._plain_names()

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        module, _, leaf = name.rpartition(".")
        if module not in self._modules or leaf not in ("weight", "weight_codes", "weight_scale"):
            return self._source.info(name)
        if leaf == "weight":
            return torch.float32, self._shape(module)
        tensor = self.tensor(name)
        return tensor.dtype, tuple(tensor.shape)

    def tensor(self, name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        if module not in self._modules or leaf not in ("weight", "weight_codes", "weight_scale"):
            return self._source.tensor(name)
        codes = self._codes(module)
        if leaf == "weight":
            return codes.weight()
        return (codes.read() if leaf == "weight_codes" else codes.scale).contiguous()

    @cached_property
    def kept(self) -> QuantLayout:
        """The layers whose codes and scales are stored as ours would be, by the checkpoint's names."""
        found: dict[LinearFormat, list[str]] = {}
        for module in sorted(self._modules):
            if (form := self._codes(module).form) is not None:
                found.setdefault(form, []).append(module)
        joined = QuantLayout.from_config(self.config).joined
        return QuantLayout(tuple((tuple(names), form) for form, names in found.items()), (), joined)

    def _plain_names(self) -> list[str]:
        names = []
        for name in self._source.names():
            module, _, leaf = name.rpartition(".")
            if module in self._modules and leaf in _MARKS:
                names.append(f"{module}.weight")
            elif not (module in self._modules and (leaf == "weight" or leaf in _PARTS)) and not _KV.fullmatch(name):
                names.append(name)
        empty = [name for name in names if name.endswith("_proj.bias") and name.removesuffix(".bias") in self._modules]
        if empty and self.config.get("architectures", [""])[0] in FAMILIES:
            with torch.device("meta"):
                wanted = {name for name, _ in Decoder(ModelSpec.from_config(self.config)).named_parameters()}
            # GPTQ tools write a bias of zeros for layers that have none
            unused = {name for name in empty if name not in wanted and not self._source.tensor(name).any()}
            names = [name for name in names if name not in unused]
        return list(dict.fromkeys(names))

    def _shape(self, module: str) -> tuple[int, int]:
        """(N, K) of a weight."""
        if f"{module}.weight_shape" in self._raw:
            rows, columns = self._part(module, "weight_shape").tolist()
            return rows, columns
        if f"{module}.qweight" in self._raw:
            words, width = self._source.info(f"{module}.qweight")[1]
            if self.method == "awq":
                return width * 8, words
            columns = self._source.info(f"{module}.g_idx")[1][0] if f"{module}.g_idx" in self._raw else 0
            return width, columns or words * 32 // self._configured_bits()
        rows, columns = self._source.info(f"{module}.weight")[1]
        return rows, columns

    def _configured_bits(self) -> int:
        if not isinstance(bits := self.block.get("bits"), int) or not 2 <= bits <= 8:
            raise UserError(
                f"{self.name}: quantization_config.bits is {bits!r}, expected 2 to 8; fetch config.json again"
            )
        return bits

    def _bits(self, module: str) -> int:
        """Of a code, from the width of what is stored, as one checkpoint may mix widths."""
        columns = self._shape(module)[1]
        if f"{module}.weight_packed" in self._raw:
            return self._source.info(f"{module}.weight_packed")[1][1] * 32 // columns
        if f"{module}.qweight" in self._raw:
            return 4 if self.method == "awq" else self._source.info(f"{module}.qweight")[1][0] * 32 // columns
        return 8

    def _codes(self, module: str) -> Codes:
        if f"{module}.qweight" in self._raw:
            return self._awq(module) if self.method == "awq" else self._gptq(module)
        if f"{module}.weight_packed" in self._raw:
            return self._packed(module)
        return self._plain(module)

    def _gptq(self, module: str) -> Codes:
        rows, columns = shape = self._shape(module)
        bits, scale = self._bits(module), self._part(module, "scales").T  # [N, G]
        zero = _unpack(self._part(module, "qzeros"), bits, (scale.shape[1], rows), 1).T.int()
        if (self.block.get("checkpoint_format") or self.block.get("format") or "gptq") == "gptq":
            zero = zero + 1
        group = _in_turn(columns, -(-columns // scale.shape[1]))
        if f"{module}.g_idx" in self._raw:
            group = self._part(module, "g_idx").long()

        def read() -> torch.Tensor:
            return _unpack(self._part(module, "qweight"), bits, (columns, rows), 0).T

        return self._checked(module, Codes(shape, bits, read, scale, zero, group))

    def _awq(self, module: str) -> Codes:
        rows, columns = shape = self._shape(module)
        scale = self._part(module, "scales").T

        def unpack(leaf: str, height: int) -> torch.Tensor:
            words = _unpack(self._part(module, leaf), 4, (height, rows), 1)
            return words.unflatten(1, (-1, 8))[:, :, list(_AWQ_PLACE)].flatten(1).T

        zero, group = unpack("qzeros", scale.shape[1]), _in_turn(columns, -(-columns // scale.shape[1]))
        return self._checked(module, Codes(shape, 4, lambda: unpack("qweight", columns), scale, zero, group))

    def _packed(self, module: str) -> Codes:
        rows, columns = shape = self._shape(module)
        if self._source.info(f"{module}.weight_packed")[0] != torch.int32:
            raise UserError(
                f"{module} of {self.name} is stored as FP4 ({self.block.get('format')}), which is not decoded; "
                "quantize from the 16-bit checkpoint"
            )
        bits = self._bits(module)
        scale = _as_matrix(self._part(module, "weight_scale"), rows)
        zero = self._zero(module, bits, (rows, scale.shape[1]))
        group = _in_turn(columns, -(-columns // scale.shape[1]))
        if f"{module}.weight_g_idx" in self._raw and (index := self._part(module, "weight_g_idx")).amin() >= 0:
            group = index.long()

        def read() -> torch.Tensor:
            return _unpack(self._part(module, "weight_packed"), bits, shape, 1)

        return self._checked(module, Codes(shape, bits, read, scale, zero, group))

    def _zero(self, module: str, bits: int, shape: tuple[int, int]) -> torch.Tensor | None:
        if f"{module}.weight_zero_point" not in self._raw:
            return None
        zero = self._part(module, "weight_zero_point")
        return _unpack(zero, bits, shape, 0) if zero.dtype == torch.int32 else _as_matrix(zero, shape[0])

    def _plain(self, module: str) -> Codes:
        dtype, _ = self._source.info(f"{module}.weight") if f"{module}.weight" in self._raw else (None, ())
        if dtype not in (torch.int8, torch.float8_e4m3fn):
            raise UserError(
                f"{module}.weight of {self.name} has a scale but is {str(dtype).removeprefix('torch.')}, "
                "expected int8 or float8_e4m3fn; quantize from the 16-bit checkpoint"
            )
        rows, columns = shape = self._shape(module)
        leaf = "weight_scale" if f"{module}.weight_scale" in self._raw else "weight_scale_inv"
        scale, width = self._part(module, leaf), columns
        if scale.ndim == 2 and scale.shape[0] != rows and scale.numel() > 1:  # one for each block of rows and columns
            height, width = self._block_shape(module, scale)
            scale = scale.repeat_interleave(height, dim=0)[:rows]
        else:
            scale = _as_matrix(scale, rows)
            width = -(-columns // scale.shape[1])
        zero = self._zero(module, 8, (rows, scale.shape[1]))
        group, floating = _in_turn(columns, width), dtype == torch.float8_e4m3fn
        return self._checked(
            module, Codes(shape, 8, lambda: self._part(module, "weight"), scale, zero, group, floating)
        )

    def _block_shape(self, module: str, scale: torch.Tensor) -> tuple[int, int]:
        shapes = {tuple(self.block["weight_block_size"])} if self.block.get("weight_block_size") else set()
        for group in (self.block.get("config_groups") or {}).values():
            if shape := (group.get("weights") or {}).get("block_structure"):
                shapes.add(tuple(shape))
        if len(shapes) != 1:
            raise UserError(
                f"{module} of {self.name} has block scales {list(scale.shape)} and quantization_config names "
                f"{len(shapes)} block shapes, expected one; quantize from the 16-bit checkpoint"
            )
        height, width = shapes.pop()
        return int(height), int(width)

    def _part(self, module: str, leaf: str) -> torch.Tensor:
        if f"{module}.{leaf}" not in self._raw:
            raise UserError(f"{self.name} lacks tensor {module}.{leaf}; the checkpoint is incomplete, fetch it again")
        return self._source.tensor(f"{module}.{leaf}")

    def _checked(self, module: str, codes: Codes) -> Codes:
        """UserError when the parts of a layer do not fit each other."""
        (rows, columns), groups = codes.shape, codes.scale.shape[1]
        fits = codes.scale.shape[0] == rows and codes.group.shape == (columns,)
        fits = fits and (codes.zero is None or codes.zero.shape == codes.scale.shape)
        if not fits or int(codes.group.min()) < 0 or int(codes.group.max()) >= groups:
            raise UserError(
                f"the parts of {module} of {self.name} do not fit: weight {[rows, columns]}, scales "
                f"{list(codes.scale.shape)}, groups up to {int(codes.group.max())}; fetch the checkpoint again"
            )
        return codes


@dataclass(frozen=True)
class Kept:
    """The linear layers of `source` (the decoder's names) whose codes are there to be taken over, as `layout` says."""

    source: TensorSource
    layout: QuantLayout

    def holds(self, module: str, form: LinearFormat) -> bool:
        """Whether the weights of `module` are stored in `form`; how its inputs are taken does not matter."""
        return self.layout.format_of(module) == replace(form, exact_inputs=False)

    def codes(self, module: str, form: LinearFormat) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Codes int8 or e4m3 [N, K] and scale [N, G] of `module` where they are stored in `form`."""
        if not self.holds(module, form):
            return None
        return self.source.tensor(f"{module}.weight_codes"), self.source.tensor(f"{module}.weight_scale")


_KV = re.compile(r".*\.self_attn\.(?:[kvq]_scale|[kvq]_proj\.(?:output_scale|[kvq]_scale)|[kvq]_zero_point)")


def _refuse_unknown(where: str, method: str, block: Mapping[str, Any]) -> None:
    reason = None
    layout = str(block.get("checkpoint_format") or block.get("format") or block.get("version") or "").lower()
    if method not in _METHODS:
        reason = f"quant_method is {method!r}, readable are {', '.join(_METHODS)}"
    elif method == "gptq" and layout not in ("", "gptq", "gptq_v2"):
        reason = f"checkpoint_format is {layout!r}, readable are gptq and gptq_v2"
    elif method == "awq" and (layout not in ("", "gemm") or block.get("bits", 4) != 4):
        reason = f"AWQ version is {layout!r} of {block.get('bits', 4)} bits, readable is gemm of 4"
    elif (sparsity := (block.get("sparsity_config") or {}).get("format") or "dense") != "dense":
        reason = f"sparsity_config.format is {sparsity!r}, readable is dense"
    elif (block.get("transform_config") or {}).get("config_groups"):
        reason = "transform_config rotates activations, which is not computed here"
    elif re.search("fp4|fp6|mxfp8", layout):
        reason = f"format is {layout!r}, readable are integers and e4m3"
    if reason:
        raise UserError(f"{where}: quantization_config: {reason}; give the 16-bit checkpoint it was made from")


def _unpack(words: torch.Tensor, bits: int, shape: tuple[int, int], dim: int) -> torch.Tensor:
    """int32 words, filled from the lowest bit along `dim` -> int8 of `shape`, less half of the range."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    return unpack_from_int32(words, bits, torch.Size(shape), packed_dim=1 if dim else 0)


def _in_turn(columns: int, size: int) -> torch.Tensor:
    return torch.arange(columns) // size


def _as_matrix(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """A scale for the whole weight, or one for each row, as [N, G]."""
    scale = scale.reshape(1, 1) if scale.numel() == 1 else scale if scale.ndim == 2 else scale[:, None]
    return scale.expand(rows, -1) if scale.shape[0] == 1 else scale
