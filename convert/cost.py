"""What a context costs: peak memory, KV bytes, and telling "out of memory" from other failures.

On a GPU the peak is what PyTorch allocated on the device. On a CPU it is the resident memory of the whole process,
weights and libraries included, reset before each context where Linux allows it (/proc/self/clear_refs).
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from lcconvert.runtime.engine import Engine
from lcconvert.runtime.kv_cache import Sequence

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's and the CPU allocator's refusals."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MESSAGES)


def estimated_seconds(measured: tuple[int, float] | None, length: int) -> float:
    """What a context of `length` tokens may take, from (tokens, seconds) of another; 0 when none was measured.

    The truth lies between linear and quadratic in the length; quadratic is the cautious guess.
    """
    return measured[1] * (length / measured[0]) ** 2 if measured else 0.0


def synchronize(device: torch.device) -> None:
    """Waits for the GPU, so that a clock read after it is true; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak bytes since the block was entered."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak_resident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_resident()


def reset_peak_resident() -> None:
    """Starts the peak of resident memory anew; where the system does not allow it, the peak is the process's life's."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """Largest resident memory of this process in bytes since the last reset."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def kv_bytes_of(engine: Engine, seq: Sequence) -> int:
    """Bytes that `seq` really holds: its full pages and its two exact ends, in the engine's own dtype."""
    pool = engine.pool
    page = pool.bytes / pool.capacity if pool.capacity else 0
    exact = pool.exact_bytes / len(pool.exact_k[0].data)
    return int(len(seq.pages) * page + 2 * exact)
