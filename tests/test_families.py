"""Every family against transformers: prefill, cached decode, past the window; in 16 bit; after quantization; extended.

And the other way round: a config.json that means something else to transformers must mean the same here or be refused.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from families import ROWS, TOKENS, Written, written

from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.source import FolderSource


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=ROWS)
def model(request: pytest.FixtureRequest, root: Path) -> Written:
    return written(request.param, root)


def worst(engine: Engine, ids: list[int], theirs: torch.Tensor) -> float:
    """Largest logit difference over a prefill, one that goes on, and decode steps across a page's end (at 384)."""
    engine.chunk = 128
    seq = engine.new_sequence()
    found = [engine.prefill(seq, ids[:300]) - theirs[299]]
    found.append(engine.logits(engine.prefill(seq, ids[300:380], want="all")) - theirs[300:380])
    found += [engine.decode(seq, ids[at]) - theirs[at] for at in range(380, TOKENS)]
    return max(float(difference.abs().max()) for difference in found)


def _read(folder: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def test_logits_equal_transformers(model: Written) -> None:
    engine = Engine.load(FolderSource(model.folder), device="cpu")
    assert engine.spec.parameters() == sum(weight.numel() for weight in model.oracle.parameters())
    assert worst(engine, model.ids, model.logits) <= 1e-4
    with torch.no_grad():
        at_once = engine.model.logits(engine.model(torch.tensor([model.ids])))[0]
    assert (at_once - model.logits).abs().max() <= 1e-4


def test_16_bit_is_as_close_as_transformers(model: Written, tmp_path: Path) -> None:
    """Both from bfloat16 weights, against their float32 result: here in bfloat16 no further off than transformers."""
    copy.deepcopy(model.oracle).bfloat16().save_pretrained(tmp_path)
    ids = torch.tensor([model.ids])
    theirs, exact = (_read(tmp_path, dtype)(ids).logits[0].float() for dtype in (torch.bfloat16, torch.float32))
    wide = load_decoder(FolderSource(tmp_path))
    narrow = Engine.load(FolderSource(tmp_path), device="cpu", dtype=torch.bfloat16)
    with torch.no_grad():
        assert (wide.logits(wide(ids))[0] - exact).abs().max() <= 1e-4
    assert worst(narrow, model.ids, exact) <= 1.25 * float((theirs - exact).abs().max())


def test_flash(model: Written, tmp_path: Path) -> None:
    """transformers reads the artifact through compressed-tensors, expands it and gets the same logits."""
    config = QuantizeConfig(samples=0, kv="bf16", attention="dense")
    out = quantize(str(model.folder), tmp_path / "out", config)
    theirs = _read(out, torch.float32)(torch.tensor([model.ids])).logits[0]
    assert worst(Engine.load(FolderSource(out), device="cpu"), model.ids, theirs) <= 1e-4
