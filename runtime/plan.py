"""The memory a context needs, predicted from shapes before anything is loaded.

Decimal gigabytes as cards are sold. Counts what grows: weights, KV pages, one layer's exact K and V, hidden states,
rotary tables, one chunk of activations. Left out: allocator fragmentation and the CUDA context (about 0.5 GB).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lcconvert.runtime.sidecar import PAGE
from lcconvert.runtime.spec import ModelSpec

GPU_CHUNK = 16_384
# bytes a value takes in full pages, for head size D: codes plus fp16 scale and zero point per 128 (K) or D (V) values
_KV_BYTES = {
    "bf16": lambda dim: 2.0,
    "fp8": lambda dim: 1.0,
    "int4": lambda dim: 0.5 + (4 / PAGE + 4 / dim) / 2,
    "k8v4": lambda dim: 0.75 + (4 / dim) / 2,
}
VARIANTS = {"16-bit": ("bf16", 16.0, 16.0), "pro": ("fp8", 8.0, 16.0), "flash": ("int4", 4.125, 16.0)}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the GPU while a prompt of `context` tokens is prefilled; decode needs less."""

    variant: str
    kv_scheme: str
    context: int
    weights: int
    kv_pages: int
    layer_kv: int
    hidden: int
    tables: int
    chunk: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_pages + self.layer_kv + self.hidden + self.tables + self.chunk

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"total": self.total}


def kv_bytes_per_token(spec: ModelSpec, scheme: str) -> float:
    """Bytes one token takes in full pages over all layers."""
    return spec.kv_values_per_token * _KV_BYTES[scheme](spec.head_dim)


def plan(spec: ModelSpec, variant: str, context: int) -> MemoryPlan:
    """The plan of `variant` ("16-bit", "pro" or "flash") at `context` tokens, batch 1, 16-bit activations."""
    scheme, linear_bits, other_bits = VARIANTS[variant]
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tied_head else 2)
    linear = spec.parameters() - embeddings
    chunk = min(context, GPU_CHUNK)
    return MemoryPlan(
        variant=variant,
        kv_scheme=scheme,
        context=context,
        weights=int(linear * linear_bits / 8 + embeddings * other_bits / 8),
        kv_pages=int(kv_bytes_per_token(spec, scheme) * context),
        layer_kv=2 * 2 * context * spec.kv_size,
        hidden=2 * context * spec.hidden_size,
        tables=2 * 4 * context * spec.head_dim // 2,
        chunk=2 * chunk * (3 * spec.hidden_size + 2 * spec.q_size + 3 * spec.intermediate_size),
    )


def longest_context(spec: ModelSpec, variant: str, gpu_bytes: int) -> int:
    """The largest multiple of the page whose plan fits into `gpu_bytes`; 0 when the weights alone do not."""
    low, high = 0, 2**34 // PAGE
    while low < high:
        middle = (low + high + 1) // 2
        if plan(spec, variant, middle * PAGE).total <= gpu_bytes:
            low = middle
        else:
            high = middle - 1
    return low * PAGE
