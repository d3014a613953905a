"""What a decoder is, read from an HF config.json. A new family is a row in `families`, never a copied model file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.families import Family, family_of
from lcconvert.runtime.rope import RopeSpec

_ACTIVATIONS: dict[str, Literal["silu", "gelu"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
_TYPES = {"full_attention": False, "sliding_attention": True}


@dataclass(frozen=True)
class ModelSpec:
    """Shapes and switches of one decoder; `max_position` is the configured context in tokens.

    Which layers have a sliding `window` (tokens that a query sees, its own included) and which do not turn q and k at
    all is told by layer: `window_of`, `rope_of`. `local_rope` is that of windowed layers where it is another.
    `query_gain` multiplies the scores, beside 1/sqrt(head_dim).
    """

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
    qk_norm_whole: bool = False  # over all heads together
    pre_norms: bool = True
    post_norms: bool = False
    norm_shift: float = 0.0
    query_gain: float = 1.0
    embed_scale: float = 1.0
    activation: Literal["silu", "gelu", "clamped"] = "silu"
    swiglu: tuple[float, float] = (0.0, 0.0)  # alpha and limit of the clamped one
    sinks: bool = False
    interleaved: bool = False  # as stored: the decoder turns halves
    window: int | None = None
    windowed: tuple[int, ...] = ()  # numbers of the layers with the window
    unrotated: tuple[int, ...] = ()
    local_rope: RopeSpec | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0  # inner width of one
    weights_sum_to_one: bool = True  # those of a token's experts
    router_bias: bool = False
    routed: tuple[int, ...] = ()  # numbers of the layers with experts; the others have an MLP

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelSpec:
        """Raises UserError for an architecture, a field or a value that this decoder does not compute exactly."""
        family = family_of(config)
        values = family.read(config)
        act_key = "hidden_act" if "hidden_act" in family.defaults else "hidden_activation"
        if (act := values[act_key]) not in _ACTIVATIONS:
            raise UserError(f"config.json: {act_key} is {act!r}, supported are {', '.join(_ACTIVATIONS)}")
        heads = positive(values, "num_attention_heads")
        hidden = positive(values, "hidden_size")
        layers = positive(values, "num_hidden_layers")
        head_dim = hidden // heads if values["head_dim"] is None else positive(values, "head_dim")
        scalar = positive(values, "query_pre_attn_scalar") if "query_pre_attn_scalar" in values else head_dim
        attention_bias = bool(values.get("attention_bias", False))
        unrotated = _unrotated(values, layers) if family.unrotated else ()
        windowed = _windowed(family, values, layers, unrotated)
        window = positive(values, "sliding_window") if windowed else None
        beyond = window is not None and window >= positive(values, "max_position_embeddings")
        if beyond and not family.local_rope:
            window, windowed = None, ()  # limits nothing
        rope, local_rope = _ropes(family, values)
        spec = cls(
            family=family.name,
            hidden_size=hidden,
            intermediate_size=positive(values, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads if values["num_key_value_heads"] is None else positive(values, "num_key_value_heads"),
            head_dim=head_dim,
            vocab_size=positive(values, "vocab_size"),
            rms_eps=float(values["rms_norm_eps"]),
            rope=rope,
            max_position=positive(values, "max_position_embeddings"),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias and family.o_bias,
            mlp_bias=bool(values.get("mlp_bias", False)) or family.experts_bias,
            qk_norm=family.qk_norm != "none",
            tied_head=bool(values["tie_word_embeddings"]),
            eos_ids=_ids(values["eos_token_id"]),
            bos_id=values["bos_token_id"],
            qk_norm_whole=family.qk_norm == "width",
            pre_norms=family.pre_norms,
            post_norms=family.post_norms,
            norm_shift=family.norm_shift,
            query_gain=(head_dim / scalar) ** 0.5,
            embed_scale=hidden**0.5 if family.scaled_embeddings else 1.0,
            activation="clamped" if family.clamped else _ACTIVATIONS[act],
            swiglu=(_number(values, "swiglu_alpha"), _number(values, "swiglu_limit")) if family.clamped else (0.0, 0.0),
            sinks=family.sinks,
            interleaved=family.interleaved,
            window=window,
            windowed=windowed,
            unrotated=unrotated,
            local_rope=local_rope if windowed else None,
            **_experts(family, values, layers),
        )
        if spec.num_heads % spec.num_kv_heads:
            raise UserError(
                f"config.json: num_attention_heads {spec.num_heads} is not a multiple of "
                f"num_key_value_heads {spec.num_kv_heads}; one of them is wrong"
            )
        if rope.rotary_dim(head_dim) % 2:
            raise UserError(
                f"config.json: {rope.rotary_dim(head_dim)} of {head_dim} channels of a head would turn, expected an "
                "even number; correct partial_rotary_factor"
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

    @property
    def inner_size(self) -> int:
        """The widest a token gets within an MLP or an expert."""
        return max(self.expert_size, self.intermediate_size if len(self.routed) < self.num_layers else 0)

    def window_of(self, layer: int) -> int | None:
        """Tokens a query of `layer` sees, its own included; None for all."""
        return self.window if layer in self.windowed else None

    def rope_of(self, layer: int) -> RopeSpec:
        """What turns q and k of `layer`; with `partial` 0 nothing does."""
        if layer in self.unrotated:
            return RopeSpec(partial=0.0)
        return self.local_rope if self.local_rope is not None and layer in self.windowed else self.rope

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The different tables that the layers use."""
        return tuple(dict.fromkeys(self.rope_of(layer) for layer in range(self.num_layers)))

    def attending_layers(self, length: int) -> float:
        """Layers without a window that would cost as much causal attention over `length` tokens as all layers do."""
        window = min(self.window or length, length)
        share = window / length * (2 - window / length)  # of the pairs of a query and an earlier key
        return self.num_layers - len(self.windowed) * (1 - share)

    @property
    def beyond_plain(self) -> tuple[str, ...]:
        """What a decoder of the Llama and Qwen kind does not have, in words; empty for those."""
        window = f"a window of {self.window} tokens in {len(self.windowed)} of {self.num_layers} layers"
        found = {
            window: bool(self.windowed),
            "RoPE of their own in those layers": self.local_rope is not None,
            f"no RoPE in {len(self.unrotated)} of {self.num_layers} layers": bool(self.unrotated),
            f"RoPE on {self.rope.rotary_dim(self.head_dim)} of {self.head_dim} channels": self.rope.partial != 1,
            "RoPE on neighbouring channels": self.interleaved,
            "norms of q and k over all heads": self.qk_norm_whole,
            "norms of outputs": self.post_norms,
            "no norms of inputs": not self.pre_norms,
            "norm weights counted from 1": self.norm_shift != 0,
            f"scores scaled by {self.query_gain:g} more": self.query_gain != 1,
            f"embeddings scaled by {self.embed_scale:g}": self.embed_scale != 1,
            f"{self.activation} in the MLP": self.activation != "silu",
            "sinks in attention": self.sinks,
            f"{self.num_experts} experts in {len(self.routed)} of {self.num_layers} layers": bool(self.routed),
        }
        return tuple(text for text, present in found.items() if present)

    def parameters(self) -> int:
        """Number of weights, the embedding counted once when the head is tied."""
        h, m = self.hidden_size, self.intermediate_size
        attention = h * (self.q_size + 2 * self.kv_size) + self.q_size * h
        attention += (self.q_size + 2 * self.kv_size if self.qkv_bias else 0) + (h if self.o_bias else 0)
        if self.qk_norm:
            attention += self.q_size + self.kv_size if self.qk_norm_whole else 2 * self.head_dim
        attention += self.num_heads if self.sinks else 0
        mlp = 3 * h * m + (2 * m + h if self.mlp_bias else 0)
        expert = 3 * h * self.expert_size + (2 * self.expert_size + h if self.mlp_bias else 0)
        experts = (h + self.router_bias + expert) * self.num_experts
        norms = 2 * h * (self.pre_norms + self.post_norms)
        embeddings = self.vocab_size * h * (1 if self.tied_head else 2)
        mlps = len(self.routed) * experts + (self.num_layers - len(self.routed)) * mlp
        return self.num_layers * (attention + norms) + mlps + h + embeddings


