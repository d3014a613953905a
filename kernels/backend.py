"""Decides, in one place, whether a kernel runs as Triton or as the plain PyTorch function beside it.

Every public kernel has both forms with one signature and asks `use_triton` which to run. CUDA tensors take Triton when
it is installed; CPU tensors take PyTorch. Triton's interpreter can run on CPU tensors but only checks kernels, so it
runs when a test forces it. Without Triton (macOS, Windows) the modules still import: `jit` then leaves functions alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal

import torch

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    triton = None
    tl = None
    TensorDescriptor = None

try:
    from triton.experimental.gluon.language.nvidia import hopper as gluon
except ImportError:
    gluon = None

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def jit(*varying: str) -> Callable[..., Any]:
    """Decorator of a Triton function. `varying` integers change from call to call: the compiled code serves all values.

    (Triton otherwise compiles anew for 1 and for multiples of 16, seconds each, in the middle of a request.)
    """
    return triton.jit(do_not_specialize=list(varying)) if triton is not None else lambda function: function


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


def use_hopper(tensor: torch.Tensor) -> bool:
    """Whether a kernel that would run as Triton runs in the form written for Hopper in Gluon, where it has one."""
    return gluon is not None and tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] == 9


def dot_dtype(tensor: torch.Tensor) -> Any:
    """The Triton type matrix products of this tensor's values run in, or None where only PyTorch should do them.

    Float32 products on a GPU would need other tile sizes for no user; the interpreter multiplies bfloat16 wrongly.
    """
    if interpreted:
        return tl.float16 if tensor.dtype == torch.float16 else tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(tensor.dtype)


def descriptor(x: torch.Tensor, block: list[int]) -> Any:
    """A tensor-memory descriptor of x [T, heads, D] seen as [T, heads * D], read and written in `block` pieces.

    Reads past the end are zeros and writes past it are dropped. Offsets are 64-bit in hardware.
    """
    rows, heads, d = x.shape
    assert x.stride(2) == 1
    assert x.stride(1) == d or heads == 1, f"heads must be adjacent, strides {x.stride()}"
    assert x.data_ptr() % 16 == 0
    assert x.stride(0) * x.element_size() % 16 == 0, f"rows must start on 16 bytes, strides {x.stride()}"
    return TensorDescriptor(x, [rows, heads * d], [x.stride(0), 1], block)


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 2 under the interpreter, so that work is still split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
