"""`lcconvert extend`: a short-context checkpoint becomes a long-context one in 16 bit.

The steps are those of `extend`, read from top to bottom: open, stretch the positions, fine-tune (optional), write, read
back and compare. What is trained is what is written: the decoder is built with its final RoPE from the first step, and
the file on disk must give the same table and, at a far position, the same logits to the bit.

Surprising rule: everything that refuses a request runs before the first byte is written, and a training that stops
leaves its work folder, `OUT.partial`, from which the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.corpus import Corpus
from lcconvert.convert.extend_config import ExtendConfig, Stage
from lcconvert.convert.extend_plan import Cost, card_here, card_named, fit_time, render
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.import_quantized import DecodedSource
from lcconvert.convert.license import source_license
from lcconvert.convert.parallel import sharding_asked, start_process
from lcconvert.convert.provenance import made_with, named_source, public_name
from lcconvert.convert.rope_methods import extend_rope
from lcconvert.convert.shard_writer import Form, ShardWriter
from lcconvert.convert.trainable import check_trainable, loaded_dtype
from lcconvert.convert.trainer import HOW_TO_RESUME, remove_state, train
from lcconvert.convert.writer import new_folder, partial_folder, verify_folder, write_files
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.families import family_of
from lcconvert.runtime.model import Decoder, load_decoder
from lcconvert.runtime.rope import RopeSpec, cos_sin
from lcconvert.runtime.sidecar import NAME as SIDECAR
from lcconvert.runtime.sidecar import ContextClaim, Sidecar
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.stored import as_stored, decoder_source
from lcconvert.runtime.tokenizer import Tokenizer

__all__ = ["ExtendConfig", "Stage", "extend"]


def extend(src: str, out: Path, config: ExtendConfig) -> Path:
    """Writes the checkpoint `src` with context `config.context` to the new folder `out` and returns it.

    UserError (nothing written) when the request cannot be met; CheckFailed when training diverges or what was written
    does not read back equal; Interrupted with the work folder kept for the same command to resume. Of several processes
    under `accelerate launch` all train and the first one writes; the others return as soon as they are not needed.
    """
    source, spec, rope = _stretch(src, config)
    tokenizer = Tokenizer.from_files(source.files)
    held_out = [Haystack.load(path).text for path in (None, *map(Path, config.held_out))]
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    process = start_process(device)
    config = _planned(config, spec, torch.device(device), process.num_processes)
    resume = HOW_TO_RESUME if config.plan else None
    cost = Cost(spec, config, card_here(process.device), process.num_processes, sharding_asked())
    need = 2 * spec.parameters() + (2 * cost.state_bytes() if config.plan else 0)  # two: one replaces the other

    main = process.is_main_process
    writing = new_folder(Path(out), keep_on_stop=resume, need_bytes=need) if main else nullcontext(partial_folder(out))
    with writing as folder:
        stretched = _Stretched(source, extended_config(source.config, spec, rope, config.context))
        dtype = loaded_dtype(config, process.device, cost.host_optimizer) if config.plan else torch.bfloat16
        decoder = load_decoder(stretched, device=device, dtype=dtype)
        provenance = _provenance(source, src, stretched.sha256(), config) | made_with(device, "accelerate")
        if config.plan:
            tokens = sum(stage.rows * stage.seq_len for stage in config.plan)
            corpus = Corpus.read(
                config.data,
                tokenizer,
                need=tokens,
                seed=config.seed,
                upsample_long=config.upsample_long,
                skip_bad=config.skip_bad,
                held_out=held_out,
            )
            for place in corpus.skipped if main else ():
                click.echo(f"skipped {place}", err=True)
            if corpus.held_out and main:
                click.echo(f"left out {corpus.held_out} documents that hold held-out text", err=True)
            replayed = any(stage.replay_share for stage in config.plan)
            compute = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
            teacher = load_decoder(source, device=device, dtype=compute) if replayed else None
            decoder, provenance["training"] = train(
                decoder, corpus, tokenizer, config, folder, stretched.sha256(), teacher=teacher
            )
            del teacher
        if not main:
            return Path(out)
        decoder = decoder.to(torch.bfloat16)
        claim = ContextClaim(configured=config.context)
        sidecar = Sidecar(variant="extended", context=claim, provenance=provenance)
        files = {**extended_files(source.files, config.context), SIDECAR: sidecar.to_bytes()}
        _write(folder, decoder, stretched.config, files)
        _verify(folder, decoder, stretched.config, rope, config.context)
        remove_state(folder)
    return Path(out)


def dry_run(src: str, config: ExtendConfig, card: str, cards: int = 1) -> str:
    """What `extend` would do on so many cards of that name, for a terminal; UserError for what it would refuse."""
    _, spec, rope = _stretch(src, config)
    chosen = card_named(card)
    cost = Cost(spec, fit_time(config, spec, chosen, cards), chosen, cards)
    cost.check_fits()
    return render(cost, rope)


def extended_config(config: Mapping[str, Any], spec: ModelSpec, rope: RopeSpec, context: int) -> dict[str, Any]:
    """config.json of the extended model: RoPE in both forms, the context, bfloat16, no window that limited nothing."""
    changed = {k: v for k, v in config.items() if k not in ("torch_dtype", "original_max_position_embeddings")}
    changed |= {**rope.to_config(), "max_position_embeddings": context, "dtype": "bfloat16"}
    family = family_of(config)
    if family.defaults["original_max_position_embeddings"] is not None:  # an absent one would get the family's value
        changed["original_max_position_embeddings"] = rope.original_max_position or spec.max_position
    if spec.windowed and family.local_rope:  # only full layers change: windowed ones keep their RoPE
        local = (spec.local_rope or spec.rope).to_config()
        if spec.local_rope is not None and "rope_local_base_freq" in config:
            changed["rope_local_base_freq"] = local["rope_theta"]
        both = {"full_attention": changed["rope_parameters"], "sliding_attention": local["rope_parameters"]}
        changed["rope_parameters"] = both
    elif not spec.windowed:  # a window that is as long as the old context never limited anything
        if changed.get("sliding_window"):
            changed["sliding_window"] = None
        if changed.get("use_sliding_window"):
            changed["use_sliding_window"] = False
    return changed


def extended_files(files: Mapping[str, bytes], context: int) -> dict[str, bytes]:
    """The auxiliary files, byte for byte but for limits of the old context that a tokenizer would enforce."""
    changed = {name: content for name, content in files.items() if name != SIDECAR}
    if "tokenizer_config.json" in files:
        settings = json.loads(files["tokenizer_config.json"])
        settings["model_max_length"] = context
        changed["tokenizer_config.json"] = _json_bytes(settings)
    tokenizer = json.loads(files["tokenizer.json"])
    if tokenizer.get("truncation") or tokenizer.get("padding"):
        changed["tokenizer.json"] = _json_bytes({**tokenizer, "truncation": None, "padding": None})
    return changed


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _stretch(src: str, config: ExtendConfig) -> tuple[TensorSource, ModelSpec, RopeSpec]:
    """The source, what it is, and the RoPE it gets."""
    source = open_checkpoint(src)
    spec = ModelSpec.from_config(source.config)
    _check_windows(source, spec)
    rope = extend_rope(
        spec.rope,
        config.resolved_method,
        head_dim=spec.rope.rotary_dim(spec.head_dim),
        trained=spec.max_position,
        context=config.context,
        factors=config.factors,
        attention_factor=config.attention_factor,
    )
    rope = replace(rope, partial=spec.rope.partial)
    _check_request(source, spec, config)
    ModelSpec.from_config(extended_config(source.config, spec, rope, config.context))  # the family has such a RoPE
    return source, spec, rope


def _check_windows(source: TensorSource, spec: ModelSpec) -> None:
    """UserError where a longer RoPE would turn layers that never see further than their window."""
    turned = [number for number in spec.windowed if number not in spec.unrotated]
    if turned and not (family_of(source.config).local_rope and len(turned) < spec.num_layers):
        raise UserError(
            f"{source.name} sees {spec.window} tokens in {len(turned)} of {spec.num_layers} layers, whose RoPE its "
            "config.json cannot keep apart; set sliding_window to null if the model was not trained so, else it has "
            "nothing to extend"
        )


def _planned(config: ExtendConfig, spec: ModelSpec, device: torch.device, devices: int) -> ExtendConfig:
    """The settings with their stages cut to max_time; UserError when a stage does not fit into the GPU."""
    if device.type != "cuda":
        if config.max_time is not None:
            raise UserError(f"max_time plans by the speed of a GPU and this runs on {device}; give fewer steps instead")
        return config
    card = card_here(device)
    Cost(spec, config, card, devices, sharding_asked()).check_fits()
    return fit_time(config, spec, card, devices, sharding_asked())


def _check_request(source: TensorSource, spec: ModelSpec, config: ExtendConfig) -> None:
    if isinstance(source, DecodedSource) or source.config.get("quantization_config"):
        raise UserError(f"{source.name} is quantized; extend the 16-bit checkpoint that it was made from")
    if config.plan:
        check_trainable(spec, source.name)
    if config.plan and not config.data:
        raise UserError("training steps are asked for but no data is given; name text files or folders as data")
    for stage in config.plan:
        if stage.seq_len > config.context:
            raise UserError(
                f"seq_len is {stage.seq_len}, more than the context of {config.context}; "
                "train at most at the context's own length"
            )


class _Stretched:
    """The source with another config.json, hashing the tensors as they are read, so that they are read once."""

    def __init__(self, source: TensorSource, config: dict[str, Any]):
        self.name, self.config, self.files = source.name, config, source.files
        self._source = source
        self._digest = hashlib.sha256()

    def names(self) -> list[str]:
        return self._source.names()

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self._source.info(name)

    def tensor(self, name: str) -> torch.Tensor:
        tensor = self._source.tensor(name)
        self._digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        self._digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return tensor

    def sha256(self) -> str:
        """Over the tensors read so far: in the model's order, once `load_decoder` is through."""
        return self._digest.hexdigest()


