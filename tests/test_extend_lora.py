"""LoRA: starts as the model, trains only what it says, and the merged model gives the logits of the unmerged one."""

from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from lcconvert.convert.extend import ExtendConfig, Stage, extend
from lcconvert.convert.extend_plan import CARDS, Cost
from lcconvert.convert.lora import TARGETS, add_lora, merge_lora
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import Decoder, load_decoder
from lcconvert.runtime.source import FolderSource

IDS = torch.arange(60)[None] * 7 % 320


@pytest.fixture(scope="module", params=["llama", "qwen2"])  # tied head; biases and a head of its own
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(request.param), request.param)


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.no_grad():
        return decoder.logits(decoder(IDS))


def test_merged_equals_unmerged(source: Path) -> None:
    decoder = load_decoder(FolderSource(source))
    names, before = list(decoder.state_dict()), logits(decoder)
    add_lora(decoder, rank=4, alpha=8.0, train=(), seed=0)
    assert torch.equal(logits(decoder), before)
    adapters = [weight for weight in decoder.parameters() if weight.requires_grad]
    assert len(adapters) == 2 * len(TARGETS) * len(decoder.layers)
    with torch.no_grad():
        for weight in adapters:
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    unmerged = logits(decoder)
    assert (unmerged - before).abs().max() > 0.1
    merge_lora(decoder)
    assert list(decoder.state_dict()) == names
    torch.testing.assert_close(logits(decoder), unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [(), ("norms",), ("norms", "embeddings")])
def test_trains_only_what_it_says(tmp_path: Path, train: tuple) -> None:
    write_tiny(tmp_path / "source")
    (tmp_path / "a.txt").write_text("The river rose and the wind fell.\n\n" * 80)
    config = ExtendConfig(
        context="64k",
        data=(str(tmp_path / "a.txt"),),
        stages=(Stage(steps=3, seq_len=512, lr=1e-2),),
        lora_rank=4,
        lora_train=train,
        weight_decay=0.0,
        device="cpu",
    )
    written = FolderSource(extend(str(tmp_path / "source"), tmp_path / "out", config))
    before = FolderSource(tmp_path / "source")
    assert set(written.names()) == set(before.names())
    changed = {n for n in before.names() if not torch.equal(written.tensor(n), before.tensor(n).bfloat16())}
    wanted = {n for n in before.names() if any(target in n for target in TARGETS)}
    wanted |= {n for n in before.names() if "norm" in n and "norms" in train}
    wanted |= {n for n in before.names() if "embed_tokens" in n and "embeddings" in train}
    assert changed == wanted
    decoder = load_decoder(before)
    count = Cost(decoder.spec, config, CARDS["h100"]).trained_weights()
    add_lora(decoder, 4, 16.0, train, 0)
    assert count == sum(weight.numel() for weight in decoder.parameters() if weight.requires_grad)


def test_rank_too_large(source: Path) -> None:
    with pytest.raises(UserError, match="lora_rank is 65 but q_proj is 64 x 64"):
        add_lora(load_decoder(FolderSource(source)), 65, 16.0, (), 0)
