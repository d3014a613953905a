"""`extend` without training: what is written, what transformers makes of it, and what is refused before writing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import write_tiny

from lcconvert.convert import extend as module
from lcconvert.convert.extend import ExtendConfig, Stage, extend
from lcconvert.convert.extend_config import METHODS
from lcconvert.runtime.errors import CheckFailed, UserError
from lcconvert.runtime.model import load_decoder
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.source import FolderSource

CONTEXT = 16_384


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("method", METHODS)
def test_transformers_reads_the_result_alike(source: Path, tmp_path: Path, method: Any) -> None:
    out = extend(str(source), tmp_path / "out", ExtendConfig(context=CONTEXT, method=method, device="cpu"))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = load_decoder(FolderSource(out))
    ids = torch.arange(40)[None] * 7 % 320
    with torch.no_grad():
        expected = oracle(ids).logits
        torch.testing.assert_close(ours.logits(ours(ids)), expected, atol=1e-4, rtol=0)
    assert oracle.config.max_position_embeddings == CONTEXT


def test_files(source: Path, tmp_path: Path) -> None:
    out = extend(str(source), tmp_path / "out", ExtendConfig(context="16k", device="cpu"))
    config = json.loads((out / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == config["rope_scaling"]["rope_type"] == "yarn"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["rope_parameters"]["factor"] == 8.0
    assert config["rope_parameters"]["original_max_position_embeddings"] == 2048
    assert config["max_position_embeddings"] == CONTEXT
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == CONTEXT
    assert settings["chat_template"] == json.loads((source / "tokenizer_config.json").read_text())["chat_template"]
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    written, before = FolderSource(out), FolderSource(source)
    assert set(written.names()) == set(before.names())
    for name in written.names():
        assert torch.equal(written.tensor(name), before.tensor(name).bfloat16())
    sidecar = Sidecar.read(written)
    assert (sidecar.variant, sidecar.context.configured, sidecar.context.validated) == ("extended", CONTEXT, None)
    assert sidecar.provenance["source"] == source.name
    assert len(sidecar.provenance["source_tensors_sha256"]) == 64
    assert sidecar.provenance["config"]["method"] == "yarn"
    assert not list(tmp_path.glob("*.partial"))


def test_windows_that_never_cut_are_removed(tmp_path: Path) -> None:
    write_tiny(tmp_path / "mistral", "mistral", sliding_window=2048)
    out = extend(str(tmp_path / "mistral"), tmp_path / "out", ExtendConfig(context=CONTEXT, device="cpu"))
    assert json.loads((out / "config.json").read_text())["sliding_window"] is None


def test_tokenizer_limits_are_lifted(source: Path) -> None:
    files = FolderSource(source).files
    limited = json.loads(files["tokenizer.json"])
    limited["truncation"] = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
    changed = module.extended_files({**files, "tokenizer.json": json.dumps(limited).encode()}, CONTEXT)
    assert json.loads(changed["tokenizer.json"])["truncation"] is None


def test_sharded_untied_source_with_biases(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "qwen2", "qwen2")
    out = extend(str(folder), tmp_path / "out", ExtendConfig(context=CONTEXT, method="ntk", device="cpu"))
    assert "lm_head.weight" in FolderSource(out).names()
    assert "model.layers.0.self_attn.q_proj.bias" in FolderSource(out).names()


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"context": 2048}, "context is 2048 tokens but the source already reads 2048"),
        ({"context": 1000}, "context is 1000 tokens"),
        ({"context": CONTEXT, "steps": 1}, "no data is given"),
        ({"context": CONTEXT, "steps": 1, "seq_len": CONTEXT + 1, "data": ("x",)}, "more than the context"),
        ({"context": CONTEXT, "steps": 1, "stages": (Stage(steps=1),)}, "keep one of the two"),
        ({"context": CONTEXT, "steps": 1, "data": ("/nowhere",)}, "/nowhere does not exist"),
        ({"context": CONTEXT, "method": "longrope", "factors": (1.0, 2.0)}, "expected 8 factors"),
    ],
)
def test_refused_and_nothing_written(source: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        extend(str(source), tmp_path / "out", ExtendConfig(**config, device="cpu"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda folder: change(folder, "config.json", quantization_config={"quant_method": "gptq"}), "quantiz"),
        (lambda folder: change(folder, "config.json", rope_parameters={"rope_type": "spiral"}), "spiral"),
        (lambda folder: change(folder, "config.json", sliding_window=512, architectures=["MistralForCausalLM"]), "512"),
    ],
)
def test_refused_sources(tmp_path: Path, break_it: Any, message: str) -> None:
    folder = write_tiny(tmp_path / "source")
    break_it(folder)
    with pytest.raises(UserError, match=message):
        extend(str(folder), tmp_path / "out", ExtendConfig(context="1M", device="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_output_that_exists_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        extend(str(source), tmp_path, ExtendConfig(context=CONTEXT, device="cpu"))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def wrong_theta(folder: Path, config: dict[str, Any], files: dict[str, bytes]) -> None:
    write_files(folder, {**config, "rope_parameters": {**config["rope_parameters"], "rope_theta": 9e3}}, files)


def wrong_context(folder: Path, config: dict[str, Any], files: dict[str, bytes]) -> None:
    write_files(folder, {**config, "max_position_embeddings": 2048}, files)


write_files = module.write_files


@pytest.mark.parametrize("mistake", [wrong_theta, wrong_context])
def test_a_wrong_file_is_caught_and_removed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: Any
) -> None:
    monkeypatch.setattr(module, "write_files", mistake)
    with pytest.raises(CheckFailed, match="does not read back as the RoPE"):
        extend(str(source), tmp_path / "out", ExtendConfig(context=CONTEXT, device="cpu"))
    assert not list(tmp_path.iterdir())


def test_a_wrong_tensor_is_caught(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slipping(module.ShardWriter):
        def add(self, name: str, tensor: torch.Tensor) -> None:
            super().add(name, tensor * 1.01 if name == "model.norm.weight" else tensor)

    monkeypatch.setattr(module, "ShardWriter", Slipping)
    with pytest.raises(CheckFailed, match=r"model\.norm\.weight"):
        extend(str(source), tmp_path / "out", ExtendConfig(context=CONTEXT, device="cpu"))
    assert not list(tmp_path.iterdir())
