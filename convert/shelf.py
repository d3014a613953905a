"""Where tensors wait between a forward and a backward pass: on the device, or in host memory, copied beside the work.

At 256K tokens the inputs of an 8B model's layers are 69 GB. A layer takes a second there and its input two gigabytes,
so a copy over PCIe each way, on a stream of its own, is never waited for. On a CPU everything works alike, without
streams.

Surprising rule: memory is given back in the order of the compute stream, which waits for the copy, instead of by
`record_stream`: with that, a CPU that runs ahead of the GPU finds no block free and allocates another one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.units import format_bytes

_SMALL = 2**16  # bytes; not worth a copy
_FLYING = 12  # tensors whose copies may be on their way to the host


@dataclass
class Kept:
    """A tensor on the shelf, as a flat one: `here` on the device, `host` in page-locked bytes, or both for a while."""

    dtype: torch.dtype
    here: torch.Tensor | None
    host: torch.Tensor | None = None
    arrived: torch.cuda.Event | None = None


class Shelf:
    """Tensors of one device. Host buffers are kept for the next step; `close` gives them back."""

    def __init__(self, device: torch.device):
        self.device = device
        self.host_bytes = 0
        self._free: dict[int, list[torch.Tensor]] = {}
        self._locked: list[torch.Tensor] = []
        self._flying: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, tensor: torch.Tensor, *, on_host: bool) -> Kept:
        """Keeps `tensor`, which has no gaps and which nobody may change from now on, as its values lie in memory."""
        flat = tensor.detach().as_strided((tensor.numel(),), (1,))
        if not on_host or flat.nbytes < _SMALL:
            return Kept(flat.dtype, flat)
        host = self._buffer(flat.nbytes)
        if self._side is None:
            host.copy_(flat.view(torch.uint8))
        else:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._side):
                host.copy_(flat.view(torch.uint8), non_blocking=True)
                self._flying.append((flat, self._side.record_event()))
            self._land(_FLYING)
        return Kept(flat.dtype, None, host)

    def fetch(self, kept: Kept) -> None:
        """Starts the copy back; the work queued before this call may go on beside it."""
        if kept.here is not None or kept.host is None:
            return
        self._land(0)
        here = torch.empty(kept.host.shape, dtype=torch.uint8, device=self.device)
        if self._side is None:
            here.copy_(kept.host)
        else:
            self._side.wait_stream(torch.cuda.current_stream(self.device))  # `here` may be memory still in use
            with torch.cuda.stream(self._side):
                here.copy_(kept.host, non_blocking=True)
                kept.arrived = self._side.record_event()
        self._free[kept.host.nbytes].append(kept.host)  # the next copy into it is behind this one, on the same stream
        kept.here, kept.host = here.view(kept.dtype), None

    def take(self, kept: Kept) -> torch.Tensor:
        """The flat tensor, on the device; `kept` goes on holding it."""
        self.fetch(kept)
        if kept.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.arrived)
            kept.arrived = None
        assert kept.here is not None
        return kept.here

    def reserve(self, count: int, nbytes: int) -> None:
        """Makes `count` host buffers of `nbytes` before a step needs them; locking pages takes a second for 5 GB."""
        buffers = self._free.setdefault(nbytes, [])
        while len(buffers) < count:
            buffers.append(self._lock(nbytes))

    def close(self) -> None:
        if self._side is not None:
            self._side.synchronize()
        for buffer in self._locked:
            unlock_pages(buffer)
        self._flying.clear()
        self._locked, self._free, self.host_bytes = [], {}, 0

    def _land(self, flying: int) -> None:
        """Lets go of tensors whose copies are through, and of all but so many others as soon as theirs will be."""
        while len(self._flying) > flying or (self._flying and self._flying[0][1].query()):
            torch.cuda.current_stream(self.device).wait_event(self._flying.popleft()[1])

    def _buffer(self, nbytes: int) -> torch.Tensor:
        buffers = self._free.setdefault(nbytes, [])
        return buffers.pop() if buffers else self._lock(nbytes)

    def _lock(self, nbytes: int) -> torch.Tensor:
        buffer = lock_pages(torch.zeros(nbytes, dtype=torch.uint8), self.device)
        self._locked.append(buffer)
        self.host_bytes += nbytes
        return buffer


def lock_pages(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`host` itself, its pages locked for copies beside the work of `device`; PyTorch's own pinned memory comes in
    powers of two. To be unlocked before it is freed."""
    if device.type == "cuda":
        error = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
        if int(error):
            raise UserError(
                f"{format_bytes(host.nbytes)} of host memory cannot be page-locked ({error}); give this process more "
                "host memory, or train shorter sequences"
            )
    return host


def unlock_pages(host: torch.Tensor) -> None:
    if host.is_pinned():
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(host.data_ptr()))


def without_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself where its values lie side by side in memory, in any order, else a copy of which that is true."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor if span == tensor.numel() else tensor.contiguous()
