"""The model card, README.md: what the artifact is, what was measured on it, and how it was made.

Every figure comes from validation/report.json or config.json; nothing is typed in, rounded up or carried over from the
base model. What was not measured is said to be unmeasured, in the text and by its absence from the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from lcconvert.convert.results import Needles, Perplexity, Report, Tasks
from lcconvert.runtime.sidecar import Sidecar
from lcconvert.runtime.units import format_bytes, format_count

MARK = "<!-- written by lcconvert push; delete this line to keep your own edits -->"
EVAL_RESULTS = ".eval_results/lcconvert.yaml"
_RELATION = {"extended": "finetune", "pro": "quantized", "flash": "quantized"}
_NEEDLES = {  # dataset and title by wording
    "heldout": ("lcconvert-needles", "Needles"),
    "training": ("lcconvert-needles-training", "Needles in the wording of training"),
    "multikey": ("lcconvert-needles-multikey", "Needles among four similar ones"),
}
_WEIGHTS = {
    "pro": "fp8 (e4m3) weights with one scale per output channel",
    "flash": "int4 weights with one scale per group of inputs",
}


@dataclass(frozen=True)
class CardFacts:
    """All that a card is made of. `pictures` are paths inside the repo; `engine` is the weights' format."""

    repo: str
    license: Mapping[str, str]  # the Hub's identifier as `license`, and the name and link of one that is "other"
    base_model: str | None
    config: dict[str, Any]
    sidecar: Sidecar
    report: Report | None
    pictures: Sequence[str]
    engine: str = "safetensors"  # "safetensors" | "onnx" | "gguf"


def model_card(facts: CardFacts) -> str:
    """The text of README.md: YAML metadata between `---` lines, then Markdown."""
    parts = [_title(facts), _measured(facts), _use(facts), _how_made(facts)]
    return f"---\n{_metadata(facts)}---\n{MARK}\n\n" + "\n\n".join(parts) + "\n"


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    variant = facts.sidecar.variant
    rows = [
        EvalResult(
            task_type="text-generation", dataset_type=figure.dataset, dataset_config=str(figure.size),
            dataset_name=figure.name, metric_type=figure.metric, metric_name=figure.metric_name,
            metric_value=figure.value,
        )
        for figure in (_figures(facts.report) if facts.report is not None else ())
    ]  # fmt: skip
    extra: dict[str, Any] = {key: value for key, value in facts.license.items() if key != "license"}
    if facts.base_model is not None and variant in _RELATION:
        extra["base_model_relation"] = _RELATION[variant]
    data = ModelCardData(
        base_model=facts.base_model,
        license=facts.license["license"],
        library_name={"onnx": "onnxruntime", "gguf": "gguf"}.get(facts.engine, "transformers"),
        pipeline_tag="text-generation",
        tags=["lcconvert", "long-context", facts.engine, *([variant] if variant in _WEIGHTS else [])],
        model_name=facts.repo.rpartition("/")[2] if rows else None,
        eval_results=rows or None,
        **extra,
    )
    return data.to_yaml() + "\n"


