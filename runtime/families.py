"""The model families one decoder computes: what their config.json means, and how their checkpoints name and order rows.

A family is a row of data here, never a copied model file. Its `defaults` are the fields that a config.json may leave
out, with the values that transformers' config class then takes; with `REQUIRED` and `INERT` they are all the fields
that are understood. Any other field is refused by name, because what is not understood may change the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lcconvert.runtime.errors import UserError

# fields without which no shape is known
REQUIRED = (
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
# fields that change no logit of a loaded model: bookkeeping, training, the tokenizer's business
INERT = frozenset(
    (
        "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range",
        "attention_dropout", "pad_token_id", "auto_map", "pretraining_tp", "cache_implementation",
        "resid_pdrop", "embd_pdrop", "quantization_config", "license", "is_llama_config", "rope_interleaved",
        "transformers.js_config", "unsloth_version", "unsloth_fixed", "return_dict", "output_attentions",
        "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
        "problem_type", "id2label", "label2id", "chunk_size_feed_forward", "is_encoder_decoder",
        "task_specific_params",
    )
)  # fmt: skip
_BASE: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "original_max_position_embeddings": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_SANDWICH = {  # Gemma's names of the four norms, by the decoder's
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
_POST = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
_GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
_QKV = {"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}


@dataclass(frozen=True)
class Family:
    """One family's switches. `name` is HF's model_type.

    windows: which layers have a sliding window: none, "all", Qwen's late ones, the ones without RoPE, or those that
    `layer_types` names, which repeat with period `pattern` when absent (the last of a period sees everything).
    local_rope: windowed layers have a RoPE of their own. names: the checkpoint's name of a layer's part, by the
    decoder's; * stands for an expert's number. fused: parts that the checkpoint stores as one tensor, row behind row.
    """

    name: str
    defaults: Mapping[str, Any]
    qkv_bias: bool = False  # without `attention_bias` too
    o_bias: bool = False  # `attention_bias` reaches the output projection
    qk_norm: Literal["none", "head", "width"] = "none"
    pre_norms: bool = True  # on the input of attention and MLP
    post_norms: bool = False  # on their output, before it is added
    norm_shift: float = 0.0  # added to every stored norm weight
    scaled_embeddings: bool = False  # by sqrt(hidden_size)
    windows: Literal["none", "all", "late", "unrotated", "types"] = "none"
    pattern: int = 0
    local_rope: bool = False
    unrotated: bool = False  # some layers have no RoPE
    partial: bool = False  # a share of the channels may turn
    interleaved: bool = False  # neighbouring channels turn together, not channel i with i + half
    sinks: bool = False  # every head has a logit that nothing is behind
    stacked: bool = False  # plain experts lie in one tensor, as `stacked.py` tells
    clamped: bool = False  # experts have gpt-oss's activation
    experts_bias: bool = False  # in experts and in what chooses them
    experts: tuple[str, ...] = ()  # the fields that count them; () for an MLP in every layer
    expert_size: str = "intermediate_size"  # the field with their inner width
    rope_kinds: tuple[str, ...] = ("default", "linear", "yarn", "longrope", "llama3")
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # fields with the only values computed here
    names: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` with the family's defaults filled in; UserError names a field that is not understood."""
        known = {*REQUIRED, *INERT, *self.defaults, *self.fixed}
        for key, value in config.items():
            off = value is None or (value is False and key in ("attention_bias", "mlp_bias"))
            if key not in known and not key.startswith("_") and not off:
                raise UserError(
                    f"config.json: {key} is {value!r}, which is not understood for a {self.name} model and may change "
                    "what it computes; remove the field if it has no effect"
                )
        for key, allowed in self.fixed.items():
            if key in config and config[key] not in allowed:
                raise UserError(
                    f"config.json: {key} is {config[key]!r}, which is not supported for a {self.name} model; "
                    f"supported is {' or '.join(map(repr, allowed))}"
                )
        objects = {key for key, value in self.defaults.items() if isinstance(value, dict)}
        return {**self.defaults, **{k: v for k, v in config.items() if v is not None or k not in objects}}


