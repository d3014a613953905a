"""PoSE positions, by property: strictly increasing, inside the context, consecutive in chunks, cut only at borders."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcconvert.convert.pose import pose_positions


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 300),
    extra=st.integers(0, 2**20),
    max_chunks=st.integers(1, 16),
    borders=st.lists(st.integers(-3, 320), max_size=40),
    seed=st.integers(0, 2**32),
)
def test_properties(length: int, extra: int, max_chunks: int, borders: list[int], seed: int) -> None:
    context = length + extra
    positions = pose_positions(length, borders, context, max_chunks, random.Random(seed))
    assert positions.shape == (length,)
    assert positions.dtype == torch.int64
    assert positions[0] == 0
    assert positions[-1] < context
    steps = positions.diff()
    assert (steps >= 1).all()
    jumps = (steps > 1).nonzero()[:, 0] + 1
    assert set(jumps.tolist()) <= set(borders)
    assert len(jumps) <= max_chunks - 1
    again = pose_positions(length, borders, context, max_chunks, random.Random(seed))
    assert torch.equal(positions, again)


def test_spans_reach_far_and_near() -> None:
    """The skips are weighted to the far end, and short spans are still met."""
    rng = random.Random(0)
    spans = [int(pose_positions(64, range(0, 64, 4), 2**20, 8, rng)[-1]) for _ in range(500)]
    assert sum(span > 2**19 for span in spans) > 0.25 * len(spans)
    assert sum(span < 2**16 for span in spans) > 0.25 * len(spans)
    assert max(spans) > 0.95 * 2**20


def test_uses_up_to_the_chunks_asked() -> None:
    rng = random.Random(0)
    cuts = [int((pose_positions(256, range(256), 2**20, 16, rng).diff() > 1).sum()) for _ in range(200)]
    assert max(cuts) >= 14
