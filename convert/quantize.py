"""`quantize`: a 16-bit checkpoint becomes the `flash` (int4) or the `pro` (fp8) artifact.

One layer is in memory at a time: read it, round its weights in the order calibration text passes them, write them. So
the peak is a few times the largest layer plus the hidden states of the samples and the shard being filled, whatever the
size of the model.

Surprising rule: later layers are calibrated on the outputs of rounded earlier ones, so the order of layers matters and
a single layer cannot be quantized again alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lcconvert.convert.calibrate import Calibration, Reach, calibration_windows, load_layer, shared_input
from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.ct_layout import kv_scale_tensors, quantization_config
from lcconvert.convert.error_table import error_table
from lcconvert.convert.gate import check_lengths, measure_loss, missed
from lcconvert.convert.import_quantized import DecodedSource, Kept, decoded
from lcconvert.convert.progress import progress, say
from lcconvert.convert.provenance import made_with, named_source, origin, public_name
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.convert.reduce_config import ReduceConfig
from lcconvert.convert.resume import HOW_TO_RESUME, made_by, resumable, source_identity
from lcconvert.convert.round_layer import Groups, Rounding, round_layer
from lcconvert.convert.round_to_nearest import FP8
from lcconvert.convert.sensitivity import Part, sensitivities, within_budget
from lcconvert.convert.shard_writer import ShardWriter
from lcconvert.convert.writer import new_folder, verify_folder, write_files
from lcconvert.runtime import sidecar as sidecars
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.kv_cache import read_scales
from lcconvert.runtime.linear import LinearFormat, QuantLayout, matches
from lcconvert.runtime.model import Decoder, Layer, check_finite
from lcconvert.runtime.sidecar import AttentionPolicy, KVConfig, Sidecar
from lcconvert.runtime.source import FolderSource, TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.stacked import Unstacked
from lcconvert.runtime.stored import as_stored, decoder_source, router_name
from lcconvert.runtime.tokenizer import Tokenizer

REPORT = "quantization.json"
_GROUPS = (128, 64, 32)


def quantize(src: str, out: Path, config: QuantizeConfig) -> Path:
    """Writes the quantized artifact of `src` to the new folder `out` and returns it.

    `src` may be quantized already, by us or others (see `import_quantized`): layers stored as they will be are taken
    over code by code. An unfinished run of the same command is gone on with.
    UserError (nothing written): an incomplete source or non-finite weights, a group size that does not divide, too
    little calibration text. CheckFailed: what was written does not read back, or misses
    a bar of the gate.
    """
    if config.reduce is not None:
        src, config = _reduced(src, out, config, config.reduce), config.model_copy(update={"reduce": None})
    original = source = decoded(open_checkpoint(src))
    plan = make_plan(source, config)
    plan, parts = _within_budget(source, plan, config)
    text = b"" if plan.windows is None else plan.windows.numpy().tobytes()
    made_of = {
        "source": source_identity(src, source),
        "calibration text": hashlib.sha256(text).hexdigest(),
        "settings": config.model_dump(mode="json"),
        "device": str(plan.device),
        "version": made_by(),
    }
    source = decoder_source(source, plan.spec)
    with (
        new_folder(out, keep_on_stop=HOW_TO_RESUME, need_bytes=plan.bytes) as folder,
        resumable(folder, made_of) as journal,
    ):
        stored, done = plan.stored, len(journal.layers)
        finished = [name for name in stored if -1 < layer_of(name) < done]
        writer = ShardWriter(folder, stored, config.max_shard, written=finished)
        write_files(folder, plan.config_json, source.files)
        for name in plan.outside:
            writer.add(name, _read(source, name).to(plan.dtype))
        with progress("quantize", plan.spec.num_layers, "layers") as bar:
            bar.advance(done)
            for tensors, rows, reach in quantized_layers(source, plan, config, folder, done):
                for name, tensor in as_stored(plan.config_json, plan.spec, tensors.items()):
                    writer.add(name, tensor)
                writer.sync()
                noted: dict[str, Any] = {"rows": rows}
                if reach and reach.alpha is not None:
                    noted |= {"alpha": reach.alpha.tolist(), "kept": reach.kept}
                journal.add(noted)
                bar.note(f"output error {max((row['output_error'] for row in rows), default=0.0):.2%}")
                bar.advance()
        writer.close()
        report = [row for layer in journal.layers for row in layer["rows"]]
        alphas, kept = ([layer[key] for layer in journal.layers if key in layer] for key in ("alpha", "kept"))
        sidecar = _sidecar(src, source, plan, config, alphas)
        write_files(folder, plan.config_json, {**source.files, sidecars.NAME: sidecar.to_bytes()})
        written = verify_folder(folder, stored)
        read_scales(written, plan.spec, plan.kv.scheme)  # refuses an absent or zero KV scale on disk
        summary = summarize(plan, report)
        summary["selector_kept"] = kept  # by layer: share of skippable key blocks read on the first sample
        summary["sensitivity"] = [{"modules": part.modules, "kl": part.kl} for part in parts]
        if config.gate is not None:
            summary["loss"] = measure_loss(original, folder, config.gate, plan.device)
            sidecar.provenance["quantize"]["loss"] = summary["loss"]  # the card shows what is in there
            (folder / sidecars.NAME).write_bytes(sidecar.to_bytes())
        (folder / REPORT).write_text(json.dumps(summary, indent=2) + "\n")
    say(error_table(report))
    if config.gate is not None and (bars := missed(config.gate, summary["loss"])):
        raise CheckFailed(f"{'; '.join(bars)}; {_costliest(source, plan, parts, summary)}; the artifact is in {out}")
    return out


def _reduced(src: str, out: Path, config: QuantizeConfig, wanted: ReduceConfig) -> str:
    """The folder of `src` with fewer layers, beside `out`; made unless an earlier attempt has made it."""
    from lcconvert.convert.reduce import reduce_depth  # trains, which takes seconds to import

    folder = out.with_name(f"{out.name}-reduced")
    if not folder.exists():
        return str(reduce_depth(src, folder, wanted, _device(config)))
    step = Sidecar.read(FolderSource(folder)).provenance.get("reduce", {})
    settings = wanted.model_dump(mode="json") | {"data": [*map(public_name, wanted.data)]}
    if (step.get("config"), step.get("from")) != (settings, public_name(src)):
        raise UserError(f"{folder} was not made from {src} with these settings; remove it or choose another output")
    return str(folder)


def _device(config: QuantizeConfig) -> torch.device:
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _within_budget(source: TensorSource, plan: Plan, config: QuantizeConfig) -> tuple[Plan, list[Part]]:
    """The plan with those parts in fp8 that the size budget has room for, and what every part loses."""
    if config.bits_per_weight is None:
        return plan, []
    assert plan.windows is not None  # the config asks for samples
    parts = sensitivities(decoder_source(source, plan.spec), plan.spec, plan.layout, plan.windows, plan.device)
    wide = [module for part in within_budget(parts, config.bits_per_weight) for module in part.modules]
    return make_plan(source, config.model_copy(update={"wide": (*config.wide, *wide)})), parts


def _costliest(source: TensorSource, plan: Plan, parts: list[Part], summary: dict[str, Any]) -> str:
    """What to look at first when the loss is too high."""
    kv, weights = (max(row[which]["mean_kl"] for row in summary["loss"]) for which in ("kv", "weights"))
    if kv > weights:
        return f"most is lost in the KV cache ({plan.kv.scheme})"
    if plan.windows is None:
        worst = max(summary["linear_layers"], key=lambda row: row["output_error"])
        return f"the largest error is in {worst['name']}"
    parts = parts or sensitivities(source, plan.spec, plan.layout, plan.windows, plan.device)
    part = max(parts, key=lambda part: part.kl)
    hint = "; inputs in 16-bit lose less" if plan.form.kind == "fp8" and not plan.form.exact_inputs else ""
    return f"most is lost in {', '.join(part.modules)} (KL {part.kl:.4g} when nothing else is rounded){hint}"


@dataclass(frozen=True)
class Plan:
    """What will be written: decided before any work, and checked against the disk after it.

    `expected`: dtype and shape by tensor name. `outside`: the tensors of no layer. `dtype`: of all that stays 16 bit.
    `kept`: the layers that a quantized source stores as we do; `imported`: its quant_method. `windows`: calibration
    tokens int64 [S, T], or None.
    """

    spec: ModelSpec
    form: LinearFormat
    layout: QuantLayout
    kept: Kept
    imported: str | None
    config_json: dict[str, Any]
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    outside: list[str]
    dtype: torch.dtype
    kv: KVConfig
    attention: AttentionPolicy
    inherited: Sidecar
    windows: torch.Tensor | None
    device: torch.device

    @property
    def stored(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """`expected` by the names that the family's checkpoints have."""
        shapes = ((name, torch.empty(shape, dtype=d, device="meta")) for name, (d, shape) in self.expected.items())
        return {n: (t.dtype, tuple(t.shape)) for n, t in as_stored(self.config_json, self.spec, shapes)}

    @property
    def bytes(self) -> int:
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.expected.values())


