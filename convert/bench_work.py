"""What a prefill and a decoded token must compute and move, by arithmetic: the floors measured times stand beside.

FLOPs count a multiplication and an addition each, and only useful ones: a listed key block counts whole, the diagonal
one as half. Bytes are those that must cross the memory bus once. Left out: norms, rotation and activations, which a
perfect machine would hide; they are the measured part `other`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcconvert.runtime.sidecar import PAGE, AttentionPolicy
from lcconvert.runtime.spec import ModelSpec


@dataclass(frozen=True)
class Work:
    """Of one part: floating-point operations, and bytes that cross the device's memory bus."""

    flops: float = 0.0
    bytes: float = 0.0


def tiles_of(context: int) -> int:
    """Query tiles, and key blocks, of `context` tokens; tile i (from 0) has i + 1 causal blocks."""
    return -(-context // PAGE)


def capped_blocks(tiles: int, cap: int) -> int:
    """Sum over the tiles of min(causal blocks, cap)."""
    full = min(tiles, cap)
    return full * (full + 1) // 2 + (tiles - full) * cap


def cap_for_density(context: int, density: float) -> int:
    """The cap of blocks a row whose capped_blocks come nearest to `density` of all causal blocks; at least 1."""
    tiles = tiles_of(context)
    wanted = density * capped_blocks(tiles, tiles)
    low, high = 1, tiles  # the first cap that reaches `wanted`
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if capped_blocks(tiles, middle) >= wanted else (middle + 1, high)
    below = max(1, low - 1)
    return below if wanted - capped_blocks(tiles, below) < capped_blocks(tiles, low) - wanted else low


def fixed_density_policy(context: int, density: float) -> AttentionPolicy:
    """hybrid, with every sparse row cut to one length: `density` of the causal blocks at `context` tokens.

    Random weights have no distant blocks worth choosing by a threshold, so floor and cap are the same number. The sinks
    and local blocks are inside it, the dense rows at the end come on top.
    """
    cap = cap_for_density(context, density)
    return AttentionPolicy(kind="hybrid", min_blocks=cap, max_blocks=cap)


def sparse_tiles(context: int, policy: AttentionPolicy) -> int:
    """Query tiles before the dense end, of `context` tokens that are long enough to be sparse at all."""
    if policy.kind != "hybrid":
        return 0
    return max(0, (context - policy.dense_last) // PAGE)


def prefill_work(
    spec: ModelSpec, context: int, policy: AttentionPolicy, *, listed: int, itemsize: int, packed: float
) -> dict[str, Work]:
    """The work of each part of a prefill of `context` tokens, of which only the last one passes the last layer whole.

    listed: key blocks attended, over tiles, heads and layers, the last layer's single row counted as a tile.
    itemsize: bytes of a K or V value before it is packed. packed: bytes of a token in the cache.
    """
    layers, heads, tiles = spec.num_layers - 1, spec.num_heads, tiles_of(context)  # layers that pass all rows
    key_value = 2 * spec.hidden_size * 2 * spec.kv_size
    rest = 2 * spec.hidden_size * (2 * spec.q_size + 3 * spec.intermediate_size)
    head = 2 * spec.hidden_size * spec.vocab_size
    block, last_row = 4 * PAGE * PAGE * spec.head_dim, 4 * heads * spec.head_dim * context
    scored = sparse_tiles(context, policy)
    pooled = (PAGE // policy.pool) * scored * (scored - 1) // 2  # pooled keys before the diagonal, over the tiles
    return {
        "gemm": Work(flops=(layers + 1) * context * key_value + (layers * context + 1) * rest + head),
        "attention": Work(flops=block * (listed - heads * tiles - layers * heads * tiles / 2) + last_row),
        "selection": Work(flops=layers * heads * 2 * spec.head_dim * PAGE * pooled),
        "quantize": Work(bytes=context * (spec.kv_values_per_token * itemsize + packed)),
    }


def decode_bytes(
    spec: ModelSpec, context: int, *, weights: int, kv: float, itemsize: int, pages: int | None, bounds: float
) -> float:
    """Bytes one decoded token must read: `weights`, the two exact ends, and full pages.

    kv: bytes of a token in full pages. pages: full pages that are read, None for all. bounds: bytes a token of the scan
    that chooses them, nothing when all are read.
    """
    full = max(0, context - PAGE) // PAGE
    exact = min(context, PAGE) + max(0, context - PAGE) % PAGE
    read = full if pages is None else min(full, pages)
    scan = 0.0 if pages is None else full * PAGE * bounds
    return weights + exact * spec.kv_values_per_token * itemsize + read * PAGE * kv + scan
