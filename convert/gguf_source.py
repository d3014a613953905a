"""A GGUF file as a `TensorSource`: HF tensor names, HF row order, float32, and the config.json the file implies.

Every storage type the `gguf` library can dequantize is read, one tensor at a time; packed integers are not kept.
The surprising rule: RoPE scaling need not be in the metadata at all. A table of divisors (`rope_freqs.weight`) is read
as Llama 3.1's scaling where it is that, and else as a LongRoPE table, which says the same thing of any length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from lcconvert.convert.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from lcconvert.convert.gguf_names import ARCHITECTURES, ROPE_DIVISORS, hf_name, row_order
from lcconvert.convert.gguf_tokenizer import special_token_ids, tokenizer_files
from lcconvert.runtime.errors import UserError

_BLOCK_BYTES = 1 << 26  # float32 bytes of a tensor dequantized at a time; the library makes several copies
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
        if self._arch not in ARCHITECTURES:
            raise UserError(
                f"{path} holds architecture {self._arch!r}, expected one of {', '.join(ARCHITECTURES)}; "
                "convert the original checkpoint instead"
            )
        self._divisors = stored.pop(ROPE_DIVISORS, None)
        self._tensors = {_hf_name(name, path): entry for name, entry in stored.items()}
        for kind in sorted({entry.kind for entry in self._tensors.values()}):
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

    def kinds(self) -> list[str]:
        """The storage types of its matrices, such as BF16 or Q4_0."""
        return sorted({entry.kind.name for entry in self._tensors.values() if len(entry.shape) > 1})

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.float32, self._entry(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        entry = self._entry(name)
        values = self._read(entry)
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        order = row_order(name, self._arch, len(values), heads, kv_heads)
        if order is not None:
            stored, values = values, np.empty_like(values)
            values[order] = stored
        return torch.from_numpy(values)

    def raw_blocks(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """A tensor as the file holds it, rows in its own order, some MB at a time.

        Yields the stored bytes, uint8 [rows, bytes of a row], and their values, float32 [rows, width].
        """
        return self._blocks(self._entry(name))

    def _entry(self, name: str) -> GgufTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise UserError(f"tensor {name} is not in {self.name}; the checkpoint is incomplete") from None

    def _read(self, entry: GgufTensor) -> np.ndarray:
        values = np.empty((math.prod(entry.shape[:-1]), entry.shape[-1]), np.float32)
        at = 0
        for _, block in self._blocks(entry):
            values[at : at + len(block)] = block
            at += len(block)
        return values.reshape(entry.shape)

    def _blocks(self, entry: GgufTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows, width = math.prod(entry.shape[:-1]), entry.shape[-1]
        row_bytes, step = entry.size // rows, max(1, _BLOCK_BYTES // (4 * width))
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            for start in range(0, rows, step):
                raw = np.fromfile(file, np.uint8, count=min(step, rows - start) * row_bytes)
                raw = raw.reshape(-1, row_bytes)
                yield raw, gguf.dequantize(raw, entry.kind)

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
        model_type, architecture = ARCHITECTURES[self._arch]
        if model_type == "llama" and str(self._metadata.get("general.basename", "")).lower() == "mistral":
            model_type, architecture = ARCHITECTURES["mistral"]  # llama.cpp files Mistral under llama
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
            "vocab_size": self._entry("model.embed_tokens.weight").shape[0],
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
            return self._scaling_by_table(self._divisors, theta, head_dim, context)
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
            # llama.cpp multiplies YaRN's own temperature by the key; written out, as engines fill it in differently
            extra = float(self._key(prefix + "attn_factor", 1.0))
            scaling["attention_factor"] = extra * (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
            return scaling
        raise UserError(f"{self.path} has rope.scaling.type {kind!r}, expected none, linear or yarn")

    def _scaling_by_table(self, table: GgufTensor, theta: float, head_dim: int, context: int) -> dict[str, Any]:
        """llama3 if its parameters, recovered from the table, reproduce every divisor; else the table itself."""
        divisors = self._read(table).reshape(-1).astype(np.float64)
        if divisors.shape != (head_dim // 2,) or not (np.isfinite(divisors) & (divisors > 0)).all():
            raise UserError(
                f"{self.path} has a {ROPE_DIVISORS} table of {len(divisors)} values, expected {head_dim // 2} positive "
                "ones (half a head); fetch it again"
            )
        factor = float(divisors.max())
        low, high = _LLAMA3_BANDS["low_freq_factor"], _LLAMA3_BANDS["high_freq_factor"]
        turns = _LLAMA3_BANDS["original_max_position_embeddings"] * theta ** (-np.arange(0, head_dim, 2) / head_dim)
        smooth = np.clip((turns / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
        scale = float(self._key("rope.scaling.attn_factor", 1.0))
        if scale == 1.0 and np.allclose(divisors, 1.0 / ((1.0 - smooth) / factor + smooth), rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3_BANDS}
        original = int(self._key("rope.scaling.original_context_length", context))
        return {
            "rope_type": "longrope",
            "short_factor": divisors.tolist(),
            "long_factor": divisors.tolist(),
            "factor": context / original,
            "original_max_position_embeddings": original,
            "attention_factor": scale,
        }


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
    if (known := hf_name(name)) is None:
        raise UserError(
            f"{path} holds tensor {name}, which no supported architecture has; convert the original checkpoint"
        )
    return known
