"""One row for each model family: the tiny random checkpoint that transformers writes of it, and what becomes of it.

Small enough that windows end, pages close and layers differ within a few hundred tokens. Test files that hold
something for every family take their rows from here, and so does the README's table: `python tests/families.py`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  puts lcconvert on the path, also for `python tests/families.py`
import torch
import transformers
from tiny import SHAPE, write_tokenizer

from lcconvert.convert.export import ExportConfig, export
from lcconvert.convert.extend import ExtendConfig, extend
from lcconvert.convert.gguf_export import check_expressible
from lcconvert.convert.inspect import inspect
from lcconvert.convert.quantize import quantize
from lcconvert.convert.quantize_config import QuantizeConfig
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.spec import ModelSpec

WINDOW = 150  # tokens: more than a page, no multiple of one
CONTEXT = 8_192
TOKENS = 390
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_LONGROPE = {  # transformers takes short_factor below 64 tokens, long_factor above; this decoder always the latter
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.25 * i for i in range(6)],
    "long_factor": [1.0 + 0.5 * i for i in range(6)],
    "partial_rotary_factor": 0.75,
}
_GEMMA = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_OLMO = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.2,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
}
_HYBRID = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

# row -> (model_type, what differs from the common shape)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama-3.1": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {
            **_HYBRID,
            "head_dim": 32,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 96,
            "swiglu_limit": 0.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150_000.0,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "phi3-plain": ("phi3", {}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "phi4": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 64}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**_HYBRID, "rope_parameters": _OLMO}),
    "glm4": ("glm4", {"head_dim": 32, "rope_parameters": {**SHAPE["rope_parameters"], "partial_rotary_factor": 0.5}}),
    "gemma3": (
        "gemma3_text",
        {
            **_HYBRID,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "rope_parameters": _GEMMA,
            "tie_word_embeddings": True,
        },
    ),
}


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk, float32, the model it was written from, and that one's logits [TOKENS, V] for `ids`."""

    folder: Path
    oracle: transformers.PreTrainedModel
    ids: list[int]
    logits: torch.Tensor


def random_model(row: str) -> transformers.PreTrainedModel:
    """Weights large enough that attention is not uniform; biases and norms are random too."""
    model_type, differing = ROWS[row]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SHAPE | differing))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 2.0 if "sinks" in name else 0.1)
            if "norm" in name and model_type != "gemma3_text":  # whose norms count from 1
                weight.add_(1)
    return model.eval()


@cache
def written(row: str, root: Path) -> Written:
    """The row's checkpoint, made once for all tests of a session under its temporary folder `root`."""
    folder = root / row
    oracle = random_model(row)
    oracle.save_pretrained(folder)
    write_tokenizer(folder)
    ids = torch.randint(4, 260, (1, TOKENS), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return Written(folder, oracle, ids[0].tolist(), oracle(ids).logits[0])


@dataclass(frozen=True)
class Outcome:
    """What a verb made of a row's checkpoint: the folder if it writes one, or the sentence it refused with."""

    folder: Path | None = None
    refused: str = ""


VERBS = ("inspect", "extend", "quantize", "serve", "onnx", "gguf")


@cache
def outcome(row: str, verb: str, root: Path) -> Outcome:
    """Tried once a session."""
    model = written(row, root)
    source, out = str(model.folder), root / f"{row}-{verb}"
    try:
        match verb:
            case "inspect":
                inspect(source)
            case "extend":
                spec = ModelSpec.from_config(FolderSource(model.folder).config)
                method = "linear" if spec.rope.kind == "linear" else "theta"
                return Outcome(extend(source, out, ExtendConfig(context=CONTEXT, method=method, device="cpu")))
            case "quantize":
                return Outcome(quantize(source, out, QuantizeConfig(samples=0, kv="bf16", attention="dense")))
            case "serve":
                engine = Engine.load(FolderSource(model.folder), device="cpu")
                engine.prefill(engine.new_sequence(), model.ids[:8])
            case "onnx":
                settings = ExportConfig(format="onnx", precision="fp32", max_length=512, compare="always")
                return Outcome(export(source, out, settings))
            case "gguf":
                check_expressible(ModelSpec.from_config(FolderSource(model.folder).config), source)
    except UserError as error:
        return Outcome(refused=str(error))
    return Outcome()


# what people call it -> its plain row, and rows of its variants by what sets them apart
TABLE: dict[str, tuple[str, dict[str, str]]] = {
    "Llama 2, 3, 3.1 to 3.3": ("llama-3.1", {}),
    "Mistral": ("mistral", {"a window": "mistral-window"}),
    "Mixtral": ("mixtral", {}),
    "Qwen2, Qwen2.5": ("qwen2", {"a window": "qwen2-window"}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3-moe", {}),
    "gpt-oss": ("gpt-oss", {}),
    "Phi-3, Phi-4": ("phi3-plain", {"a window": "phi3", "LongRoPE": "phi4"}),
    "SmolLM3": ("smollm3", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {}),
    "GLM-4": ("glm4", {}),
    "Gemma 3 (text)": ("gemma3", {}),
}


def table(root: Path) -> str:
    """Markdown: family by verb, as `outcome` found it."""
    lines = ["| family | " + " | ".join(VERBS) + " |", "|---" * (1 + len(VERBS)) + "|"]
    for name, (plain, variants) in TABLE.items():
        cells = []
        for verb in VERBS:
            without = [what for what, row in variants.items() if outcome(row, verb, root).refused]
            cell = "no" if outcome(plain, verb, root).refused else "yes"
            cells.append(f"yes, not with {' or '.join(without)}" if without and cell == "yes" else cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(table(Path(folder)))
