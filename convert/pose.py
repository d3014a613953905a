"""Position ids that reach the target context from a short window (PoSE, arXiv 2309.10400).

A window of T tokens is cut into chunks and the chunks are pushed apart, so that the model meets the angles of a million
tokens at the price of a few thousand. It meets only T competing keys, though: skips teach distances, not the crowd, and
real length must still grow where it can be afforded.

Surprising rules: cuts fall only on borders given by the caller (documents, paragraphs, planted facts), because a jump
inside a sentence teaches the model to distrust neighbours; the first chunk stays at 0, where attention sinks live.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch

FAR_SHARE = 0.6  # windows whose span is uniform up to the context; the other spans are log-uniform (measured better)


def pose_positions(
    length: int, borders: Sequence[int], context: int, max_chunks: int, rng: random.Random
) -> torch.Tensor:
    """Strictly increasing int64 [length] below `context`, starting at 0, consecutive inside each chunk.

    `borders` are token offsets at which a chunk may start. The number of chunks is drawn from 2..`max_chunks` and is
    smaller where there are fewer borders; with no usable border, or max_chunks == 1, the window stays contiguous.
    """
    assert length <= context
    cuts = sorted({border for border in borders if 0 < border < length})
    room = context - length
    if max_chunks < 2 or not cuts or not room:
        return torch.arange(length)
    cuts = sorted(rng.sample(cuts, min(rng.randint(2, max_chunks) - 1, len(cuts))))
    total = (
        rng.randint(0, room) if rng.random() < FAR_SHARE else int(math.exp(rng.uniform(0.0, math.log(room + 1)))) - 1
    )
    offsets = sorted(rng.randint(0, total) for _ in cuts[1:])  # a random split of the whole skip over the cuts
    positions = torch.arange(length)
    for cut, before, after in zip(cuts, [0, *offsets], [*offsets, total]):
        positions[cut:] += after - before
    return positions
