"""The engine a bench measures, an artifact as it is or a shape with random weights, and the memory it should take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.progress import say
from lcconvert.convert.settings import make_config
from lcconvert.convert.shapes import random_decoder, random_kv_scales
from lcconvert.runtime.engine import CPU_CHUNK, Engine, has_fp8
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.kv_cache import PagePool
from lcconvert.runtime.linear import QuantLayout
from lcconvert.runtime.plan import VARIANTS, MemoryPlan, plan_for_source, plan_memory, stored_as, variant_layout
from lcconvert.runtime.products import Gemm
from lcconvert.runtime.sidecar import PAGE, AttentionPolicy, KVConfig, Sidecar
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.units import format_count


@dataclass(frozen=True)
class Target:
    """`plan` is the prediction for the engine's whole context, None on a CPU; `fp8`: its prefill products are e4m3."""

    engine: Engine
    variant: str
    plan: MemoryPlan | None
    fp8: bool


def load_target(
    src: str,
    longest: int,
    decode: int,
    *,
    kv: str | None,
    attention: str | None,
    device: torch.device,
    gpu_bytes: int | None,
) -> Target:
    """The artifact `src`, its KV scheme or the policy's kind exchanged when asked, with room for `longest` tokens and
    `decode` more in every way it can decode."""
    source = open_checkpoint(src)
    sidecar = Sidecar.read(source)
    policy = sidecar.attention
    if attention is not None:
        policy = policy.named(attention)
    cache = sidecar.kv if kv is None else make_config(KVConfig, {"scheme": kv}, "--kv")
    most = longest + decode * (1 if policy.decode_share is None else 2)
    if most > sidecar.context.configured:
        raise UserError(
            f"context {longest} plus {most - longest} decoded tokens exceeds the {sidecar.context.configured} of "
            f"{source.name}; give a smaller --context"
        )
    say(f"loading {source.name}")
    engine = Engine.load(source, device=device, kv=cache, attention=policy, max_context=most, gpu_bytes=gpu_bytes)
    layout = QuantLayout.from_config(source.config)
    plan = None
    if device.type == "cuda":
        budget = gpu_bytes or torch.cuda.get_device_properties(device).total_memory
        plan = plan_for_source(source, cache, policy, most, gemm=engine.gemm, dtype=engine.dtype, gpu_bytes=budget)
    wide = any(form.kind == "fp8" for _, form in layout.groups)
    return Target(engine, sidecar.variant, plan, wide or engine.gemm == "fp8")


def random_target(
    name: str,
    config: dict[str, Any],
    variant: str,
    policy: AttentionPolicy,
    max_context: int,
    *,
    device: torch.device,
    gpu_bytes: int | None,
    check: bool = True,
) -> Target:
    """A model of `config`'s shape made on `device` as `variant` stores it, with KV pages for `max_context` tokens.

    With `check`, UserError before anything is allocated when it cannot fit into `gpu_bytes`, or into what is free.
    """
    spec = ModelSpec.from_config(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    scheme, wanted = VARIANTS[variant]
    on_gpu = device.type == "cuda"
    gemm: Gemm = wanted if has_fp8(device) else "16-bit"
    layout = variant_layout(spec, variant)
    plan = None
    if on_gpu:
        budget = gpu_bytes or torch.cuda.mem_get_info(device)[0]
        stored = stored_as(spec, layout, gemm, dtype)
        plan = plan_memory(spec, stored, max_context, scheme=scheme, policy=policy, gemm=gemm, gpu_bytes=budget)
        if check:
            plan.check(f"{name} {variant}")
    say(f"making {name} {variant} with KV pages for {format_count(max_context)} tokens")
    kv = make_config(KVConfig, {"scheme": scheme}, "--variant")
    scales = random_kv_scales(spec) if scheme == "fp8" else None
    pool = PagePool(
        spec, kv, device=device, dtype=dtype, scales=scales, capacity=-(-max_context // PAGE), growable=False
    )
    engine = Engine(
        random_decoder(spec, layout, device, dtype),
        None,
        pool,
        policy,
        name=Path(name).name,
        max_context=max_context,
        eos_ids=frozenset(),
        gemm=gemm,
        chunk=plan.chunk_rows if plan else CPU_CHUNK,
        offload=plan.offload if plan else False,
    )
    return Target(engine, variant, plan, has_fp8(device) and variant != "16-bit")
