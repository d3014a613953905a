"""One decoder for all dense families, used to train, to calibrate and to serve: what is trained is what is served.

Parameter names are those of HF's Llama; `stored` says how the checkpoints of other families name and order them. A
layer is cut in two halves, `qkv` and `finish`, because the runtime puts its own attention between them (layer-major
prefill, paged decode); `forward` joins them with plain causal SDPA for training and for comparison with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lcconvert.kernels.rms_norm import rms_norm_torch
from lcconvert.runtime.banded import banded_attention
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import QuantLayout, make_linear
from lcconvert.runtime.rope import apply_rope, cos_sin
from lcconvert.runtime.sinks import with_sinks
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.stored import decoder_source, stored_name

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q [B, T, Hq, D], k and v [B, T, Hkv, D] of new tokens -> attention output [B, T, Hq, D]."""

# cuDNN's backward pass is the fastest there is on Hopper; it has no float32, and the others take over
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_CHECKED = 1 << 24  # values looked at at a time


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense causal attention over the order of rows, by the fastest kernel that PyTorch has for it."""
    dim = q.shape[-1]
    if sinks is not None:  # a query for the row of the sink keeps it square; its output is dropped
        q, k, v = with_sinks(q, k, v, sinks)
        q = torch.cat((q[..., :1, :, :], q), -3)
    q, k, v = (x.transpose(-2, -3) for x in (q, k, v))  # [B, heads, T, D]
    with sdpa_kernel(_BACKENDS, set_priority=True):
        gqa = q.shape[-3] != k.shape[-3]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa, scale=dim**-0.5)
    out = out.transpose(-2, -3)
    return out if sinks is None else out[..., 1:, :, :dim]


def checkpointed(
    layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, attend: Attend | None = None
) -> torch.Tensor:
    """`layer(x, cos, sin, attend)`, of which the backward pass computes everything again but the attention: it is the
    one part that is dear to compute and cheap to keep (q, k, v and its output in the compute dtype). Within a window it
    is neither, as every tile keeps the keys it sees, so there it is computed again too."""
    q, k, v = checkpoint(layer.qkv, x, cos, sin, use_reentrant=False)
    if attend is None and layer.window is not None:
        attn = checkpoint(layer.attend, q, k, v, use_reentrant=False)
    else:
        attn = (attend or layer.attend)(q, k, v)
    out: torch.Tensor = checkpoint(layer.finish, x, attn.flatten(-2), use_reentrant=False)
    return out


class RMSNorm(nn.Module):
    """x / rms(x) * (shift + weight) * gain; the sum is float32 where there is one, as Gemma was trained."""

    def __init__(self, size: int, eps: float, shift: float = 0.0, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.shift, self.gain = eps, shift, gain

    @property
    def factor(self) -> torch.Tensor:
        """What the normed rows are multiplied with, [size]: the weight itself for most families, else float32."""
        if self.shift == 0 and self.gain == 1:
            return self.weight
        return (self.weight.float() + self.shift) * self.gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm_torch(x, self.factor, self.eps)


class Attention(nn.Module):
    """The four projections and the optional q/k norm of one layer; the attention itself is the caller's."""

    def __init__(self, spec: ModelSpec, layout: QuantLayout, name: str):
        super().__init__()
        self.head_dim = spec.head_dim

        def linear(leaf: str, n_in: int, n_out: int, bias: bool) -> nn.Module:
            return make_linear(n_in, n_out, bias, layout.format_of(f"{name}.{leaf}"))

        self.q_proj = linear("q_proj", spec.hidden_size, spec.q_size, spec.qkv_bias)
        self.k_proj = linear("k_proj", spec.hidden_size, spec.kv_size, spec.qkv_bias)
        self.v_proj = linear("v_proj", spec.hidden_size, spec.kv_size, spec.qkv_bias)
        self.o_proj = linear("o_proj", spec.q_size, spec.hidden_size, spec.o_bias)
        self.sinks = nn.Parameter(torch.empty(spec.num_heads)) if spec.sinks else None
        self.whole_norm = spec.qk_norm_whole
        q_size, k_size = (spec.q_size, spec.kv_size) if spec.qk_norm_whole else (spec.head_dim, spec.head_dim)
        self.q_norm, self.k_norm = (
            RMSNorm(size, spec.rms_eps, spec.norm_shift, gain) if spec.qk_norm else nn.Identity()
            for size, gain in ((q_size, spec.query_gain), (k_size, 1.0))
        )

    def query(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[..., T, H] -> [..., T, Hq, D], normed and rotated."""
        return apply_rope(self._heads(self.q_proj(x), self.q_norm), cos, sin)

    def key_value(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., T, H] -> K (normed and rotated) and V, each [..., T, Hkv, D]."""
        k = apply_rope(self._heads(self.k_proj(x), self.k_norm), cos, sin)
        return k, self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def _heads(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """[..., heads * D] -> [..., heads, D], normed over each head or over all of them."""
        heads = (-1, self.head_dim)
        return norm(x).unflatten(-1, heads) if self.whole_norm else norm(x.unflatten(-1, heads))


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec, layout: QuantLayout, name: str, inner: int):
        super().__init__()
        h, m, bias = spec.hidden_size, inner, spec.mlp_bias
        self.gate_proj = make_linear(h, m, bias, layout.format_of(f"{name}.gate_proj"))
        self.up_proj = make_linear(h, m, bias, layout.format_of(f"{name}.up_proj"))
        self.down_proj = make_linear(m, h, bias, layout.format_of(f"{name}.down_proj"))
        self.activation, self.swiglu = spec.activation, spec.swiglu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gated(x))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> the input of the down projection [..., I]."""
        gate = self.gate_proj(x)
        if self.activation == "clamped":
            alpha, limit = self.swiglu
            gate, up = gate.clamp(max=limit), self.up_proj(x).clamp(-limit, limit)
            return (up + 1) * (gate * torch.sigmoid(gate * alpha))
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return gate * self.up_proj(x)


class Experts(nn.Module):
    """Many MLPs, of which every token takes the few that `gate` scores highest, weighted by those scores.

    Plain: one expert after the other, over the rows that chose it. Which rows these are is only known on the device,
    so a step of this cannot be a CUDA graph.
    """

    def __init__(self, spec: ModelSpec, layout: QuantLayout, name: str):
        super().__init__()
        self.per_token, self.sum_to_one = spec.experts_per_token, spec.weights_sum_to_one
        self.gate = nn.Linear(spec.hidden_size, spec.num_experts, bias=spec.router_bias)
        self.experts = nn.ModuleList(
            MLP(spec, layout, f"{name}.experts.{number}", spec.expert_size) for number in range(spec.num_experts)
        )

    @property
    def mlps(self) -> Sequence[MLP]:
        return cast(Sequence[MLP], self.experts)

    def routes(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows x [M, H] -> the numbers of each row's experts int64 [M, k], and their weights [M, k] in x's dtype."""
        weights, chosen = self.gate(x).float().softmax(-1).topk(self.per_token, dim=-1)
        if self.sum_to_one:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights.to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        chosen, weights = self.routes(rows)
        out = torch.zeros_like(rows)
        for number in chosen.unique().tolist():
            row, place = torch.where(chosen == number)
            out.index_add_(0, row, self.experts[number](rows[row]) * weights[row, place, None])
        return out.view_as(x)