def _provenance(source: TensorSource, src: str, digest: str, config: ExtendConfig) -> dict[str, Any]:
    earlier = Sidecar.read(source).provenance  # an extended checkpoint may be extended again
    settings = config.model_dump(mode="json") | {
        "method": config.resolved_method,
        "data": [*map(public_name, config.data)],
        "held_out": [*map(public_name, config.held_out)],
    }
    return {
        "stage": "extend",
        **named_source(src, source),
        **({"base_model": earlier.get("base_model", earlier["source"])} if "source" in earlier else {}),
        "source_tensors_sha256": digest,
        **source_license(source),
        "native_context": earlier.get("native_context") or source.config["max_position_embeddings"],
        "config": settings,
    }


def _write(folder: Path, decoder: Decoder, config: dict[str, Any], files: Mapping[str, bytes]) -> None:
    writer = ShardWriter(folder, _stored(decoder, config))
    for name, tensor in as_stored(config, decoder.spec, decoder.state_dict().items()):
        writer.add(name, tensor)
    writer.close()
    write_files(folder, config, files)


def _stored(decoder: Decoder, config: dict[str, Any]) -> dict[str, Form]:
    """What the checkpoint of `decoder` holds."""
    empty = ((name, torch.empty_like(tensor, device="meta")) for name, tensor in decoder.state_dict().items())
    return {name: (t.dtype, tuple(t.shape)) for name, t in as_stored(config, decoder.spec, empty)}