def make_plan(source: TensorSource, config: QuantizeConfig) -> Plan:
    """Reads headers, config and tokenizer, no weights; every error that can be known now is raised now."""
    spec = ModelSpec.from_config(source.config)
    alike, imported = QuantLayout.from_config(source.config), None
    if isinstance(source, DecodedSource):
        alike, imported = source.kept, source.method
    elif isinstance(source, Unstacked):
        imported = "mxfp4"
    source = decoder_source(source, spec)
    kept = Kept(source, alike)
    with torch.device("meta"):
        plain = Decoder(spec)
    _check_complete(source, plain)
    ignore = ("lm_head", *([rf"re:.*{router_name(source.config)}$"] if spec.routed else []), *config.ignore)
    form = fp8 = LinearFormat("fp8", exact_inputs=config.inputs == "16-bit")
    if config.variant == "flash":
        form = LinearFormat("int4", _group_size(plain, ignore, alike, config))
    kv = KVConfig(scheme=config.kv_scheme)
    # engines without our K8V4 pages keep K and V in fp8; vLLM refuses scales without the scheme they belong to
    block = quantization_config(form, ignore, wide=config.wide, fp8=fp8, fp8_kv=kv.scheme in ("fp8", "k8v4"))
    layout = QuantLayout.from_config({**source.config, "quantization_config": block})
    _check_whole(layout, (*config.ignore, *config.wide))
    dtype = torch.float16 if source.info("model.embed_tokens.weight")[0] == torch.float16 else torch.bfloat16
    config_json = {k: v for k, v in source.config.items() if k != "torch_dtype"}
    config_json |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": block}
    if config.gate is not None:
        check_lengths(config.gate, source)
    windows = None
    if config.samples:
        tokenizer = Tokenizer.from_files(source.files)
        windows = calibration_windows(
            config.calibration, tokenizer, samples=config.samples, length=config.length, seed=config.seed
        )
    return Plan(
        spec=spec,
        form=form,
        layout=layout,
        kept=kept,
        imported=imported,
        config_json=config_json,
        expected=_expected(spec, layout, kept, dtype, kv),
        outside=[name for name, _ in plain.named_parameters() if not name.startswith("model.layers.")],
        dtype=dtype,
        kv=kv,
        attention=AttentionPolicy.model_validate({"kind": _attention_kind(config, spec)}),
        inherited=Sidecar.read(source),
        windows=windows,
        device=_device(config),
    )


