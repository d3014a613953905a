"""Decides, in one place, whether a kernel runs as Triton or as the plain PyTorch function beside it.

Every public kernel has both forms with one signature and asks `use_triton` which to run. CUDA tensors take Triton when
it is installed; CPU tensors take PyTorch. Triton's interpreter can run on CPU tensors but is only a checking tool, so it
runs when a test forces it. Without Triton (macOS, Windows) the modules still import: `jit` then leaves functions alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = None

jit: Callable[..., Any] = triton.jit if triton is not None else lambda function: function
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

_forced: Literal["torch", "triton"] | None = None


@contextmanager
def force(choice: Literal["torch", "triton"] | None) -> Iterator[None]:
    """Within the block every kernel runs as `choice`, wherever its tensors are; None restores the automatic choice."""
    global _forced
    previous, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = previous


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether kernels on this tensor's device run as Triton.

    Raises RuntimeError when Triton is forced where it cannot run: not installed, or on a CPU tensor not interpreted.
    """
    if _forced == "triton":
        if triton is None or not (tensor.is_cuda or interpreted):
            raise RuntimeError("Triton was forced but needs a CUDA tensor, or TRITON_INTERPRET=1 set before import")
        return True
    return _forced is None and triton is not None and tensor.is_cuda
