"""The decoder against transformers: every family, and SmolLM2 itself, prefill and cached decode, fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, tiny_model

from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.rope import inv_freq
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.tokenizer import Tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention_bias", [False, True])
def test_logits_equal_transformers(tmp_path: Path, family: str, attention_bias: bool) -> None:
    if attention_bias and family in ("mistral", "qwen2"):
        family, extra = "llama", {"attention_bias": True, "mlp_bias": True}
    else:
        extra = {"attention_bias": True} if attention_bias else {}
    oracle = tiny_model(family, **extra)
    oracle.save_pretrained(tmp_path)
    decoder = load_decoder(FolderSource(tmp_path))
    ids = torch.randint(4, 320, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = decoder.logits(decoder(ids))
        theirs = oracle(ids).logits
    assert (ours - theirs).abs().max() <= 1e-4
    assert decoder.spec.parameters() == sum(p.numel() for p in oracle.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_cached_decode_equal_transformers(tmp_path: Path, family: str) -> None:
    oracle = tiny_model(family)
    oracle.save_pretrained(tmp_path)
    engine = Engine.load(FolderSource(tmp_path), device="cpu")
    engine.chunk = 128
    ids = torch.randint(4, 320, (400,), generator=torch.Generator().manual_seed(2)).tolist()
    seq = engine.new_sequence()
    with torch.no_grad():
        theirs = oracle(torch.tensor([ids])).logits[0]
        first = engine.prefill(seq, ids[:300])
        assert (first - theirs[299]).abs().max() <= 1e-4
        middle = engine.logits(engine.prefill(seq, ids[300:350], want="all"))
        assert (middle - theirs[300:350]).abs().max() <= 1e-4
        for at in range(350, 400):  # crosses the page border at 384
            assert (engine.decode(seq, ids[at]) - theirs[at]).abs().max() <= 1e-4
    assert len(seq.pages) == 2
    assert seq.tail_length == 16


@pytest.fixture(scope="module")
def smollm2_text(smollm2, smollm2_oracle) -> tuple[list[int], torch.Tensor]:
    """600 tokens of prose and transformers' logits for them."""
    text = " ".join(
        f"The {word} of hall {i} was kept in the north tower." for i, word in enumerate(["ledger", "lamp"] * 25)
    )
    ids = Tokenizer.from_files(smollm2.files).encode(text)[:600]
    with torch.no_grad():
        return ids, smollm2_oracle(torch.tensor([ids])).logits[0]


def _worst(engine: Engine, ids: list[int], theirs: torch.Tensor, prefill: int) -> float:
    """Largest logit difference over a prefill of `prefill` tokens and 8 decode steps after it."""
    seq = engine.new_sequence()
    hidden = engine.prefill(seq, ids[:prefill], want="all")
    blocks = range(0, prefill, 200)
    worst = max(
        float((engine.logits(hidden[i : i + 200]) - theirs[i : min(i + 200, prefill)]).abs().max()) for i in blocks
    )
    decoded = (float((engine.decode(seq, ids[at]) - theirs[at]).abs().max()) for at in range(prefill, prefill + 8))
    return max(worst, *decoded)


def test_smollm2_equals_transformers(smollm2, smollm2_text) -> None:
    assert _worst(Engine.load(smollm2, device="cpu"), *smollm2_text, prefill=250) <= 1e-4


def test_smollm2_differs_only_by_the_float32_angle(smollm2, smollm2_text, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers multiplies position and frequency in float32, which moves logits by 5e-4 at position 1,000.

    With its rule put in place of ours nothing is left, so the exact angle is the whole difference.
    """

    def float32_angle(rope, head_dim, positions):
        freq, scale = inv_freq(rope, head_dim)
        angle = positions.float()[..., None] * freq
        return angle.cos() * scale, angle.sin() * scale

    monkeypatch.setattr("lcconvert.runtime.prefill.cos_sin", float32_angle)
    assert _worst(Engine.load(smollm2, device="cpu"), *smollm2_text, prefill=500) <= 1e-4


def _rewrite(folder: Path, change) -> FolderSource:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return FolderSource(folder)


def test_wrong_weights_are_named(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"

    def poison(tensors: dict) -> None:
        tensors[name][3, 5] = float("nan")

    with pytest.raises(UserError, match=f"{name}.*NaN"):
        load_decoder(_rewrite(tmp_path, poison))
    with pytest.raises(UserError, match=f"lacks tensor {name}"):
        load_decoder(_rewrite(tmp_path, lambda t: t.pop(name)))

    def misshape(tensors: dict) -> None:
        tensors[name] = torch.zeros(2, 2)

    with pytest.raises(UserError, match=rf"{name}.*\[2, 2\]"):
        load_decoder(_rewrite(tmp_path, misshape))

    def add(tensors: dict) -> None:
        tensors[name] = torch.zeros(128, 64)
        tensors["model.layers.1.adapter.weight"] = torch.zeros(1)

    with pytest.raises(UserError, match=r"model\.layers\.1\.adapter\.weight"):
        load_decoder(_rewrite(tmp_path, add))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*not supported"),
        ({"architectures": []}, "architectures is absent"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope type is 'spiral'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "needs factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e4, "warp": 1}}, "'warp'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
    ],
)
def test_config_faults_name_the_field(tmp_path: Path, change: dict, message: str) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    with pytest.raises(UserError, match=message):
        ModelSpec.from_config(config)