class Layer(nn.Module):
    """Layer `number`. Where a norm's place is empty in its family, an identity fills it."""

    def __init__(self, spec: ModelSpec, layout: QuantLayout, number: int):
        super().__init__()
        name = f"model.layers.{number}"

        def norm(present: bool) -> nn.Module:
            return RMSNorm(spec.hidden_size, spec.rms_eps, spec.norm_shift) if present else nn.Identity()

        self.number, self.window, self.routed = number, spec.window_of(number), number in spec.routed
        self.self_attn = Attention(spec, layout, f"{name}.self_attn")
        self.mlp: MLP | Experts
        if self.routed:
            self.mlp = Experts(spec, layout, f"{name}.mlp")
        else:
            self.mlp = MLP(spec, layout, f"{name}.mlp", spec.intermediate_size)
        self.input_layernorm = norm(spec.pre_norms)
        self.post_attention_layernorm = norm(spec.pre_norms)  # of the MLP's input
        self.post_self_attn_layernorm = norm(spec.post_norms)
        self.post_mlp_layernorm = norm(spec.post_norms)

    def qkv(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [..., T, H], tables [..., T, D/2] -> q [..., T, Hq, D], k and v [..., T, Hkv, D]; q and k are rotated."""
        h = self.input_layernorm(x)
        return self.self_attn.query(h, cos, sin), *self.self_attn.key_value(h, cos, sin)

    def finish(self, x: torch.Tensor, attn: torch.Tensor) -> torch.Tensor:
        """x [..., T, H] and attention output [..., T, Hq*D] -> the layer's output [..., T, H]."""
        x = x + self.post_self_attn_layernorm(self.self_attn.o_proj(attn))
        return x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`causal_attention`, within the layer's window if it has one."""
        sinks = self.self_attn.sinks
        if self.window is None:
            return causal_attention(q, k, v, sinks)
        return banded_attention(q, k, v, self.window, sinks)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend | None = None,
        checkpoint_parts: bool = False,
    ) -> torch.Tensor:
        """`attend` replaces the layer's own attention; `checkpoint_parts` as in `checkpointed`."""
        if checkpoint_parts:  # from within, because sharded weights are gathered when a layer is called
            return checkpointed(self, x, cos, sin, attend)
        return self.finish(x, (attend or self.attend)(*self.qkv(x, cos, sin)).flatten(-2))


class Backbone(nn.Module):
    def __init__(self, spec: ModelSpec, layout: QuantLayout):
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, layout, number) for number in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_eps, spec.norm_shift)


