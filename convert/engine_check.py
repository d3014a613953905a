"""`lcconvert export SRC --check ENGINE`: what an engine will read from an artifact, and how to serve it, without the
engine. vLLM and transformers and SGLang read the safetensors folder itself, llama.cpp and onnxruntime an export of it.

Engines drop what they do not know without a word: a KV scale, a factor on cos and sin, a 4-bit cache. So this says what
is read, what is not used, what is computed otherwise, and what would stop the engine.
What the engines do is known from their sources: vLLM 0.33, transformers 5.24 with compressed-tensors 0.20, SGLang
0.5.23, llama.cpp of llama-cpp-python 0.3.36, onnxruntime 1.32. Left out: kernels, speed, memory other than the cache.
"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.engine_rope import EngineRope, engine_rope
from lcconvert.convert.export_weights import GROUP_SIZES
from lcconvert.convert.gguf_source import GgufSource
from lcconvert.convert.inspect import find_faults
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.families import family_of
from lcconvert.runtime.linear import QuantLayout
from lcconvert.runtime.model import Decoder
from lcconvert.runtime.plan import kv_bytes_per_token
from lcconvert.runtime.sidecar import NAME as SIDECAR
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.stored import decoder_source
from lcconvert.runtime.units import format_bytes, format_count

ENGINES = ("vllm", "transformers", "sglang", "llama.cpp", "onnxruntime")
_NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
_OF_FOLDER = ("vllm", "transformers", "sglang")  # read the safetensors folder
_FUSED = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
_MARLIN_GROUPS = (32, 64, 128)  # int4 groups that vLLM's and SGLang's kernels take
_GENAI = (
    'import onnxruntime_genai as og; m = og.Model("{0}"); t = og.Tokenizer(m); s = t.create_stream(); '
    "p = og.GeneratorParams(m); p.set_search_options(max_length={1}); g = og.Generator(m, p); "
    'g.append_tokens(t.encode(input("prompt: "))); [print(s.decode(g.get_next_tokens()[0]), end="", flush=True) '
    "for _ in iter(g.is_done, True) if g.generate_next_token() is None]"
)


@dataclass
class Reading:
    """`context`: tokens the engine takes by itself, and `served` those of `commands`. `kv_bytes`: of that context.

    `not_used`, `otherwise` (computed, but not as here) and `refused` (the engine stops) are sentences.
    """

    engine: str
    source: str
    context: int
    served: int
    validated: int | None
    rope: EngineRope
    weights: list[str]
    kv_cache: str
    kv_scales: str
    kv_bytes: int
    not_used: list[str] = field(default_factory=list)
    otherwise: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_engine(src: str, engine: str) -> Reading:
    """Reads headers, config and KV scales of `src`; UserError for an unknown engine or what is not a checkpoint."""
    if engine not in ENGINES:
        raise UserError(f"engine is {engine!r}, expected one of {', '.join(ENGINES)}")
    if engine == "onnxruntime" and (Path(src).expanduser() / "model.onnx").is_file():
        return _read_onnx_folder(src)
    return _Artifact(src, engine).reading()


def _read_onnx_folder(src: str) -> Reading:
    """An ONNX export itself."""
    from lcconvert.convert.engine_check_onnx import read_onnx

    folder = Path(src).expanduser()
    spec, context, served, rope, weights = read_onnx(folder)
    recorded = folder / SIDECAR
    result = Reading(
        engine="onnxruntime",
        source=src,
        context=context,
        served=served,
        validated=Sidecar.parse(recorded.read_bytes(), src).context.validated if recorded.is_file() else None,
        rope=rope,
        weights=weights,
        kv_cache="float32",
        kv_scales="none",
        kv_bytes=4 * spec.kv_values_per_token * served,
        commands=[f"python -c {shlex.quote(_GENAI.format(src, served))}"],
    )
    if max(rope.error.values()) > 1e-5:
        result.otherwise.append("the baked rotary table is not that of config.json; export the checkpoint again")
    return result


class _Artifact:
    def __init__(self, src: str, engine: str):
        self.engine, self.name = engine, _NAMES.get(engine, engine)
        path = Path(src).expanduser()
        if engine == "llama.cpp" and path.is_dir() and len(found := sorted(path.glob("*.gguf"))) == 1:
            src = str(found[0])  # the folder of a GGUF export
        self.src = src
        self.source: TensorSource = open_checkpoint(src)
        self.spec = ModelSpec.from_config(self.source.config)
        self.layout = QuantLayout.from_config(self.source.config)
        self.sidecar = Sidecar.read(self.source)
        stated = str(self.source.config.get("dtype") or self.source.config.get("torch_dtype"))
        self.dtype = torch.float16 if stated == "float16" else torch.bfloat16
        self.type_name = str(self.dtype).removeprefix("torch.")

    def reading(self) -> Reading:
        result = Reading(
            engine=self.engine,
            source=self.source.name,
            context=self._context(),
            served=self._served(),
            validated=self.sidecar.context.validated,
            rope=engine_rope(self.engine, self.spec, self.dtype),
            weights=self._weights(),
            kv_cache=self.type_name,
            kv_scales="none",
            kv_bytes=0,
            faults=find_faults(self.source, self.spec),
            commands=self._commands(),
        )
        self._read_kv(result)
        self._read_rope(result)
        self._read_tensors(result)
        self._read_sidecar(result)
        return result

    @cached_property
    def linear(self) -> dict[str, str]:
        """Linear layer -> "int4 by groups of 128", "fp8" or "16 bit"."""
        names = []
        for number in range(self.spec.num_layers):
            routed = range(self.spec.num_experts) if number in self.spec.routed else None
            mlps = ["mlp"] if routed is None else [f"mlp.experts.{expert}" for expert in routed]
            parts = [("self_attn", (*_FUSED[0][1], "o_proj")), *((mlp, (*_FUSED[1][1], "down_proj")) for mlp in mlps)]
            names += [f"model.layers.{number}.{part}.{leaf}" for part, leaves in parts for leaf in leaves]
        found = {}
        for name in names:
            form = self.layout.format_of(name)
            kind = "16 bit" if form is None else form.kind
            found[name] = f"int4 by groups of {form.group_size}" if form and form.kind == "int4" else kind
        return found

    def _context(self) -> int:
        rope = self.spec.rope
        if rope.kind == "linear" and self.engine in ("vllm", "sglang"):
            return int(self.spec.max_position * (rope.factor or 1.0))
        return self.spec.max_position

    def _served(self) -> int:
        if self.engine == "onnxruntime":
            from lcconvert.convert.onnx_export import reserved_length

            return reserved_length(self.spec, self.spec.max_position)
        return self.spec.max_position

    def _weights(self) -> list[str]:
        return [f"{count} linear layers {self._scheme(kind)}" for kind, count in Counter(self.linear.values()).items()]

    def _scheme(self, kind: str) -> str:
        if isinstance(self.source, GgufSource):
            stored = ", ".join(self.source.kinds())
            return f"as the file stores them ({stored})" if self.engine == "llama.cpp" else f"expanded from {stored}"
        if kind == "16 bit":
            return "in float32" if self.engine == "onnxruntime" else f"in {self.type_name}"
        match self.engine, kind:
            case "llama.cpp", "fp8":
                return "fp8, in the export expanded to BF16"
            case "llama.cpp", _:
                return f"{kind}, in the export Q4_0 of the same codes"
            case "onnxruntime", "fp8":
                return "fp8, in the export expanded to float32"
            case "onnxruntime", _:
                return f"{kind}, in the export MatMulNBits of the same bytes"
            case "transformers", _:
                return f"{kind}, through compressed-tensors, which expands them to {self.type_name} on first use"
            case _, "fp8":
                return "fp8 e4m3 by channel, activations fp8 by token (W8A8; below compute capability 8.9: W8A16)"
        return f"{kind}, symmetric, activations in {self.type_name} (WNA16)"

    def _read_kv(self, result: Reading) -> None:
        layers, fp8 = range(self.spec.num_layers), (self.source.config.get("quantization_config") or {})
        scheme = fp8.get("kv_cache_scheme")
        present = set(self.source.names())
        both = [f"model.layers.{n}.self_attn." for n in layers]
        found = [p for p in both if {p + "k_scale", p + "v_scale"} <= present]
        values = [self.source.tensor(p + which).flatten() for p in found for which in ("k_scale", "v_scale")]
        stored = "bf16"
        if self.engine == "vllm" and scheme:
            stored, result.kv_cache = "fp8", "fp8 e4m3"
            by_head = scheme.get("strategy") == "attn_head"
            each = "per KV head (needs FlashAttention 3: Hopper or newer)" if by_head else "per layer"
            spread = f", {float(min(v.min() for v in values)):.3g} to {float(max(v.max() for v in values)):.3g}"
            result.kv_scales = f"{len(found)} of {len(layers)} layers, {each}" + (spread if values else "")
            if missing := sorted(set(both) - set(found)):
                result.otherwise.append(
                    f"{missing[0]}k_scale or v_scale is missing ({len(missing)} layers): vLLM takes 1.0 without a word"
                )
        elif found:
            if self.engine == "vllm" and any(v.numel() > 1 for v in values):
                result.refused.append(
                    f"{found[0]}k_scale has {values[0].numel()} values and no kv_cache_scheme names them, which stops "
                    "vLLM's loader; quantize again"
                )
            result.not_used.append(
                f"calibrated KV scales ({len(found)} layers): "
                + {
                    "sglang": f"SGLang reads one per layer, not one per head, and keeps the cache in {self.type_name}",
                    "transformers": f"reported as unexpected tensors, the cache is in {self.type_name}",
                    "vllm": f"without a kv_cache_scheme the cache is in {self.type_name}",
                }.get(self.engine, "the export does not carry them")
            )
        per_token = kv_bytes_per_token(self.spec, stored)
        if self.engine == "onnxruntime":
            result.kv_cache, per_token = "float32", per_token * 2
        elif self.engine == "llama.cpp":
            result.kv_cache = "float16 (-ctk q8_0 -ctv q8_0 halve it)"
        result.kv_bytes = int(per_token * result.served)

    def _read_rope(self, result: Reading) -> None:
        rope, context = self.spec.rope, self.spec.max_position
        if abs(result.rope.scale - rope.attention_scale) > 1e-4:
            result.otherwise.append(
                f"attention_factor {rope.attention_scale:.4g} is not read: {self.name} multiplies cos and sin by "
                f"{result.rope.scale:.4g}"
            )
        if result.context != context:
            result.otherwise.append(
                f"{self.name} multiplies max_position_embeddings {context} by the linear factor and would take "
                f"{result.context} tokens; the command below limits it"
            )
        if self.engine == "vllm" and rope.kind == "yarn":
            rows = int((rope.original_max_position or 0) * (rope.factor or 1.0))
            if rows < context:
                result.refused.append(f"vLLM's table has {rows} positions, fewer than the context {context}")
        if self.engine == "transformers" and rope.kind == "longrope" and rope.short_factor != rope.long_factor:
            result.otherwise.append(
                f"texts up to {rope.original_max_position} tokens use short_factor; here long_factor serves any length"
            )
        if self.engine == "llama.cpp" and isinstance(self.source, GgufSource):
            if rope.kind == "yarn" and (rope.beta_fast, rope.beta_slow) != (32.0, 1.0):
                result.otherwise.append(
                    f"betas {rope.beta_fast:g} and {rope.beta_slow:g} are not read: llama.cpp takes 32 and 1"
                )
        elif self.engine == "llama.cpp":
            from lcconvert.convert.gguf_export import check_expressible, rope_scaling
            from lcconvert.convert.gguf_vocabulary import vocabulary_metadata

            try:
                check_expressible(self.spec, self.source.name)
                rope_scaling(self.spec, self.source.name)
                vocabulary_metadata(self.source.files, self.spec.vocab_size, self.source.name)
            except UserError as error:
                result.refused.append(str(error))

    def _read_tensors(self, result: Reading) -> None:
        """What is missing or has no place, by the names of the model that the config describes."""
        with torch.device("meta"):
            decoder = Decoder(self.spec, self.layout)
        wanted = {name for name, _ in (*decoder.named_parameters(), *decoder.named_buffers())}
        present = set(decoder_source(self.source, self.spec).names())
        if missing := sorted(wanted - present):
            result.refused.append(f"tensor {missing[0]} is missing ({len(missing)} in all)")
        beside = (".k_scale", ".v_scale", ".rotary_emb.inv_freq", "lm_head.weight")
        if extra := sorted(name for name in present - wanted if not name.endswith(beside)):
            result.refused.append(f"tensor {extra[0]} has no place in a {self.spec.family} model ({len(extra)} in all)")
        self._read_groups(result)
        if self.spec.routed and self.engine == "transformers" and self.layout.groups:
            result.refused.append("packed experts, which transformers has no place for and would make up")
        if self.spec.routed and self.engine == "onnxruntime":
            result.refused.append("experts, which the ONNX export does not compute")
        if self.engine not in ("vllm", "sglang"):
            return
        if family_of(self.source.config).stacked and self.layout.groups:
            result.refused.append(f"packed experts of {self.spec.family} by themselves, where all are wanted as one")
        for number in range(self.spec.num_layers):
            for part, leaves in _FUSED if number not in self.spec.routed else _FUSED[:1]:
                kinds = {leaf: self.linear[f"model.layers.{number}.{part}.{leaf}"] for leaf in leaves}
                if len(set(kinds.values())) > 1:
                    stored = ", ".join(f"{leaf} {kind}" for leaf, kind in kinds.items())
                    result.refused.append(f"model.layers.{number}.{part} is fused but stored as {stored}")
                    return

    def _read_groups(self, result: Reading) -> None:
        allowed = {"vllm": _MARLIN_GROUPS, "sglang": _MARLIN_GROUPS, "onnxruntime": GROUP_SIZES}.get(self.engine)
        for size in sorted({form.group_size for _, form in self.layout.groups if form.kind == "int4"}):
            if allowed is not None and size not in allowed:
                result.refused.append(
                    f"int4 groups of {size} have no kernel in {self.name}, which takes "
                    f"{', '.join(map(str, sorted(allowed)))}; quantize with --group-size 32"
                )
            elif self.engine == "llama.cpp" and size % 32:
                result.refused.append(f"int4 groups of {size} are not whole Q4_0 blocks of 32; export --precision bf16")

    def _read_sidecar(self, result: Reading) -> None:
        kv, attention = self.sidecar.kv.scheme, self.sidecar.attention.kind
        here = int(kv_bytes_per_token(self.spec, kv) * result.served)
        if kv in ("int4", "k8v4"):
            result.not_used.append(
                f"KV scheme {kv} of lcconvert.json: the cache takes {format_bytes(result.kv_bytes)} at "
                f"{format_count(result.served)} tokens, with `lcconvert serve` {format_bytes(here)}"
            )
        if attention == "hybrid":
            result.not_used.append("hybrid attention of lcconvert.json: every key is attended to")
        if self.sidecar.prefill_gemm == "fp8" and any(kind.startswith("int4") for kind in self.linear.values()):
            result.not_used.append("fp8 products in prefill of lcconvert.json")

    def _commands(self) -> list[str]:
        tokens, folder, pin = self.spec.max_position, shlex.quote(self.src), ""
        beside = Path(self.src.removeprefix("package:")).name.partition("@")[0].removesuffix(".gguf")
        commands = []
        if self.engine in _OF_FOLDER and isinstance(self.source, GgufSource):
            out = shlex.quote(f"{beside}-hf")
            commands.append(f"lcconvert export {folder} -o {out} --format safetensors --precision {self._precision()}")
            folder = out
        elif not isinstance(self.source, GgufSource) and not Path(self.src).expanduser().exists():
            # a Hub id, whose commit the source's name holds
            repo, _, commit = self.source.name.partition("@")
            if self.engine in ("vllm", "sglang"):
                folder, pin = repo, f" --revision {commit}"
            else:
                folder = f"{repo}@{commit}"
        match self.engine:
            case "vllm":
                commands.append(f"vllm serve {folder} --dtype {self.type_name} --max-model-len {tokens}{pin}")
            case "transformers":
                commands.append(f"transformers serve {folder} --dtype {self.type_name}")
            case "sglang":
                commands.append(
                    f"python -m sglang.launch_server --model-path {folder} --dtype {self.type_name} "
                    f"--context-length {tokens}{pin}"
                )
            case "llama.cpp":
                if isinstance(self.source, GgufSource):
                    file = shlex.quote(str(self.source.path))
                else:
                    int4 = any(kind.startswith("int4") for kind in self.linear.values())
                    commands.append(f"lcconvert export {folder} -o {shlex.quote(beside + '-gguf')} --format gguf")
                    file = shlex.quote(f"{beside}-gguf/model-{'q4_0' if int4 else 'bf16'}.gguf")
                commands.append(f"llama-server -m {file} -c {tokens} --jinja")
            case _:
                out = f"{beside}-onnx"
                commands.append(f"lcconvert export {folder} -o {shlex.quote(out)} --format onnx")
                commands.append(f"python -c {shlex.quote(_GENAI.format(out, self._served()))}")
        return commands

    def _precision(self) -> str:
        return "fp16" if self.dtype == torch.float16 else "bf16"


def render(reading: Reading) -> str:
    """The reading as text for a terminal."""
    rope, name = reading.rope, _NAMES.get(reading.engine, reading.engine)
    off = ", ".join(f"{error:.2g} at {at:,}" for at, error in rope.error.items())
    validated = "nothing" if reading.validated is None else format_count(reading.validated)
    lines = [
        f"{name} reads {reading.source} as",
        f"  context   {format_count(reading.context)} tokens; validated: {validated}",
        f"  RoPE      {rope.kind}, theta {rope.theta:g}"
        + (f", factor {rope.factor:g} over {rope.original_context}" if rope.factor and rope.original_context else "")
        + f", cos and sin times {rope.scale:.4g}",
        f"            {rope.stored} table; off from the exact one by {off}",
        *(f"  weights   {line}" for line in reading.weights),
        f"  KV cache  {reading.kv_cache}, {format_bytes(reading.kv_bytes)} at {format_count(reading.served)} tokens; "
        f"scales: {reading.kv_scales}",
    ]
    for title, sentences in (
        ("not used", reading.not_used),
        ("differs", reading.otherwise),
        ("refused", reading.refused),
        ("fault", reading.faults),
        ("run", reading.commands),
    ):
        lines += [f"  {title:<9} {sentence}" for sentence in sentences]
    return "\n".join(lines)