FAMILIES = {
    "LlamaForCausalLM": Family("llama", {**_BASE, "attention_bias": False, "mlp_bias": False}, o_bias=True),
    "MistralForCausalLM": Family(
        "mistral",
        {**_BASE, "num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        {**_BASE, "num_key_value_heads": 32, **_QWEN},
        qkv_bias=True,
        windows="late",
        fixed={"attention_bias": (True,)},
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {**_BASE, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False, **_QWEN},
        o_bias=True,
        qk_norm="head",
        windows="late",
    ),
    "MixtralForCausalLM": Family(
        "mixtral",
        {
            **_BASE,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        windows="all",
        experts=("num_local_experts",),
        names={
            "mlp.gate": "block_sparse_moe.gate",
            "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
            "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
            "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
        },
    ),
    "Qwen3MoeForCausalLM": Family(
        "qwen3_moe",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": None,  # there once; windows are on all layers or none
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": None,
            "num_local_experts": None,  # the same by a newer name
            "norm_topk_prob": False,
            "mlp_only_layers": None,
        },
        o_bias=True,
        qk_norm="head",
        windows="all",
        experts=("num_experts", "num_local_experts"),
        expert_size="moe_intermediate_size",
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        {
            **_BASE,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "attention_bias": True,
            "sliding_window": 128,
            "layer_types": None,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "experts_per_token": None,  # these two are of OpenAI's own code
            "initial_context_length": None,
        },
        o_bias=True,
        windows="types",
        pattern=2,
        sinks=True,
        stacked=True,
        clamped=True,
        experts_bias=True,
        experts=("num_local_experts",),
        names={"mlp.gate": "mlp.router"},
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        {
            **_BASE,
            "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 1.0,
            "sliding_window": None,
        },
        windows="all",
        partial=True,
        rope_kinds=("default", "longrope"),
        fused={**_QKV, **_GATE_UP},
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        {
            **_BASE,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        o_bias=True,
        windows="unrotated",
        unrotated=True,
    ),
    "Olmo2ForCausalLM": Family(
        "olmo2",
        {**_BASE, "rms_norm_eps": 1e-5, "attention_bias": False},
        o_bias=True,
        qk_norm="width",
        pre_norms=False,
        post_norms=True,
        names=_POST,
    ),
    "Olmo3ForCausalLM": Family(
        "olmo3",
        {
            **_BASE,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "attention_bias": False,
            "sliding_window": 4096,
            "layer_types": None,
        },
        o_bias=True,
        qk_norm="width",
        pre_norms=False,
        post_norms=True,
        windows="types",
        pattern=4,
        local_rope=True,
        names=_POST,
    ),
    "Glm4ForCausalLM": Family(
        "glm4",
        {
            **_BASE,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 0.00000015625,
            "attention_bias": True,
            "partial_rotary_factor": 0.5,
        },
        post_norms=True,
        partial=True,
        interleaved=True,
        fused=_GATE_UP,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        {
            **{key: value for key, value in _BASE.items() if key != "hidden_act"},
            "hidden_activation": "gelu_pytorch_tanh",
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "attention_bias": False,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "layer_types": None,
        },
        o_bias=True,
        qk_norm="head",
        post_norms=True,
        norm_shift=1.0,
        scaled_embeddings=True,
        windows="types",
        pattern=6,
        local_rope=True,
        fixed={
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (None, False),
        },
        names=_SANDWICH,
    ),
}


# what `inspect` plans the memory of, but nothing here runs
_PLANNED_ONLY = {
    "DeepseekV4ForCausalLM": "whose keys and values are compressed: `inspect` plans its memory, nothing here runs it, "
    "and as it was trained for 1M tokens there is nothing to extend"
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of config.json's architecture; UserError when there is none."""
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not architectures:
        raise UserError(f"config.json: architectures is absent, expected one of {', '.join(FAMILIES)}; add it")
    if architectures[0] in _PLANNED_ONLY:
        raise UserError(f"config.json: architecture is {architectures[0]}, {_PLANNED_ONLY[architectures[0]]}")
    if architectures[0] not in FAMILIES:
        raise UserError(
            f"config.json: architecture is {architectures[0]!r}, which is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[architectures[0]]
