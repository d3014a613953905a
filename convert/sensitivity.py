"""What each part of a model loses when it alone is rounded, and which parts a size budget keeps in 8 bits.

A part is the linear layers of a decoder layer that share an input. All parts are measured in one pass over the layers:
the hidden states that one rounded part has changed travel on beside the exact ones, so every layer is read once and
moves all copies made before it. At the end each copy's divergence from the original model's predictions is known.
Rounding is to nearest: what GPTQ saves is about the same share everywhere, and this decides an order.

Left out: pairs. Losses of parts are taken to add up, which holds while they are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lcconvert.convert.calibrate import load_layer, shared_input
from lcconvert.convert.progress import progress
from lcconvert.convert.round_layer import to_nearest
from lcconvert.convert.round_to_nearest import dequantize
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import LinearFormat, QuantLayout
from lcconvert.runtime.model import Layer, RMSNorm, layer_tables, read_tensor, scaled
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec

_WINDOWS, _LENGTH = 2, 256  # of the calibration tokens, what is enough to tell parts apart
_ROWS = 8  # copies that pass a layer at a time
_SCALE_BITS = 16
Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Linear layers `modules` that share an input, K wide and N high in all, stored in `form`; `kl`: what rounding them
    alone costs, in mean nats a token."""

    modules: tuple[str, ...]
    form: LinearFormat
    width: int
    height: int
    kl: float

    @property
    def bits(self) -> int:
        """With scales."""
        return self.bits_in(self.form)

    @property
    def added(self) -> int:
        """Bits that fp8 takes more."""
        return self.bits_in(LinearFormat("fp8")) - self.bits

    def bits_in(self, form: LinearFormat) -> int:
        """fp8 has one scale a row, int4 one a group."""
        groups = self.width // form.group_size if form.kind == "int4" else 1
        return self.height * (self.width * (4 if form.kind == "int4" else 8) + groups * _SCALE_BITS)


@torch.no_grad()
def sensitivities(
    source: TensorSource, spec: ModelSpec, layout: QuantLayout, windows: torch.Tensor, device: torch.device
) -> list[Part]:
    """Every part that `layout` quantizes, measured on the first tokens of int64 `windows` [S, T]."""
    ids = windows[:_WINDOWS, :_LENGTH]
    embedding = source.tensor("model.embed_tokens.weight")
    x = scaled(spec, F.embedding(ids, embedding).to(device, torch.float32 if device.type == "cpu" else embedding.dtype))
    tables = layer_tables(spec, torch.arange(ids.shape[1], device=device)[None])
    copies = x[:0]  # [parts * S, T, H]
    found: list[tuple[tuple[str, ...], LinearFormat, int, int]] = []
    with progress("sensitivity", spec.num_layers, "layers") as bar:
        for number in range(spec.num_layers):
            prefix, layer = f"model.layers.{number}", load_layer(source, spec, number, device)
            after, moments = _watched(layer, x, tables[number])
            moved = [layer(rows, *tables[number]) for rows in copies.split(_ROWS)] if len(copies) else []
            for names in shared_input(layer):
                forms = {name: form for name in names if (form := layout.format_of(f"{prefix}.{name}"))}
                for form in dict.fromkeys(forms.values()):
                    wanted = [name for name in names if forms.get(name) == form]
                    weights = [layer.get_parameter(f"{name}.weight") for name in wanted]
                    seen = moments.get(names[0])
                    moved.append(_changed(layer, weights, form, embedding.dtype, seen, x, tables[number]))
                    full = tuple(layout.stored_name(f"{prefix}.{name}") for name in wanted)
                    found.append((tuple(dict.fromkeys(full)), form, weights[0].shape[1], sum(map(len, weights))))
            copies, x = torch.cat(moved), after
            bar.advance()
    losses = divergences(source, spec, x, copies)
    return [Part(*part, kl) for part, kl in zip(found, losses, strict=True)]


def _watched(layer: Layer, x: torch.Tensor, tables: Tables) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The layer's output, and E[x^2] float32 [K] by the first name of each `shared_input` row; none for an
    expert that no token chose."""
    moments: dict[str, torch.Tensor] = {}

    def watch(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        moments[name] = args[0].float().square().flatten(0, -2).mean(0)

    names = [row[0] for row in shared_input(layer)]
    hooks = [layer.get_submodule(name).register_forward_pre_hook(partial(watch, name)) for name in names]
    after = layer(x, *tables)
    for hook in hooks:
        hook.remove()
    return after, moments


def _changed(
    layer: Layer,
    weights: list[nn.Parameter],
    form: LinearFormat,
    dtype: torch.dtype,
    second_moment: torch.Tensor | None,
    x: torch.Tensor,
    tables: Tables,
) -> torch.Tensor:
    """The layer's output with only `weights` rounded, which are as before afterwards."""
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight.copy_(dequantize(*to_nearest(weight.float(), form, second_moment, dtype)))
    after: torch.Tensor = layer(x, *tables)
    for weight, old in zip(weights, before):
        weight.copy_(old)
    return after


def divergences(
    source: TensorSource, spec: ModelSpec, x: torch.Tensor, copies: torch.Tensor, weights: torch.Tensor | None = None
) -> list[float]:
    """KL of each group of len(x) copies [P * S, T, H] from x [S, T, H], mean nats a token.

    weights: float32 [S, T], of the states, with a sum of 1 in every row; None weighs all alike.
    """
    norm = RMSNorm(spec.hidden_size, spec.rms_eps, spec.norm_shift)
    size = torch.Size([spec.vocab_size, spec.hidden_size])
    norm.weight = nn.Parameter(read_tensor(source, "model.norm.weight", norm.weight.shape).to(x.device, x.dtype))
    name = "model.embed_tokens.weight" if spec.tied_head else "lm_head.weight"
    head = read_tensor(source, name, size).to(x.device, x.dtype)

    def log_probs(hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(norm(hidden), head).float().log_softmax(-1)

    if weights is None:
        weights = torch.full(x.shape[:2], 1 / x.shape[1], device=x.device)
    totals = torch.zeros(len(copies) // len(x), dtype=torch.float64)
    for sample in range(len(x)):
        rows = weights[sample].nonzero()[:, 0]
        wanted = log_probs(x[sample, rows])
        for part in range(len(totals)):
            found = log_probs(copies[part * len(x) + sample, rows])
            kl = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
            totals[part] += float(kl @ weights[sample, rows]) / len(x)
    return [max(total, 0.0) for total in totals.tolist()]


def within_budget(parts: list[Part], bits_per_weight: float) -> list[Part]:
    """The int4 parts to store in fp8 instead: of the most loss a bit first, while the mean stays in the budget."""
    weights = sum(part.width * part.height for part in parts)
    spent, budget = sum(part.bits for part in parts), bits_per_weight * weights
    if spent > budget:
        raise UserError(
            f"bits_per_weight is {bits_per_weight:g} but the formats chosen take {spent / weights:.3f} with their "
            "scales; give that much or more, a larger group_size, or fewer wide layers"
        )
    chosen = []
    for part in sorted((part for part in parts if part.form.kind == "int4"), key=lambda part: -part.kl / part.added):
        if spent + part.added <= budget:
            spent += part.added
            chosen.append(part)
    return chosen
