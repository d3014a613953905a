"""`lcconvert inspect`: what a checkpoint really is, what it would need, and what is wrong with it. Reads no weights.

`--verify` instead reads every byte of an artifact and compares it with the hashes its conversion recorded.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lcconvert.convert.checkpoint import hub_folder, is_hub_id, open_checkpoint
from lcconvert.convert.compressed_kv import ARCHITECTURE, compressed_kv
from lcconvert.convert.hashing import verify_files
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.paths import plain_parts
from lcconvert.runtime.plan import PARTS, VARIANTS, kv_bytes_per_token, longest_context, plan_variant
from lcconvert.runtime.rope import inv_freq
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec, positive
from lcconvert.runtime.units import format_bytes, format_count


def inspect(src: str, *, context: int | None = None, gpu_bytes: int = 80 * 10**9) -> dict[str, Any]:
    """Architecture, RoPE as applied, KV bytes per token, a memory plan per variant at `context`, and faults found."""
    source = open_checkpoint(src)
    if source.config.get("architectures") == [ARCHITECTURE]:
        return _inspect_compressed(source, context)
    spec = ModelSpec.from_config(source.config)
    context = context or spec.max_position
    freq, scale = inv_freq(spec.rope, spec.head_dim)
    plans, impossible = {}, []
    for variant in VARIANTS:
        try:
            plans[variant] = plan_variant(spec, variant, context, gpu_bytes)
        except UserError as error:
            impossible.append(str(error))
    return {
        "source": source.name,
        "family": spec.family,
        "parameters": spec.parameters(),
        "layers": spec.num_layers,
        "heads": [spec.num_heads, spec.num_kv_heads],
        "head_dim": spec.head_dim,
        "vocab": spec.vocab_size,
        "context": spec.max_position,
        "bytes_on_disk": _stored_bytes(source),
        "quantization": (source.config.get("quantization_config") or {}).get("format"),
        "rope": {
            "kind": spec.rope.kind,
            "theta": spec.rope.theta,
            "factor": spec.rope.factor,
            "original_context": spec.rope.original_max_position,
            "attention_scale": scale,
            "longest_wavelength": round(2 * math.pi / float(freq[freq > 0].min())),
        },
        "beyond_llama": list(spec.beyond_plain),
        "without_kernel": plain_parts(spec),
        "kv_bytes_per_token": {s: kv_bytes_per_token(spec, s) for s in ("bf16", "fp8", "int4", "k8v4")},
        "plan_context": context,
        "plans": {v: p.as_dict() for v, p in plans.items()},
        "longest_context": {v: longest_context(spec, v, gpu_bytes) for v in plans},
        "faults": [*find_faults(source, spec), *impossible],
    }


def _inspect_compressed(source: TensorSource, context: int | None) -> dict[str, Any]:
    """What is known of a model that is only planned for, at one context for all."""
    context = context or positive(source.config, "max_position_embeddings")
    return {
        "source": source.name,
        "family": source.config.get("model_type"),
        "bytes_on_disk": _stored_bytes(source),
        "plan_context": context,
        **compressed_kv(source.config, context),
    }


def _stored_bytes(source: TensorSource) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in map(source.info, source.names()))


def verify(src: str) -> dict[str, str]:
    """SHA-256 by path of every file of the artifact `src`, a folder or a Hub id, once all of them are as recorded.

    CheckFailed names the files that are missing, changed or extra; UserError when `src` records no hashes.
    """
    folder = Path(src).expanduser()
    if not folder.is_dir():
        if folder.exists() or not is_hub_id(src):
            raise UserError(f"{src} is no folder and no Hub id; give the output folder of a conversion to verify")
        folder = hub_folder(src, whole=True)
    return verify_files(folder)


def find_faults(source: TensorSource, spec: ModelSpec) -> list[str]:
    """Sentences on fields that would make engines disagree or prompts be cut."""
    faults = []
    config, rope = source.config, spec.rope
    if "tokenizer.json" not in source.files:
        faults.append("no tokenizer.json: nothing can be generated or validated")
    else:
        settings = json.loads(source.files.get("tokenizer_config.json", b"{}"))
        limit = settings.get("model_max_length")
        if isinstance(limit, int) and limit < spec.max_position:
            faults.append(f"tokenizer_config.json: model_max_length {limit} is below the context {spec.max_position}")
        if "chat_template.jinja" not in source.files and not settings.get("chat_template"):
            faults.append("no chat template: prompts are completed as plain text")
    new, old = config.get("rope_parameters") or {}, config.get("rope_theta")
    new = new.get("full_attention", new)  # of layers that see everything, where others have their own
    scaling = new or config.get("rope_scaling") or {}
    if rope.kind == "yarn":
        absent = [k for k in ("beta_fast", "beta_slow", "attention_factor") if scaling.get(k) is None]
        if absent:
            faults.append(f"YaRN field {absent[0]} is absent: engines fill it in differently")
        assert rope.factor is not None
        assert rope.original_max_position is not None
        reach = round(rope.factor * rope.original_max_position)
        if reach != spec.max_position:
            faults.append(f"YaRN reaches {reach} tokens but max_position_embeddings is {spec.max_position}")
    if old is not None and new.get("rope_theta") not in (None, old):
        faults.append(f"rope_theta is {old} but rope_parameters.rope_theta is {new['rope_theta']}")
    if "generation_config.json" not in source.files and not spec.eos_ids:
        faults.append("no end-of-text token is named: answers run to the token limit")
    if rope.kind == "longrope" and rope.short_factor not in (None, rope.long_factor):
        original = rope.original_max_position
        faults.append(
            f"LongRoPE: texts up to {original} tokens are read with long_factor here, by others with short_factor"
        )
    claim = Sidecar.read(source).context
    if claim.validated is not None and claim.validated < claim.configured:
        faults.append(
            f"configured for {format_count(claim.configured)} tokens, validated to {format_count(claim.validated)}"
        )
    return faults


def render(report: dict[str, Any], gpu_bytes: int) -> str:
    """The report as text for a terminal."""
    if "kv_total" in report:
        return _render_compressed(report)
    rope = report["rope"]
    lines = [
        f"{report['source']}",
        f"  {report['family']}, {report['parameters'] / 1e6:.1f}M parameters, {report['layers']} layers, "
        f"{report['heads'][0]}/{report['heads'][1]} heads of {report['head_dim']}, vocabulary {report['vocab']}, "
        f"{format_bytes(report['bytes_on_disk'])} of tensors"
        + (f", {report['quantization']}" if report["quantization"] else ""),
        f"  context {format_count(report['context'])}; RoPE {rope['kind']}, theta {rope['theta']:g}"
        + (f", factor {rope['factor']:g} over {rope['original_context']}" if rope["factor"] else "")
        + f", attention scale {rope['attention_scale']:.4g}, longest wavelength {rope['longest_wavelength']:,} tokens",
        *(f"  has {', '.join(report['beyond_llama'])}" for _ in report["beyond_llama"][:1]),
        *(f"  without a kernel: {text}" for text in report["without_kernel"]),
        "  KV bytes per token: " + ", ".join(f"{k} {v:,.0f}" for k, v in report["kv_bytes_per_token"].items()),
        f"  memory at {format_count(report['plan_context'])} tokens on {format_bytes(gpu_bytes)}:",
    ]
    for variant, p in report["plans"].items():
        parts = ", ".join(f"{k.replace('_', ' ')} {format_bytes(p[k])}" for k in PARTS if p[k])
        verdict = "fits" if p["fits"] else "does not fit"
        longest = format_count(report["longest_context"][variant])
        lines.append(f"    {variant:7}{format_bytes(p['total']):>9} {verdict} ({parts}); longest {longest}")
        lines.append(
            f"           {p['kv_scheme']} KV, prefill in chunks of {p['chunk_rows']:,} rows, hidden states "
            + (f"in {format_bytes(p['host_pinned'])} of pinned host memory" if p["offload"] else "on the GPU")
        )
    lines += [f"  fault: {fault}" for fault in report["faults"]] or ["  no faults found"]
    return "\n".join(lines)


def _render_compressed(report: dict[str, Any]) -> str:
    layers = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in report["layers"].items())
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in report["kv_bytes"].items())
    return (
        f"{report['source']}\n"
        f"  {report['family']}, {format_bytes(report['bytes_on_disk'])} of tensors; layers: {layers}\n"
        f"  KV cache at {format_count(report['plan_context'])} tokens in 16 bit: {format_bytes(report['kv_total'])} "
        f"({parts})\n"
        "  only planned for: nothing here runs it, and there is nothing to extend"
    )
