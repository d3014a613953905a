"""The alternatives a user has, on the same shape in the same process: dense PyTorch attention, and transformers.

Both run 16-bit random weights at a length that fits; one that does not fit is a result, not a failure. The dense row is
our own engine without its ideas (dense policy, 16-bit products and KV), which is what a good PyTorch program reaches.
"""

from __future__ import annotations

import copy
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lcconvert.convert.bench_measure import (
    clock,
    measure_decode,
    measure_prefill,
    random_ids,
    read_peaks,
    reset_peaks,
    warm_up,
)
from lcconvert.convert.bench_report import Ceilings, Compared
from lcconvert.convert.bench_target import random_target
from lcconvert.convert.bench_work import capped_blocks, prefill_work, tiles_of
from lcconvert.convert.cost import is_out_of_memory, synchronize
from lcconvert.convert.progress import say
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy
from lcconvert.runtime.spec import ModelSpec

_STEPS = 16  # decoded tokens
_QUERIES = 16_384  # rows of the single layer's attention
_WARM_UP = 1024
_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def compare_sdpa(
    config: dict[str, Any],
    context: int,
    *,
    longest: int,
    limits: Ceilings | None,
    device: torch.device,
    gpu_bytes: int | None,
) -> Compared:
    """Prefill and decode of our engine with dense attention by PyTorch and nothing quantized.

    A context of `longest` tokens rarely fits, so its time is also computed: dense attention at the rate measured over
    that many keys, and 16-bit products at the card's ceiling, which a real program stays below.
    """
    spec = ModelSpec.from_config(config)
    try:
        rates = attention_rates(spec, longest, device)
        room = context + _STEPS + PAGE
        target = random_target(
            "dense", config, "16-bit", AttentionPolicy(), room, device=device, gpu_bytes=gpu_bytes, check=False
        )
        engine = target.engine
        warm_up(engine, [engine.decode], context)
        seq = engine.new_sequence()
        prefill = measure_prefill(engine, seq, context, None, fp8=False)
        decode = measure_decode(engine, seq, context, engine.decode, engine.attention, _STEPS, None)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Compared("sdpa", context, out_of_memory=True)
    return Compared(
        "sdpa",
        context,
        out_of_memory=False,
        prefill_seconds=prefill.seconds,
        decode_seconds_per_token=decode.seconds_per_token,
        weight_bytes=engine.memory()["weights"],
        peak_gpu=prefill.memory.gpu,
        attention_tflops=rates,
        longest=longest,
        computed_longest_seconds=_dense_seconds(spec, longest, max(rates.values()), limits)
        if limits and rates
        else None,
    )


def _dense_seconds(spec: ModelSpec, context: int, attention_tflops: float, limits: Ceilings) -> float:
    tiles = tiles_of(context)
    listed = spec.num_heads * ((spec.num_layers - 1) * capped_blocks(tiles, tiles) + tiles)
    work = prefill_work(spec, context, AttentionPolicy(), listed=listed, itemsize=2, packed=0.0)
    return (work["attention"].flops / attention_tflops + work["gemm"].flops / limits.bf16_tflops) / 1e12


def attention_rates(spec: ModelSpec, keys: int, device: torch.device) -> dict[str, float]:
    """TFLOP/s of one layer's dense attention, the last 16K queries over `keys` keys, by each backend that takes it.

    No mask: nearly all of the work of a long causal prefill is of this kind, and not every backend masks a chunk.
    """
    queries = min(_QUERIES, keys)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q = torch.randn(1, spec.num_heads, queries, spec.head_dim, dtype=dtype, device=device)
    k, v = (torch.randn(1, spec.num_kv_heads, keys, spec.head_dim, dtype=dtype, device=device) for _ in range(2))
    flops = 4.0 * spec.num_heads * queries * keys * spec.head_dim
    rates = {}

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=spec.num_heads != spec.num_kv_heads)

    if device.type != "cuda":
        attend()
        return {"default": flops / clock(device, attend) / 1e12}
    for name, backend in _BACKENDS.items():
        with sdpa_kernel(backend):
            try:
                attend()
                rates[name] = flops / statistics.median(clock(device, attend) for _ in range(3)) / 1e12
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                say(f"{name} attention does not take this shape: {error}")
    return rates


def compare_transformers(config: dict[str, Any], context: int, *, device: torch.device) -> Compared:
    """A greedy `generate` of transformers with its default cache and SDPA attention, timed token by token."""
    spec = ModelSpec.from_config(config)
    say(f"transformers: {context} tokens")
    try:
        return _run_transformers(config, spec, context, device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Compared("transformers", context, out_of_memory=True)


def _run_transformers(config: dict[str, Any], spec: ModelSpec, context: int, device: torch.device) -> Compared:
    import transformers

    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    described = transformers.AutoConfig.for_model(spec.family, **copy.deepcopy(settings))  # it changes what it is given
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(described, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # noise does not end
    ids = torch.tensor([random_ids(spec.vocab_size, context)], device=device)

    def generate(prompt: torch.Tensor, steps: int) -> list[float]:
        """Times at which the call began and each of 1 + `steps` tokens was there."""
        synchronize(device)
        clock = _Clock()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1 + steps, do_sample=False, streamer=clock
        )
        return clock.times

    generate(ids[:, :_WARM_UP], 1)
    reset_peaks(device)
    times = generate(ids, _STEPS)
    return Compared(
        "transformers",
        context,
        out_of_memory=False,
        prefill_seconds=times[1] - times[0],
        decode_seconds_per_token=statistics.median(b - a for a, b in pairwise(times[1:])),
        weight_bytes=sum(weight.nbytes for weight in model.parameters()),
        peak_gpu=read_peaks(device).gpu,
    )


class _Clock:
    """A streamer that notes when things reach it; `generate` copies them to the host first, which waits for the GPU.

    The first is the prompt itself, before any work.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