class Decoder(nn.Module):
    """The causal language model of `spec`; `layout` says which linear layers are quantized."""

    def __init__(self, spec: ModelSpec, layout: QuantLayout | None = None):
        super().__init__()
        self.spec = spec
        self.model = Backbone(spec, layout or QuantLayout())
        self.lm_head = None if spec.tied_head else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    @property
    def layers(self) -> Sequence[Layer]:
        return cast(Sequence[Layer], self.model.layers)

    @property
    def head_weight(self) -> torch.Tensor:
        """The output projection [V, H]; the embedding itself when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        *,
        checkpoint_layers: bool = False,
        attend_of: Callable[[Layer], Attend | None] | None = None,
    ) -> torch.Tensor:
        """int64 ids [B, T] -> hidden states after the final norm [B, T, H], dense causal attention over row order.

        `positions` int64 [B, T] only turn the rotary angles (PoSE may skip); None counts from 0. With
        `checkpoint_layers`, activations inside a layer but its attention are recomputed in the backward pass.
        `attend_of` gives a layer another attention, for rows that are not all of a sequence.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        tables = layer_tables(self.spec, positions)
        x = self.embed(input_ids)
        for layer, (cos, sin) in zip(self.layers, tables, strict=True):
            x = layer(x, cos, sin, attend_of(layer) if attend_of else None, checkpoint_layers)
        return self.model.norm(x)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 ids [...] -> hidden states [..., H] at the input of the first layer."""
        return scaled(self.spec, self.model.embed_tokens(ids))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] -> float32 [..., V]; pass a few hundred rows at a time, the result is V wide."""
        return F.linear(hidden, self.head_weight).float()


def scaled(spec: ModelSpec, x: torch.Tensor) -> torch.Tensor:
    """Embeddings [..., H], scaled where the family does so, by a factor rounded to their dtype."""
    return x if spec.embed_scale == 1 else x * torch.tensor(spec.embed_scale).to(x.dtype).item()


def layer_tables(spec: ModelSpec, positions: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's rotary tables (cos, sin) for int64 `positions` [...], float32 [..., D/2]; equal ones are shared."""
    tables = {rope: cos_sin(rope, spec.head_dim, positions) for rope in spec.ropes}
    return [tables[spec.rope_of(number)] for number in range(spec.num_layers)]


def load_decoder(
    source: TensorSource, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Decoder:
    """Builds the decoder of `source` and fills it tensor by tensor; quantized layers keep their packed form.

    Strict: a missing, left-over, misshapen or non-finite tensor is a UserError that names it.
    """
    spec = ModelSpec.from_config(source.config)
    if spec.num_layers > (count := len(source.names())):  # before a module is made for each of them
        raise UserError(
            f"config.json: num_hidden_layers is {spec.num_layers}, but {source.name} has {count} tensors in all; "
            "config.json and weights do not belong together"
        )
    source = decoder_source(source, spec)
    layout = QuantLayout.from_config(source.config)
    with torch.device("meta"):
        decoder = Decoder(spec, layout)
    wanted = dict(decoder.named_parameters()) | dict(decoder.named_buffers())
    present = set(source.names())
    if missing := sorted(set(wanted) - present):
        raise UserError(
            f"{source.name} lacks tensor {stored_name(source, missing[0])} ({len(missing)} missing); "
            "the checkpoint is incomplete"
        )
    if extra := sorted(n for n in present - set(wanted) if not _ignorable(n, spec)):
        raise UserError(
            f"{source.name} holds tensor {extra[0]} ({len(extra)} not used), which a {spec.family} model of this "
            "config has no place for; config.json and weights do not belong together"
        )
    for name, placeholder in wanted.items():
        tensor = read_tensor(source, name, placeholder.shape)
        packed = name.rpartition(".")[2].startswith("weight_") or tensor.dtype == torch.float8_e4m3fn
        tensor = tensor.to(device) if packed else tensor.to(device, dtype)
        owner = decoder.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if isinstance(placeholder, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor)
    return decoder.eval()


def read_tensor(source: TensorSource, name: str, shape: torch.Size) -> torch.Tensor:
    """The tensor `name` of `source`; UserError when it has another shape than `shape`, or NaN or infinite values."""
    tensor = source.tensor(name)
    if tensor.shape != shape:
        raise UserError(
            f"tensor {name} of {source.name} has shape {list(tensor.shape)}, config.json wants "
            f"{list(shape)}; config.json and weights do not belong together"
        )
    check_finite(name, tensor, source.name)
    return tensor


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Raises UserError when a floating tensor (float8 included) holds NaN or infinity."""
    if not is_finite(tensor):
        raise UserError(f"tensor {name} of {where} holds NaN or infinite values; the checkpoint is damaged")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether `tensor`, of any dtype, holds only finite values, in little memory beyond it."""
    if not tensor.dtype.is_floating_point:
        return True
    blocks = tensor.reshape(-1).split(_CHECKED)
    return all(bool(torch.isfinite(block.float() if block.dtype.itemsize == 1 else block).all()) for block in blocks)


def _ignorable(name: str, spec: ModelSpec) -> bool:
    if name.endswith((".rotary_emb.inv_freq", ".self_attn.k_scale", ".self_attn.v_scale")):
        return True  # a table we compute; KV-cache scales the cache reads itself
    return spec.tied_head and name == "lm_head.weight"
