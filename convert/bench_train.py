"""`lcconvert bench --train`: what a training step costs on this machine, of a shape with random weights.

The step is the trainer's own: its loss, its streamed pass where the plan says so, clipping and optimizer, on one row of
random tokens that all count. What is predicted for it stands beside what was measured. A short step warms up; only
steps of the whole length are timed.

Surprising rule: model FLOP count neither what is computed twice nor what is not wanted. A weight that learns is worth 6
a token and one that does not 4 (forward, and the gradient of its input), causal attention twice its forward pass for
the backward one; the embedding is looked up and counts nothing.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from lcconvert.convert.claim import replace_file
from lcconvert.convert.cost import PeakMemory, is_out_of_memory, peak_resident, reset_peak_resident, synchronize
from lcconvert.convert.extend_config import ExtendConfig, Stage
from lcconvert.convert.extend_plan import Cost, card_here
from lcconvert.convert.host_adamw import HostAdamW
from lcconvert.convert.progress import say
from lcconvert.convert.shapes import random_decoder, read_shape
from lcconvert.convert.streamed import Streaming
from lcconvert.convert.trainable import compute_dtype, loaded_dtype, make_trainable
from lcconvert.convert.trainer import LossModule, streaming_of
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import QuantLayout
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.units import format_bytes, format_count

_WARM_UP = 4096
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bfloat16, by the vendor


class TrainBenchConfig(BaseModel):
    """What to measure: `steps` steps of one row of each `context`; the rest as in `extend`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str
    context: tuple[Annotated[int, Field(ge=256)], ...] = (2**16,)
    steps: Annotated[int, Field(ge=1)] = 3
    lora_rank: int = Field(0, ge=0)
    lora_train: tuple[Literal["norms", "embeddings"], ...] = ("norms", "embeddings")
    streamed: bool | None = None
    host_optimizer: bool | None = None
    tile: int = Field(8192, ge=64)
    device: str | None = None

    def training(self, length: int) -> ExtendConfig:
        shared = self.model_dump(include={"lora_rank", "lora_train", "streamed", "host_optimizer", "tile", "device"})
        stage = Stage.model_validate({"steps": 1, "seq_len": length})
        return ExtendConfig.model_validate({"context": length, "stages": (stage,), **shared})


@dataclass(frozen=True)
class TrainStep:
    """`seconds` of every step, rates by the median one; bytes at the peak over all of them, `pinned` those of
    activations alone. Model FLOP twice: as said above, and as if every weight learnt (6N)."""

    context: int
    seconds: list[float]
    tokens_per_second: float
    model_flop: float
    mfu: float | None
    flop_by_6n: float
    mfu_by_6n: float | None
    loss: float
    grad_norm: float
    set_up_seconds: float
    optimizer_seconds: float
    device_bytes: int
    device_reserved: int | None
    host_bytes: int
    pinned_bytes: int
    predicted_seconds: float | None  # what is predicted is a GPU's
    predicted_device_bytes: int | None
    predicted_host_bytes: int | None
    keeps: dict[str, int]


