"""What an extension will take before it starts: seconds and peak GPU memory of every stage, and what does not fit.

The seconds are two products at two rates: 8 FLOP a weight and token (forward, recomputed forward, backward), and 3.5
forward passes of causal attention, which is kept. The rates come from training SmolLM2-135M on one H100 with 64K and
256K tokens a step and give those back to 5%; other head sizes were not measured. Loading, checkpoints and the write
at the end are left out. Memory is a sum over what is alive at the worst moment, not a measurement.

Surprising rule: only cards whose rates were measured have a name here. A guess that looks like a measurement would be
believed.
"""

from __future__ import annotations

from dataclasses import dataclass

from lcconvert.convert.extend_config import REPLAY_ROW, REPLAY_TOKENS, ExtendConfig, Stage
from lcconvert.convert.loss import TILE_ROWS
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.rope import RopeSpec
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.units import format_bytes, format_count

_READ_SHARE = 0.14  # what block-sparse reading of 1M takes of the time of dense attention, selection included
_ASK_RATE = 0.53  # of the rate of attention: a few hundred rows against a million keys fill the GPU less
_QUESTION_TOKENS = 64  # a question in its chat frame and the answer
_GRAIN = 1024  # the longest length that fits is named to this many tokens


@dataclass(frozen=True)
class Card:
    """memory in bytes; useful FLOP/s of linear layers and of attention in training, bfloat16."""

    memory: int
    linear: float
    attention: float


CARDS = {"h100": Card(memory=80 * 10**9, linear=225e12, attention=415e12)}


def card_named(name: str) -> Card:
    if name not in CARDS:
        raise UserError(f"card is {name!r}, expected one whose speed was measured: {', '.join(CARDS)}")
    return CARDS[name]


