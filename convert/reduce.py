"""A model with fewer layers: those that matter least go, and the rest learns to predict what the whole model does.

Layers are taken out one at a time, each time the one whose absence moves the predictions least, and text counts there
as it does in training: half of it is synthetic retrieval, of which only the answers are asked for, so a layer that
finds things in the context stays. What is left is healed by `train`, mostly by the divergence from the whole model.

Left out: narrower layers. Decoding a small model costs time by the layer, not by the width of one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lcconvert.convert.agreement import compare, read_reference
from lcconvert.convert.calibrate import load_layer
from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.corpus import Corpus
from lcconvert.convert.extend_config import ExtendConfig, Stage
from lcconvert.convert.extend_plan import card_here, fit_time
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.progress import progress
from lcconvert.convert.provenance import made_with, origin, public_name
from lcconvert.convert.reduce_config import ReduceConfig
from lcconvert.convert.rows import StageRows
from lcconvert.convert.sensitivity import divergences
from lcconvert.convert.settings import make_config
from lcconvert.convert.shard_writer import ShardWriter
from lcconvert.convert.trainable import check_trainable
from lcconvert.convert.trainer import HOW_TO_RESUME, remove_state, train
from lcconvert.convert.writer import new_folder, verify_folder, write_files
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import layer_tables, load_decoder, scaled
from lcconvert.runtime.sidecar import NAME, Sidecar
from lcconvert.runtime.source import FolderSource, TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.stored import as_stored, decoder_source
from lcconvert.runtime.tokenizer import Tokenizer

# the text that layers are chosen on
_CHOOSING = Stage.model_validate({"steps": 8, "seq_len": 1024, "retrieval_share": 0.5})
_COPIES = 8  # copies that pass a layer at a time
_MEASURED = 2048  # tokens of held-out text


def reduce_depth(src: str, out: Path, config: ReduceConfig, device: torch.device) -> Path:
    """Writes `src` less a share of its layers, healed, in 16 bit to the new folder `out` and returns it.

    What it lost against the whole model is in the sidecar's provenance, under `reduce`. UserError (nothing written):
    no layer or all layers would go, layers that config.json tells apart, a quantized source, no text.
    """
    source = open_checkpoint(src)
    if source.config.get("quantization_config"):
        raise UserError(f"{source.name} is quantized; reduce the 16-bit checkpoint that it was made from")
    spec = ModelSpec.from_config(source.config)
    check_trainable(spec, source.name)
    count = round(config.share * spec.num_layers)
    if not 0 < count < spec.num_layers - 1:
        raise UserError(
            f"reduce is {config.share:g}, which is {count} of {spec.num_layers} layers; give a share that takes some "
            "and leaves two"
        )
    tokenizer = Tokenizer.from_files(source.files)
    training = _training(config, spec, device)
    corpus = Corpus.read(
        config.data,
        tokenizer,
        need=sum(stage.rows * stage.seq_len for stage in training.plan),
        seed=config.seed,
        held_out=[Haystack.load().text],
    )
    rows = StageRows(_CHOOSING, corpus, tokenizer, _CHOOSING.seq_len, 0, 0, 0)
    kept = kept_layers(source, spec, rows, count, device)
    reduced = Fewer(source, spec, kept)
    with new_folder(out, keep_on_stop=HOW_TO_RESUME, need_bytes=spec.parameters() * 26) as folder:
        decoder = load_decoder(reduced, device=device, dtype=torch.float32)
        teacher = load_decoder(source, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        identity = f"{source.name} layers {kept}"
        decoder, facts = train(decoder, corpus, tokenizer, training, folder, identity, teacher=teacher)
        decoder = decoder.to(torch.bfloat16)
        tensors = dict(as_stored(reduced.config, decoder.spec, decoder.state_dict().items()))
        writer = ShardWriter(folder, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.close()
        expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        del decoder, teacher, tensors
        before = Sidecar.read(source)
        step: dict[str, Any] = {
            "from": public_name(src),
            "layers_left_out": sorted(set(range(spec.num_layers)) - set(kept)),
            "layers_before": spec.num_layers,
            "config": config.model_dump(mode="json") | {"data": [*map(public_name, config.data)]},
            "training": facts,
            **made_with(device, "accelerate"),
        }
        sidecar = Sidecar(
            variant="extended",
            context=before.context.model_copy(update={"validated": None}),
            provenance={**origin(src, source), "reduce": step},
        )
        write_files(folder, reduced.config, {**source.files, NAME: sidecar.to_bytes()})
        step["loss"] = _loss(source, verify_folder(folder, expected), device)
        provenance = {**sidecar.provenance, "reduce": step}
        (folder / NAME).write_bytes(sidecar.model_copy(update={"provenance": provenance}).to_bytes())
        remove_state(folder)
    return out


def _training(config: ReduceConfig, spec: ModelSpec, device: torch.device) -> ExtendConfig:
    stages = tuple(
        stage.model_copy(update={"seq_len": min(stage.seq_len, spec.max_position)}) for stage in config.stages
    )
    on_gpu = device.type == "cuda"
    settings = {
        "context": spec.max_position,
        "data": config.data,
        "stages": stages,
        "seed": config.seed,
        "save_every": 0,
        "max_time": config.max_time if on_gpu else None,
        "device": str(device),
        "dtype": "bfloat16" if on_gpu else "float32",
    }
    training = make_config(ExtendConfig, settings, "reduce")
    return fit_time(training, spec, card_here(device)) if on_gpu else training


@torch.no_grad()
def kept_layers(source: TensorSource, spec: ModelSpec, rows: StageRows, drop: int, device: torch.device) -> list[int]:
    """The numbers of the layers that stay when `drop` of them go; the first and the last always stay."""
    batch = [rows[i] for i in range(len(rows))]
    ids = torch.stack([row["ids"] for row in batch])
    counted = torch.stack([row["weights"] for row in batch]).roll(-1, 1).to(device)  # of the state before each token
    plain = decoder_source(source, spec)
    kept, whole = list(range(spec.num_layers)), None
    with progress("choose layers", drop, "layers") as bar:
        for _ in range(drop):
            x, copies = _without_each(plain, spec, kept, ids, device)
            whole = x if whole is None else whole
            losses = divergences(plain, spec, whole, copies, counted)
            number = kept[1 + losses.index(min(losses))]
            kept.remove(number)
            bar.note(f"layer {number}: KL {min(losses):.3g}")
            bar.advance()
    return kept


def _without_each(
    source: TensorSource, spec: ModelSpec, kept: list[int], ids: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of int64 ids [S, T] after the layers `kept`: [S, T, H], and [(n - 2) * S, T, H] with one of them
    left out, neither the first nor the last."""
    embedding = source.tensor("model.embed_tokens.weight")
    x = scaled(spec, F.embedding(ids, embedding).to(device, torch.float32 if device.type == "cpu" else embedding.dtype))
    tables = layer_tables(spec, torch.arange(ids.shape[1], device=device)[None])
    copies = x[:0]
    for number in kept:
        layer = load_layer(source, spec, number, device)
        moved = [layer(some, *tables[number]) for some in copies.split(_COPIES)] if len(copies) else []
        skipped = [] if number in (kept[0], kept[-1]) else [x]
        copies, x = torch.cat([copies[:0], *moved, *skipped]), layer(x, *tables[number])
    return x, copies


