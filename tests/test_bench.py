"""`lcconvert bench`: arithmetic of work and density, random models of a shape, the document, bad requests."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tiny import tiny_config, write_tiny

from lcconvert.convert import bench as bench_module
from lcconvert.convert import bench_report
from lcconvert.convert.bench_work import (
    cap_for_density,
    capped_blocks,
    decode_bytes,
    fixed_density_policy,
    prefill_work,
    sparse_tiles,
    tiles_of,
)
from lcconvert.convert.cli import main
from lcconvert.convert.shapes import SHAPES, random_decoder, random_kv_scales, read_shape
from lcconvert.kernels.select_blocks import select_blocks
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.kv_cache import Sequence
from lcconvert.runtime.linear import Fp8Linear, Int4Linear
from lcconvert.runtime.plan import variant_layout
from lcconvert.runtime.sidecar import AttentionPolicy
from lcconvert.runtime.spec import ModelSpec

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lcconvert", "bench", *args])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("shape")
    tiny_config("qwen2", architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    return str(folder)


# --- arithmetic ---


@given(st.integers(1, 300), st.integers(1, 400))
def test_capped_blocks_is_the_sum_it_names(tiles: int, cap: int) -> None:
    assert capped_blocks(tiles, cap) == sum(min(row + 1, cap) for row in range(tiles))


@given(st.integers(1, 40_000), st.floats(0.001, 1.0))
def test_no_other_cap_comes_nearer_to_the_density(context: int, density: float) -> None:
    cap, tiles = cap_for_density(context, density), tiles_of(context)

    def miss(candidate: int) -> float:
        return abs(capped_blocks(tiles, candidate) - density * capped_blocks(tiles, tiles))

    assert 1 <= cap <= tiles
    assert miss(cap) == min(miss(other) for other in range(1, tiles + 1))


def test_four_percent_of_a_million_tokens() -> None:
    assert cap_for_density(2**20, 0.04) == 166
    assert cap_for_density(2**20, 1.0) == 8192


@settings(max_examples=10, deadline=None)
@given(st.integers(9, 24), st.floats(0.3, 1.0))
def test_the_selector_lists_what_the_arithmetic_says(tiles: int, density: float) -> None:
    context, heads = 128 * tiles, 2
    policy = fixed_density_policy(context, density)
    q = torch.randn(context, heads, 16, generator=torch.Generator().manual_seed(tiles))
    assert policy.max_blocks is not None
    lists = select_blocks(
        q,
        q[:, :1].contiguous(),
        q_offset=0,
        alpha=torch.full((heads,), 0.01),
        sink_blocks=policy.sink_blocks,
        local_blocks=policy.local_blocks,
        dense_from=context - policy.dense_last,
        min_blocks=policy.min_blocks,
        max_blocks=policy.max_blocks,
    )
    sparse = sparse_tiles(context, policy)
    always = policy.sink_blocks + policy.local_blocks
    rows = capped_blocks(sparse, max(policy.max_blocks, always)) + sum(range(sparse + 1, tiles + 1))
    assert lists.count.sum(1).tolist() == [rows] * heads


def test_work_of_a_dense_prefill_is_the_textbook_number() -> None:
    spec = ModelSpec.from_config(SHAPES["llama-3.1-8b"])
    context, policy = 2**17, AttentionPolicy()
    tiles = tiles_of(context)
    listed = spec.num_heads * ((spec.num_layers - 1) * tiles * (tiles + 1) // 2 + tiles)
    work = prefill_work(spec, context, policy, listed=listed, itemsize=2, packed=34_816.0)
    attention = 31 * 4 * 4096 * context**2 / 2  # exact causal pairs of the layers that pass all rows
    assert work["attention"].flops == pytest.approx(attention, rel=1e-3)
    linear = spec.parameters() - 2 * spec.vocab_size * spec.hidden_size
    assert work["gemm"].flops == pytest.approx(2 * context * linear * 31 / 32, rel=0.01)
    assert work["selection"].flops == 0
    assert work["quantize"].bytes == context * (2 * 32 * 1024 * 2 + 34_816)


def test_bytes_of_a_step() -> None:
    spec = ModelSpec.from_config(SHAPES["llama-3.1-8b"])
    values, context = spec.kv_values_per_token, 2**20
    dense = decode_bytes(spec, context, weights=5_000, kv=34_816.0, itemsize=2, pages=None, bounds=9.0)
    assert dense == 5_000 + 128 * values * 2 + (context - 128) * 34_816
    sparse = decode_bytes(spec, context, weights=5_000, kv=34_816.0, itemsize=2, pages=100, bounds=9.0)
    assert sparse == 5_000 + 128 * values * 2 + 100 * 128 * 34_816 + (context - 128) * 9
    assert decode_bytes(spec, 100, weights=0, kv=1.0, itemsize=2, pages=None, bounds=0.0) == 100 * values * 2


# --- shapes ---


@pytest.mark.parametrize(
    ("name", "parameters", "kv_values"),
    [
        ("llama-3.1-8b", 8_030_261_248, 65_536),
        ("qwen2.5-7b", 7_615_616_512, 28_672),
        ("smollm2-135m", 134_515_008, 11_520),
    ],
)
def test_shapes_are_the_published_ones(name: str, parameters: int, kv_values: int) -> None:
    spec = ModelSpec.from_config(SHAPES[name])
    assert spec.parameters() == parameters
    assert spec.kv_values_per_token == kv_values
    assert spec.max_position > 2**20 + 64
    assert spec.qkv_bias == (name == "qwen2.5-7b")


@pytest.mark.parametrize("variant", ["flash", "pro", "16-bit"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_random_decoder_is_complete_finite_and_packed(variant: str, family: str) -> None:
    kind = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    spec = ModelSpec.from_config(tiny_config(family, architectures=[kind]).to_dict())
    decoder = random_decoder(spec, variant_layout(spec, variant), torch.device("cpu"), torch.float32)
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        assert not tensor.is_meta
        assert not tensor.requires_grad
    kinds = {type(module) for module in decoder.layers[0].modules()} & {Int4Linear, Fp8Linear, torch.nn.Linear}
    assert kinds == {{"flash": Int4Linear, "pro": Fp8Linear, "16-bit": torch.nn.Linear}[variant]}
    ids = torch.randint(0, spec.vocab_size, (1, 40))
    with torch.inference_mode():
        hidden = decoder(ids)
    assert hidden.isfinite().all()
    assert 0.5 < hidden.std() < 2
    again = random_decoder(spec, variant_layout(spec, variant), torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        assert torch.equal(again(ids), hidden)


def test_random_weights_have_the_size_of_trained_ones() -> None:
    spec = ModelSpec.from_config(SHAPES["smollm2-135m"] | {"num_hidden_layers": 1})
    x = torch.randn(64, 576, generator=torch.Generator().manual_seed(1))
    for variant in ("flash", "pro", "16-bit"):
        decoder = random_decoder(spec, variant_layout(spec, variant), torch.device("cpu"), torch.float32)
        with torch.inference_mode():
            y = decoder.layers[0].mlp.gate_proj(x)
        assert y.std() == pytest.approx(0.02 * 24, rel=0.15)
        assert abs(y.mean()) < 0.02


def test_kv_scales_differ_by_head_and_between_k_and_v() -> None:
    spec = ModelSpec.from_config(SHAPES["llama-3.1-8b"])
    scales = random_kv_scales(spec)
    assert len(scales) == spec.num_layers
    for k, v in scales:
        assert len({*k.tolist(), *v.tolist(), 1.0}) == 2 * spec.num_kv_heads + 1
        assert min(k.min(), v.min()) > 0


def test_a_shape_is_a_name_or_a_folder_with_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llama-3.1-8b, qwen2.5-7b, smollm2-135m or a folder"):
        read_shape("llama-4")
    for content in ("[1]", "{not json"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json"):
            read_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen2.5-7b"] | {"quantization_config": {"x": 1}}))
    assert read_shape(str(tmp_path)) == SHAPES["qwen2.5-7b"]


# --- the command ---


def _fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _check_document(document: dict) -> None:
    assert set(document) == _fields(bench_report.Report) | {"format"}
    assert document["format"] == 1
    for rows, kind in (
        ("prefill", bench_report.Prefill),
        ("decode", bench_report.Decode),
        ("compare", bench_report.Compared),
    ):
        for row in document[rows]:
            assert set(row) == _fields(kind)
    for row in document["prefill"]:
        spent = [part["seconds"] for part in row["parts"] if "overlapped" not in part["name"]]
        assert sum(spent) == pytest.approx(row["seconds"], rel=0.05)
        assert row["memory"]["host"] > 0


def test_flash_shape_end_to_end(shape: str, tmp_path: Path, call: Call) -> None:
    file = tmp_path / "bench.json"
    args = ["--shape", shape, "--random-weights", "--context", "2k", "--context", "1k", "--policy", "hybrid-decode"]
    args += ["--density", "0.5", "--decode", "3", "--compare", "sdpa", "--compare", "transformers"]
    args += ["--compare-context", "512", "--device", "cpu", "-o", str(file)]
    code, out, err = call(*args)
    assert (code, "prefill of 2K tokens" in out) == (0, True), err
    document = json.loads(file.read_text())
    _check_document(document)
    assert document["model"]["variant"] == "flash"
    assert document["model"]["kv"] == "int4"
    assert [row["context"] for row in document["prefill"]] == [1024, 2048]
    assert [(row["context"], row["policy"]) for row in document["decode"]] == [
        (1024, "dense"), (1024, "page-sparse"), (2048, "dense"), (2048, "page-sparse"),
    ]  # fmt: skip
    short, long = document["prefill"]
    assert 0.5 < long["density"] < short["density"] <= 1  # one cap for both, and the dense end on top
    parts = {part["name"]: part for part in long["parts"]}
    assert {"gemm", "attention", "selection", "quantize", "other"} <= set(parts)
    assert parts["attention"]["flops"] > parts["selection"]["flops"] > 0
    assert document["growth"]["tokens"] == 2
    assert [row["method"] for row in document["compare"]] == ["sdpa", "transformers"]
    for row in document["compare"]:
        assert row["prefill_seconds"] > 0
        assert row["decode_seconds_per_token"] > 0
    assert call(*args)[0] == 2  # the file is not overwritten


@pytest.mark.gpu
def test_a_gpu_reports_floors_ceilings_and_predictions(tmp_path: Path, call: Call) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["smollm2-135m"] | {"num_hidden_layers": 3}))
    args = ["--shape", str(tmp_path), "--random-weights", "--context", "8k", "--context", "64k", "--decode", "4"]
    args += [
        "--policy",
        "hybrid-decode",
        "--gpu-memory",
        "8G",
        "--compare",
        "sdpa",
        "--compare-context",
        "8k",
        "--json",
    ]
    code, out, err = call(*args)
    assert code == 0, err
    document = json.loads(out)
    _check_document(document)
    assert document["ceilings"]["copy_tb"] > 0.1
    assert document["warm_up"]["longest_layer_seconds"] > 0
    short, long = document["prefill"]
    assert long["density"] < short["density"] < 1
    assert 0 < long["floor_seconds"] < long["seconds"]
    assert short["predicted_gpu"] is None
    assert 0.8 < long["predicted_gpu"] / long["memory"]["gpu"] < 1.2  # 5% is for models that fill a card
    for row in document["decode"]:
        assert 0 < row["floor_seconds"] < row["seconds_per_token"]
    assert document["compare"][0]["computed_longest_seconds"] > 0
    code, out, err = call(*args, "--gpu-memory", "100M")
    assert (code, out, "largest context that fits" in err) == (2, "", True)


def test_pro_shape_prints_json(shape: str, call: Call) -> None:
    args = ["--shape", shape, "--random-weights", "--variant", "pro", "--context", "300", "--decode", "2", "--json"]
    code, out, _ = call(*args, "--device", "cpu")
    document = json.loads(out)
    assert code == 0
    _check_document(document)
    assert document["model"]["kv"] == "fp8"
    assert document["prefill"][0]["density"] == 1
    assert document["growth"] is None
    assert [row["policy"] for row in document["decode"]] == ["dense"]


def test_widths_without_an_int4_group_have_no_flash_variant(tmp_path: Path, call: Call) -> None:
    odd = {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 3}
    odd |= {"num_key_value_heads": 1, "vocab_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["smollm2-135m"] | odd))
    args = ["--shape", str(tmp_path), "--random-weights", "--context", "200", "--decode", "1", "--device", "cpu"]
    code, _, err = call(*args)
    assert (code, "no int4 group of 128, 64 or 32 divides the layer widths 48, 100" in err) == (2, True)
    assert call(*args, "--variant", "pro")[0] == 0


def test_artifact_and_no_decoding(tmp_path: Path, call: Call) -> None:
    folder = write_tiny(tmp_path / "tiny")
    code, out, _ = call(str(folder), "--context", "200", "--decode", "0", "--kv", "int4", "--json")
    document = json.loads(out)
    assert code == 0
    _check_document(document)
    assert document["model"]["variant"] == "source"
    assert document["decode"] == []
    code, _, err = call(str(folder), "--context", "2k")
    assert (code, "plus 64 decoded tokens exceeds the 2048" in err) == (2, True)


def test_out_of_memory_of_an_alternative_is_a_row(shape: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def refuse(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", refuse)
    args = ["--shape", shape, "--random-weights", "--context", "300", "--decode", "1", "--compare", "transformers"]
    code, out, _ = call(*args, "--compare-context", "300", "--device", "cpu")
    assert code == 0
    assert "transformers at 300 tokens: out of memory" in out


def _read_report(file: Path) -> bench_report.Report:
    document = json.loads(file.read_text(encoding="utf-8"))
    _check_document(document)
    report = TypeAdapter(bench_report.Report).validate_python(document)
    assert report.as_dict() == document
    return report


def test_committed_measurements_can_be_read_and_are_what_the_readme_shows() -> None:
    root = Path(__file__).parent.parent
    for file in (root / "tests" / "bench").glob("*.json"):
        _read_report(file)
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name in re.findall(r"\]\((tests/bench/[^)/]+\.json)\)", readme):
        assert bench_report.render(_read_report(root / name)) in readme, name


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), 2, "ran out of memory at 400 tokens"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_run_that_ends_early_keeps_what_it_has(
    error: BaseException,
    code: int,
    sentence: str,
    shape: str,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measure = bench_module.measure_prefill

    def fail(engine: Engine, seq: Sequence, context: int, *args: Any, **kwargs: Any) -> bench_report.Prefill:
        if context == 400:
            raise error
        return measure(engine, seq, context, *args, **kwargs)

    monkeypatch.setattr(bench_module, "measure_prefill", fail)
    file = tmp_path / "bench.json"
    args = ["--shape", shape, "--random-weights", "--context", "300", "--context", "400", "--decode", "1"]
    got, out, err = call(*args, "--device", "cpu", "-o", str(file))
    assert (got, out) == (code, "")
    assert sentence in err
    assert f"{file} holds what was measured before" in err
    document = json.loads(file.read_text())
    _check_document(document)
    assert [row["context"] for row in document["prefill"]] == [300]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("", "there is nothing to measure"),
        ("art --shape smollm2-135m", "both an artifact (art) and --shape smollm2-135m"),
        ("--shape smollm2-135m", "--shape smollm2-135m names no weights; add --random-weights"),
        ("--shape gpt-5 --random-weights", "--shape is 'gpt-5', expected llama-3.1-8b"),
        ("art --random-weights", "--random-weights belongs to --shape"),
        ("art --density 0.1", "--density belongs to --shape"),
        ("art --compare sdpa", "--compare belongs to --shape"),
        ("--shape smollm2-135m --random-weights --kv int4", "--kv belongs to an artifact"),
        ("--shape smollm2-135m --random-weights --attention dense", "--attention belongs to an artifact"),
        ("--shape smollm2-135m --random-weights --density 1.5", "density is 1.5"),
        ("--shape smollm2-135m --random-weights --density 0.1 --policy dense", "the policy is dense"),
        ("--shape smollm2-135m --random-weights --density 0.1 --variant pro", "the policy is dense"),
        ("--shape smollm2-135m --random-weights --policy hybrid-decode --variant pro", "bounds of int4 keys"),
        ("--shape smollm2-135m --random-weights --policy sparse", "policy is 'sparse'"),
        ("--shape smollm2-135m --random-weights --variant tiny", "variant is 'tiny'"),
        ("--shape smollm2-135m --random-weights --compare vllm", "is 'vllm'"),
        ("--shape smollm2-135m --random-weights --compare-context 1k", "--compare-context is given without --compare"),
        ("--shape smollm2-135m --random-weights --context 0", "context is '0'"),
        ("--shape smollm2-135m --random-weights --decode -1", "decode is -1"),
        ("--shape smollm2-135m --random-weights --device tpu", "--device is 'tpu'"),
        ("--shape smollm2-135m --random-weights -o no/such/folder/b.json", "whose folder does not exist"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence(args: str, sentence: str, call: Call) -> None:
    code, out, err = call(*args.split())
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.strip().splitlines()) == 1 or "Usage" in err
