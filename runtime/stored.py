"""How a family's checkpoint names, joins and orders the decoder's tensors: read through here, written through here.

Every difference is one of rows. A part may have another name; q, k and v (or gate and up) may lie in one tensor, row
behind row; and the channels of a head that turn together may be neighbours, or only the first few of them, where the
decoder turns channel i with i + D/2. Putting the rows of q and k in the decoder's order once, at load, leaves one
rotation for every family, with frequency 0 for the channels that do not turn; scores do not depend on the order.

The surprise: packed int4 and fp8 weights move row by row like plain ones, so an artifact keeps its family's layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lcconvert.runtime.families import Family, family_of
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.stacked import Unstacked, has_stacks, stacked

_PART = re.compile(r"(model\.layers\.\d+\.)(.+)\.(\w+)")  # layer, part, leaf


@dataclass(frozen=True)
class _Place:
    """Where a part of a layer lies: rows begin..end of the stored part `name`, those in `order` if it is given."""

    name: str
    begin: int = 0
    end: int | None = None
    order: torch.Tensor | None = None  # int64: decoder row i is stored row order[i]


class _Layout:
    """The places of all parts that are not stored as the decoder has them."""

    def __init__(self, family: Family, spec: ModelSpec):
        rows = {
            "self_attn.q_proj": spec.q_size,
            "self_attn.k_proj": spec.kv_size,
            "self_attn.v_proj": spec.kv_size,
            "mlp.gate_proj": spec.intermediate_size,
            "mlp.up_proj": spec.intermediate_size,
        }
        self.places = {}
        for part, stored in family.names.items():
            for number in range(spec.num_experts) if "*" in part else (0,):
                self.places[part.replace("*", str(number))] = _Place(stored.replace("*", str(number)))
        self.joined: Mapping[str, tuple[str, ...]] = family.fused
        for whole, parts in family.fused.items():
            begin = 0
            for part in parts:
                self.places[part] = _Place(whole, begin, begin := begin + rows[part])
        if (head := _head_order(spec)) is not None:
            for part in ("self_attn.q_proj", "self_attn.k_proj"):
                starts = torch.arange(0, rows[part], spec.head_dim)[:, None]
                self.places[part] = replace(self.places.get(part, _Place(part)), order=(starts + head).flatten())
        self.parts: dict[str, list[str]] = {}  # decoder's parts by stored part
        for part, place in self.places.items():
            self.parts.setdefault(place.name, []).append(part)

    def decoder_names(self, name: str) -> list[str]:
        """What the decoder calls the stored tensor `name`, or the parts it is made of."""
        if not (match := _PART.fullmatch(name)):
            return [name]
        layer, part, leaf = match.groups()
        if part in self.parts:
            return [f"{layer}{mine}.{leaf}" for mine in self.parts[part]]
        return [name]

    def place(self, name: str) -> tuple[str, _Place | None]:
        """(stored name, place) of the decoder's tensor `name`; None where nothing differs."""
        if (match := _PART.fullmatch(name)) and (place := self.places.get(match[2])):
            return f"{match[1]}{place.name}.{match[3]}", place
        return name, None


class _DecoderSource:
    """A source under the decoder's names and in its order."""

    def __init__(self, source: TensorSource, layout: _Layout):
        self.name, self.config, self.files = source.name, source.config, source.files
        self._source, self._layout = source, layout

    def names(self) -> list[str]:
        return [mine for name in self._source.names() for mine in self._layout.decoder_names(name)]

    def stored_name(self, name: str) -> str:
        stored = self._layout.place(name)[0]
        return self._source.stored_name(stored) if isinstance(self._source, Unstacked) else stored

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        stored, place = self._layout.place(name)
        dtype, shape = self._source.info(stored)
        if place is not None and place.end is not None and not name.endswith(".weight_shape"):
            shape = (min(place.end, shape[0]) - place.begin, *shape[1:])
        return dtype, shape

    def tensor(self, name: str) -> torch.Tensor:
        stored, place = self._layout.place(name)
        tensor = self._source.tensor(stored)
        if place is None:
            return tensor
        if name.endswith(".weight_shape"):  # not rows, but how many there are
            return tensor if place.end is None else torch.stack((tensor.new_tensor(place.end - place.begin), tensor[1]))
        tensor = tensor[place.begin : place.end]
        return tensor if place.order is None or len(tensor) != len(place.order) else _rows(tensor, place.order)


def decoder_source(source: TensorSource, spec: ModelSpec) -> TensorSource:
    """`source` as the decoder names and orders its tensors; `source` itself where its family does the same."""
    family = family_of(source.config)
    if family.stacked and has_stacks(source):
        source = Unstacked(source)
    layout = _Layout(family, spec)
    return _DecoderSource(source, layout) if layout.places and not isinstance(source, _DecoderSource) else source


def stored_name(source: TensorSource, name: str) -> str:
    """What the checkpoint calls the decoder's tensor `name`."""
    return source.stored_name(name) if isinstance(source, _DecoderSource) else name


def as_stored(
    config: Mapping[str, Any], spec: ModelSpec, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The decoder's `tensors` (name, value) as a checkpoint of `config`'s family holds them, joined parts at the last.

    Holds the parts of joined tensors only until all have come. Meta tensors give the shapes alone.
    """
    layout = _Layout(family := family_of(config), spec)
    if family.stacked and not config.get("quantization_config"):
        tensors = stacked(tensors, spec.num_experts)
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        stored, place = layout.place(name)
        if place is None:
            yield name, tensor
            continue
        if place.order is not None and not name.endswith(".weight_shape"):
            tensor = _rows(tensor, place.order.argsort())
        match = _PART.fullmatch(name)
        assert match is not None
        if (wanted := layout.joined.get(place.name)) is None:
            yield stored, tensor
            continue
        found = waiting.setdefault(stored, {})
        found[match[2]] = tensor
        if len(found) == len(wanted):
            parts = [found[part] for part in wanted]
            yield stored, _shape(parts) if name.endswith(".weight_shape") else torch.cat(parts)
            del waiting[stored]
    assert not waiting, f"parts are missing of {', '.join(waiting)}"


def router_name(config: Mapping[str, Any]) -> str:
    """A pattern for the modules that choose experts, as checkpoints of the family of `config` call them."""
    return re.escape(family_of(config).names.get("mlp.gate", "mlp.gate"))


def _shape(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack((torch.stack([part[0] for part in parts]).sum(), parts[0][1]))


def _rows(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    order = order.to(tensor.device)
    if tensor.dtype.itemsize == 1:  # e4m3 has no gather everywhere
        return tensor.view(torch.uint8)[order].view(tensor.dtype)
    return tensor[order]


def _head_order(spec: ModelSpec) -> torch.Tensor | None:
    """Stored channel of each channel of a head, int64 [D]; None where they are the same."""
    dim, turning = spec.head_dim, spec.rope.rotary_dim(spec.head_dim)
    if turning == dim and not spec.interleaved:
        return None
    channel, rest = torch.arange(turning), torch.arange(turning, dim)
    halves = (channel[0::2], channel[1::2]) if spec.interleaved else channel.chunk(2)
    return torch.cat([part for half, still in zip(halves, rest.tensor_split(2), strict=True) for part in (half, still)])