def _attention_kind(config: QuantizeConfig, spec: ModelSpec) -> Literal["dense", "hybrid"]:
    if not spec.sinks:
        return config.attention_kind
    if config.attention == "hybrid":
        raise UserError(f"attention is hybrid, which has no sinks, and {spec.family} has them; leave attention out")
    return "dense"


def quantized_layers(
    source: TensorSource, plan: Plan, config: QuantizeConfig, folder: Path, done: int
) -> Iterator[tuple[dict[str, torch.Tensor], list[dict[str, Any]], Reach | None]]:
    """For each layer after the first `done`, which are in `folder`, in order: its tensors to write, an error row per
    linear layer, what calibration saw."""
    calibration = None
    if plan.windows is not None:
        calibration = Calibration(source, plan.spec, plan.windows, plan.device)
    policy = plan.attention if plan.attention.kind == "hybrid" else None
    rounding = Rounding(plan.layout, plan.dtype, config.damp if config.method == "gptq" else 0.0, plan.kept)
    written = decoder_source(decoded(FolderSource(folder)), plan.spec)
    for number in range(0 if calibration else done, plan.spec.num_layers):
        layer = load_layer(source, plan.spec, number, plan.device)
        if number < done:
            assert calibration is not None
            _pass_again(layer, load_layer(written, plan.spec, number, plan.device), calibration, rounding)
            continue
        found: list[Reach] = []
        groups: Groups = ((names, None) for names in shared_input(layer))
        if calibration:
            groups = calibration.walk(layer, policy, config.attention_mass, found.append)
        tensors, rows = round_layer(layer, f"model.layers.{number}", groups, rounding)
        reach = found[0] if found else None
        if plan.kv.scheme in ("fp8", "k8v4"):
            assert reach is not None
            tensors |= kv_scale_tensors(number, reach.k_scale, reach.v_scale)
        yield tensors, rows, reach


