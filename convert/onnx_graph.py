"""Writes the decoder as an ONNX graph, node by node, from its `ModelSpec`: nothing is traced and no model is built.

Linear weights keep their checkpoint layout [N, K]: Gemm reads them transposed and MatMulNBits takes compressed-tensors'
int4 bytes as they are, so a tied head is one initializer and exporting copies bytes. Attention is ONNX Runtime's
GroupQueryAttention, which rotates by the cos/sin rows it is given: our own RoPE table, attention factor included, not a
second reading of the RoPE fields. Inputs, outputs and cache have the names onnxruntime-genai expects. All that is not
int4 has one float type, that of `data`; the norms sum in float32 all the same (RMSNormalization's `stash_type`).

Surprising rule: hidden states are [B*S, H] throughout, and only attention sees [B, S, .], because Gemm is 2-D.
Left out: sliding windows, and logits for the last token only.

Legend: B batch, S new tokens, P cached tokens, T = P + S, H hidden, D head size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from lcconvert.convert.export_weights import ExportWeights, Int4Weight
from lcconvert.convert.onnx_data import ONNX_TYPES, ExternalData
from lcconvert.runtime.rope import RopeSpec, cos_sin
from lcconvert.runtime.spec import ModelSpec

OPSET = 23  # the first with RMSNormalization
_IR_VERSION = 11  # what opset 23 was released with; older runtimes refuse newer numbers
_ROPE_ROWS = 1 << 14


def decoder_graph(
    weights: ExportWeights,
    data: ExternalData,
    *,
    rows: int,
    int4_group: int | None,
    step: Callable[[], None] = lambda: None,
) -> onnx.ModelProto:
    """The graph of `weights.spec`, its weights appended to `data` layer by layer (`step` is called after each).

    `rows` positions can be addressed; `int4_group` is the largest group for weights that are rounded here, None for
    plain float weights. At run time `attention_mask` [B, T] int64 gives the lengths: S new tokens after P cached.
    """
    spec = weights.spec
    graph = _Graph(weights, data, int4_group)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total_sequence"])
    kind = ONNX_TYPES[data.float_type]
    past = [_cache_info(spec, kind, f"past_key_values.{i}.{kv}", "past_sequence") for i, kv in _cache_names(spec)]
    present = [_cache_info(spec, kind, f"present.{i}.{kv}", "total_sequence") for i, kv in _cache_names(spec)]
    logits = helper.make_tensor_value_info("logits", kind, ["batch", "sequence", spec.vocab_size])

    graph.lengths()
    graph.rope_tables(rows)
    embedding = graph.initializer("model.embed_tokens.weight")
    x = graph.node("Gather", [embedding, "input_ids"], "embed_tokens")  # [B, S, H]
    x = graph.node("Reshape", [x, graph.constant("rows_hidden", [-1, spec.hidden_size])], "hidden")  # [B*S, H]
    if spec.embed_scale != 1:
        x = graph.node("Mul", [x, graph.initializer("embed_scale", torch.tensor([spec.embed_scale]))], "scaled")
    for layer in range(spec.num_layers):
        x = graph.layer(x, layer)
        step()
    x = graph.rms_norm(x, "model.norm")
    head = embedding if spec.tied_head else graph.initializer("lm_head.weight")
    x = graph.node("Gemm", [x, head], "lm_head", transB=1)  # [B*S, V]
    graph.node("Reshape", [x, "batch_sequence_any"], "lm_head/unflatten", outputs=["logits"])
    weights.assert_all_used()

    proto = helper.make_graph(
        graph.nodes, f"lcconvert-{spec.family}", [ids, mask, *past], [logits, *present], graph.initializers
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(proto, opset_imports=opsets, producer_name="lcconvert")
    model.ir_version = _IR_VERSION
    return model


class _Graph:
    """Nodes and initializers in the making. Each method adds one idea and returns the name of its result."""

    def __init__(self, weights: ExportWeights, data: ExternalData, int4_group: int | None):
        self.weights, self.spec, self.data, self.int4_group = weights, weights.spec, data, int4_group
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: set[str] = set()
        self._tables: dict[RopeSpec, tuple[str, ...]] = {}

    def node(
        self, op: str, inputs: Sequence[str], name: str, *, outputs: Sequence[str] = (), domain: str = "", **attrs: Any
    ) -> str:
        out = list(outputs) or [f"{name}/out"]
        self.nodes.append(helper.make_node(op, list(inputs), out, name, domain=domain, **attrs))
        return out[0]

    def initializer(self, name: str, tensor: torch.Tensor | None = None) -> str:
        """A weight in the side file: `tensor`, or the source's tensor of that name."""
        self.initializers.append(self.data.add(name, self.weights.plain(name) if tensor is None else tensor))
        return name

    def constant(self, name: str, values: int | list[int]) -> str:
        if name not in self._constants:
            self._constants.add(name)
            shape = [] if isinstance(values, int) else [len(values)]
            flat = [values] if isinstance(values, int) else values
            self.initializers.append(helper.make_tensor(name, TensorProto.INT64, shape, flat))
        return name

    def lengths(self) -> None:
        """From the mask: `seqlens_k` int32 [B] (tokens of a row, minus 1), `total_length` int32; shape [B, S, -1]."""
        tokens = self.node("ReduceSum", ["attention_mask", self.constant("axis_1", [1])], "row_tokens", keepdims=0)
        last = self.node("Sub", [tokens, self.constant("one", [1])], "row_last")
        self.node("Cast", [last], "seqlens_k", outputs=["seqlens_k"], to=TensorProto.INT32)
        shape = self.node("Shape", ["attention_mask"], "mask_shape")
        total = self.node("Gather", [shape, self.constant("index_1", 1)], "mask_length")
        self.node("Cast", [total], "total_length", outputs=["total_length"], to=TensorProto.INT32)
        shape = self.node("Shape", ["input_ids"], "ids_shape")
        self.node(
            "Concat", [shape, self.constant("any", [-1])], "batch_sequence", outputs=["batch_sequence_any"], axis=0
        )

    def rope_tables(self, rows: int) -> None:
        """`cos_cache` and `sin_cache` [rows, D/2], made a block of rows at a time: at 1M the angles are 512 MB.

        Numbered from 1 where layers have further ones.
        """
        shape = (rows, self.spec.head_dim // 2)
        for number, rope in enumerate(self.spec.ropes):
            names = tuple(f"{name}{number or ''}" for name in ("cos_cache", "sin_cache"))
            self._tables[rope] = names
            for index, name in enumerate(names):
                blocks = _rope_blocks(rope, self.spec.head_dim, rows, index)
                self.initializers.append(self.data.add_blocks(name, shape, torch.float32, blocks))

    def rms_norm(self, x: str, module: str, gain: float = 1.0) -> str:
        weight = f"{module}.weight"
        if self.spec.norm_shift or gain != 1:
            scale = self.initializer(weight, (self.weights.plain(weight).float() + self.spec.norm_shift) * gain)
        else:
            scale = self.initializer(weight)
        return self.node("RMSNormalization", [x, scale], module, axis=-1, epsilon=self.spec.rms_eps)

    def linear(self, x: str, module: str, *, bias: bool) -> str:
        """[rows, K] -> [rows, N]."""
        if self.int4_group is not None and (packed := self.weights.int4(module, self.int4_group)) is not None:
            return self._int4_linear(x, module, packed, bias)
        weight = self.initializer(f"{module}.weight", self.weights.dense(module))
        inputs = [x, weight, *([self.initializer(f"{module}.bias")] if bias else [])]
        return self.node("Gemm", inputs, module, transB=1)

    def _int4_linear(self, x: str, module: str, weight: Int4Weight, bias: bool) -> str:
        rows, groups = weight.scale.shape
        blob = weight.packed.contiguous().view(torch.uint8).view(rows, groups, weight.group_size // 2)
        codes = self.initializer(f"{module}.weight_packed", blob)
        scale = self.initializer(f"{module}.weight_scale", weight.scale)
        inputs = [x, codes, scale]
        if bias:
            inputs += ["", "", self.initializer(f"{module}.bias")]
        return self.node(
            "MatMulNBits", inputs, module, domain="com.microsoft",
            K=groups * weight.group_size, N=rows, bits=4, block_size=weight.group_size, accuracy_level=0,
        )  # fmt: skip

    def layer(self, x: str, layer: int) -> str:
        """[B*S, H] -> [B*S, H], and the layer's present key and value."""
        spec, name = self.spec, f"model.layers.{layer}"
        attn = f"{name}.self_attn"
        h = self.rms_norm(x, f"{name}.input_layernorm") if spec.pre_norms else x
        q = self._heads(self.linear(h, f"{attn}.q_proj", bias=spec.qkv_bias), f"{attn}.q_norm", spec.query_gain)
        k = self._heads(self.linear(h, f"{attn}.k_proj", bias=spec.qkv_bias), f"{attn}.k_norm")
        v = self.linear(h, f"{attn}.v_proj", bias=spec.qkv_bias)
        q, k, v = (self.node("Reshape", [t, "batch_sequence_any"], f"{t}/rows") for t in (q, k, v))  # [B, S, .]
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        out = self.node(
            "GroupQueryAttention",
            [q, k, v, *past, "seqlens_k", "total_length", *self._tables[spec.rope_of(layer)]], attn,
            outputs=[f"{attn}/out", f"present.{layer}.key", f"present.{layer}.value"], domain="com.microsoft",
            num_heads=spec.num_heads, kv_num_heads=spec.num_kv_heads, scale=1 / math.sqrt(spec.head_dim),
            do_rotary=1, rotary_interleaved=0, local_window_size=spec.window_of(layer) or -1,
        )  # fmt: skip
        out = self.node("Reshape", [out, self.constant("rows_q", [-1, spec.q_size])], f"{attn}/flatten")
        out = self._normed_out(self.linear(out, f"{attn}.o_proj", bias=spec.o_bias), f"{name}.post_self_attn_layernorm")
        x = self.node("Add", [x, out], f"{attn}/residual")

        mlp = f"{name}.mlp"
        h = self.rms_norm(x, f"{name}.post_attention_layernorm") if spec.pre_norms else x
        gate = self.linear(h, f"{mlp}.gate_proj", bias=spec.mlp_bias)
        if spec.activation == "gelu":
            gate = self.node("Gelu", [gate], f"{mlp}/gelu", approximate="tanh")
        else:
            gate = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{mlp}/sigmoid")], f"{mlp}/silu")
        up = self.linear(h, f"{mlp}.up_proj", bias=spec.mlp_bias)
        h = self.node("Mul", [gate, up], f"{mlp}/gated")
        out = self._normed_out(self.linear(h, f"{mlp}.down_proj", bias=spec.mlp_bias), f"{name}.post_mlp_layernorm")
        return self.node("Add", [x, out], f"{mlp}/residual")

    def _normed_out(self, x: str, norm: str) -> str:
        return self.rms_norm(x, norm) if self.spec.post_norms else x

    def _heads(self, x: str, norm: str, gain: float = 1.0) -> str:
        """The RMS norm of q and k where a family has one: over each head, as rows of D, or over all of them."""
        if not self.spec.qk_norm:
            return x
        if self.spec.qk_norm_whole:
            return self.rms_norm(x, norm, gain)
        x = self.node("Reshape", [x, self.constant("rows_head", [-1, self.spec.head_dim])], f"{norm}/split")
        return self.rms_norm(x, norm, gain)


def _cache_names(spec: ModelSpec) -> Iterator[tuple[int, str]]:
    return ((layer, kv) for layer in range(spec.num_layers) for kv in ("key", "value"))


def _cache_info(spec: ModelSpec, kind: int, name: str, length: str) -> onnx.ValueInfoProto:
    shape: list[str | int | None] = ["batch", spec.num_kv_heads, length, spec.head_dim]
    return helper.make_tensor_value_info(name, kind, shape)


def _rope_blocks(rope: RopeSpec, head_dim: int, rows: int, index: int) -> Iterator[torch.Tensor]:
    for start in range(0, rows, _ROPE_ROWS):
        yield cos_sin(rope, head_dim, torch.arange(start, min(start + _ROPE_ROWS, rows)))[index]
