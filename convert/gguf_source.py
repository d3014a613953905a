"""A GGUF file as a `TensorSource`: HF tensor names, HF row order, float32, and the config.json the file implies.

Every storage type the `gguf` library can dequantize is read, one tensor at a time; packed integers are not kept.
The surprising rule: llama.cpp stores q and k of the `llama` architecture with the two halves of each head interleaved,
and of the Qwen architectures as they are, so the permutation is undone by architecture and not by tensor name.
Llama 3.1's RoPE scaling is not in the metadata at all, only as a table of divisors (`rope_freqs.weight`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from lcconvert.convert.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from lcconvert.convert.gguf_tokenizer import special_token_ids, tokenizer_files
from lcconvert.runtime.errors import UserError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
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
_ROPE_DIVISORS = "rope_freqs.weight"
# GGUF architecture -> (HF model_type, HF class, q/k rows are interleaved)
_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM", True),
    "mistral": ("mistral", "MistralForCausalLM", True),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", False),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", False),
}
_LLAMA3_BANDS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufSource:
    """Opens one `.gguf` file by its tables. UserError for a cut file, an unknown architecture or an unknown tensor."""

    def __init__(self, path: Path):
        self.path = path
        self.name = str(path)
        header = read_gguf_header(path)
        self._metadata = header.metadata
        stored = _with_other_parts(path, header)
        self._arch = str(self._metadata.get("general.architecture"))
        if self._arch not in _ARCHITECTURES:
            raise UserError(
                f"{path} holds architecture {self._arch!r}, expected one of {', '.join(_ARCHITECTURES)}; "
                "convert the original checkpoint instead"
            )
        self._divisors = stored.pop(_ROPE_DIVISORS, None)
        self._tensors = {_hf_name(name, path): (name, entry) for name, entry in stored.items()}
        for kind in sorted({entry.kind for _, entry in self._tensors.values()}):
            self._check_readable(kind)
        self.config = self._config()
        self.files = self._files()

    def _files(self) -> Mapping[str, bytes]:
        """The tokenizer as HF files and generation_config.json, rebuilt from the metadata."""
        ids = special_token_ids(self._metadata)
        ends = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
        generation: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("bos", "pad") if name in ids}
        if ends:
            unique = list(dict.fromkeys(ends))
            generation["eos_token_id"] = unique if len(unique) > 1 else unique[0]
        return {
            **tokenizer_files(self._metadata, self.name, self.config["max_position_embeddings"]),
            "generation_config.json": (json.dumps(generation, indent=2) + "\n").encode(),
        }

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.float32, self._entry(name)[1].shape

    def tensor(self, name: str) -> torch.Tensor:
        stored, entry = self._entry(name)
        values = self._read(entry)
        part = stored.split(".")[-2]
        if _ARCHITECTURES[self._arch][2] and part in ("attn_q", "attn_k"):
            heads = self.config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            # [heads, D/2, 2, ...] -> [heads, 2, D/2, ...]
            values = values.reshape(heads, values.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(entry.shape)
        return torch.from_numpy(np.ascontiguousarray(values))

    def _entry(self, name: str) -> tuple[str, GgufTensor]:
        try:
            return self._tensors[name]
        except KeyError:
            raise UserError(f"tensor {name} is not in {self.name}; the checkpoint is incomplete") from None

    def _read(self, entry: GgufTensor) -> np.ndarray:
        raw = np.fromfile(entry.path, dtype=np.uint8, count=entry.size, offset=entry.start)
        if entry.kind == gguf.GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(entry.shape)
        if entry.kind == gguf.GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32).reshape(entry.shape)
        rows = math.prod(entry.shape[:-1])
        return gguf.dequantize(raw.reshape(rows, -1), entry.kind).reshape(entry.shape)

    def _check_readable(self, kind: gguf.GGMLQuantizationType) -> None:
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            return
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise UserError(
                f"{self.path} stores tensors as {kind.name}, which the gguf library cannot dequantize; "
                "give another quantization of the model"
            ) from None

    def _key(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(f"{self._arch}.{key}", default)
        if value is None:
            raise UserError(f"{self.path} has no {self._arch}.{key} in its metadata; the file is incomplete")
        return value

    def _config(self) -> dict[str, Any]:
        model_type, architecture, _ = _ARCHITECTURES[self._arch]
        if model_type == "llama" and str(self._metadata.get("general.basename", "")).lower() == "mistral":
            model_type, architecture, _ = _ARCHITECTURES["mistral"]  # llama.cpp files Mistral under llama
        hidden, heads = self._key("embedding_length"), self._key("attention.head_count")
        head_dim = self._metadata.get(f"{self._arch}.attention.key_length") or hidden // heads
        context = self._key("context_length")
        config: dict[str, Any] = {
            "architectures": [architecture],
            "model_type": model_type,
            "dtype": "float32",
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": self._key("feed_forward_length"),
            "num_hidden_layers": self._key("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._key("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": context,
            "rms_norm_eps": self._key("attention.layer_norm_rms_epsilon"),
            "vocab_size": self._entry("model.embed_tokens.weight")[1].shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **self._rope(head_dim, context),
            **{
                f"{name}_token_id": number
                for name, number in special_token_ids(self._metadata).items()
                if name in ("bos", "eos", "pad")
            },
        }
        if self._key("rope.dimension_count", head_dim) != head_dim:
            raise UserError(
                f"{self.path} rotates {self._key('rope.dimension_count')} of {head_dim} channels a head; "
                "partial rotary embeddings are not supported"
            )
        if model_type in ("llama", "qwen3"):
            config["attention_bias"] = any(name.endswith(".self_attn.q_proj.bias") for name in self._tensors)
        if model_type == "llama":
            config["mlp_bias"] = any(name.endswith(".mlp.gate_proj.bias") for name in self._tensors)
        if model_type == "mistral":
            config["sliding_window"] = self._metadata.get(f"{self._arch}.attention.sliding_window")
        if isinstance(named := self._metadata.get("general.license"), str):
            config["license"] = named  # read by `push`; engines ignore it
        return config

    def _rope(self, head_dim: int, context: int) -> dict[str, Any]:
        """`rope_parameters` (transformers 5) and the legacy `rope_theta` / `rope_scaling` with the same content."""
        theta = float(self._key("rope.freq_base", 10000.0))
        scaling = self._rope_scaling(theta, head_dim, context)
        parameters = {"rope_type": "default", "rope_theta": theta, **scaling}
        return {"rope_parameters": parameters, "rope_theta": theta, "rope_scaling": scaling or None}

    def _rope_scaling(self, theta: float, head_dim: int, context: int) -> dict[str, Any]:
        prefix = "rope.scaling."
        kind = str(self._key(prefix + "type", "none"))
        if self._divisors is not None:
            return self._llama3_scaling(self._divisors, theta, head_dim)
        if kind == "none":
            return {}
        factor = float(self._key(prefix + "factor"))
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            scaling: dict[str, Any] = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": int(
                    self._key(prefix + "original_context_length", round(context / factor))
                ),
                "beta_fast": float(self._key(prefix + "yarn_beta_fast", 32.0)),
                "beta_slow": float(self._key(prefix + "yarn_beta_slow", 1.0)),
            }
            for key in ("yarn_attn_factor", "attn_factor"):  # llama.cpp multiplies this onto YaRN's own temperature
                if (extra := self._metadata.get(f"{self._arch}.{prefix}{key}")) is not None:
                    scaling["attention_factor"] = float(extra) * (0.1 * math.log(factor) + 1.0)
                    break
            return scaling
        raise UserError(f"{self.path} has rope.scaling.type {kind!r}, expected none, linear or yarn")

    def _llama3_scaling(self, table: GgufTensor, theta: float, head_dim: int) -> dict[str, Any]:
        """Recovers the llama3 parameters from the divisors and checks that they reproduce every one of them."""
        divisors = self._read(table).reshape(-1).astype(np.float64)
        factor = float(divisors.max())
        low, high = _LLAMA3_BANDS["low_freq_factor"], _LLAMA3_BANDS["high_freq_factor"]
        turns = _LLAMA3_BANDS["original_max_position_embeddings"] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((turns / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
        expected = 1.0 / ((1.0 - smooth) / factor + smooth)
        if expected.shape != divisors.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise UserError(
                f"{self.path} has a {_ROPE_DIVISORS} table that is not Llama 3.1 scaling of an 8192 window; "
                "convert the original checkpoint instead"
            )
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3_BANDS}


def _with_other_parts(path: Path, header: GgufHeader) -> dict[str, GgufTensor]:
    """All tensors of a model in one or several files; the first of several holds the metadata and names the rest."""
    count = header.metadata.get("split.count", 1)
    if count <= 1:
        return dict(header.tensors)
    first = f"-00001-of-{count:05d}.gguf"
    if not path.name.endswith(first):
        raise UserError(f"{path} is one of {count} parts of a model; give the part whose name ends in {first}")
    tensors = dict(header.tensors)
    for number in range(2, count + 1):
        part = path.with_name(path.name.removesuffix(first) + f"-{number:05d}-of-{count:05d}.gguf")
        if not part.is_file():
            raise UserError(f"{part} is missing though the model has {count} parts; fetch it too")
        tensors |= read_gguf_header(part).tensors
    if len(tensors) != (total := header.metadata.get("split.tensors.count", len(tensors))):
        raise UserError(f"the {count} parts of {path} hold {len(tensors)} tensors, expected {total}; fetch them again")
    return tensors


def _hf_name(name: str, path: Path) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case [part, ("weight" | "bias") as kind] if part in _TOP:
            return f"{_TOP[part]}.{kind}"
        case ["blk", layer, part, ("weight" | "bias") as kind] if part in _BLOCK and layer.isdigit():
            return f"model.layers.{layer}.{_BLOCK[part]}.{kind}"
    raise UserError(f"{path} holds tensor {name}, which no supported architecture has; convert the original checkpoint")
