"""What a context takes in a model that compresses its keys and values: DeepSeek-V4, planned from config.json alone.

Three kinds of layers (by `layer_types`, or `compress_ratios` in the configs as published): a sliding window only; the
window and one entry for every few tokens, of which an indexer picks (so each entry has an index key too); the window
and one entry for every 128 tokens. An entry serves as key and value of all heads. Left out: the few tokens that wait to
be compressed, and weights, which `inspect` reads from the tensor table.

This decoder does not run such models; their own window is 1M, so there is nothing to extend either.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.spec import positive

ARCHITECTURE = "DeepseekV4ForCausalLM"
_KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
_VALUE = 2  # bytes, 16 bit


def compressed_kv(config: dict[str, Any], context: int) -> dict[str, Any]:
    """Layers of each kind, and bytes in 16 bit of their entries at `context` tokens; UserError names a faulty field."""
    layers, width, index, window = (
        positive(config, key) for key in ("num_hidden_layers", "head_dim", "index_head_dim", "sliding_window")
    )
    kinds = Counter(_layer_types(config, layers))
    rates = {kind: rate for rate, kind in _KINDS.items() if rate} | (config.get("compress_rates") or {})
    sparse, heavy = (kinds[kind] * -(-context // rates[kind]) for kind in (_KINDS[4], _KINDS[128]))
    parts = {
        "window": layers * min(window, context) * width * _VALUE,
        "compressed_sparse": sparse * width * _VALUE,
        "index": sparse * index * _VALUE,
        "heavily_compressed": heavy * width * _VALUE,
    }
    return {"layers": dict(kinds), "kv_bytes": parts, "kv_total": sum(parts.values())}


def _layer_types(config: dict[str, Any], layers: int) -> list[str]:
    if (types := config.get("layer_types")) is None:
        ratios = config.get("compress_ratios")
        if not isinstance(ratios, list) or any(ratio not in _KINDS for ratio in ratios):
            raise UserError(f"config.json: compress_ratios is {ratios!r}, expected 0, 4 or 128 for each layer")
        types = [_KINDS[ratio] for ratio in ratios[:layers]]  # the next-token head behind the layers has one too
    if not isinstance(types, list) or len(types) != layers or any(kind not in _KINDS.values() for kind in types):
        raise UserError(f"config.json: layer_types is {types!r}, expected {layers} of {', '.join(_KINDS.values())}")
    return types
