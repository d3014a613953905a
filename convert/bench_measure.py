"""Times one engine: prefills of random tokens and the decode steps after them, with the memory they took.

A prefill is timed once, from a synchronized device to a synchronized device, and its parts are of that same run: they
are bracketed by device events that nothing waits for. Before it, a short prompt compiles the kernels and one layer of
the longest prompt those that depend on length; neither counts. A decoded token is the best one of the logits before it,
so a step includes the wait for that choice, as in generation.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from lcconvert.convert.bench_report import Ceilings, Decode, Memory, Part, Prefill, WarmUp
from lcconvert.convert.bench_work import Work, decode_bytes, prefill_work
from lcconvert.convert.cost import peak_resident, reset_peak_resident, synchronize
from lcconvert.convert.progress import say
from lcconvert.kernels.bench import ceilings, fp8_ceiling
from lcconvert.runtime.decode import DecodeStep
from lcconvert.runtime.engine import Cancelled, Engine
from lcconvert.runtime.kv_cache import Sequence
from lcconvert.runtime.plan import MemoryPlan
from lcconvert.runtime.sidecar import AttentionPolicy
from lcconvert.runtime.timing import PartTimer

WARM_UP = {"cuda": 4096, "cpu": 256}  # tokens; on a CPU nothing is compiled
_WARM_STEPS = 2
_PINNED = "allocated_bytes.peak"

Step = Callable[[Sequence, int], torch.Tensor]  # appends a token, returns the logits [V] after it


def ways_to_decode(engine: Engine) -> list[tuple[AttentionPolicy, Step]]:
    """The engine's own way, and before it the dense one when its policy reads a share of the pages."""
    policy = engine.attention
    if policy.decode_share is None:
        return [(policy, engine.decode)]
    dense = policy.model_copy(update={"decode_share": None})
    step = DecodeStep(engine.model, engine.layers, engine.pool, dense)
    return [(dense, torch.inference_mode()(lambda seq, token: step([seq], [token])[0])), (policy, engine.decode)]


def measure_ceilings(device: torch.device) -> Ceilings | None:
    """What this card reaches on a large copy and large products; nothing on a CPU. Takes 5 GB for a second."""
    if device.type != "cuda":
        return None
    copy, products = ceilings()
    limits = Ceilings(copy, products, fp8_ceiling())
    torch.cuda.empty_cache()
    return limits