@dataclass(frozen=True)
class Cost:
    """What a model of `spec` takes to train as `config` says, on `card`."""

    spec: ModelSpec
    config: ExtendConfig
    card: Card

    def step_seconds(self, stage: Stage) -> float:
        """One optimizer step, or one text and all updates about it."""
        if stage.questions:
            return self._reading_seconds(stage)
        spec, length = self.spec, stage.seq_len
        recomputed = self.config.gradient_checkpointing
        weights, forwards = spec.parameters(), 3.5

        def seconds(flop_per_weight: int, passes: float, window: int) -> float:
            """Of one row: attention FLOP are 2 w q (causal: half of 4 w q) a token and layer."""
            again = 2 * 3 * spec.hidden_size * spec.intermediate_size * spec.num_layers if self.config.mlp_tile else 0
            linear = (flop_per_weight * weights + again) * length / self.card.linear
            return linear + passes * 2 * window * length * spec.q_size * spec.num_layers / self.card.attention

        trained = 8 if recomputed else 6
        row = (1 - stage.replay_share) * seconds(trained, forwards, length)
        row += stage.replay_share * seconds(trained + 2, forwards + 1, min(REPLAY_TOKENS, length))  # and the teacher
        return row * stage.batch_size * stage.accumulate

    def _reading_seconds(self, stage: Stage) -> float:
        """The text is one forward pass, of whose attention the hybrid policy computes a share; every question attends
        to all of it, forward and backward (2.5 forwards, of which two products serve gradients nobody wants)."""
        spec, length = self.spec, stage.seq_len
        share = 1.0 if stage.prefix_attention == "dense" else _READ_SHARE
        attention = 2 * spec.q_size * spec.num_layers / self.card.attention  # seconds a query and key, causal
        reading = 2 * spec.parameters() * length / self.card.linear + share * attention * length**2
        asking = stage.questions * _QUESTION_TOKENS * length * 2 * 3.5 * attention / _ASK_RATE
        replayed = -(-stage.questions // stage.batch_size) * REPLAY_ROW * bool(stage.replay_share)
        return reading + asking + 10 * spec.parameters() * replayed / self.card.linear

    def peak_bytes(self, stage: Stage) -> int:
        """Weights, gradients and both moments in float32, then what the worst moment of a backward pass holds."""
        spec, tokens = self.spec, stage.batch_size * (_QUESTION_TOKENS if stage.questions else stage.seq_len)
        if stage.questions and stage.replay_share:
            tokens += REPLAY_ROW
        size = 4 if self.config.dtype == "float32" else 2
        held = spec.parameters() * (4 + (size if size == 2 else 0))  # autocast keeps the weights in 16 bit too
        held += 12 * self.trained_weights()
        if any(each.replay_share for each in self.config.plan):
            held += spec.parameters() * 2
        if stage.questions:  # keys and values of the text, its hidden states, and gradients of one layer's keys
            held += stage.seq_len * (2 * size * spec.kv_size * (spec.num_layers + 1) + 4 * spec.hidden_size)
        narrow = 2 * spec.hidden_size * (4 + size)  # the two norms: input in float32, output
        inside = narrow + size * (3 * spec.q_size + 2 * spec.kv_size)  # of a token and layer, all but the MLP
        wide = 4 * size * spec.intermediate_size
        if self.config.mlp_tile:
            held += min(self.config.mlp_tile, tokens) * wide * 3 // 2
        else:
            inside += wide
        borders = 4 * spec.hidden_size  # float32 between layers
        layers = spec.num_layers
        kept = layers * borders + inside if self.config.gradient_checkpointing else layers * (borders + inside)
        ends = 4 * borders + 8 * spec.head_dim  # hidden states, their gradients, rotary tables
        gradient = inside // 2
        head = spec.vocab_size * (4 * spec.hidden_size + 12 * TILE_ROWS)
        return held + tokens * (kept + gradient + ends) + head

    def trained_weights(self) -> int:
        """Weights with a gradient: all, or the adapters and what is trained beside them."""
        spec, config = self.spec, self.config
        if not config.lora_rank:
            return spec.parameters()
        attention = 4 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size  # in and out widths of q, k, v, o
        count = config.lora_rank * spec.num_layers * attention
        norms = (2 * spec.num_layers + 1) * spec.hidden_size
        embeddings = spec.vocab_size * spec.hidden_size
        return count + norms * ("norms" in config.lora_train) + embeddings * ("embeddings" in config.lora_train)

    def longest(self, stage: Stage) -> int:
        """The longest seq_len, in whole _GRAIN tokens and one window at a time, that fits; 0 when none does."""
        low, high = 0, self.config.context // _GRAIN
        while low < high:
            middle = (low + high + 1) // 2
            tried = stage.model_copy(update={"seq_len": middle * _GRAIN, "batch_size": 1})
            low, high = (middle, high) if self.peak_bytes(tried) <= self.card.memory else (low, middle - 1)
        return low * _GRAIN

    def check_fits(self) -> None:
        """UserError for the first stage that does not fit, with the longest length that does."""
        for number, stage in enumerate(self.config.plan, start=1):
            if (peak := self.peak_bytes(stage)) > self.card.memory:
                longest = self.longest(stage)
                remedy = (
                    f"the longest seq_len that fits is {format_count(longest)} with batch_size 1"
                    if longest
                    else "no seq_len fits, take a smaller model"
                )
                raise UserError(
                    f"stage {number} ({stage.batch_size} x {format_count(stage.seq_len)} tokens) would take "
                    f"{format_bytes(peak)} and the card has {format_bytes(self.card.memory)}; {remedy}"
                )

    def seconds(self) -> float:
        return sum(stage.steps * self.step_seconds(stage) for stage in self.config.plan)


def fit_time(config: ExtendConfig, spec: ModelSpec, card: Card) -> ExtendConfig:
    """`config` with fewer steps in every stage, in proportion, so that training ends within `max_time` on `card`.

    Never more steps than asked for; UserError when one step of every stage is too long already.
    """
    cost = Cost(spec, config, card)
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
    lines += ["", f"{'stage':>5} {'steps':>6} {'tokens a step':>16} {'s a step':>9} {'seconds':>8} {'peak':>8}"]
    for number, stage in enumerate(config.plan, start=1):
        each = cost.step_seconds(stage)
        rows = f"{stage.questions} on" if stage.questions else f"{stage.batch_size * stage.accumulate} x"
        shape = f"{rows} {format_count(stage.seq_len)}"
        lines.append(
            f"{number:>5} {stage.steps:>6} {shape:>16} {each:>9.2f} {each * stage.steps:>8.0f} "
            f"{format_bytes(cost.peak_bytes(stage)):>8}"
        )
    return "\n".join([*lines, f"training takes about {cost.seconds() / 60:.1f} minutes, loading and writing apart"])
