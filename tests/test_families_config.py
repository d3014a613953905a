"""Every field of every family's config.json changed in turn: what changes transformers' logits changes ours, equally,
or is refused by name. So is a field that neither knows."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import ROWS, Written, written

from lcconvert.convert.inspect import inspect, render
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.families import INERT
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec

TOKENS = 160  # more than the window
SAME = 1e-4
COVERED = (
    "llama",
    "llama-biases",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3-biases",
    "phi3-plain",
)  # by rows with more fields
DISTINCT = [row for row in ROWS if row not in COVERED]


def mutations(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, new value) for everything below `value` that a model is made of; `...` deletes."""
    for key, old in value.items():
        here = (*path, key)
        if not path and key in INERT:
            continue
        yield here, ...
        if isinstance(old, dict):
            yield from mutations(old, here)
            continue
        yield from ((here, new) for new in others(old))


def others(old: Any) -> list[Any]:
    match old:
        case bool():
            return [not old]
        case int():
            return [old * 2 + 1, 0]
        case float():
            return [old * 2, old / 4]
        case None:
            return [True, 40]
        case str():
            return {"default": ["linear", "yarn", "proportional"], "silu": ["gelu", "relu"]}.get(old, [old + "_2"])
        case list():
            return [old[::-1], old[:-1], None]
    raise AssertionError(f"no other value for {old!r}")


def changed(config: dict[str, Any], path: tuple[str, ...], new: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    if new is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return config


@torch.no_grad()
def theirs(model: Written, config: dict[str, Any], state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """transformers' logits; None where it refuses the config, crashes, or would make up weights."""
    try:
        read = type(model.oracle.config).from_dict(copy.deepcopy(config))
        with torch.device("meta"):
            other = transformers.AutoModelForCausalLM.from_config(read)
        other.load_state_dict(state, strict=False, assign=True)
        other.tie_weights()
        if any(weight.is_meta for weight in other.parameters()):
            return None
        for name, module in list(other.named_modules()):
            if name.endswith("rotary_emb"):  # its tables are no weights
                other.set_submodule(name, type(module)(read))
        for name, buffer in list(other.named_buffers()):
            if buffer.is_meta:
                scale = read.hidden_size**0.5  # Gemma's embeddings have the only one
                owner, _, leaf = name.rpartition(".")
                setattr(other.get_submodule(owner), leaf, torch.tensor(scale))
        return other.eval()(torch.tensor([model.ids[:TOKENS]])).logits[0]
    except Exception:  # any way of saying no
        return None


@torch.no_grad()
def ours(source: FolderSource, ids: list[int]) -> torch.Tensor | None:
    try:
        decoder = load_decoder(source)
        return decoder.logits(decoder(torch.tensor([ids[:TOKENS]])))[0]
    except UserError:
        return None


@pytest.mark.parametrize("row", DISTINCT)
def test_no_field_is_read_otherwise(row: str, families_root: Path) -> None:
    model = written(row, families_root)
    source = FolderSource(model.folder)
    state = model.oracle.state_dict()
    config = json.loads((model.folder / "config.json").read_text())
    before = theirs(model, config, state)
    assert before is not None
    assert (ours(source, model.ids) - before).abs().max() <= SAME
    untouched = {key: config[key] for key in config.keys() & (INERT - {"dtype", "model_type", "pad_token_id"})}
    other = {key: others(old)[0] for key, old in untouched.items()}
    assert (theirs(model, {**config, **other}, state) - before).abs().max() == 0
    wrong, alike = [], 0
    for path, new in mutations(config):
        source.config = changed(config, path, new)
        found = ours(source, model.ids)
        if found is None:
            continue  # refused
        expected = theirs(model, source.config, state)
        if expected is None:
            continue  # nothing to compare with
        alike += 1
        if not (found - expected).abs().max() <= SAME:
            wrong.append(f"{'.'.join(path)} = {'absent' if new is ... else new!r}")
    assert not wrong, "\n".join(wrong)
    assert alike > 10


@pytest.mark.parametrize("row", ["llama", "phi3", "gemma3"])
def test_what_is_not_understood_is_named(row: str, families_root: Path) -> None:
    source = FolderSource(written(row, families_root).folder)
    plain = source.config
    for key in ("attention_chunk_size", "logit_scale", "moe_layers"):
        source.config = {**plain, key: 3}
        with pytest.raises(UserError, match=f"{key} is 3, which is not understood"):
            load_decoder(source)


def test_deepseek_v4_is_planned_for(families_root: Path, tmp_path: Path) -> None:
    """The 61 layers of V4-Pro take 9.62 GiB at 1M in 16 bit, as vLLM's makers state for their implementation."""
    shutil.copytree(written("llama", families_root).folder, tmp_path / "v4")
    ratios = [128, 128, *([4, 128] * 30)][:61]
    config = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "num_hidden_layers": 61,
        "head_dim": 512,
        "index_head_dim": 128,
        "sliding_window": 128,
        "max_position_embeddings": 2**20,
        "compress_ratios": [*ratios, 0],
    }
    (tmp_path / "v4" / "config.json").write_text(json.dumps(config))
    report = inspect(str(tmp_path / "v4"))
    assert report["layers"] == {"heavily_compressed_attention": 31, "compressed_sparse_attention": 30}
    assert report["kv_total"] / 2**30 == pytest.approx(9.62, rel=0.005)
    assert "KV cache at 1M tokens in 16 bit: 10.3 GB" in render(report, 80 * 10**9)
    with pytest.raises(UserError, match="nothing to extend"):
        ModelSpec.from_config(config)
