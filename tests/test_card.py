"""The model card: valid metadata, every figure out of the report, and nothing claimed that was not measured."""

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard
from reports import tiny_report

from lcconvert.convert.card import CardFacts, model_card
from lcconvert.runtime.sidecar import AttentionPolicy, ContextClaim, KVConfig, Sidecar


def facts(**changed: Any) -> CardFacts:
    sidecar = Sidecar(
        variant=changed.pop("variant", "flash"),
        kv=KVConfig(scheme="int4"),
        attention=AttentionPolicy(kind="hybrid"),
        context=ContextClaim(configured=8192),
        provenance={"source": "someone/base", "recipe": {"extend": {"method": "yarn"}}},
    )
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [1.0, 2.0]}
    given: dict[str, Any] = {
        "repo": "me/demo",
        "license": {"license": "apache-2.0"},
        "base_model": "someone/base",
        "config": {"dtype": "bfloat16", "rope_parameters": rope},
        "sidecar": sidecar,
        "report": tiny_report("ab" * 32),
        "pictures": ["validation/needles.png"],
    }
    return CardFacts(**(given | changed))


def test_metadata_is_read_back_by_the_hub_library() -> None:
    data = ModelCard(model_card(facts())).data
    assert data.base_model == "someone/base"
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.tags == ["lcconvert", "long-context", "safetensors", "flash"]
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    assert found[("Needles at 1K tokens", "accuracy")] == 1.0
    assert found[("Needles at 4K tokens", "accuracy")] == 0.8
    assert found[("jargon, window 512", "perplexity")] == 12.1825
    assert ("jargon, window 2K", "perplexity") not in found  # it ran out of memory: not measured, not claimed
    assert found[("Same tokens as base", "kl_divergence")] == 0.0312


def test_measured_tables() -> None:
    text = model_card(facts())
    for expected in (
        "| 4,096 | 4/5 | 40% to 100% |",
        "| 2,048 | out of memory |  |",
        "| prefill | 0.0312 | 0.25 | 95.31% |",
        "| 4,096 | 8.25 s | 21.5 tok/s | not measured |",
        "98.8 MB",
        "Validated context: 4,096 tokens (85% of the score at 1,024 tokens)",
        "Configured context: 8,192 tokens",
        "stayed silent 2 times",
        "![needles](validation/needles.png)",
        '"method": "yarn"',
    ):
        assert expected in text, expected
    assert "long_factor" not in text  # a table of 64 numbers is not for reading


def test_unvalidated_artifact_claims_nothing() -> None:
    text = model_card(facts(report=None, pictures=[]))
    assert "No validation report comes with this artifact" in text
    assert "## Measured\n\nNothing." in text
    assert "model-index" not in text
    assert not re.search(r"\d%", text)


def test_validation_that_no_length_passed() -> None:
    assert "no tested length passed" in model_card(facts(report=tiny_report("ab" * 32, validated=None)))


@pytest.mark.parametrize(("engine", "library"), [("onnx", "onnxruntime"), ("gguf", "gguf")])
def test_other_engines(engine: str, library: str) -> None:
    card = ModelCard(model_card(facts(engine=engine)))
    assert card.data.library_name == library
    assert engine in card.data.tags


def test_extended_is_a_finetune_and_local_sources_are_no_base_model() -> None:
    assert "base_model_relation: finetune" in model_card(facts(variant="extended"))
    local = model_card(facts(base_model=None))
    assert "base_model" not in local.partition("## How it was made")[0]
