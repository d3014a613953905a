"""Depth reduction: which layers go, that what is left is healed and written whole, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from lcconvert.convert.corpus import Corpus
from lcconvert.convert.extend_config import Stage
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.convert.reduce import Fewer, kept_layers
from lcconvert.convert.reduce_config import ReduceConfig
from lcconvert.convert.rows import StageRows
from lcconvert.convert.sensitivity import divergences
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.tokenizer import Tokenizer

CPU = torch.device("cpu")
HEALING = Stage(steps=2, seq_len=1024, lr=2e-3, replay_share=0.8, retrieval_share=0.2)
FLASH = {"samples": 0, "attention": "dense"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five layers, of which layer 2 changes nothing and layer 3 little."""
    folder = write_tiny(tmp_path_factory.mktemp("source") / "llama", "llama", num_hidden_layers=5)
    tensors = load_file(folder / "model.safetensors")
    for number, share in ((2, 0.0), (3, 0.05)):
        for leaf in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{number}.{leaf}.weight"] *= share
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    paragraphs = Haystack.load().text[-60_000:].split("\n\n")
    path.write_text("\n\n".join(" ".join(reversed(part.split())) for part in paragraphs))  # not the held-out text
    return str(path)


def test_the_layers_that_matter_least_go(source: Path, text: str) -> None:
    checkpoint = FolderSource(source)
    spec, tokenizer = ModelSpec.from_config(checkpoint.config), Tokenizer.from_files(checkpoint.files)
    corpus = Corpus.read((text,), tokenizer, need=8000, seed=0)
    rows = StageRows(Stage(steps=2, seq_len=1024, retrieval_share=0.5), corpus, tokenizer, 1024, 0, 0, 0)
    assert kept_layers(checkpoint, spec, rows, 1, CPU) == [0, 1, 3, 4]
    assert kept_layers(checkpoint, spec, rows, 2, CPU) == [0, 1, 4]
    assert kept_layers(checkpoint, spec, rows, 3, CPU) == [0, 4]


def test_divergences_weigh_the_rows_that_are_asked_for(source: Path) -> None:
    checkpoint = FolderSource(source)
    spec, decoder = ModelSpec.from_config(checkpoint.config), load_decoder(checkpoint)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 64, generator=generator)
    copies = x.repeat(2, 1, 1) + 0.3 * torch.randn(4, 6, 64, generator=generator)
    weights = torch.zeros(2, 6)
    weights[0, 1], weights[1, 2:4] = 1.0, 0.5
    with torch.no_grad():
        wanted, found = (decoder.logits(decoder.model.norm(h)).log_softmax(-1) for h in (x, copies.view(2, 2, 6, 64)))
        kl = (wanted.exp() * (wanted - found)).sum(-1)  # [parts, S, T]
        assert divergences(checkpoint, spec, x, copies, weights) == pytest.approx(
            ((kl * weights).sum((1, 2)) / 2).tolist(), rel=1e-4
        )
        assert divergences(checkpoint, spec, x, copies) == pytest.approx(kl.mean((1, 2)).tolist(), rel=1e-4)


def test_a_reduced_artifact_is_healed_and_said_apart(source: Path, text: str, tmp_path: Path) -> None:
    wanted = ReduceConfig(share=0.4, data=(text,), stages=(HEALING,))
    out = quantize(str(source), tmp_path / "flash", QuantizeConfig(**FLASH, reduce=wanted))
    reduced = FolderSource(tmp_path / "flash-reduced")
    for folder in (FolderSource(out), reduced):
        assert folder.config["num_hidden_layers"] == 3
        step = Sidecar.read(folder).provenance["reduce"]
        assert (step["layers_left_out"], step["layers_before"]) == ([2, 3], 5)
        assert step["training"]["steps"] == 2
        assert step["loss"]["tokens"] == 2048
    before, after = load_decoder(FolderSource(source)), load_decoder(reduced)
    changed = [
        after.layers[i].mlp.up_proj.weight - before.layers[old].mlp.up_proj.weight for i, old in ((0, 0), (2, 4))
    ]
    assert all(
        0 < difference.abs().max() < 0.02 for difference in changed
    )  # healed, from the weights of layers 0 and 4
    # made once: a second artifact of the same name and settings finds it, another share does not
    stamp = (tmp_path / "flash-reduced" / "model.safetensors").stat().st_mtime_ns
    out.rename(tmp_path / "first")
    quantize(str(source), out, QuantizeConfig(**FLASH, reduce=wanted))
    assert (tmp_path / "flash-reduced" / "model.safetensors").stat().st_mtime_ns == stamp
    out.rename(tmp_path / "second")
    with pytest.raises(UserError, match=r"flash-reduced was not made from .* with these settings"):
        quantize(str(source), out, QuantizeConfig(**FLASH, reduce=wanted.model_copy(update={"share": 0.2})))


@pytest.mark.parametrize(("share", "count"), [(0.05, 0), (0.9, 4)])
def test_shares_that_leave_nothing_to_do_or_to_run(source: Path, text: str, tmp_path: Path, share, count) -> None:
    wanted = ReduceConfig(share=share, data=(text,), stages=(HEALING,))
    with pytest.raises(UserError, match=f"which is {count} of 5 layers"):
        quantize(str(source), tmp_path / "out", QuantizeConfig(**FLASH, reduce=wanted))
    assert not list(tmp_path.iterdir())


def test_each_layer_keeps_its_kind(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 64}
    source = FolderSource(write_tiny(tmp_path / "qwen2", "qwen2", num_hidden_layers=4, **window))
    spec = ModelSpec.from_config(source.config)
    assert [spec.window_of(number) for number in range(4)] == [None, None, 64, 64]
    fewer = Fewer(source, spec, [0, 3])
    reduced = ModelSpec.from_config(fewer.config)
    assert [reduced.window_of(number) for number in range(2)] == [None, 64]
    name = "self_attn.q_proj.bias"
    assert torch.equal(fewer.tensor(f"model.layers.1.{name}"), source.tensor(f"model.layers.3.{name}"))
    assert len(load_decoder(fewer).layers) == 2
    source.config.pop("layer_types")
    with pytest.raises(UserError, match=r"layer 3 would become layer 1, .* cannot be reduced"):
        Fewer(source, spec, [0, 3])
