"""Attention sinks: a learned score of each head that takes its share of the softmax and has no value behind it.

Without them an output is sum(p v); with them it is that times sigmoid(lse - sink), lse the log of the sum of
exponentials (gpt-oss, arXiv 2508.10925). Kernels that keep lse correct it where they join their parts. All others, and
all backward passes, are given the sink as one more key: queries get two channels that hold it, and the key is 1 there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_CHANNELS = 8  # added to a head, of which two are used: kernels take multiples of this


def with_sinks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [..., T, Hq, D], k and v [..., S, Hkv, D], sinks [Hq] -> q with D + 8 channels, k and v with one row more, too.

    The first row is the sink, which every query must see. The scale is still 1/sqrt(D), and of the output the first D
    channels count. In 16 bit a sink is the sum of two values, so it loses nothing.
    """
    dim = q.shape[-1]
    score = sinks.float() * dim**0.5
    high = score.to(q.dtype)
    low = (score - high.float()).to(q.dtype)
    added = F.pad(torch.stack((high, low), -1), (0, _CHANNELS - 2))  # [Hq, 8]
    k, v = (F.pad(x, (0, _CHANNELS, 0, 0, 1, 0)) for x in (k, v))
    k[..., 0, :, dim : dim + 2] = 1
    return torch.cat((q, added.expand(*q.shape[:-1], -1)), -1), k, v
