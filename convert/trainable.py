"""Makes a decoder ready to be trained: which weights learn, in what precision each is held, and by which optimizer.

Weights that learn are float32 beside their gradients and moments, unless the optimizer keeps those in host memory; all
others are in the precision of the forward pass, since nothing is ever added to them.
"""

from __future__ import annotations

from typing import Any

import torch

from lcconvert.convert.extend_config import ExtendConfig
from lcconvert.convert.host_adamw import HostAdamW
from lcconvert.convert.lora import add_lora
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.model import Decoder
from lcconvert.runtime.spec import ModelSpec

_BETAS = (0.9, 0.95)


def compute_dtype(config: ExtendConfig, device: torch.device) -> torch.dtype:
    """Of the forward pass: as configured, or bfloat16 on a GPU and float32 elsewhere."""
    name = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def loaded_dtype(config: ExtendConfig, device: torch.device, host_optimizer: bool) -> torch.dtype:
    """What to load the weights in: the widest that none of them has to give up again."""
    narrow = host_optimizer or (config.lora_rank and "embeddings" not in config.lora_train)
    return compute_dtype(config, device) if narrow else torch.float32


def check_trainable(spec: ModelSpec, name: str) -> None:
    """UserError when no gradient is computed of a part of the model."""
    if spec.sinks:
        raise UserError(f"{name} has sinks in attention, which are not trained here; serve or quantize it as it is")


def make_trainable(decoder: Decoder, config: ExtendConfig, *, host_optimizer: bool) -> torch.optim.Optimizer:
    """Adds adapters if asked for, sets what learns and every precision, and returns the optimizer."""
    if config.lora_rank:
        add_lora(decoder, config.lora_rank, config.lora_alpha, config.lora_train, config.seed)
    else:
        decoder.requires_grad_(True)
    compute = compute_dtype(config, decoder.head_weight.device)
    for weight in decoder.parameters():
        weight.data = weight.data.to(torch.float32 if weight.requires_grad and not host_optimizer else compute)
    kind = HostAdamW if host_optimizer else torch.optim.AdamW
    return kind(_weight_groups(decoder, config.weight_decay), betas=_BETAS)


def _weight_groups(decoder: Decoder, decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only; norms and biases are left alone."""
    trained = [p for p in decoder.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
