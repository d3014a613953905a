"""A checkpoint as an ONNX folder: model.onnx, model.onnx.data, genai_config.json, and the tokenizer files unchanged.

Weights stream from the checkpoint to the data file one tensor at a time. Stored int4 codes are copied; fp8 weights (a
`pro` artifact) are expanded to floats, since onnxruntime's CPU provider has no fp8 product, so only the weights' own
rounding remains and not that of the activations. The KV cache is float32 whatever the artifact's own scheme is, or
float16 when everything is (precision fp16).

Surprising rule: `max_length` in genai_config.json is not the context. A runtime may reserve the cache for it, and
1,048,576 tokens of an 8B model would be 256 GiB, so it is what fits 4 GiB; callers raise it up to `context_length`.
Prompts are read in chunks, because a prompt's logits at once are S x V (8 GB for 16K tokens of Llama's vocabulary).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch

from lcconvert.convert.export_weights import GROUP_SIZES, ExportWeights
from lcconvert.convert.onnx_check import check_files, compare_logits
from lcconvert.convert.onnx_data import ExternalData
from lcconvert.convert.onnx_graph import decoder_graph
from lcconvert.convert.progress import progress
from lcconvert.convert.writer import new_folder
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.sidecar import NAME as SIDECAR
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lcconvert.convert.export import ExportConfig

MODEL, DATA = "model.onnx", "model.onnx.data"
_COMPARE_WEIGHTS = 10**9
_RESERVED_CACHE_BYTES = 4 << 30
_PROMPT_CHUNK = 512  # tokens
_GENAI_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_SAMPLING = ("temperature", "top_k", "top_p")  # a repetition penalty would change greedy decoding too


def export_onnx(source: TensorSource, sidecar: Sidecar, out: Path, config: ExportConfig) -> Path:
    """Writes and checks the folder `out`; what the comparison found is recorded in its lcconvert.json."""
    weights = ExportWeights(source)
    spec = weights.spec
    if spec.routed:
        raise UserError(f"{source.name} has experts, which the ONNX graph does not compute; export it to safetensors")
    rows = config.max_length or spec.max_position
    if rows > spec.max_position:
        raise UserError(
            f"max_length is {rows} but {source.name} is configured for {spec.max_position} tokens; extend it first"
        )
    int4 = config.precision == "int4" or (config.precision == "auto" and weights.stores_int4)
    float_type = torch.float16 if config.precision == "fp16" else torch.float32
    if int4:
        _refuse_other_groups(weights)
    comparing = _will_compare(spec, config)
    genai = genai_config(spec, source.config, rows, files=source.files, float_type=float_type)
    need = _bytes_needed(spec, rows, int4, float_type.itemsize)
    with new_folder(out, need_bytes=need) as folder:
        with ExternalData(folder / DATA, float_type) as data, progress("export onnx", spec.num_layers, "layers") as bar:
            model = decoder_graph(
                weights, data, rows=rows, int4_group=config.group_size if int4 else None, step=bar.advance
            )
        onnx.save_model(model, str(folder / MODEL))
        check_files(folder / MODEL, data.digests)
        found = "not run"
        if comparing:
            difference = compare_logits(folder / MODEL, spec, rows)
            found = f"largest logit difference {difference:.2g} in onnxruntime {version('onnxruntime')}"
        precision = "int4" if int4 else "fp16" if float_type == torch.float16 else "fp32"
        _write_files(folder, source, sidecar, genai, {"precision": precision, "comparison": found})
    return out


def genai_config(
    spec: ModelSpec,
    config: dict[str, Any],
    rows: int,
    *,
    files: Mapping[str, bytes] | None = None,
    float_type: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """What onnxruntime-genai reads. `rows` positions are addressable; generation stops at `max_length` unless told.

    It stops at the ids our own engine stops at: those of config.json, generation_config.json and the tokenizer (in
    `files`). It decodes greedily, as ours does by default; the sampling values of generation_config.json are there for
    callers that turn `do_sample` on.
    """
    files = files or {}
    stops = Tokenizer.from_files(files).eos_ids if "tokenizer.json" in files else ()
    eos = list(dict.fromkeys((*spec.eos_ids, *stops)))
    pad = config.get("pad_token_id")
    tokens: dict[str, Any] = {} if spec.bos_id is None else {"bos_token_id": spec.bos_id}
    if eos:
        tokens |= {"eos_token_id": eos if len(eos) > 1 else eos[0], "pad_token_id": eos[0] if pad is None else pad}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "num_hidden_layers": spec.num_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    known = spec.family if spec.family in _GENAI_TYPES else "llama"  # a plain decoder to onnxruntime-genai
    model = {"type": known, "vocab_size": spec.vocab_size, "context_length": rows, **tokens, "decoder": decoder}
    wanted = json.loads(files.get("generation_config.json", b"{}"))
    search = {
        "max_length": reserved_length(spec, rows, float_type.itemsize),
        "chunk_size": _PROMPT_CHUNK,
        "past_present_share_buffer": True,
        "do_sample": False,
        **{name: wanted[name] for name in _SAMPLING if wanted.get(name) is not None},
    }
    return {"model": model, "search": search}


def reserved_length(spec: ModelSpec, rows: int, value_bytes: int = 4) -> int:
    """The largest power of two of tokens whose KV cache (float32, or `value_bytes` a value) takes at most 4 GiB, and
    at most `rows`."""
    fitting = _RESERVED_CACHE_BYTES // (value_bytes * spec.kv_values_per_token)
    return min(rows, 1 << (fitting.bit_length() - 1)) if fitting else 1


def _will_compare(spec: ModelSpec, config: ExportConfig) -> bool:
    if config.compare == "never":
        return False
    try:
        version("onnxruntime")
    except PackageNotFoundError:
        if config.compare == "auto":
            return False
        raise UserError("compare is 'always' but onnxruntime is not installed; run `pip install onnxruntime`") from None
    return config.compare == "always" or spec.parameters() <= _COMPARE_WEIGHTS


def _refuse_other_groups(weights: ExportWeights) -> None:
    for _, form in weights.layout.groups:
        if form.kind == "int4" and form.group_size not in GROUP_SIZES:
            raise UserError(
                f"{weights.source.name} has int4 groups of {form.group_size}, onnxruntime computes with groups of "
                f"{', '.join(str(size) for size in reversed(GROUP_SIZES))}; export it with precision fp32 or fp16"
            )


def _bytes_needed(spec: ModelSpec, rows: int, int4: bool, value_bytes: int) -> int:
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tied_head else 2)
    linear = spec.parameters() - embeddings
    return value_bytes * (embeddings + rows * spec.head_dim) + (linear * 5 // 8 if int4 else value_bytes * linear)


def _write_files(
    folder: Path, source: TensorSource, sidecar: Sidecar, genai: dict[str, Any], found: dict[str, str]
) -> None:
    """config.json, tokenizer and sidecar; the config describes the model, its quantization block only the source."""
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    step = sidecar.provenance["export"] | found
    sidecar = sidecar.model_copy(update={"provenance": sidecar.provenance | {"export": step}})
    for name, value in {"config.json": config, "genai_config.json": genai}.items():
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, content in source.files.items():
        (folder / name).write_bytes(content)
    (folder / SIDECAR).write_bytes(sidecar.to_bytes())
