"""What an extension will take before it starts: seconds and peak GPU memory of every stage, and what does not fit.

The seconds are two products at two rates: 8 FLOP a weight and token (forward, recomputed forward, backward; 6 of a
weight that does not learn), and 3.5 forward passes of causal attention, one more where it is not kept. The rates come
from training SmolLM2-135M on one H100 with 64K and 256K tokens a step and give those back to 5%; other head sizes were
not measured. Loading, checkpoints and the write at the end are left out. `extend_memory` counts the bytes.

Surprising rule: only cards whose rates were measured have a name here. A guess that looks like a measurement would be
believed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from lcconvert.convert.extend_config import REPLAY_ROW, REPLAY_TOKENS, ExtendConfig, Stage
from lcconvert.convert.extend_memory import QUESTION_TOKENS, Memory, StageMemory
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.rope import RopeSpec
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.units import format_bytes, format_count

_READ_SHARE = 0.14  # what block-sparse reading of 1M takes of the time of dense attention, selection included
_ASK_RATE = 0.53  # of the rate of attention: a few hundred rows against a million keys fill the GPU less
_GRAIN = 1024  # the longest length that fits is named to this many tokens


@dataclass(frozen=True)
class Card:
    """memory and host: bytes of the device and of the machine around it; useful FLOP/s of linear layers and of
    attention in training, bfloat16; bus: bytes/s each way between the two."""

    memory: int
    host: int
    linear: float
    attention: float
    bus: float = 45e9


CARDS = {"h100": Card(memory=80 * 10**9, host=2**37, linear=225e12, attention=415e12)}


def card_here(device: torch.device) -> Card:
    """The card at hand, at the speeds of an H100; a CPU is one on which everything fits."""
    card = CARDS["h100"]
    if device.type != "cuda":
        return replace(card, memory=2**62, host=2**62)
    return replace(card, memory=torch.cuda.get_device_properties(device).total_memory, host=host_memory())


def host_memory() -> int:
    """Bytes of this machine, or of the container that this process is confined to, for one of its processes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        total = min(total, int(limit)) if limit.isdigit() else total
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as the launcher of several says


def card_named(name: str) -> Card:
    if name not in CARDS:
        raise UserError(f"card is {name!r}, expected one whose speed was measured: {', '.join(CARDS)}")
    return CARDS[name]


