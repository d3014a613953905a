"""Models of a given shape with random weights, made on the device itself: speed and memory need no checkpoint.

The shapes are published architectures, RoPE scaling re-aimed at 1,048,576 tokens; a folder's config.json gives any
other. Weights come packed as an artifact stores them (random int4 codes, random e4m3), of about the size trained ones
have, so that activations stay finite through all layers and every code path is the real one. The text such a model
writes is noise, and so is what its attention looks at: nothing measured on it says anything about quality.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import Fp8Linear, Int4Linear, QuantLayout
from lcconvert.runtime.model import Decoder, RMSNorm
from lcconvert.runtime.spec import ModelSpec

MILLION = 2**20
_WINDOW = MILLION + 4096  # room to decode after a prompt of 1M
_STD = 0.02  # of the weights, as these models are initialized
_INT4_STD = (sum(code * code for code in range(-8, 8)) / 16) ** 0.5
_FP8_STD = 96.0  # of the e4m3 codes: the largest of some thousand normal values then lies near 448
_SIGMAS = 5.0  # largest K or V value of a head over its standard deviation, for the fp8 scales

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "max_position_embeddings": _WINDOW,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 64.0,  # 8 reaches 128K, and 1M is eight times that
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": _WINDOW,
        "rope_theta": 1000000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": _WINDOW / 32768, "original_max_position_embeddings": 32768},
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": _WINDOW,
        "rope_theta": 100000.0,
    },
}


def read_shape(name: str) -> dict[str, Any]:
    """The HF config.json of a shape by name, or of a folder that holds one; UserError for anything else."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--shape is {name!r}, expected {', '.join(SHAPES)} or a folder that holds a config.json"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); give another folder") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds {type(config).__name__}, expected an object; give another folder")
    config.pop("quantization_config", None)  # the variant says how the weights are stored
    return config


def random_decoder(
    spec: ModelSpec, layout: QuantLayout, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Decoder:
    """A decoder of `spec` whose tensors are drawn on `device`; plain weights, scales and biases have `dtype`.

    Weights have a standard deviation of 0.02 and zero mean (int4 codes average -1/2, so half of the scales are
    negative), norms are one. At no time is there a weight in more than one form.
    """
    with torch.device("meta"):
        decoder = Decoder(spec, layout)
    generator = torch.Generator(device).manual_seed(seed)
    for module in decoder.modules():
        _fill(module, device, dtype, generator)
    return decoder.eval()


def random_kv_scales(spec: ModelSpec, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """fp8 scales (K, V) a layer, float32 [Hkv] each, that fit the random weights; every head's is another one."""
    generator = torch.Generator().manual_seed(seed)
    largest = _SIGMAS * _STD * spec.hidden_size**0.5
    return [
        (_around(largest / 448, spec, generator), _around(largest / 2 / 448, spec, generator))
        for _ in range(spec.num_layers)
    ]


def _around(value: float, spec: ModelSpec, generator: torch.Generator) -> torch.Tensor:
    return value * (0.75 + 0.5 * torch.rand(spec.num_kv_heads, generator=generator))


def _fill(module: nn.Module, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Replaces the tensors that `module` itself holds."""

    def normal(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

    def uniform(shape: torch.Size, mean: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).uniform_(0.75 * mean, 1.25 * mean, generator=generator)

    if isinstance(module, Int4Linear):
        words = torch.empty(module.weight_packed.shape, dtype=torch.int32, device=device)
        module.register_buffer("weight_packed", words.random_(-(2**31), 2**31 - 1, generator=generator))
        scale = uniform(module.weight_scale.shape, _STD / _INT4_STD)
        sign = torch.empty_like(scale).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        module.register_buffer("weight_scale", scale.mul_(sign))
        size = (module.out_features, module.in_features)
        module.register_buffer("weight_shape", torch.tensor(size, dtype=torch.int64, device=device))
    elif isinstance(module, Fp8Linear):
        codes = normal(module.weight.shape, _FP8_STD).clamp_(-448, 448).to(torch.float8_e4m3fn)
        module.register_buffer("weight", codes)
        module.register_buffer("weight_scale", uniform(module.weight_scale.shape, _STD / _FP8_STD))
    elif isinstance(module, RMSNorm):
        module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device), requires_grad=False)
    elif isinstance(module, nn.Linear | nn.Embedding):
        module.weight = nn.Parameter(normal(module.weight.shape, _STD), requires_grad=False)
    if isinstance(module, Int4Linear | Fp8Linear | nn.Linear) and module.bias is not None:
        module.bias = nn.Parameter(normal(module.bias.shape, _STD), requires_grad=False)
