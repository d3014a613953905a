"""What GGUF calls the tensors of a decoder and how it orders their rows: one table, read in both directions.

Surprising rule: llama.cpp's `llama` architecture rotates neighbouring channels, HF rotates halves, so there the rows of
q and k hold the two halves of each head interleaved, biases included; the Qwen architectures keep HF's order. The order
follows the architecture and never the tensor's name alone.
"""

from __future__ import annotations

import numpy as np

ROPE_DIVISORS = "rope_freqs.weight"  # float32 [D/2], what each frequency is divided by; not a weight
# GGUF architecture -> (HF model_type, HF class)
ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
# family -> the architecture it is written as: llama.cpp files Mistral under llama
WRITTEN_AS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_INTERLEAVED = ("llama", "mistral")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_OF = {hf: name for name, hf in _TOP.items()}
_LAYER_OF = {hf: name for name, hf in _LAYER.items()}


def hf_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None for a name that no decoder here has."""
    match name.split("."):
        case [part, ("weight" | "bias") as leaf] if part in _TOP:
            return f"{_TOP[part]}.{leaf}"
        case ["blk", layer, part, ("weight" | "bias") as leaf] if part in _LAYER and layer.isdigit():
            return f"model.layers.{layer}.{_LAYER[part]}.{leaf}"
    return None


def gguf_name(name: str) -> str:
    """The inverse of `hf_name`."""
    module, _, leaf = name.rpartition(".")
    if module in _TOP_OF:
        return f"{_TOP_OF[module]}.{leaf}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{_LAYER_OF[part]}.{leaf}"


def row_order(name: str, architecture: str, rows: int, heads: int, kv_heads: int) -> np.ndarray | None:
    """Which HF row each GGUF row of the HF tensor `name` holds, int64 [rows]; None where the order is the same."""
    part = name.split(".")[-2]
    if architecture not in _INTERLEAVED or part not in ("q_proj", "k_proj"):
        return None
    # [heads, 2, D/2] -> [heads, D/2, 2]
    return np.arange(rows).reshape(heads if part == "q_proj" else kv_heads, 2, -1).swapaxes(1, 2).reshape(-1)
