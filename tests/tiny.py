"""Tiny random checkpoints written by transformers, the oracle: one per family, and the tokenizer they share."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def tiny_config(family: str, **overrides: object) -> transformers.PretrainedConfig:
    values: dict = deepcopy(SHAPE) | {"tie_word_embeddings": family in ("llama", "qwen3")}
    if family == "qwen3":
        values["head_dim"] = 32  # not hidden / heads
    if family == "mistral":
        values |= {"sliding_window": None, "head_dim": 16}
    kinds = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    return kinds[family](**(values | overrides))


def tiny_model(family: str, seed: int = 0, **overrides: object) -> transformers.PreTrainedModel:
    """Random weights large enough that attention is not uniform; biases and norms are random too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.02 if "norm" in name else 0.08)
            if "norm" in name:
                weight.add_(1)
    return model.eval()


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: 256 byte tokens after four special ones; text of any language round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|pad|>"]
    vocab = {token: i for i, token in enumerate(special)}
    for char in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[char] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "model_max_length": 2048}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_tiny(folder: Path, family: str = "llama", seed: int = 0, **overrides: object) -> Path:
    """An HF folder with weights, config and tokenizer."""
    tiny_model(family, seed, **overrides).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
