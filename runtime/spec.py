"""What a decoder is, read from an HF config.json. A new family is a row in `_FAMILIES`, never a copied model file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.rope import RopeSpec

# architecture -> (family, default qkv bias, q/k norm); config.json may override the bias (`attention_bias`)
_FAMILIES = {
    "LlamaForCausalLM": ("llama", False, False),
    "MistralForCausalLM": ("mistral", False, False),
    "Qwen2ForCausalLM": ("qwen2", True, False),
    "Qwen3ForCausalLM": ("qwen3", False, True),
}


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and switches of one decoder; `max_position` is the configured context in tokens."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_eps: float
    rope: RopeSpec
    max_position: int
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    eos_ids: tuple[int, ...]
    bos_id: int | None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelSpec:
        """Raises UserError for an architecture or a feature this decoder does not compute exactly."""
        architectures = config.get("architectures") or []
        if not isinstance(architectures, list) or not architectures:
            raise UserError(f"config.json: architectures is absent, expected one of {', '.join(_FAMILIES)}; add it")
        if architectures[0] not in _FAMILIES:
            raise UserError(
                f"config.json: architecture is {architectures[0]!r}, which is not supported; "
                f"supported are {', '.join(_FAMILIES)}"
            )
        family, qkv_bias, qk_norm = _FAMILIES[architectures[0]]
        attention_bias = bool(config.get("attention_bias", False))
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise UserError(f"config.json: hidden_act is {act!r}, only 'silu' is supported")
        heads = _positive(config, "num_attention_heads")
        hidden = _positive(config, "hidden_size")
        spec = cls(
            family=family,
            hidden_size=hidden,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=_positive(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_positive(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=_positive(config, "vocab_size"),
            rms_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=RopeSpec.from_config(config),
            max_position=_positive(config, "max_position_embeddings"),
            qkv_bias=qkv_bias or attention_bias,
            o_bias=attention_bias and family in ("llama", "qwen3"),
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=qk_norm,
            tied_head=bool(config.get("tie_word_embeddings", False)),
            eos_ids=_ids(config.get("eos_token_id")),
            bos_id=config.get("bos_token_id"),
        )
        if spec.num_heads % spec.num_kv_heads:
            raise UserError(
                f"config.json: num_attention_heads {spec.num_heads} is not a multiple of "
                f"num_key_value_heads {spec.num_kv_heads}; one of them is wrong"
            )
        window = config.get("sliding_window")
        windowed = family == "mistral" or bool(config.get("use_sliding_window", False))
        if windowed and window and window < spec.max_position:
            raise UserError(
                f"config.json: sliding_window is {window}, less than max_position_embeddings {spec.max_position}; "
                "sliding-window layers are not supported, set sliding_window to null if the model was not trained so"
            )
        return spec

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def kv_values_per_token(self) -> int:
        """K and V values over all layers that one token adds to the cache."""
        return 2 * self.num_layers * self.kv_size

    def parameters(self) -> int:
        """Number of weights, the embedding counted once when the head is tied."""
        h, m = self.hidden_size, self.intermediate_size
        attention = h * (self.q_size + 2 * self.kv_size) + self.q_size * h
        attention += (self.q_size + 2 * self.kv_size if self.qkv_bias else 0) + (h if self.o_bias else 0)
        attention += 2 * self.head_dim if self.qk_norm else 0
        mlp = 3 * h * m + (2 * m + h if self.mlp_bias else 0)
        embeddings = self.vocab_size * h * (1 if self.tied_head else 2)
        return self.num_layers * (attention + mlp + 2 * h) + h + embeddings


def _positive(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)
