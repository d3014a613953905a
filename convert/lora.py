"""Low-rank adapters (LoRA, arXiv 2106.09685) on the attention products, trained and then merged: no trace is left.

For models whose gradients and Adam moments do not fit: only q, k, v and o learn, by two thin matrices each, and the
norms and the embeddings where asked, which LongLoRA (arXiv 2309.12307) found that long contexts need.

Surprising rule: the adapter's output is added in the precision of the forward pass, the merged weight is rounded once,
so the two agree to rounding and not to the bit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import Decoder

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoraLinear(nn.Module):
    """y = x W^T + b + scale * (x down^T) up^T; W [N, K] is frozen, down [r, K] random, up [N, r] starts at zero."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base, scale
        bound = 1.0 / math.sqrt(base.in_features)
        down = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(base.weight.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.down), self.up)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the adapter added to its weight, in place."""
        weight = self.base.weight
        weight.copy_(weight.float() + self.scale * (self.up @ self.down))
        return self.base


def add_lora(decoder: Decoder, rank: int, alpha: float, train: tuple[str, ...], seed: int) -> None:
    """Freezes `decoder` but for adapters of `rank` on TARGETS of every layer, and "norms" and "embeddings" in `train`.

    The adapters are scaled by alpha / rank. UserError when `rank` is more than a target can have.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder.requires_grad_(False)
    for layer in decoder.layers:
        for name in TARGETS:
            base = getattr(layer.self_attn, name)
            if rank > min(base.in_features, base.out_features):
                raise UserError(
                    f"lora_rank is {rank} but {name} is {base.out_features} x {base.in_features}; take a lower rank"
                )
            setattr(layer.self_attn, name, LoraLinear(base, rank, alpha / rank, generator))
    for name, weight in decoder.named_parameters():
        if ("norms" in train and "norm" in name) or ("embeddings" in train and "embed_tokens" in name):
            weight.requires_grad_(True)


def merge_lora(decoder: Decoder) -> None:
    """Puts plain layers back, with what the adapters learnt in their weights; everything can be trained again."""
    for layer in decoder.layers:
        for name in TARGETS:
            setattr(layer.self_attn, name, getattr(layer.self_attn, name).merged())
    decoder.requires_grad_(True)