def _loss(source: TensorSource, reduced: FolderSource, device: torch.device) -> dict[str, Any]:
    """What the reduced model lost against the whole one on held-out text."""
    tokens = min(_MEASURED, Sidecar.read(source).context.configured)
    engine = Engine.load(source, device=device, max_context=tokens)
    reference = read_reference(engine, Haystack.load().excerpt(engine.tokenizer, tokens, "the loss of reduction"))
    del engine
    result = compare(Engine.load(reduced, device=device, max_context=tokens), reference, 0)
    figures = {name: round(result["prefill"][name], 6) for name in ("mean_kl", "top1")}
    return {"tokens": tokens, **figures, "ppl_increase": round(result["ppl_increase"], 6)}


class Fewer:
    """The layers `kept` of a checkpoint, numbered anew."""

    def __init__(self, source: TensorSource, spec: ModelSpec, kept: list[int]):
        self.name, self.files, self._source = source.name, source.files, source
        self.config = json.loads(json.dumps(source.config))
        self.config["num_hidden_layers"] = len(kept)
        for key, value in self.config.items():
            if isinstance(value, list) and len(value) == spec.num_layers:  # one entry a layer
                self.config[key] = [value[number] for number in kept]
        fewer = ModelSpec.from_config(self.config)
        for new, old in enumerate(kept):
            if (fewer.window_of(new), fewer.rope_of(new)) != (spec.window_of(old), spec.rope_of(old)):
                raise UserError(
                    f"{source.name}: layer {old} would become layer {new}, which its config.json makes another kind of "
                    "layer; this family cannot be reduced"
                )
        self._names = {}
        for name in source.names():
            head, found, rest = name.partition("model.layers.")
            number, _, leaf = rest.partition(".")
            if not found:
                self._names[name] = name
            elif int(number) in kept:
                self._names[f"{head}model.layers.{kept.index(int(number))}.{leaf}"] = name

    def names(self) -> list[str]:
        return [*self._names]

    def info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self._source.info(self._names[name])

    def tensor(self, name: str) -> torch.Tensor:
        return self._source.tensor(self._names[name])