@torch.no_grad()
def _pass_again(layer: Layer, rounded: Layer, calibration: Calibration, rounding: Rounding) -> None:
    """Takes the samples through `layer` as when it was `rounded`."""
    for names, _ in calibration.walk(layer, None, 1.0, lambda _: None):
        for name in names:
            if rounding.layout.format_of(f"model.layers.{layer.number}.{name}"):
                layer.get_parameter(f"{name}.weight").copy_(rounded.get_parameter(f"{name}.weight"))


def summarize(plan: Plan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of quantization.json; `bits_per_weight` counts codes and scales of the quantized linear layers."""
    stored = {row["name"]: 0 for row in rows}
    weights = 0
    for name, (dtype, shape) in plan.expected.items():
        module, _, leaf = name.rpartition(".")
        if module in stored and leaf != "bias":
            stored[module] += 8 * dtype.itemsize * torch.Size(shape).numel()
            if leaf in ("weight_packed", "weight"):
                weights += torch.Size(shape).numel() * (8 if leaf == "weight_packed" else 1)
    return {
        "bits_per_weight": round(sum(stored.values()) / weights, 3) if weights else None,
        "bytes": plan.bytes,
        "calibration_tokens": 0 if plan.windows is None else plan.windows.numel(),
        "linear_layers": rows,
    }


def _sidecar(src: str, source: TensorSource, plan: Plan, config: QuantizeConfig, alphas: list[list[float]]) -> Sidecar:
    attention = plan.attention
    if attention.kind == "hybrid":
        attention = attention.model_copy(update={"alpha": [[round(a, 9) for a in row] for row in alphas]})
    settings = config.model_dump(mode="json") | {"calibration": [*map(public_name, config.calibration)]}
    step = {**named_source(src, source), "config": settings, **made_with(plan.device)}
    if plan.imported:
        step["imported"] = plan.imported
    provenance = {**origin(src, source), "quantize": step}
    context = plan.inherited.context.model_copy(update={"validated": None})  # validated lengths are of other weights
    return Sidecar(
        variant=config.variant,
        prefill_gemm="fp8" if config.variant == "flash" and config.inputs == "fp8" else "16-bit",
        kv=plan.kv,
        attention=attention,
        context=context,
        provenance=provenance,
    )


def _read(source: TensorSource, name: str) -> torch.Tensor:
    tensor = source.tensor(name)
    check_finite(name, tensor, source.name)
    return tensor


def _check_complete(source: TensorSource, plain: Decoder) -> None:
    wanted, present = {name for name, _ in plain.named_parameters()}, set(source.names())
    if missing := sorted(wanted - present):
        raise UserError(
            f"{source.name} lacks tensor {missing[0]} ({len(missing)} missing); the checkpoint is incomplete"
        )
    tied = {"lm_head.weight"} if plain.lm_head is None else set()
    if extra := sorted(n for n in present - wanted - tied if not n.endswith("rotary_emb.inv_freq")):
        raise UserError(
            f"{source.name} holds tensor {extra[0]} ({len(extra)} not used), which its config.json has no place for; "
            "config.json and weights do not belong together"
        )


def _check_whole(layout: QuantLayout, patterns: tuple[str, ...]) -> None:
    """UserError when a pattern names a part that the checkpoint stores joined to others."""
    for part, whole in layout.joined:
        for pattern in patterns:
            if matches(f"model.layers.0.{part}", pattern) and not matches(f"model.layers.0.{whole}", pattern):
                raise UserError(f"{pattern} names {part}, which this family stores within {whole}; name that instead")


def _group_size(plain: Decoder, ignore: tuple[str, ...], kept: QuantLayout, config: QuantizeConfig) -> int:
    probe = QuantLayout(((("Linear",), LinearFormat("int4", 1)),), (*ignore, *config.wide), kept.joined)
    widths = {n: m.in_features for n, m in plain.named_modules() if isinstance(m, nn.Linear) and probe.format_of(n)}
    if not widths:
        raise UserError(
            f"ignore and wide {', '.join((*config.ignore, *config.wide))} leave no linear layer for int4; name fewer"
        )
    if config.group_size is not None:
        for name, width in widths.items():
            if width % config.group_size or config.group_size % 8:
                raise UserError(
                    f"group size {config.group_size} does not fit {name}, which has {width} inputs; "
                    "give a multiple of 8 that divides them, or leave it out to have one chosen"
                )
        return config.group_size
    for size in (*sorted({form.group_size for _, form in kept.groups if form.kind == "int4"}), *_GROUPS):
        if all(width % size == 0 for width in widths.values()):
            return size
    odd = next(name for name, width in widths.items() if width % _GROUPS[-1])
    raise UserError(
        f"no group size of {', '.join(map(str, _GROUPS))} divides the {widths[odd]} inputs of {odd}; "
        "add it to ignore, or use variant pro"
    )


def _expected(
    spec: ModelSpec, layout: QuantLayout, kept: Kept, dtype: torch.dtype, kv: KVConfig
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Every tensor of the artifact, from the model that will load it."""
    with torch.device("meta"):
        decoder = Decoder(spec, layout)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, tensor in (*decoder.named_parameters(), *decoder.named_buffers()):
        fixed = tensor.dtype if tensor.dtype in (torch.int32, torch.int64, FP8) else dtype
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_scale" and (form := layout.format_of(module)) and kept.holds(module, form):
            fixed = kept.source.info(name)[0]
        expected[name] = (fixed, tuple(tensor.shape))
    if kv.scheme in ("fp8", "k8v4"):
        for number in range(spec.num_layers):
            for which in ("k_scale", "v_scale"):
                expected[f"model.layers.{number}.self_attn.{which}"] = (torch.float32, (spec.num_kv_heads,))
    return dict(sorted(expected.items(), key=lambda item: layer_of(item[0])))  # shards are filled layer by layer


def layer_of(name: str) -> int:
    """The layer that the tensor `name` is of; -1 for those of none."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1