def _verify(folder: Path, decoder: Decoder, config: dict[str, Any], rope: RopeSpec, context: int) -> None:
    """Raises CheckFailed unless the folder on disk is the model in memory."""
    tensors = decoder.state_dict()
    written = decoder_source(verify_folder(folder, _stored(decoder, config)), decoder.spec)
    for name, tensor in tensors.items():
        if not torch.equal(written.tensor(name), tensor.cpu()):
            raise CheckFailed(
                f"tensor {name} of {folder} differs from the one in memory; the write went wrong, repeat it"
            )
    _verify_positions(written, rope, context)
    again = load_decoder(written, device=decoder.head_weight.device, dtype=decoder.head_weight.dtype)
    if not torch.equal(_far_logits(again, context), _far_logits(decoder, context)):
        raise CheckFailed(f"{folder} gives other logits at position {context - 1} than the model in memory; repeat it")


def _verify_positions(written: TensorSource, rope: RopeSpec, context: int) -> None:
    spec = ModelSpec.from_config(written.config)
    positions = torch.tensor([0, 1, context // 2, context - 1])
    tables = (cos_sin(each, spec.head_dim, positions) for each in (spec.rope, rope))
    if spec.max_position != context or not all(torch.equal(a, b) for a, b in zip(*tables)):
        raise CheckFailed(f"{written.name}/config.json does not read back as the RoPE that was asked for; repeat it")


@torch.no_grad()
def _far_logits(decoder: Decoder, context: int) -> torch.Tensor:
    """Logits [V] after sixteen tokens, eight at the start and eight at the end of the context."""
    device = decoder.head_weight.device
    ids = torch.arange(16, device=device)[None] * 7919 % decoder.spec.vocab_size
    positions = torch.cat((torch.arange(8), torch.arange(context - 8, context)))[None].to(device)
    return decoder.logits(decoder(ids, positions)[0, -1])
