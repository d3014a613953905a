"""The memory a context needs, predicted from shapes before anything is loaded, and the prefill that fits a card.

Counts what PyTorch will have allocated at the peak of a prefill of the whole context, batch 1: weights, KV pages, one
layer's exact K and V, hidden states, rotary tables, one layer's expanded weights and the widest moment of one chunk.
Decode needs less. Left out: the CUDA context (about 0.5 GB) and fragmentation, for which 3% of the card is kept free.
Bytes; a gigabyte is 10^9 as cards are sold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from lcconvert.kernels.select_blocks import SCORES
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.kv_cache import EXACT_PAGES
from lcconvert.runtime.linear import Fp8Linear, LinearFormat, QuantLayout
from lcconvert.runtime.model import Decoder
from lcconvert.runtime.prefill import MLP_ROWS
from lcconvert.runtime.products import Gemm
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy, KVConfig
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.units import format_bytes, format_count

_KEPT_FREE = 0.03  # of the card
_LIBRARIES = 2**27  # workspaces that cuBLAS keeps, 32 MB for every stream that multiplies
# Prefill rows and whether hidden states live in host memory, the fastest first.
_WAYS = ((16_384, False), (8_192, False), (16_384, True), (8_192, True), (4_096, True))
# bytes a value takes in full pages, for head size D: codes plus fp16 scale and zero point per 128 (K) or D (V) values
_KV_BYTES = {
    "bf16": lambda dim: (2.0, 2.0),
    "fp8": lambda dim: (1.0, 1.0),
    "int4": lambda dim: (0.5 + 4 / PAGE, 0.5 + 4 / dim),
    "k8v4": lambda dim: (1.0, 0.5 + 4 / dim),
}
VARIANTS: dict[str, tuple[str, Gemm]] = {
    "16-bit": ("bf16", "16-bit"),
    "pro": ("fp8", "16-bit"),
    "flash": ("int4", "fp8"),
}

PARTS = ("weights", "kv_pages", "layer_kv", "hidden", "tables", "expanded", "chunk", "libraries")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of prefilling `context` tokens, and how that prefill is cut."""

    kv_scheme: str
    context: int
    chunk_rows: int
    offload: bool
    weights: int
    kv_pages: int
    layer_kv: int
    hidden: int
    tables: int
    expanded: int
    chunk: int
    libraries: int
    host_pinned: int
    gpu_bytes: int
    longest: int = 0  # the largest context that fits `gpu_bytes`; only looked for when `context` does not

    @property
    def total(self) -> int:
        """GPU bytes."""
        return sum(getattr(self, name) for name in PARTS)

    @property
    def fits(self) -> bool:
        return self.total <= self.gpu_bytes * (1 - _KEPT_FREE)

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"total": self.total, "fits": self.fits}

    def check(self, name: str) -> None:
        """UserError when it does not fit."""
        if not self.fits:
            raise UserError(
                f"{name} at {format_count(self.context)} tokens needs {format_bytes(self.total)} of GPU memory "
                f"({format_bytes(self.weights)} weights, {format_bytes(self.kv_pages)} KV cache as {self.kv_scheme}), "
                f"{format_bytes(self.gpu_bytes)} are free; the largest context that fits is "
                f"{format_count(self.longest)}, ask for no more than that"
            )


@dataclass(frozen=True)
class Stored:
    """Bytes of a model as it lies on the GPU, of one layer's expanded weights, and of an activation value."""

    weights: int
    expanded: int
    element: int = 2


def kv_bytes_per_token(spec: ModelSpec, scheme: str) -> float:
    """Bytes one token takes in full pages over all layers."""
    return spec.kv_values_per_token * sum(_KV_BYTES[scheme](spec.head_dim)) / 2


