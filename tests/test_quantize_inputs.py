"""What `quantize` says of sources and texts that are not as they should be, and those it must cope with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from lcconvert.convert.error_table import error_table
from lcconvert.convert.quantize import REPORT, quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.source import FolderSource

TEXT = {"samples": 1, "length": 256}
FREE = QuantizeConfig(samples=0, attention="dense")


def changed(folder: Path, change) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.weight"]
)
def test_weights_that_are_not_finite_are_named(tmp_path: Path, name: str, value: float) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    src = changed(write_tiny(tmp_path / "source", "qwen2"), poison)
    with pytest.raises(
        UserError, match=rf"tensor {name} of .* holds NaN or infinite values; the checkpoint is damaged"
    ):
        quantize(src, tmp_path / "out", FREE)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_calibration_text_that_is_not_there(tmp_path: Path) -> None:
    src = str(write_tiny(tmp_path / "source"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "no-texts").mkdir()
    for name, message in (
        ("absent.txt", r"absent\.txt.* does not exist"),
        ("empty.txt", r"empty\.txt"),
        ("no-texts", r"no-texts"),
    ):
        with pytest.raises(UserError, match=message):
            quantize(src, tmp_path / "out", QuantizeConfig(calibration=(str(tmp_path / name),), **TEXT))
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("variant", ["flash", "pro"])
def test_a_layer_of_zeros(tmp_path: Path, variant: str) -> None:
    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith("model.layers.0.") and name.endswith("_proj.weight"):
                tensor.zero_()

    src = changed(write_tiny(tmp_path / "source", "llama"), silence)
    out = quantize(src, tmp_path / "out", QuantizeConfig(variant=variant, kv="int4", attention="dense", **TEXT))
    rows = json.loads((out / REPORT).read_text())["linear_layers"]
    assert {row["output_error"] for row in rows if ".layers.0." in row["name"]} == {0.0}
    ids = torch.arange(4, 80)[None]
    with torch.no_grad():
        before, after = load_decoder(FolderSource(Path(src))), load_decoder(FolderSource(out))
        assert torch.equal(
            after.layers[0](after.embed(ids), *_tables(after)), after.embed(ids)
        )  # a layer that does nothing
        loss = (before.logits(before(ids)) - after.logits(after(ids))).abs().max()
    assert loss < 1.0
    if variant == "pro":
        with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.k_scale came out as .*all-zero weights"):
            quantize(src, tmp_path / "fp8", QuantizeConfig(variant="pro", **TEXT))
        assert not (tmp_path / "fp8").exists()


def _tables(decoder) -> tuple[torch.Tensor, torch.Tensor]:
    from lcconvert.runtime.rope import cos_sin

    return cos_sin(decoder.spec.rope, decoder.spec.head_dim, torch.arange(76)[None])


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_tied_heads_and_biases_are_kept(tmp_path: Path, family: str, tied: bool) -> None:
    source = write_tiny(tmp_path / "source", family)
    out = quantize(str(source), tmp_path / "out", FREE)
    before, after = FolderSource(source), FolderSource(out)
    assert after.config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in after.names()) is not tied
    biases = [name for name in before.names() if name.endswith(".bias")]
    assert len(biases) == (0 if tied else 6)
    for name in biases:
        assert torch.equal(after.tensor(name), before.tensor(name).bfloat16())


@pytest.mark.parametrize(
    ("width", "asked", "message"),
    [
        (72, None, r"no group size of 128, 64, 32 divides the 72 inputs of model\.layers\.0\.self_attn\.q_proj"),
        (64, 48, r"group size 48 does not fit model\.layers\.0\.self_attn\.q_proj, which has 64 inputs"),
        (64, 12, r"group size 12 does not fit"),
        (72, 24, None),
    ],
)
def test_odd_group_sizes(tmp_path: Path, width: int, asked: int | None, message: str | None) -> None:
    shape = {"hidden_size": width, "head_dim": 18, "intermediate_size": 144, "num_hidden_layers": 1}
    src = str(write_tiny(tmp_path / "source", "llama", **shape))
    config = FREE.model_copy(update={"group_size": asked})
    if message:
        with pytest.raises(UserError, match=message):
            quantize(src, tmp_path / "out", config)
        return
    decoder = load_decoder(FolderSource(quantize(src, tmp_path / "out", config)))
    with torch.no_grad():
        assert torch.isfinite(decoder(torch.arange(4, 60)[None])).all()


def test_the_error_of_every_layer_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = quantize(
        str(write_tiny(tmp_path / "source")), tmp_path / "out", QuantizeConfig(wide=("re:.*v_proj",), **TEXT)
    )
    shown = capsys.readouterr().err
    rows = json.loads((out / REPORT).read_text())["linear_layers"]
    assert error_table(rows) in shown
    head, first, second, worst, made = error_table(rows).splitlines()
    assert set(head.split()[4:]) == {"q", "k", "v", "o", "gate", "up", "down"}
    by_name = {row["name"]: row["output_error"] for row in rows}
    column = head.split()[4:].index("down") + 2
    assert first.split()[column] == f"{100 * by_name['model.layers.0.mlp.down_proj']:.3f}"
    assert second.split()[column] == f"{100 * by_name['model.layers.1.mlp.down_proj']:.3f}"
    assert max(by_name, key=by_name.__getitem__) in worst
    assert made == "made by: gptq (14)"
    experts = [
        {"name": f"model.layers.0.mlp.experts.{e}.up_proj", "output_error": e / 10, "method": "rtn"} for e in (1, 2)
    ]
    assert error_table(experts).splitlines()[1].split() == ["layer", "0", "20.000"]