def eval_results(facts: CardFacts) -> str | None:
    """The measured figures in the Hub's newer form, the text of `EVAL_RESULTS`; None when there are none.

    A dataset there is a Hub id. These texts have none, so theirs are under `lcconvert/` and link to the report.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    if facts.report is None:
        return None
    entries = [
        EvalResultEntry(
            dataset_id=figure.dataset.replace("-", "/", 1),
            task_id=f"{figure.metric}_{figure.size}",
            value=figure.value,
            date=facts.report.created,
            source_url=f"https://huggingface.co/{facts.repo}/blob/main/validation/report.json",
            source_name="lcconvert validate",
            notes=f"{figure.metric_name}. {figure.name}",
        )
        for figure in _figures(facts.report)
    ]
    if not entries:
        return None
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class _Figure:
    """One measured number: on which text, at which length in tokens, by which metric."""

    dataset: str
    size: int
    name: str
    metric: str
    metric_name: str
    value: float


def _figures(report: Report) -> Iterator[_Figure]:
    """Needles per length, perplexity per context, agreement with the reference."""
    for needles in report.needles:
        dataset, title = _NEEDLES[needles.wording]
        for at in needles.by_length:
            if at.state == "measured" and at.n:
                name, found = f"{title} at {format_count(at.length)} tokens", round(at.strict / at.n, 6)
                yield _Figure(dataset, at.length, name, "accuracy", "Found (strict)", found)
    if (perplexity := report.perplexity) is not None:
        for point in perplexity.by_context:
            if point.ppl is not None:
                name = f"{perplexity.text.name}, window {format_count(point.context)}"
                ppl = round(point.ppl, 6)
                yield _Figure("lcconvert-perplexity", point.context, name, "perplexity", "Perplexity", ppl)
    if (agreement := report.agreement) is not None:
        name, both = f"Same tokens as {agreement.reference}", agreement.prefill
        for metric, metric_name, value in (
            ("accuracy", "Top-1 agreement", both.top1),
            ("kl_divergence", "Mean KL (nats)", both.mean_kl),
        ):
            yield _Figure("lcconvert-agreement", agreement.tokens, name, metric, metric_name, round(value, 6))


def _title(facts: CardFacts) -> str:
    context, report = facts.sidecar.context, facts.report
    made_from = f" made from `{facts.base_model}`" if facts.base_model else ""
    kind = _WEIGHTS.get(facts.sidecar.variant, f"{facts.config.get('dtype', '16-bit')} weights")
    lines = [
        f"# {facts.repo.rpartition('/')[2]}",
        "",
        f"A long-context checkpoint{made_from} with lcconvert: {kind}, "
        f"KV cache scheme `{facts.sidecar.kv.scheme}`, `{facts.sidecar.attention.kind}` attention.",
        "",
        f"- Configured context: {context.configured:,} tokens. This is what the position encoding reaches.",
    ]
    validated = report.claim.validated if report is not None else None
    if report is None:
        lines.append("- Validated context: none. **No validation report comes with this artifact.**")
    elif validated is None:
        lines.append(f"- Validated context: none; no tested length passed ({report.claim.rule}).")
    else:
        lines.append(f"- Validated context: {validated:,} tokens ({report.claim.rule}). Use it up to here.")
    return "\n".join(lines)


def _measured(facts: CardFacts) -> str:
    report = facts.report
    if report is None:
        return (
            "## Measured\n\nNothing. Run `lcconvert validate` on the artifact and push again; "
            "until then its quality at any length is unknown."
        )
    setup = report.setup
    parts = [
        "## Measured",
        f"By `lcconvert validate` on {setup.device} ({setup.dtype}, KV `{setup.kv_scheme}`, attention "
        f"`{setup.attention}`), {report.created}. Full report: `validation/report.json`. "
        f"Weights on disk: {format_bytes(report.artifact.bytes)}; KV cache: "
        f"{format_bytes(report.kv_bytes_per_token)} per token.",
    ]
    parts += [_needles(needles) for needles in report.needles]
    if report.tasks is not None:
        parts.append(_tasks(report.tasks))
    if report.perplexity is not None:
        parts.append(_perplexity(report.perplexity))
    if (agreement := report.agreement) is not None:
        rows = [
            [label, f"{b.mean_kl:.4g}", f"{b.p99_kl:.4g}", f"{b.top1:.2%}"]
            for label, b in (("prefill", agreement.prefill), ("decode, through the KV cache", agreement.decode))
            if b is not None
        ]
        parts.append(
            f"Agreement with `{agreement.reference}` on {agreement.tokens:,} tokens "
            f"(perplexity {agreement.ppl_increase:+.2%}):\n\n"
            + _table(["path", "mean KL (nats)", "99th percentile", "same top token"], rows)
        )
    if report.cost:
        rows = [
            [
                f"{c.length:,}",
                _or_state(c.prefill_seconds, "{:.2f} s", c.state),
                _or_state(c.decode_tokens_per_second, "{:.1f} tok/s", c.state),
                _unmeasured(c.state) if c.peak_bytes is None else format_bytes(c.peak_bytes),
            ]
            for c in report.cost
        ]
        parts.append(f"Cost on {setup.device}:\n\n" + _table(["context", "prefill", "decode", "peak memory"], rows))
    if report.checks:
        rows = [
            [c.name, f"{c.limit:g}", _or_state(c.value, "{:.4g}", "not measured"), "yes" if c.passed else "**no**"]
            for c in report.checks
        ]
        parts.append("Checks:\n\n" + _table(["check", "limit", "value", "passed"], rows))
    parts += [f"![{name.rpartition('/')[2].rpartition('.')[0]}]({name})" for name in facts.pictures]
    return "\n\n".join(parts)


def _needles(needles: Needles) -> str:
    rows = [
        [f"{at.length:,}", f"{at.strict}/{at.n}", f"{at.low:.0%} to {at.high:.0%}"]
        if at.state == "measured"
        else [f"{at.length:,}", at.state, ""]
        for at in needles.by_length
    ]
    control = needles.control
    return (
        f"{_NEEDLES[needles.wording][1]} (a number hidden in a long text, {len(needles.depths)} depths, asked as "
        f"{needles.prompt}):\n\n"
        + _table(["context", "found", "95% interval"], rows)
        + f"\n\nAsked {control.n} times about a key that is not in the text, it stayed silent {control.silent} times."
    )


def _tasks(tasks: Tasks) -> str:
    lengths = sorted({cell.length for cell in tasks.cells})
    rows = [
        [
            name,
            *(
                f"{cell.strict}/{cell.n}" if cell.n else cell.state
                for length in lengths
                for cell in tasks.cells
                if (cell.task, cell.length) == (name, length)
            ),
            f"{kept:,}" if kept else "none",
        ]
        for name, kept in tasks.effective.items()
    ]
    head = ["task", *(f"{length:,}" for length in lengths), f"keeps {tasks.keep:.0%} to"]
    return f"Tasks, right by the strict rule, {tasks.samples} samples a length:\n\n" + _table(head, rows)


def _perplexity(perplexity: Perplexity) -> str:
    rows = [
        [
            f"{p.context:,}",
            _or_state(p.ppl, "{:.3f}", p.state),
            _or_state(p.change, "{:+.2%}", ""),
        ]
        for p in perplexity.by_context
    ]
    return (
        f"Perplexity of the same {perplexity.targets:,} tokens of {perplexity.text.name} with a growing window:\n\n"
        + _table(["window", "perplexity", "against the shortest"], rows)
    )


def _use(facts: CardFacts) -> str:
    if facts.engine == "onnx":
        text = "`model.onnx` runs in onnxruntime; `genai_config.json` is for onnxruntime-genai."
        command = f"hf download {facts.repo} --local-dir model"
    elif facts.engine == "gguf":
        text, command = "For llama.cpp and what is built on it.", f"hf download {facts.repo} --local-dir model"
    else:
        text = "Loads in transformers and vLLM as it is; lcconvert also applies the KV scheme and attention policy."
        if facts.sidecar.kv.scheme in ("int4", "k8v4"):
            text += f" Other engines do not know KV scheme `{facts.sidecar.kv.scheme}` and keep a wider cache."
        command = f"lcconvert serve {facts.repo}"
    return f"## Use\n\n{text}\n\n```\n{command}\n```"


def _how_made(facts: CardFacts) -> str:
    rope = facts.config.get("rope_parameters") or {"rope_theta": facts.config.get("rope_theta")}
    rope = {k: v for k, v in rope.items() if not isinstance(v, list)}
    parts = ["## How it was made", f"Position encoding:\n\n```json\n{json.dumps(rope, indent=2)}\n```"]
    if facts.sidecar.provenance:
        provenance = json.dumps(facts.sidecar.provenance, indent=2, ensure_ascii=False)
        parts.append(f"Provenance, as recorded in `lcconvert.json`:\n\n```json\n{provenance}\n```")
    else:
        parts.append("`lcconvert.json` records no provenance.")
    return "\n\n".join(parts)


def _or_state(value: float | None, form: str, state: str) -> str:
    return _unmeasured(state) if value is None else form.format(value)


def _unmeasured(state: str) -> str:
    """Why a figure is absent; a measured row can still lack one of its figures."""
    return "not measured" if state == "measured" else state


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
