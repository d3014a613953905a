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
from lcconvert.runtime.sidecar import PAGE, KVConfig
from lcconvert.runtime.spec import ModelSpec

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's and the CPU allocator's refusals."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MESSAGES)


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
            with suppress(OSError):  # then the peak is that of the process's life
                Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
            return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def kv_bytes_of(engine: Engine, seq: Sequence) -> int:
    """Bytes that `seq` really holds: its full pages and its two exact ends, in the engine's own dtype."""
    pool = engine.pool
    page = pool.bytes / pool.capacity if pool.capacity else 0
    ends = sum(t.nbytes for t in (seq.sink_k, seq.sink_v, seq.tail_k, seq.tail_v))
    return int(len(seq.pages) * page + ends)


def kv_bytes_formula(spec: ModelSpec, kv: KVConfig) -> float:
    """Bytes a token takes in full pages by the storage formats' definition, with 2-byte values where unquantized.

    An fp32 CPU run stores `bf16` pages in 4 bytes; this is the number a 16-bit engine has, so that schemes compare.
    """
    d = spec.head_dim
    k = {"bf16": 2 * d, "fp8": d, "k8v4": d, "int4": d / 2 + 4 * d / PAGE}  # int4 K: fp16 scale and zero a page channel
    v = {"bf16": 2 * d, "fp8": d, "k8v4": d / 2 + 4, "int4": d / 2 + 4}  # int4 V: fp16 scale and zero a token
    return spec.num_layers * spec.num_kv_heads * (k[kv.scheme] + v[kv.scheme])