def plan_memory(
    spec: ModelSpec,
    stored: Stored,
    context: int,
    *,
    scheme: str,
    policy: AttentionPolicy,
    gemm: Gemm,
    gpu_bytes: int,
) -> MemoryPlan:
    """The fastest way to prefill `context` tokens that fits, or the leanest with `longest` filled in."""
    for way in _WAYS:
        plan = _plan(spec, stored, context, scheme, policy, gemm, gpu_bytes, *way)
        if plan.fits:
            return plan
    low, high = 0, -(-context // PAGE)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _plan(spec, stored, middle * PAGE, scheme, policy, gemm, gpu_bytes, *_WAYS[-1]).fits
        low, high = (middle, high) if fits else (low, middle - 1)
    return replace(plan, longest=low * PAGE)


def plan_variant(spec: ModelSpec, variant: str, context: int, gpu_bytes: int) -> MemoryPlan:
    """The plan of a 16-bit checkpoint's "16-bit", "pro" or "flash" variant with that variant's default policy."""
    scheme, gemm = VARIANTS[variant]
    policy = AttentionPolicy(kind="hybrid" if variant == "flash" else "dense")
    stored = stored_as(spec, variant_layout(spec, variant), gemm)
    return plan_memory(spec, stored, context, scheme=scheme, policy=policy, gemm=gemm, gpu_bytes=gpu_bytes)


def longest_context(spec: ModelSpec, variant: str, gpu_bytes: int) -> int:
    """The largest multiple of the page whose plan fits into `gpu_bytes`; 0 when the weights alone do not."""
    plan = plan_variant(spec, variant, 2**34, gpu_bytes)
    return plan.context if plan.fits else plan.longest


def plan_for_source(
    source: TensorSource,
    kv: KVConfig,
    policy: AttentionPolicy,
    context: int,
    *,
    gemm: Gemm,
    dtype: torch.dtype,
    gpu_bytes: int,
) -> MemoryPlan:
    """The plan of a checkpoint as it is stored; reads no tensor."""
    spec = ModelSpec.from_config(source.config)
    stored = stored_as(spec, QuantLayout.from_config(source.config), gemm, dtype)
    return plan_memory(spec, stored, context, scheme=kv.scheme, policy=policy, gemm=gemm, gpu_bytes=gpu_bytes)


def variant_layout(spec: ModelSpec, variant: str) -> QuantLayout:
    """How the layers of a variant are stored by default: int4 by the largest group that divides, fp8, or plain.

    UserError when no int4 group divides the widths of the layers.
    """
    if variant == "16-bit":
        return QuantLayout()
    form = LinearFormat("fp8")
    if variant == "flash":
        inner = {
            spec.expert_size if number in spec.routed else spec.intermediate_size for number in range(spec.num_layers)
        }
        widths = sorted({spec.hidden_size, spec.q_size, *inner})
        group = next((g for g in (128, 64, 32) if not any(width % g for width in widths)), None)
        if group is None:
            raise UserError(
                f"no int4 group of 128, 64 or 32 divides the layer widths {', '.join(map(str, widths))}, so there is "
                "no flash variant; use pro"
            )
        form = LinearFormat("int4", group)
    return QuantLayout(((("Linear",), form),), ignore=("lm_head",))


def stored_as(spec: ModelSpec, layout: QuantLayout, gemm: Gemm, dtype: torch.dtype = torch.bfloat16) -> Stored:
    """Bytes of a model of this layout; the scales of packed weights are 16 bit on disk and on the GPU."""
    with torch.device("meta"):
        decoder = Decoder(spec, layout)
    sizes = {}
    for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
        item = 2 if name.endswith("weight_scale") else tensor.dtype.itemsize
        sizes[name] = tensor.numel() * (dtype.itemsize if isinstance(tensor, torch.nn.Parameter) else item)
    first = (part for part in decoder.named_buffers() if part[0].startswith("model.layers.0."))
    packed = sum(t.numel() for n, t in first if n.endswith("weight_packed") and ".experts." not in n)
    wide = 1 if gemm == "fp8" else dtype.itemsize
    exact = (m for m in decoder.layers[0].modules() if isinstance(m, Fp8Linear) and m.exact_inputs)
    widened = sum(m.weight.numel() for m in exact) * (4 + dtype.itemsize)  # float32 on the way
    return Stored(sum(sizes.values()), 8 * packed * wide + widened, dtype.itemsize)


def _plan(
    spec: ModelSpec,
    stored: Stored,
    context: int,
    scheme: str,
    policy: AttentionPolicy,
    gemm: Gemm,
    gpu_bytes: int,
    rows: int,
    offload: bool,
) -> MemoryPlan:
    rows = min(rows, context)
    page = PAGE * kv_bytes_per_token(spec, scheme)
    exact = EXACT_PAGES * PAGE * spec.kv_values_per_token * stored.element
    states = context * spec.hidden_size * stored.element
    pinned = 1 << (states - 1).bit_length() if offload else 0  # PyTorch rounds pinned memory up to a power of two
    return MemoryPlan(
        kv_scheme=scheme,
        context=context,
        chunk_rows=rows if rows < context else -(-rows // PAGE) * PAGE,
        offload=offload,
        weights=stored.weights,
        kv_pages=int(-(-context // PAGE) * page + exact),
        layer_kv=2 * context * spec.kv_size * stored.element,
        hidden=3 * rows * spec.hidden_size * stored.element if offload else states,
        tables=context * (len(spec.ropes) * 2 * 4 * spec.head_dim // 2 + 8),
        expanded=stored.expanded,
        chunk=_widest_moment(spec, stored.element, context, scheme, policy, gemm, rows),
        libraries=_LIBRARIES,
        host_pinned=pinned,
        gpu_bytes=gpu_bytes,
    )


def _widest_moment(
    spec: ModelSpec, element: int, context: int, scheme: str, policy: AttentionPolicy, gemm: Gemm, rows: int
) -> int:
    """Most bytes of temporaries a chunk of `rows` holds at once, the hidden states themselves not counted."""
    narrow = 1 if gemm == "fp8" else element  # bytes of a product's input
    queries, states = rows * spec.q_size * element, rows * spec.hidden_size * element
    pooled = selecting = listed = 0
    if policy.kind == "hybrid":
        pooled = context // policy.pool * spec.kv_size * element
        blocks = -(-context // PAGE)
        listed = 4 * spec.num_heads * -(-rows // PAGE) * blocks
        tiles = min(-(-rows // PAGE), max(1, SCORES // (spec.num_heads * blocks)))  # scored at once
        selecting = 4 * spec.num_heads * tiles * blocks
    inner, block = min(rows, MLP_ROWS) * spec.inner_size, min(rows, MLP_ROWS) * spec.hidden_size
    taken = rows * spec.q_size * narrow if narrow < element else 0
    moments = (
        rows * spec.hidden_size * narrow + queries,
        queries + listed + selecting,
        2 * queries + listed,
        2 * queries + taken + states,
        states + block * narrow + 2 * inner * element + inner * narrow,
    )
    return max(pooled + max(moments), _storing(spec, element, context, scheme))


def _storing(spec: ModelSpec, element: int, context: int, scheme: str) -> int:
    """Temporaries of quantizing one layer's K or V, the wider of the two: the codes before they go to their pages, and
    for 8 bits a float32 copy of a part."""
    values = context * spec.kv_size
    k_bytes, v_bytes = _KV_BYTES[scheme](spec.head_dim)
    if scheme == "bf16":
        return values * element
    part = 3 * 4 * min(values, 2**25) if scheme in ("fp8", "k8v4") else 0
    return int(values * max(k_bytes, v_bytes)) + part
