"""The hidden states of a whole prompt between two layers: on the GPU, or in pinned host memory streamed through it.

A layer reads every row twice and writes it once. From the host that is three copies of the states a layer, which a
layer's arithmetic hides at long context: the next chunk is fetched and the last one returned while this one computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from lcconvert.runtime.timing import PartTimer

_BUFFERS = 3  # device chunks in flight: one coming, one computing, one leaving

Chunk = tuple[int, int]  # rows [begin, end)


class HiddenStates:
    """States [T, H] that a caller visits chunk by chunk and may change in place."""

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        chunk: int,
        offload: bool,
        timer: PartTimer | None = None,
    ):
        self.offload, self._timer = offload, timer
        if not offload:
            self._rows = torch.empty(rows, width, dtype=dtype, device=device)
            return
        self._rows = torch.empty(rows, width, dtype=dtype, pin_memory=True)
        self._buffers = [torch.empty(chunk, width, dtype=dtype, device=device) for _ in range(_BUFFERS)]
        self._ready = [torch.cuda.Event() for _ in range(_BUFFERS)]
        self._free = [torch.cuda.Event() for _ in range(_BUFFERS)]
        self._fetching, self._returning = torch.cuda.Stream(device), torch.cuda.Stream(device)

    @property
    def pinned_bytes(self) -> int:
        return self._rows.nbytes if self.offload else 0

    def fill(self, chunks: list[Chunk], make: Callable[[int, int], torch.Tensor]) -> None:
        """Writes make(begin, end) [end - begin, H] into every chunk."""
        for begin, end in chunks:
            self._rows[begin:end].copy_(make(begin, end))

    def chunks(self, chunks: list[Chunk], *, write: bool) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields (begin, end, states [end - begin, H] on the device); with `write` their changes are kept."""
        if not self.offload:
            for begin, end in chunks:
                yield begin, end, self._rows[begin:end]
            return
        computing = torch.cuda.current_stream()
        for event in self._free:
            event.record(computing)
        self._fetching.wait_stream(self._returning)
        self._fetch(0, chunks[0])
        for number, (begin, end) in enumerate(chunks):
            if number + 1 < len(chunks):
                self._fetch(number + 1, chunks[number + 1])
            slot = number % _BUFFERS
            computing.wait_event(self._ready[slot])
            states = self._buffers[slot][: end - begin]
            yield begin, end, states
            self._free[slot].record(computing)
            if write:
                with torch.cuda.stream(self._returning):
                    self._returning.wait_event(self._free[slot])
                    with self._timed(self._returning):
                        self._rows[begin:end].copy_(states, non_blocking=True)
                    self._free[slot].record(self._returning)

    def _fetch(self, number: int, chunk: Chunk) -> None:
        begin, end = chunk
        slot = number % _BUFFERS
        with torch.cuda.stream(self._fetching):
            self._fetching.wait_event(self._free[slot])
            with self._timed(self._fetching):
                self._buffers[slot][: end - begin].copy_(self._rows[begin:end], non_blocking=True)
            self._ready[slot].record(self._fetching)

    def _timed(self, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
        return nullcontext() if self._timer is None else self._timer.beside("copies", stream)

    def row(self, index: int) -> torch.Tensor:
        """One row as [1, H] on the device."""
        if not self.offload:
            return self._rows[index : index + 1]
        self._returning.synchronize()
        return self._rows[index : index + 1].to(self._buffers[0].device)

    def all(self) -> torch.Tensor:
        """Every row [T, H]; only where they are on the device."""
        assert not self.offload
        return self._rows

    def close(self) -> None:
        """Waits for copies under way, so that buffers can be reused for something else."""
        if self.offload:
            self._fetching.synchronize()
            self._returning.synchronize()