def random_ids(vocab: int, count: int) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def clock(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds `work` takes, the device idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.reset_peak_host_memory_stats()
    reset_peak_resident()


def read_peaks(device: torch.device) -> Memory:
    if device.type != "cuda":
        return Memory(None, None, None, peak_resident())
    pinned = int(torch.cuda.host_memory_stats().get(_PINNED, 0))
    gpu, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return Memory(gpu, reserved, pinned, peak_resident())


def warm_up(engine: Engine, steps: list[Step], longest: int) -> WarmUp:
    """Compiles what the timed runs need, by a whole short prompt and, on a GPU, one layer of the longest one."""
    ids = random_ids(engine.spec.vocab_size, longest)
    tokens = max(1, min(WARM_UP[engine.device.type], longest - _WARM_STEPS * len(steps)))
    say(f"warm-up: {tokens} tokens")
    seconds = clock(engine.device, lambda: _short_run(engine, steps, ids[:tokens]))
    one_layer = None
    if engine.device.type == "cuda" and longest > tokens:
        one_layer = clock(engine.device, lambda: _one_layer(engine, ids))
    return WarmUp(tokens, seconds, one_layer)


def _short_run(engine: Engine, steps: list[Step], ids: list[int]) -> None:
    seq = engine.new_sequence()
    engine.prefill(seq, ids)
    for step in steps:
        for _ in range(_WARM_STEPS):
            step(seq, 0)
    engine.free(seq)


def _one_layer(engine: Engine, ids: list[int]) -> None:
    asked = 0

    def second_layer() -> bool:
        nonlocal asked
        asked += 1
        return asked > 1

    seq = engine.new_sequence()
    try:
        engine.prefill(seq, ids, cancelled=second_layer)
    except Cancelled:
        pass  # as wanted; with a single layer it just ends
    finally:
        engine.free(seq)


def measure_prefill(
    engine: Engine,
    seq: Sequence,
    context: int,
    limits: Ceilings | None,
    *,
    fp8: bool,
    plan: MemoryPlan | None = None,
) -> Prefill:
    """Prefills `context` random tokens into the empty `seq`. fp8: whether its products have the fp8 ceiling. plan: what
    was predicted for this context."""
    ids = random_ids(engine.spec.vocab_size, context)
    say(f"prefill: {context} tokens")
    timer = PartTimer(engine.device)
    reset_peaks(engine.device)
    seconds = clock(engine.device, lambda: engine.prefill(seq, ids, timer=timer))
    memory = read_peaks(engine.device)
    work = prefill_work(
        engine.spec,
        context,
        engine.attention,
        listed=timer.listed_blocks,
        itemsize=engine.dtype.itemsize,
        packed=engine.kv_bytes_per_token(),
    )
    parts = _parts(timer.seconds(), seconds, work, limits, fp8)
    floors = [part.floor_seconds for part in parts if part.floor_seconds is not None]
    return Prefill(
        context=context,
        seconds=seconds,
        tokens_per_second=context / seconds,
        density=timer.density(),
        parts=parts,
        floor_seconds=sum(floors) if floors else None,
        memory=memory,
        predicted_gpu=plan.total if plan else None,
        predicted_pinned=plan.host_pinned if plan else None,
    )


def _parts(
    timed: dict[str, float], seconds: float, work: dict[str, Work], limits: Ceilings | None, fp8: bool
) -> list[Part]:
    """The timer's parts, the known ones in a fixed order; what it did not see of `seconds` is part of `other`. Copies
    of hidden states run beside the rest and come last, on top of `seconds`."""
    named = {
        name: timed[name] for name in (*work, *timed) if name in timed and name not in ("total", "other", "copies")
    }
    parts = [_part(name, spent, work.get(name, Work()), limits, fp8) for name, spent in named.items()]
    parts.append(Part("other", max(0.0, seconds - sum(named.values()))))
    return [*parts, Part("copies, overlapped", timed["copies"])] if "copies" in timed else parts


def _part(name: str, spent: float, work: Work, limits: Ceilings | None, fp8: bool) -> Part:
    if not work.flops and not work.bytes:
        return Part(name, spent)
    computes = work.flops > 0
    amount, unit = (work.flops, "TFLOP/s") if computes else (work.bytes, "TB/s")
    ceiling = None
    if limits is not None:
        narrow = name == "selection" or (fp8 and name == "gemm")  # the selector's scores need no more than e4m3
        products = (limits.fp8_tflops if narrow else None) or limits.bf16_tflops
        ceiling = products if computes else limits.copy_tb
    return Part(
        name,
        spent,
        flops=work.flops if computes else None,
        bytes=None if computes else work.bytes,
        unit=unit,
        rate=amount / spent / 1e12 if spent > 0 else None,
        ceiling=ceiling,
        floor_seconds=amount / ceiling / 1e12 if ceiling else None,
    )


def measure_decode(
    engine: Engine,
    seq: Sequence,
    context: int,
    step: Step,
    policy: AttentionPolicy,
    steps: int,
    limits: Ceilings | None,
) -> Decode:
    """`steps` greedy steps on top of `seq`, which began with a prompt of `context` tokens; `step` follows `policy`."""
    share = policy.decode_share
    name = "dense" if share is None else "page-sparse"
    say(f"decode, {name}: {steps} tokens after {context}")
    token, times = 0, []

    def one() -> None:
        nonlocal token
        token = int(step(seq, token).argmax())

    reset_peaks(engine.device)
    size = step_bytes(engine, seq.length + steps // 2, policy)
    for _ in range(steps):
        times.append(clock(engine.device, one))
    memory = read_peaks(engine.device)
    middle = statistics.median(times)
    return Decode(
        context=context,
        policy=name,
        steps=steps,
        seconds_per_token=middle,
        slowest_seconds=max(times),
        tokens_per_second=1 / middle,
        bytes=size,
        tb_per_second=size / middle / 1e12,
        ceiling=limits.copy_tb if limits else None,
        floor_seconds=size / limits.copy_tb / 1e12 if limits else None,
        memory=memory,
    )


def step_bytes(engine: Engine, context: int, policy: AttentionPolicy) -> float:
    """Bytes a decode step reads: every weight but the embedding table, and the K and V that `policy` lets it attend."""
    spec = engine.spec
    layers = sum(t.nbytes for layer in engine.model.layers for t in (*layer.parameters(), *layer.buffers()))
    per_token = engine.kv_bytes_per_token()
    bounds = 2 * 2 * spec.num_layers * spec.kv_size / engine.kv.page_size  # fp16 scale and zero of a K channel a page
    full = max(0, context - engine.kv.page_size) // engine.kv.page_size
    pages = None
    if policy.decode_share is not None:
        pages = max(policy.decode_pages, -(-full * policy.decode_share // 1))
    return decode_bytes(
        spec,
        context,
        weights=layers + engine.model.head_weight.nbytes,
        kv=per_token,
        itemsize=engine.dtype.itemsize,
        pages=None if pages is None else int(pages),
        bounds=bounds,
    )
