"""A checkpoint as one GGUF file for llama.cpp, beside the config.json and sidecar it came with.

Types: BF16 for 16-bit weights; Q8_0 and Q4_0 by the `gguf` library's own rounding; and for a stored int4 artifact Q4_0
holding the very same codes, since 32 neighbours with one scale is a finer division of its groups. Vectors are float32.
In Q4_0 the embedding and the head stay BF16.

Surprising rule: what llama.cpp reads decides, not what the format has keys for. For these architectures it reads YaRN's
factor and window and nothing else (betas are 32 and 1, `yarn_attn_factor` is overwritten, `attn_factor` counts), so any
other table goes into the file as divisors of the frequencies, which only the `llama` architecture has a place for.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch

from lcconvert.convert.export_weights import ExportWeights, Int4Weight
from lcconvert.convert.gguf_names import ROPE_DIVISORS, WRITTEN_AS, gguf_name, row_order
from lcconvert.convert.gguf_source import GgufSource
from lcconvert.convert.gguf_vocabulary import PROBE, chat_template, vocabulary_metadata
from lcconvert.convert.progress import progress
from lcconvert.convert.writer import new_folder
from lcconvert.kernels.int4 import unpack_int4
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.rope import cos_sin, inv_freq
from lcconvert.runtime.sidecar import NAME as SIDECAR
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lcconvert.convert.export import ExportConfig

_Type = gguf.GGMLQuantizationType
_TYPES = {"bf16": _Type.BF16, "q8_0": _Type.Q8_0, "q4_0": _Type.Q4_0}
_FILE_TYPES = {
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_BLOCK = 32  # values that share a scale in Q8_0 and Q4_0
_ENCODED_AT_ONCE = 1 << 24  # values; the library's rounding makes several float32 copies


def export_gguf(source: TensorSource, sidecar: Sidecar, out: Path, config: ExportConfig) -> Path:
    """Writes `out`/model-PRECISION.gguf one tensor at a time and reads it back: every byte, RoPE table, tokenizer.

    UserError for a model that llama.cpp would not load or would compute otherwise.
    """
    weights = ExportWeights(source)
    check_expressible(weights.spec, source.name)
    precision = config.precision if config.precision != "auto" else ("q4_0" if weights.stores_int4 else "bf16")
    plan = list(_plan(weights, precision))
    scaling, divisors = rope_scaling(weights.spec, source.name)
    metadata = _metadata(source, weights.spec, sidecar, precision, scaling)
    with new_folder(out, need_bytes=sum(item.bytes for item in plan)) as folder:
        path = folder / f"model-{precision}.gguf"
        with closing(gguf.GGUFWriter(path, WRITTEN_AS[weights.spec.family])) as writer:
            for key, value in metadata.items():
                _add(writer, key, value)
            for item in plan:
                writer.add_tensor_info(item.name, item.shape, np.dtype(np.float32), item.bytes, item.kind)
            if divisors is not None:
                writer.add_tensor_info(ROPE_DIVISORS, divisors.shape, divisors.dtype, divisors.nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with progress("export gguf", len(plan), "tensors") as bar:
                for item in plan:
                    stored = item.encode()
                    item.digest = hashlib.sha256(stored.data).digest()
                    writer.write_tensor_data(stored)
                    bar.advance()
            if divisors is not None:
                writer.write_tensor_data(divisors)
            assert writer.fout is not None
            size = writer.fout[0].tell()
        if path.stat().st_size < size:  # numpy's tofile loses the error of its last block
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        weights.assert_all_used()
        _verify(path, weights.spec, plan, source.files)
        described = {key: value for key, value in source.config.items() if key != "quantization_config"}
        text = json.dumps(described, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        (folder / SIDECAR).write_bytes(sidecar.to_bytes())
    return out


class _Item:
    """One tensor of the file: its GGUF name, shape and type, and how to make its bytes when its turn comes."""

    def __init__(self, weights: ExportWeights, module: str, leaf: str, shape: tuple[int, ...], kind: _Type):
        self.weights, self.module, self.leaf, self.shape, self.kind = weights, module, leaf, shape, kind
        self.hf_name = f"{module}.{leaf}"
        self.name = gguf_name(self.hf_name)
        self.digest = b""  # of the stored bytes, once they are written
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise UserError(
                f"{self.hf_name} of {weights.source.name} has input width {shape[-1]}, which {kind.name} blocks of "
                f"{block} do not divide; export with precision bf16"
            )
        self.bytes = math.prod(shape) // block * size

    def encode(self) -> np.ndarray:
        """The stored bytes, uint8 [rows, bytes of a row], rows in GGUF order."""
        spec = self.weights.spec
        order = row_order(self.hf_name, WRITTEN_AS[spec.family], self.shape[0], spec.num_heads, spec.num_kv_heads)
        if self.kind == _Type.Q4_0 and self.weights.stores_int4:
            stored = self.weights.int4(self.module, _BLOCK)
            assert stored is not None  # _plan gives Q4_0 to the packed layers of an int4 checkpoint only
            return _q4_0_of(stored, order, self.hf_name)
        linear = self.leaf == "weight" and self.module.endswith("_proj")
        tensor = self.weights.dense(self.module) if linear else self.weights.plain(self.hf_name)
        rows = (tensor if order is None else tensor[order]).reshape(-1, self.shape[-1])
        if self.kind == _Type.BF16 and rows.dtype == torch.bfloat16:
            return rows.contiguous().view(torch.uint8).numpy()
        encoded = np.empty((len(rows), self.bytes // len(rows)), np.uint8)
        step = max(1, _ENCODED_AT_ONCE // self.shape[-1])
        for start in range(0, len(rows), step):
            part = gguf.quantize(rows[start : start + step].float().contiguous().numpy(), self.kind)
            encoded[start : start + step] = part.view(np.uint8)
        return encoded


def _plan(weights: ExportWeights, precision: str) -> Iterator[_Item]:
    spec = weights.spec
    h, wide = spec.hidden_size, (_Type.BF16 if precision == "q4_0" else _TYPES[precision])

    def linear(module: str, rows: int, columns: int, bias: bool) -> Iterator[_Item]:
        kind = _TYPES[precision]
        if kind == _Type.Q4_0 and weights.stores_int4 and not weights.is_int4(module):
            kind = _Type.BF16  # a layer the artifact itself keeps wider
        yield _Item(weights, module, "weight", (rows, columns), kind)
        if bias:
            yield _Item(weights, module, "bias", (rows,), _Type.F32)

    yield _Item(weights, "model.embed_tokens", "weight", (spec.vocab_size, h), wide)
    for layer in range(spec.num_layers):
        name = f"model.layers.{layer}"
        yield _Item(weights, f"{name}.input_layernorm", "weight", (h,), _Type.F32)
        yield from linear(f"{name}.self_attn.q_proj", spec.q_size, h, spec.qkv_bias)
        yield from linear(f"{name}.self_attn.k_proj", spec.kv_size, h, spec.qkv_bias)
        yield from linear(f"{name}.self_attn.v_proj", spec.kv_size, h, spec.qkv_bias)
        yield from linear(f"{name}.self_attn.o_proj", h, spec.q_size, spec.o_bias)
        for norm in ("q_norm", "k_norm") if spec.qk_norm else ():
            yield _Item(weights, f"{name}.self_attn.{norm}", "weight", (spec.head_dim,), _Type.F32)
        yield _Item(weights, f"{name}.post_attention_layernorm", "weight", (h,), _Type.F32)
        yield from linear(f"{name}.mlp.gate_proj", spec.intermediate_size, h, spec.mlp_bias)
        yield from linear(f"{name}.mlp.up_proj", spec.intermediate_size, h, spec.mlp_bias)
        yield from linear(f"{name}.mlp.down_proj", h, spec.intermediate_size, spec.mlp_bias)
    yield _Item(weights, "model.norm", "weight", (h,), _Type.F32)
    if not spec.tied_head:
        yield _Item(weights, "lm_head", "weight", (spec.vocab_size, h), wide)


def _q4_0_of(weight: Int4Weight, order: np.ndarray | None, name: str) -> np.ndarray:
    """The same codes as Q4_0 blocks: a float16 scale, then 16 bytes, element j low and j + 16 high, stored as q + 8."""
    if weight.group_size % _BLOCK:
        raise UserError(
            f"{name} has int4 groups of {weight.group_size}, which Q4_0 blocks of {_BLOCK} do not divide; "
            "export with precision bf16"
        )
    codes, scale = unpack_int4(weight.packed, weight.packed.shape[1] * 8), weight.scale
    if order is not None:
        codes, scale = codes[order], scale[order]
    half = scale.to(torch.float16)
    if not torch.equal(half.float(), scale.float()):
        raise UserError(f"a scale of {name} does not fit float16, which Q4_0 stores; export with precision bf16")
    half = half.repeat_interleave(weight.group_size // _BLOCK, dim=1)  # [N, K/32]
    nibbles = (codes + 8).to(torch.uint8).view(len(codes), -1, 2, _BLOCK // 2)
    packed = nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)  # [N, K/32, 16]
    blocks = torch.cat((half.unsqueeze(-1).view(torch.uint8), packed), dim=-1)  # [N, K/32, 18]
    return blocks.flatten(1).contiguous().numpy()


def _metadata(
    source: TensorSource, spec: ModelSpec, sidecar: Sidecar, precision: str, scaling: dict[str, Any]
) -> dict[str, Any]:
    arch = WRITTEN_AS[spec.family]
    values: dict[str, Any] = {
        "general.name": Path(source.name).stem,
        "general.file_type": int(_FILE_TYPES[precision]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        f"{arch}.block_count": spec.num_layers,
        f"{arch}.context_length": spec.max_position,
        f"{arch}.embedding_length": spec.hidden_size,
        f"{arch}.feed_forward_length": spec.intermediate_size,
        f"{arch}.attention.head_count": spec.num_heads,
        f"{arch}.attention.head_count_kv": spec.num_kv_heads,
        f"{arch}.attention.key_length": spec.head_dim,
        f"{arch}.attention.value_length": spec.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": spec.rms_eps,
        f"{arch}.vocab_size": spec.vocab_size,
        f"{arch}.rope.dimension_count": spec.head_dim,
        f"{arch}.rope.freq_base": float(spec.rope.theta),
        **{f"{arch}.rope.scaling.{key}": value for key, value in scaling.items()},
        **vocabulary_metadata(source.files, spec.vocab_size, source.name),
    }
    if spec.family == "mistral":
        values["general.basename"] = "mistral"
    if isinstance(named := sidecar.provenance.get("license"), str):
        values["general.license"] = named
    return values


def check_expressible(spec: ModelSpec, source: str) -> None:
    """UserError for tensors that llama.cpp's graph of this architecture has no place for."""
    if spec.family not in WRITTEN_AS or spec.beyond_plain:
        detail = f" ({', '.join(spec.beyond_plain)})" if spec.beyond_plain else ""
        raise UserError(
            f"{source} is a {spec.family} model{detail}, which is not written as GGUF here; export it to safetensors "
            "and convert that with llama.cpp's own script"
        )
    if WRITTEN_AS[spec.family] == "llama":
        return
    if spec.o_bias or spec.mlp_bias:
        where = "o_proj" if spec.o_bias else "MLP"
        raise UserError(
            f"{source} has biases in its {where} layers, which llama.cpp does not load for {spec.family}; "
            "export to onnx or safetensors"
        )
    if spec.family == "qwen2" and spec.q_size != spec.hidden_size:
        raise UserError(
            f"{source} has {spec.num_heads} heads of {spec.head_dim} on a hidden size of {spec.hidden_size}, which "
            "llama.cpp does not load for qwen2; export to onnx or safetensors"
        )


