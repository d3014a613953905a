"""Where a prefill's time goes, part by part, and how much of the causal attention it computed.

On a GPU each part is bracketed by two events and nothing waits until `seconds` is read, so a timed prefill is as fast
as an untimed one. What lies between parts is `other`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from lcconvert.kernels.sparse_prefill import BlockLists


class PartTimer:
    """Collects the parts of everything that runs between `start` and `stop`. One prefill at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._parts: dict[str, list[tuple[object, object]]] = defaultdict(list)
        self._beside: dict[str, list[tuple[object, object]]] = defaultdict(list)
        self._whole: tuple[object, object] | None = None
        self._begin: object = None
        self._listed = torch.zeros((), dtype=torch.int64, device=device)  # blocks attended
        self._causal = 0  # blocks a dense policy attends

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> None:
        self._whole = (self._begin, self._now())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._parts[name].append((begin, self._now()))

    @contextmanager
    def beside(self, name: str, stream: torch.cuda.Stream) -> Iterator[None]:
        """Work on another stream of the GPU: reported, but no part of the total, which it overlaps."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        yield
        end.record(stream)
        self._beside[name].append((begin, end))

    def count(self, blocks: BlockLists | None, tiles: int, heads: int, first: int) -> None:
        """A chunk of `tiles` query tiles whose diagonal blocks are `first`.. was attended; None: densely."""
        causal = heads * (tiles * first + tiles * (tiles + 1) // 2)
        self._causal += causal
        self._listed += causal if blocks is None else blocks.count.sum(dtype=torch.int64)

    @property
    def listed_blocks(self) -> int:
        """Attended key blocks over all query tiles, query heads and layers; the diagonal counts as one."""
        return int(self._listed)

    def density(self) -> float:
        """Attended blocks as a share of all causal blocks; 1.0 for a dense policy."""
        return self.listed_blocks / self._causal if self._causal else 1.0

    def seconds(self) -> dict[str, float]:
        """Seconds a part, plus `other`, `total`, and what ran beside. Waits for the device."""
        if self._whole is None:
            return {}
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parts, beside = (
            {name: sum(self._span(*pair) for pair in pairs) for name, pairs in group.items()}
            for group in (self._parts, self._beside)
        )
        total = self._span(*self._whole)
        return parts | {"other": max(total - sum(parts.values()), 0.0), "total": total} | beside

    def _now(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _span(begin: object, end: object) -> float:
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        assert isinstance(begin, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        return begin.elapsed_time(end) / 1000


def part(timer: PartTimer | None, name: str) -> AbstractContextManager[None]:
    """The part `name` of `timer`, or nothing without one."""
    return nullcontext() if timer is None else timer.part(name)
