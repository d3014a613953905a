"""The model card: valid metadata, every figure out of the report, and nothing claimed that was not measured."""

import re
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from reports import tiny_report

from lcconvert.convert.card import CardFacts, eval_results, model_card
from lcconvert.convert.results import TaskCell, TaskControl, Tasks
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


def test_both_forms_of_results_say_the_same() -> None:
    """model-index, and .eval_results/*.yaml, whose datasets are Hub ids and whose values link to the report."""
    metadata = yaml.safe_load(model_card(facts()).split("---\n")[1])
    name, rows = model_index_to_eval_results(metadata["model-index"])
    assert name == "demo"
    assert all(isinstance(row, EvalResult) and row.task_type == "text-generation" for row in rows)
    entries = parse_eval_result_entries(yaml.safe_load(str(eval_results(facts()))))
    assert sorted(entry.value for entry in entries) == sorted(row.metric_value for row in rows)
    assert len({(entry.dataset_id, entry.task_id) for entry in entries}) == len(entries)
    assert {entry.dataset_id for entry in entries} == {
        "lcconvert/needles", "lcconvert/perplexity", "lcconvert/agreement"
    }  # fmt: skip
    [found] = [entry for entry in entries if entry.task_id == "accuracy_4096"]
    assert (found.value, found.date) == (0.8, "2026-01-02T03:04:05Z")
    assert found.source_url == "https://huggingface.co/me/demo/blob/main/validation/report.json"
    assert found.notes == "Found (strict). Needles at 4K tokens"


def test_nothing_measured_is_no_results_file() -> None:
    assert eval_results(facts(report=None)) is None
    empty = tiny_report("ab" * 32).model_copy(update={"needles": [], "perplexity": None, "agreement": None})
    assert eval_results(facts(report=empty)) is None
    assert "model_name" not in model_card(facts(report=empty))


def test_it_renders() -> None:
    """Every table is one, the picture is one, and no fence is left open."""
    page = MarkdownIt("commonmark").enable("table").render(model_card(facts()).split("---\n", 2)[2])
    assert page.count("<table>") == 4  # needles, perplexity, agreement, cost
    assert page.count('<img src="validation/needles.png"') == 1
    assert page.count("<pre>") == 3
    assert "|" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)


def test_a_licence_that_the_hub_does_not_know() -> None:
    other = {"license": "other", "license_name": "my-licence", "license_link": "LICENSE"}
    data = ModelCard(model_card(facts(license=other))).data.to_dict()
    assert {key: data[key] for key in other} == other


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


def test_tasks_have_a_table() -> None:
    cells = [
        TaskCell(task="vt", length=4096, state="measured", n=5, score=0.9, strict=4, thirds=[]),
        TaskCell(task="vt", length=8192, state="out of memory", thirds=[]),
    ]
    tasks = Tasks(
        wording="1", prompt="chat", samples=5, metrics={"vt": "all"}, max_new_tokens={"vt": 30}, source_tree=None,
        qa_file=None, keep=0.85, cells=cells, effective={"vt": 4096},
        control=TaskControl(n=0, silent=0, invented=0, other=0),
    )  # fmt: skip
    text = model_card(facts(report=tiny_report("ab" * 32).model_copy(update={"tasks": tasks})))
    assert "| task | 4,096 | 8,192 | keeps 85% to |" in text
    assert "| vt | 4/5 | out of memory | 4,096 |" in text


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
