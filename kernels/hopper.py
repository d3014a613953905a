"""What the kernels in Gluon, Triton's dialect that names each warp's work, share: copies by the tensor memory unit.

Only for Hopper; `backend.use_hopper` decides. Import this, and the modules built on it, after asking.
"""

# mypy: allow-untyped-defs
# Triton functions take pointers and compile-time constants, which have no Python types.

from __future__ import annotations

from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Renamed after Triton 3.6.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
put = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}


def gluon_descriptor(x: torch.Tensor, rows: int) -> Any:
    """A descriptor of x [T, heads, D] seen as [T, heads * D], in pieces [rows, D]; reads past the end are zeros."""
    length, heads, d = x.shape
    assert x.stride(2) == 1
    assert x.stride(1) == d or heads == 1, f"heads must be adjacent, strides {x.stride()}"
    layout = gl.NVMMASharedLayout.get_default_for([rows, d], _TYPES[x.dtype])
    return TensorDescriptor(x, [length, heads * d], [x.stride(0), 1], [rows, d], layout)
