"""Tiny GGUF files for tests: a random transformers model and a small trained vocabulary, written as llama.cpp does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TEXT = (
    "The quick brown fox jumps over the lazy dog. 12345 times it ran, and 67 times it fell!\n\n"
    "def add(a, b):\n    return a + b\n\nNaïve café, größe, 北京 東京, привет мир, it's we'll they've.\n"
) * 4
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def tiny_model(model_type: str, *, tied: bool = True, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model: 2 layers, hidden 64, 4 heads over 2 KV heads, biases and norms far from their defaults."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "rms_norm_eps": 2.0**-17,  # a GGUF file keeps it as float32
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(shape | overrides)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                weight.normal_()
    return model.float().eval()


def vocabulary(kind: str) -> dict[str, Any]:
    """Tokenizer metadata (unprefixed) of 320 tokens trained on TEXT: `gpt2` byte-level or `llama` SentencePiece BPE."""
    if kind == "gpt2":
        trained = Tokenizer(BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
        )
        trained.train_from_iterator([TEXT], trainer)
        tokens = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
        merges = [" ".join(pair) for pair in _merges(trained)]
        return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": [3] * 3 + [1] * (len(tokens) - 3)} | {
            "merges": merges, "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0,
        }  # fmt: skip
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=61, show_progress=False, initial_alphabet=["\u2581"], limit_alphabet=45)
    trained.train_from_iterator([TEXT], trainer)
    learned = [token for token, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])][:61]
    head = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = head + byte_tokens + learned
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": [0.0] * 259 + [-float(i) for i in range(len(learned))],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(learned),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    arch: str | None = None,
    storage: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    tokenizer: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """Writes `model` under `arch` (its model type); matrices in `storage`, vectors in F32; `metadata` adds keys."""
    config = model.config
    arch = arch or config.model_type
    writer = gguf.GGUFWriter(str(path), arch, split_max_tensors=split_max_tensors)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if config.head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    for key, value in (vocabulary("gpt2") if tokenizer is None else tokenizer).items():
        _add(writer, key if key == "tokenizer.chat_template" else f"tokenizer.ggml.{key}", value)
    for key, value in (metadata or {}).items():
        _add(writer, key, value)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.numpy()
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        stored = storage if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quantize(np.ascontiguousarray(values), stored), raw_dtype=stored)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(trained: Tokenizer) -> list[list[str]]:
    import json

    return json.loads(trained.to_str())["model"]["merges"]


def _gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{_PARTS[part]}.{kind}"
    return f"{_PARTS[stem]}.{kind}"


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