def bench_train(config: TrainBenchConfig, out: Path | None = None) -> dict[str, Any]:
    """Measures every context, shortest first, and writes the results to `out` as they come.

    UserError before any work for a length that does not fit, with the longest that does.
    """
    if out is not None and out.exists():
        raise UserError(f"{out} exists and is not overwritten; give another name")
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    spec = ModelSpec.from_config(read_shape(config.shape))
    lengths = sorted(set(config.context))
    for length in lengths:
        Cost(spec, config.training(length), card_here(device)).check_fits()
    report: dict[str, Any] = {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "arguments": config.model_dump(mode="json"),
        "parameters": spec.parameters(),
        "steps": [],
    }
    for length in lengths:
        try:
            report["steps"].append(asdict(_measure(config, spec, length, device)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"{config.shape} ran out of memory at {format_count(length)} tokens: {error}") from None
        if out is not None:
            replace_file(out, json.dumps(report, indent=2).encode() + b"\n")
    return report


def _measure(config: TrainBenchConfig, spec: ModelSpec, length: int, device: torch.device) -> TrainStep:
    training = config.training(length)
    cost = Cost(spec, training, card_here(device))
    (stage,) = training.plan
    memory = cost.memory(stage)
    say(
        f"{config.shape} at {format_count(length)} tokens: {cost.step_seconds(stage):.1f} s a step, "
        f"{format_bytes(memory.device)} on the device and {format_bytes(memory.host)} in the host by the plan"
    )
    began = time.perf_counter()
    dtype = loaded_dtype(training, device, cost.host_optimizer)
    decoder = random_decoder(spec, QuantLayout(), device, dtype)
    optimizer = make_trainable(decoder, training, host_optimizer=cost.host_optimizer)
    module = LossModule(decoder.train(), checkpoint_layers=True)
    module.streaming = streaming_of(cost, stage, device)
    step = _Step(module, optimizer, training, device)
    step.run(min(_WARM_UP, length), 0)
    if module.streaming is not None:
        _reserve(module.streaming, spec, length, compute_dtype(training, device).itemsize)
    synchronize(device)
    set_up = time.perf_counter() - began
    say(f"set up in {set_up:.0f} s")
    seconds = []
    reset_peak_resident()
    with PeakMemory(device) as peak:
        for number in range(config.steps):
            began = time.perf_counter()
            step.run(length, 1 + number)
            seconds.append(time.perf_counter() - began)
            say(f"step {number + 1}: {seconds[-1]:.2f} s, loss {step.loss:.4f}, peak {format_bytes(peak.bytes())}")
    median = sorted(seconds)[len(seconds) // 2]
    flop, by_6n = _model_flop(spec, cost.trained_weights(), length), _model_flop(spec, spec.parameters(), length)
    ceiling = next((rate for name, rate in _PEAK_FLOPS.items() if name in _name(device)), None)
    result = TrainStep(
        context=length,
        seconds=seconds,
        tokens_per_second=length / median,
        model_flop=flop,
        mfu=flop / median / ceiling if ceiling else None,
        flop_by_6n=by_6n,
        mfu_by_6n=by_6n / median / ceiling if ceiling else None,
        loss=step.loss,
        grad_norm=step.grad_norm,
        set_up_seconds=set_up,
        optimizer_seconds=step.optimizer_seconds,
        device_bytes=peak.bytes(),
        device_reserved=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        host_bytes=peak_resident(),
        pinned_bytes=module.streaming.shelf.host_bytes if module.streaming else 0,
        predicted_seconds=cost.step_seconds(stage) if device.type == "cuda" else None,
        predicted_device_bytes=memory.device if device.type == "cuda" else None,
        predicted_host_bytes=memory.host if device.type == "cuda" else None,
        keeps=memory.counts(),
    )
    if module.streaming is not None:
        module.streaming.shelf.close()
    if isinstance(optimizer, HostAdamW):
        optimizer.close()
    del decoder, optimizer, module, step
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


class _Step:
    """Optimizer steps on random tokens."""

    def __init__(
        self, module: LossModule, optimizer: torch.optim.Optimizer, training: ExtendConfig, device: torch.device
    ):
        self.module, self.optimizer, self.training, self.device = module, optimizer, training, device
        self.loss = self.grad_norm = self.optimizer_seconds = 0.0

    def run(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.module.decoder.spec.vocab_size, (1, length), generator=generator).to(self.device)
        weights = torch.full((1, length), 1 / (length - 1), device=self.device)
        weights[:, 0] = 0.0
        replay = torch.zeros(1, dtype=torch.bool, device=self.device)
        positions = torch.arange(length, device=self.device)[None]
        dtype = compute_dtype(self.training, self.device)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = self.module(ids, positions, weights, replay)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.training.clip_norm)
        self.loss, self.grad_norm = loss.item(), norm.item()
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        self.optimizer_seconds = time.perf_counter() - began


def _reserve(streaming: Streaming, spec: ModelSpec, length: int, size: int) -> None:
    """Host memory for a step, so that none is allocated while a clock runs."""
    streaming.shelf.close()  # what the warm-up had
    inputs = sum(keep.inputs == "host" for keep in streaming.keeps)
    groups = spec.num_kv_heads * sum(keep.attention == "host" for keep in streaming.keeps)
    heads = spec.num_heads // spec.num_kv_heads
    streaming.shelf.reserve(inputs, length * spec.hidden_size * size)
    streaming.shelf.reserve(groups, length * heads * spec.head_dim * size)
    streaming.shelf.reserve(groups, length * heads * 4)  # their sums


def _model_flop(spec: ModelSpec, trained: int, length: int) -> float:
    """Of one row; adapters are few enough to leave out."""
    looked_up = 0 if spec.tied_head else spec.vocab_size * spec.hidden_size
    used = spec.parameters() - looked_up
    learning = max(0, min(used, trained - looked_up))
    attention = 3 * 2 * length**2 * spec.q_size * spec.num_layers
    return (4 * used + 2 * learning) * length + attention


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def render(report: dict[str, Any]) -> str:
    """A few lines a context."""
    arguments = report["arguments"]
    how = f"LoRA of rank {arguments['lora_rank']}" if arguments["lora_rank"] else "all weights"
    lines = [f"training {arguments['shape']}, {how}, on {report['device']}"]
    for row in report["steps"]:
        median = row["context"] / row["tokens_per_second"]
        used = f", {row['mfu']:.1%} of its peak ({row['mfu_by_6n']:.1%} by 6N)" if row["mfu"] else ""
        rate = f"{row['tokens_per_second']:,.0f} tokens/s, {row['model_flop'] / median / 1e12:.0f} TFLOP/s{used}"
        places = ", ".join(f"{count} {name}" for name, count in row["keeps"].items() if count)
        device = _bytes(row["device_bytes"], row["predicted_device_bytes"])
        host = _bytes(row["host_bytes"], row["predicted_host_bytes"])
        lines += [
            f"  {format_count(row['context'])} tokens: {median:.2f} s a step"
            f"{_off(row['predicted_seconds'], median)}, {rate}",
            f"    peak GPU {device}, reserved {format_bytes(row['device_reserved'] or 0)}; peak host {host}",
            f"    optimizer {row['optimizer_seconds']:.2f} s, set up {row['set_up_seconds']:.0f} s, "
            f"loss {row['loss']:.4f}{places and '; layers with ' + places}",
        ]
    return "\n".join(lines)


def _bytes(measured: int, predicted: int | None) -> str:
    return format_bytes(measured) + _off(predicted, measured)


def _off(predicted: float | None, measured: float) -> str:
    return f" (predicted {predicted / measured - 1:+.1%})" if predicted else ""
