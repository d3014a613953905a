"""Which parts of a model lose most, what a size budget does about it, and the bars a quantized artifact must meet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from lcconvert.convert.cli import main
from lcconvert.convert.hashing import verify_files
from lcconvert.convert.quantize import REPORT, make_plan, quantize
from lcconvert.convert.quantize_config import USUAL_GATES, Gate, QuantizeConfig
from lcconvert.convert.round_layer import to_nearest
from lcconvert.convert.round_to_nearest import dequantize
from lcconvert.convert.sensitivity import Part, sensitivities, within_budget
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.linear import LinearFormat
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import FolderSource

INT4, FP8 = LinearFormat("int4", 64), LinearFormat("fp8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source") / "llama", "llama")


@pytest.fixture(scope="module")
def parts(source: Path) -> list[Part]:
    plan = make_plan(FolderSource(source), QuantizeConfig(samples=2, length=256))
    return sensitivities(FolderSource(source), plan.spec, plan.layout, plan.windows, torch.device("cpu"))


def test_a_part_loses_what_the_model_loses_when_it_alone_is_rounded(source: Path, parts: list[Part]) -> None:
    plan = make_plan(FolderSource(source), QuantizeConfig(samples=2, length=256))
    assert plan.windows is not None
    assert len(parts) == 8  # four groups in each of two layers
    assert [part.modules[0].removeprefix("model.layers.") for part in parts[:2]] == [
        "0.self_attn.q_proj",
        "0.self_attn.o_proj",
    ]
    for part in (parts[0], parts[7]):
        decoder = load_decoder(FolderSource(source))
        with torch.no_grad():
            wanted = decoder.logits(decoder(plan.windows)).log_softmax(-1)
            seen: list[torch.Tensor] = []
            watched = decoder.get_submodule(part.modules[0])
            hook = watched.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].flatten(0, -2)))
            decoder(plan.windows)
            hook.remove()
            for name in part.modules:
                weight = decoder.get_parameter(f"{name}.weight")
                moment = seen[0].square().mean(0)
                weight.copy_(dequantize(*to_nearest(weight, INT4, moment, torch.float32)))
            found = decoder.logits(decoder(plan.windows)).log_softmax(-1)
        kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
        assert part.kl == pytest.approx(float(kl), rel=1e-2)


def _part(name: str, kl: float, width: int = 640, form: LinearFormat = INT4) -> Part:
    return Part((name,), form, width, 128, kl)


def test_the_budget_goes_to_the_most_loss_a_bit() -> None:
    parts = [_part("a", 0.2), _part("b", 0.3), _part("large", 0.5, 1920), _part("fp8 already", 9.0, form=FP8)]
    every = sum(part.bits for part in parts)
    weights = sum(part.width * part.height for part in parts)
    assert parts[0].bits == 128 * (640 * 4 + 10 * 16)  # codes and ten scales a row
    assert parts[3].bits == 128 * (640 * 8 + 16)

    def chosen(bits: int) -> list[str]:
        return [part.modules[0] for part in within_budget(parts, bits / weights)]

    assert chosen(every) == []
    assert chosen(every + parts[0].added) == ["b"]
    assert chosen(every + 2 * parts[0].added) == ["b", "a"]
    assert chosen(every + sum(part.added for part in parts[:3])) == ["b", "a", "large"]
    with pytest.raises(UserError, match=r"bits_per_weight is 4\.1 but the formats chosen take 4\.\d+"):
        within_budget(parts, 4.1)


def test_bits_per_weight_is_kept_and_lowers_the_loss(source: Path, parts: list[Part], tmp_path: Path) -> None:
    settings = {"samples": 2, "length": 256, "attention": "dense", "gate": Gate(lengths=("512",))}
    plain = quantize(str(source), tmp_path / "plain", QuantizeConfig(**settings))
    mixed = quantize(str(source), tmp_path / "mixed", QuantizeConfig(**settings, bits_per_weight=6.0))
    before, after = (json.loads((folder / REPORT).read_text()) for folder in (plain, mixed))
    assert before["bits_per_weight"] < 4.3
    assert 5.0 < after["bits_per_weight"] <= 6.0 + 0.02  # the shapes are stored too
    wide = after["sensitivity"]
    assert [row["kl"] for row in wide] == pytest.approx([part.kl for part in parts], rel=1e-3)
    groups = json.loads((mixed / "config.json").read_text())["quantization_config"]["config_groups"]
    named = groups["group_0"]["targets"]
    assert groups["group_0"]["weights"]["num_bits"] == 8
    assert named == [m for part in within_budget(parts, 6.0) for m in part.modules]
    assert f"{named[0]}.weight" in FolderSource(mixed).names()
    (short,), (long,) = before["loss"], after["loss"]
    assert Sidecar.read(FolderSource(mixed)).provenance["quantize"]["loss"] == after["loss"]
    verify_files(mixed)  # the sidecar's hashes were taken last
    assert short["length"] == long["length"] == 512
    assert long["weights"]["mean_kl"] < short["weights"]["mean_kl"]
    assert 0 < short["kv"]["mean_kl"] < short["together"]["mean_kl"]
    assert short["weights"]["mean_kl"] < short["together"]["mean_kl"]


def test_a_missed_bar_names_what_costs_most_and_leaves_the_artifact(source, parts, tmp_path: Path) -> None:
    out = tmp_path / "strict"
    gate = Gate(lengths=("512",), kl_max=1e-9)
    worst = max(parts, key=lambda part: part.kl).modules[0]
    with pytest.raises(CheckFailed, match=rf"KL is .* at 512 tokens, the bar is 1e-09; most is lost in .*{worst}"):
        quantize(str(source), out, QuantizeConfig(samples=2, length=256, kv="bf16", gate=gate))
    report = json.loads((out / REPORT).read_text())
    assert report["loss"][0]["kv"]["mean_kl"] == 0
    gate = Gate(lengths=("512",), kv_kl_max=1e-9)
    settings = {"samples": 0, "attention": "dense", "ignore": ("re:.*(q|k|v|o|gate|up)_proj", "model.layers.0.*")}
    with pytest.raises(
        CheckFailed, match=r"KL of the KV cache alone is .*; the largest error is in .*1\.mlp\.down_proj"
    ):
        quantize(str(source), tmp_path / "kv", QuantizeConfig(**settings, gate=gate))
    with pytest.raises(UserError, match=r"lengths are 4096 tokens but .* configured for 2048"):
        quantize(str(source), tmp_path / "long", QuantizeConfig(gate=Gate(lengths=("4k",))))
    assert not (tmp_path / "long").exists()


def test_the_command_exits_1_on_a_missed_bar(source: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def run(*args: str) -> int:
        monkeypatch.setattr("sys.argv", ["lcconvert", "quantize", str(source), "--variant", "pro", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code

    monkeypatch.setitem(USUAL_GATES, "pro", Gate(kl_max=1e-9))
    assert run("--samples", "1", "--length", "256", "--gate", "512", "-o", str(tmp_path / "pro")) == 1
    assert f"inputs in 16-bit lose less; the artifact is in {tmp_path / 'pro'}" in capsys.readouterr().err
    assert (tmp_path / "pro" / REPORT).is_file()
    assert run("--bits-per-weight", "5", "-o", str(tmp_path / "no")) == 2
    assert "bits_per_weight is 5 but variant is pro" in capsys.readouterr().err