@dataclass(frozen=True)
class Cost:
    """What a model of `spec` takes to train as `config` says, on so many `devices` that are a `card` each."""

    spec: ModelSpec
    config: ExtendConfig
    card: Card
    devices: int = 1
    sharded: bool = False  # FSDP

    def step_seconds(self, stage: Stage) -> float:
        """One optimizer step, or one text and all updates about it."""
        if stage.questions:
            return self._reading_seconds(stage)
        spec, length = self.spec, stage.seq_len
        memory = self.memory(stage)
        recomputed = self.config.gradient_checkpointing or bool(memory.keeps)
        flop = (4 + 2 * recomputed) * spec.parameters() + 2 * self.trained_weights()  # a token
        forwards = 3.5 + memory.computed_again / spec.num_layers

        def seconds(flop: int, passes: float, window: int) -> float:
            """Of one row: attention FLOP are 2 w q (causal: half of 4 w q) a token and layer."""
            attention = passes * 2 * window * length * spec.q_size * spec.attending_layers(window)
            return flop * length / self.card.linear + attention / self.card.attention

        row = (1 - stage.replay_share) * seconds(flop, forwards, length)
        teacher = 2 * spec.parameters()
        row += stage.replay_share * seconds(flop + teacher, forwards + 1, min(REPLAY_TOKENS, length))
        moved = 12 * self.trained_weights() * self.host_optimizer / self.card.bus
        return row * stage.batch_size * stage.accumulate / self.devices + moved

    def _reading_seconds(self, stage: Stage) -> float:
        """The text is one forward pass, of whose attention the hybrid policy computes a share; every question attends
        to all of it, forward and backward (2.5 forwards, of which two products serve gradients nobody wants)."""
        spec, length = self.spec, stage.seq_len
        share = 1.0 if stage.prefix_attention == "dense" else _READ_SHARE
        attention = 2 * spec.q_size * spec.attending_layers(length) / self.card.attention  # seconds a query and key
        reading = 2 * spec.parameters() * length / self.card.linear + share * attention * length**2
        asking = stage.questions * QUESTION_TOKENS * length * 2 * 3.5 * attention / _ASK_RATE
        replayed = -(-stage.questions // stage.batch_size) * REPLAY_ROW * bool(stage.replay_share)
        replaying = 10 * spec.parameters() * replayed / self.card.linear
        return (reading + asking + replaying) / self.devices

    @cached_property
    def host_optimizer(self) -> bool:
        """Whether float32 weights and moments live in host memory: only where not all stages fit otherwise."""
        if self.config.host_optimizer is not None:
            return self.config.host_optimizer
        plain = self._memory(False)
        if self.config.lora_rank or all(plain.of(stage).fits for stage in self.config.plan):
            return False
        return all(self._memory(True).of(stage).fits for stage in self.config.plan)

    def memory(self, stage: Stage) -> StageMemory:
        return self._memory(self.host_optimizer).of(stage)

    def trained_weights(self) -> int:
        return self._memory(False).trained

    def state_bytes(self) -> int:
        """On disk, of a checkpoint of the training."""
        return self._memory(self.host_optimizer).state_bytes

    def _memory(self, host_optimizer: bool) -> Memory:
        return Memory(
            self.spec, self.config, self.card.memory, self.card.host, host_optimizer, self.devices, self.sharded
        )

    def longest(self, stage: Stage) -> int:
        """The longest seq_len, in whole _GRAIN tokens and one window at a time, that fits; 0 when none does."""
        low, high = 0, self.config.context // _GRAIN
        while low < high:
            middle = (low + high + 1) // 2
            tried = stage.model_copy(update={"seq_len": middle * _GRAIN, "batch_size": 1})
            low, high = (middle, high) if self._fits_alone(tried) else (low, middle - 1)
        return low * _GRAIN

    def _fits_alone(self, stage: Stage) -> bool:
        alone = replace(self, config=self.config.model_copy(update={"stages": (stage,), "steps": 0}))
        return alone.memory(stage).fits

    def check_fits(self) -> None:
        """UserError for the first stage that does not fit, with the longest length that does."""
        for number, stage in enumerate(self.config.plan, start=1):
            memory = self.memory(stage)
            if memory.fits:
                continue
            longest = self.longest(stage)
            remedy = (
                f"the longest seq_len that fits is {format_count(longest)} with batch_size 1"
                if longest
                else "no seq_len fits, take a smaller model or lora_rank"
            )
            raise UserError(
                f"stage {number} ({stage.batch_size} x {format_count(stage.seq_len)} tokens) would take "
                f"{format_bytes(memory.device)} of the card's {format_bytes(self.card.memory)} and "
                f"{format_bytes(memory.host)} of the host's {format_bytes(self.card.host)}, of which a sixth is left "
                f"free; {remedy}"
            )

    def seconds(self) -> float:
        return sum(stage.steps * self.step_seconds(stage) for stage in self.config.plan)


def fit_time(
    config: ExtendConfig, spec: ModelSpec, card: Card, devices: int = 1, sharded: bool = False
) -> ExtendConfig:
    """`config` with fewer steps in every stage, in proportion, so that training ends within `max_time` on `card`.

    Never more steps than asked for; UserError when one step of every stage is too long already.
    """
    cost = Cost(spec, config, card, devices, sharded)
    if config.max_time is None or not config.plan or cost.seconds() <= config.max_time:
        return config
    least = sum(cost.step_seconds(stage) for stage in config.plan)
    if least > config.max_time:
        raise UserError(
            f"max_time is {config.max_time:.0f} s but one step of every stage takes {least:.0f} s; "
            "give more time or shorter stages"
        )
    share = (config.max_time - least) / (cost.seconds() - least)  # beyond the first step of each stage
    stages = []
    for stage in config.plan:
        steps = 1 + int(share * (stage.steps - 1))
        stages.append(stage.model_copy(update={"steps": steps, "warmup": min(stage.warmup, steps - 1)}))
    return config.model_copy(update={"stages": tuple(stages), "steps": 0})


def render(cost: Cost, rope: RopeSpec) -> str:
    """The plan for a terminal: scale, RoPE fields, a row a stage."""
    spec, config = cost.spec, cost.config
    scale = config.context / spec.max_position
    lines = [
        f"context  {format_count(spec.max_position)} -> {format_count(config.context)} (scale {scale:g})",
        f"method   {config.resolved_method}",
        *(f"         {key} = {value}" for key, value in rope.to_config()["rope_parameters"].items()),
    ]
    if not config.plan:
        return "\n".join([*lines, "training none: only the positions change"])
    lines += [
        "",
        f"{'stage':>5} {'steps':>6} {'tokens a step':>16} {'s a step':>9} {'seconds':>8} {'peak GPU':>9} {'host':>8}",
    ]
    for number, stage in enumerate(config.plan, start=1):
        each, memory = cost.step_seconds(stage), cost.memory(stage)
        rows = f"{stage.questions} on" if stage.questions else f"{stage.batch_size * stage.accumulate} x"
        shape = f"{rows} {format_count(stage.seq_len)}"
        lines.append(
            f"{number:>5} {stage.steps:>6} {shape:>16} {each:>9.2f} {each * stage.steps:>8.0f} "
            f"{format_bytes(memory.device):>9} {format_bytes(memory.host):>8}{_where(memory)}"
        )
    if cost.host_optimizer:
        lines.append("float32 weights and moments in host memory")
    return "\n".join([*lines, f"training takes about {cost.seconds() / 60:.1f} minutes, loading and writing apart"])


def _where(memory: StageMemory) -> str:
    """What a streamed stage keeps where."""
    if not memory.keeps:
        return ""
    return "  streamed: " + ", ".join(f"{count} {what}" for what, count in memory.counts().items() if count)