def rope_scaling(spec: ModelSpec, source: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """The `rope.scaling.*` keys, and float32 [D/2] divisors of the frequencies where the keys cannot say it."""
    rope = spec.rope
    if rope.kind == "default":
        return {}, None
    if rope.kind == "linear":
        return {"type": "linear", "factor": float(rope.factor or 1.0)}, None
    if rope.kind == "yarn" and (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True):
        assert rope.factor is not None
        assert rope.original_max_position is not None
        scaling: dict[str, Any] = {
            "type": "yarn",
            "factor": float(rope.factor),
            "original_context_length": rope.original_max_position,
            "yarn_beta_fast": rope.beta_fast,
            "yarn_beta_slow": rope.beta_slow,
        }
        own = 0.1 * math.log(rope.factor) + 1.0  # llama.cpp applies this by itself; the key multiplies it
        if not math.isclose(rope.attention_scale, own, rel_tol=1e-6):
            scaling["attn_factor"] = rope.attention_scale / own
        return scaling, None
    if WRITTEN_AS[spec.family] != "llama":
        detail = rope.kind if rope.kind != "yarn" else "yarn with other betas than 32 and 1, or truncate false"
        raise UserError(
            f"{source} has rope type {detail}, which llama.cpp cannot be told for {spec.family}; "
            "extend with --method yarn or theta"
        )
    scaling = {} if rope.original_max_position is None else {"original_context_length": rope.original_max_position}
    if rope.attention_scale != 1.0:
        scaling["attn_factor"] = rope.attention_scale
    plain = type(rope)(theta=rope.theta)
    divisors = inv_freq(plain, spec.head_dim)[0] / inv_freq(rope, spec.head_dim)[0]
    return scaling, divisors.numpy()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _verify(path: Path, spec: ModelSpec, plan: list[_Item], files: Mapping[str, bytes]) -> None:
    """CheckFailed unless the file reads back as this model: every tensor, the RoPE table's far end, the tokenizer."""
    try:
        written = GgufSource(path)
        again = ModelSpec.from_config(written.config)
    except UserError as error:
        raise CheckFailed(f"what was written cannot be read back: {error}") from None
    expected = {item.hf_name: item.shape for item in plan}
    found = {name: written.info(name)[1] for name in written.names()}
    if found != expected:
        name = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise CheckFailed(f"tensor {name} of {path.name} is {found.get(name)}, expected {expected.get(name)}")
    for item in plan:
        digest = hashlib.sha256()
        for raw, values in written.raw_blocks(item.hf_name):
            digest.update(raw.data)
            if not np.isfinite(values).all():
                raise CheckFailed(f"tensor {item.hf_name} of {path.name} holds values that are not finite")
        if digest.digest() != item.digest:
            raise CheckFailed(f"tensor {item.hf_name} of {path.name} reads back with other bytes; the disk is faulty")
    positions = torch.tensor([1, spec.max_position - 1])
    tables = [torch.cat(cos_sin(s.rope, s.head_dim, positions)) for s in (spec, again)]
    # the base is float32 in GGUF, so far angles differ by up to position * 1e-7
    if not torch.allclose(tables[0], tables[1], atol=1e-6 * spec.max_position + 1e-5):
        raise CheckFailed(f"{path.name} reads back with another RoPE table; the export is wrong")
    _verify_tokenizer(path.name, files, written.files)


def _verify_tokenizer(name: str, files: Mapping[str, bytes], again: Mapping[str, bytes]) -> None:
    ours, theirs = Tokenizer.from_files(files), Tokenizer.from_files(again)
    if ours.encode(PROBE) != theirs.encode(PROBE):
        raise CheckFailed(f"{name} reads back with a tokenizer that splits text differently; the export is wrong")
    vocabulary = json.loads(again["tokenizer.json"])
    ids = vocabulary["model"]["vocab"] | {entry["content"]: entry["id"] for entry in vocabulary["added_tokens"]}
    source = json.loads(files["tokenizer.json"])
    wanted = source["model"]["vocab"] | {entry["content"]: entry["id"] for entry in source.get("added_tokens", [])}
    if changed := [token for token, number in wanted.items() if ids.get(token) != number]:
        raise CheckFailed(
            f"token {changed[0]!r} of {name} reads back as {ids.get(changed[0])}, expected {wanted[changed[0]]}"
        )
    if chat_template(files) != chat_template(again):
        raise CheckFailed(f"{name} reads back with another chat template; the export is wrong")