def _windowed(family: Family, values: dict[str, Any], layers: int, unrotated: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of the layers with a sliding window."""
    if family.windows == "none":
        return ()
    switched_off = not values.get("use_sliding_window", True) or values["sliding_window"] is None
    if family.windows == "all":
        return () if switched_off else tuple(range(layers))
    if (types := values["layer_types"]) is not None:
        if not isinstance(types, list) or len(types) != layers or any(kind not in _TYPES for kind in types):
            raise UserError(
                f"config.json: layer_types is {types!r}, expected {' or '.join(_TYPES)} for each of {layers} layers"
            )
        chosen = tuple(number for number, kind in enumerate(types) if _TYPES[kind])
        if chosen and switched_off:
            raise UserError(
                "config.json: layer_types has sliding_attention but the window is switched off by sliding_window or "
                "use_sliding_window; correct one of them"
            )
        return chosen
    if switched_off:
        return ()
    if family.windows == "unrotated":
        return unrotated
    if family.windows == "late":
        return tuple(range(values["max_window_layers"], layers))
    period = values.get("sliding_window_pattern") or family.pattern
    return tuple(number for number in range(layers) if (number + 1) % period)


def _experts(family: Family, values: dict[str, Any], layers: int) -> dict[str, Any]:
    """The fields of `ModelSpec` about experts."""
    if not family.experts:
        return {}
    given = [key for key in family.experts if values[key] is not None] or [family.experts[0]]
    count, per_token = positive(values, given[0]), positive(values, "num_experts_per_tok")
    if values[given[-1]] != count:
        raise UserError(f"config.json: {given[0]} is {count} but {given[-1]} is {values[given[-1]]!r}; correct one")
    if per_token > count:
        raise UserError(f"config.json: num_experts_per_tok is {per_token} of {count} experts; one of them is wrong")
    step, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not isinstance(step, int) or step < 1:
        raise UserError(f"config.json: decoder_sparse_step is {step!r}, mlp_only_layers {dense!r}; correct them")
    return {
        "num_experts": count,
        "experts_per_token": per_token,
        "expert_size": positive(values, family.expert_size),
        "weights_sum_to_one": bool(values.get("norm_topk_prob", True)),
        "router_bias": family.experts_bias,
        "routed": tuple(n for n in range(layers) if n not in dense and (n + 1) % step == 0),
    }


def _unrotated(values: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Numbers of the layers without RoPE: those with a 0 in `no_rope_layers`, or the last one of each interval."""
    rotated = values["no_rope_layers"]
    if rotated is None:
        interval = positive(values, "no_rope_layer_interval")
        return tuple(number for number in range(layers) if (number + 1) % interval == 0)
    if not isinstance(rotated, list) or len(rotated) < layers:
        raise UserError(f"config.json: no_rope_layers is {rotated!r}, expected a 0 or 1 for each of {layers} layers")
    return tuple(number for number in range(layers) if not rotated[number])


def _ropes(family: Family, values: dict[str, Any]) -> tuple[RopeSpec, RopeSpec | None]:
    """The RoPE of full layers, and that of windowed ones where the family has one of its own."""
    local = None
    both = values["rope_parameters"]
    if not family.local_rope:
        rope = RopeSpec.from_config(values)
    else:
        # Newer files nest both under the layer types; older ones scale the full layers only.
        own = {"rope_theta": values.get("rope_local_base_freq", values["rope_theta"]), "rope_scaling": None}
        nested = isinstance(both, dict) and bool(set(both) & set(_TYPES))
        if both and not nested:
            raise UserError(
                f"config.json: rope_parameters is {both!r}, expected one object under each of {', '.join(_TYPES)}"
            )
        full, sliding = ((both or {}).get(kind) or {} for kind in _TYPES)
        if stray := set(both or {}) - set(_TYPES):
            raise UserError(f"config.json: rope_parameters has {sorted(stray)[0]!r} beside the layer types; remove it")
        rope = RopeSpec.from_config({**values, "rope_parameters": full or None})
        local = RopeSpec.from_config({**values, **own, "rope_parameters": sliding or None})
    for each in (rope, local):
        if each is not None and each.kind not in family.rope_kinds:
            raise UserError(
                f"config.json: rope type is {each.kind!r}, which {family.name} models do not have; "
                f"theirs are {', '.join(family.rope_kinds)}"
            )
        if each is not None and each.partial != 1 and not family.partial:
            raise UserError(
                f"config.json: partial_rotary_factor is {each.partial}, only 1.0 is supported for {family.name}"
            )
    return rope, None if local == rope else local


def positive(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def _number(config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"config.json: {key} is {value!r}, expected a number")
    return float(value)


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)
