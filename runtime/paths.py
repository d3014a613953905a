"""Which parts of a model run by kernels and which by plain PyTorch: decided here, told by `inspect`.

A feature without a kernel costs speed, never exactness.
"""

from __future__ import annotations

from lcconvert.runtime.spec import ModelSpec

KERNEL_DIMS = (32, 64, 128)  # head sizes the decode kernels take


def fixed_step(spec: ModelSpec) -> bool:
    """Whether a decode step on a GPU is always the same list of operations, so that it can be one CUDA graph."""
    return spec.head_dim in KERNEL_DIMS and not spec.routed


def plain_parts(spec: ModelSpec) -> list[str]:
    """What runs without a kernel of its own, in words, empty for Llama and Qwen."""
    found = []
    if spec.windowed:
        found.append(
            f"{len(spec.windowed)} of {spec.num_layers} layers see {spec.window} tokens: PyTorch attention over the "
            "window; their KV pages are kept for the whole context"
        )
    if spec.sinks:
        found.append("sinks in attention: prefill always dense, in PyTorch")
    if spec.head_dim not in KERNEL_DIMS:
        found.append(f"head size {spec.head_dim}: decode attention by PyTorch, without a CUDA graph")
    if spec.routed:
        found.append(
            f"{spec.num_experts} experts in {len(spec.routed)} of {spec.num_layers} layers, {spec.experts_per_token} a "
            "token: one after the other, decode without a CUDA graph"
        )
    if spec.qk_norm_whole:
        found.append("norms of q and k over all heads: a pass of their own")
    if spec.activation != "silu":
        found.append(f"{spec.activation} in the MLP: PyTorch")
    return found
