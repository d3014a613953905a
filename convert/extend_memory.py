"""Where everything of a training step lives, and how much memory that takes on the device and in the host.

A sum over what is alive at the worst moment: weights, gradients and moments, what waits for the backward pass, and what
one layer's backward pass holds. Bytes; a gigabyte is 10^9, as cards are sold. Left out: fragmentation and what the CUDA
context takes, for which some of the device is kept free, and the loading of weights.

Surprising rule: host memory is taken first for the inputs of layers, which have to wait somewhere, and what is left of
both memories for attention outputs, which can be computed again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lcconvert.convert.extend_config import REPLAY_ROW, ExtendConfig, Stage
from lcconvert.convert.host_adamw import DEVICE_BYTES
from lcconvert.convert.loss import TILE_ROWS
from lcconvert.convert.streamed import Keep
from lcconvert.runtime.spec import ModelSpec

QUESTION_TOKENS = 64  # a question in its chat frame and the answer
_KEPT_FREE = 0.03  # of the device, where a plan fills it
_HOST_SHARE = 5 / 6  # of the host's memory may be used
_LIBRARIES = 2**27  # workspaces of cuBLAS
_PROCESS = 5 * 10**9  # host memory of Python, PyTorch and CUDA


@dataclass(frozen=True)
class StageMemory:
    """`keeps`: of every layer, where the pass is streamed; empty where it is plain."""

    keeps: tuple[Keep, ...]
    device: int
    host: int
    fits: bool

    @property
    def computed_again(self) -> int:
        """Layers whose attention is computed twice."""
        return sum(keep.attention == "again" for keep in self.keeps)

    def counts(self) -> dict[str, int]:
        """Layers by what is not on the device."""
        return {
            "inputs in the host": sum(keep.inputs == "host" for keep in self.keeps),
            "attention outputs in the host": sum(keep.attention == "host" for keep in self.keeps),
            "attention outputs computed again": self.computed_again,
        }


@dataclass(frozen=True)
class Memory:
    """Of training a model of `spec` by `config` on a card with so many bytes, in a host with so many."""

    spec: ModelSpec
    config: ExtendConfig
    device: int
    host: int
    host_optimizer: bool
    devices: int = 1  # that share every batch
    sharded: bool = False  # weights, gradients and moments are too, but for those of the layer at work and the ends

    @property
    def size(self) -> int:
        """Bytes of a value in the forward pass."""
        return 4 if self.config.dtype == "float32" else 2

    def of(self, stage: Stage) -> StageMemory:
        """The plain pass where it fits, unless `streamed` says otherwise."""
        streamed = self.config.streamed
        plain = self._plain(stage)
        if streamed is False or stage.questions or (streamed is None and plain.fits):
            return plain
        return self._streamed(stage)

    @property
    def ends(self) -> int:
        """Weights of the embeddings and the head."""
        return self.spec.vocab_size * self.spec.hidden_size * (1 if self.spec.tied_head else 2)

    @property
    def trained(self) -> int:
        """Weights with a gradient: all, or the adapters and what is trained beside them."""
        return self.spec.num_layers * self._trained_in_layer + self._trained_at_ends

    @property
    def _trained_at_ends(self) -> int:
        embeddings = self.spec.vocab_size * self.spec.hidden_size
        if not self.config.lora_rank:
            return self.ends + self.spec.hidden_size
        named = self.config.lora_train
        return embeddings * ("embeddings" in named) + self.spec.hidden_size * ("norms" in named)

    @property
    def _trained_in_layer(self) -> int:
        spec = self.spec
        if not self.config.lora_rank:
            return (spec.parameters() - self.ends - spec.hidden_size) // spec.num_layers
        return self._adapters + 2 * spec.hidden_size * ("norms" in self.config.lora_train)

    @property
    def _adapters(self) -> int:
        """Of a layer: from and to the widths of q, k, v and o."""
        spec = self.spec
        return self.config.lora_rank * (4 * spec.hidden_size + 2 * spec.q_size + 2 * spec.kv_size)

    @property
    def state_bytes(self) -> int:
        """On disk, of a checkpoint of the training."""
        return self.size * self._frozen + (12 + self.size * self.host_optimizer) * self.trained

    @property
    def _frozen(self) -> int:
        return self.spec.parameters() + self.spec.num_layers * self._adapters - self.trained

    @property
    def _gradient(self) -> int:
        """Bytes of a trained weight's gradient."""
        return self.size if self.host_optimizer else 4

    @property
    def _weights(self) -> int:
        """Weights and moments on the device, gradients apart, and the original model where rows are replayed."""
        held = self.size * self._frozen + (self.size if self.host_optimizer else 12) * self.trained
        if self.sharded:
            layer = (self.spec.parameters() - self.ends) // self.spec.num_layers
            held = held // self.devices + 4 * (3 * layer + 2 * self.ends)  # one at work, its gradient, the next one
        replayed = any(stage.replay_share for stage in self.config.plan)
        other = _LIBRARIES + DEVICE_BYTES * self.host_optimizer
        return held + replayed * self.size * self.spec.parameters() + other

    @property
    def _host_state(self) -> int:
        return _PROCESS + 12 * self.trained * self.host_optimizer

    @property
    def _host_limit(self) -> int:
        return int(_HOST_SHARE * self.host)

    def _head(self) -> int:
        """The tiled loss: logits of a tile three times, the head in the precision of the pass and its gradient."""
        cast = self.size * self.spec.vocab_size * self.spec.hidden_size
        return cast + 4 * self._trained_in_head + 12 * TILE_ROWS * self.spec.vocab_size

    @property
    def _trained_in_head(self) -> int:
        trained = not self.config.lora_rank or (self.spec.tied_head and "embeddings" in self.config.lora_train)
        return self.spec.vocab_size * self.spec.hidden_size * trained

    def _plain(self, stage: Stage) -> StageMemory:
        spec, size = self.spec, self.size
        tokens = stage.batch_size * (QUESTION_TOKENS if stage.questions else stage.seq_len)
        if stage.questions and stage.replay_share:
            tokens += REPLAY_ROW
        tokens = -(-tokens // self.devices)
        held = self._weights + self._gradient * self.trained // (self.devices if self.sharded else 1)
        if size == 2 and not self.host_optimizer and not self.sharded:
            held += size * self.trained  # autocast keeps the weights in 16 bit too
        if stage.questions:  # keys and values of the text, its hidden states, and gradients of one layer's keys
            held += stage.seq_len * (2 * size * spec.kv_size * (spec.num_layers + 1) + 4 * spec.hidden_size)
        attention = size * (2 * spec.q_size + 2 * spec.kv_size) + 4 * spec.num_heads  # q, k, v, output and its sums
        waiting = attention + 4 * spec.hidden_size  # of a token and layer: float32 between layers
        if not self.config.gradient_checkpointing:
            waiting += 2 * spec.hidden_size * (4 + size) + size * 4 * spec.intermediate_size  # norms, MLP
        working = 6 * size * spec.intermediate_size + 20 * spec.hidden_size  # a layer's MLP and its gradients
        peak = held + tokens * (spec.num_layers * waiting + working + 8 * spec.head_dim) + self._head()
        peak += self._exchanged(stage)
        return self._stage((), peak, self._host_state)

    def _exchanged(self, stage: Stage) -> int:
        """Of rows that several devices share: gathered keys and values of a layer, their gradients in float32 twice."""
        sharing = self.devices // math.gcd(self.devices, stage.batch_size)
        if sharing == 1 or stage.questions:
            return 0
        rows = stage.batch_size * sharing // self.devices
        return 2 * rows * stage.seq_len * self.spec.kv_size * (self.size + 8)

    def _stage(self, keeps: tuple[Keep, ...], device: int, host: int) -> StageMemory:
        fits = device <= (1 - _KEPT_FREE) * self.device and host <= self._host_limit
        return StageMemory(keeps, device, host, fits)

    def _streamed(self, stage: Stage) -> StageMemory:
        """Hidden states H wide and query rows Q wide, of all tokens, are the units of this."""
        spec, size, layers = self.spec, self.size, self.spec.num_layers
        tokens = -(-stage.batch_size * stage.seq_len // self.devices)
        hidden, query, keys = (tokens * size * width for width in (spec.hidden_size, spec.q_size, spec.kv_size))
        waiting = query + 4 * tokens * spec.num_heads  # of attention: output and sums
        work = self._layer_pass(tokens, hidden, query, keys) + self._exchanged(stage) // spec.num_kv_heads
        held, head = self._weights, self._gradient * self._trained_in_head

        def placed(inputs_off: int, outputs_off: int, outputs_on: int) -> StageMemory:
            again = layers - outputs_off - outputs_on
            keeps = tuple(
                Keep(
                    "host" if number < inputs_off else "device",
                    "again" if number < again else "host" if number < again + outputs_off else "device",
                )
                for number in range(layers)
            )  # what waits on the device is wanted first
            on_device = (layers - inputs_off) * hidden + outputs_on * waiting
            fetched = hidden * (inputs_off > 0) + query * (outputs_off > 0)  # for the layer before
            own = hidden * (inputs_off < layers) + query * (outputs_on > 0)  # of the first one, no longer waiting
            first = held + on_device + max(head + work + fetched - own, 6 * hidden + self._head())
            looked_up = self._trained_at_ends - self._trained_in_head  # whose gradient comes last
            last = held + self._gradient * self.trained + max(work - self._gradient * looked_up, 3 * hidden)
            host = self._host_state + inputs_off * hidden + outputs_off * waiting
            return self._stage(keeps, max(first, last), host)

        whole = placed(0, 0, layers)
        if whole.fits:
            return whole
        host_room = max(0, self._host_limit - self._host_state)
        inputs_off = min(layers, host_room // hidden)
        outputs_off = min(layers, (host_room - inputs_off * hidden) // waiting)
        tries = (placed(inputs_off, outputs_off, on) for on in range(layers - outputs_off, -1, -1))
        return next((found for found in tries if found.fits), placed(inputs_off, outputs_off, 0))

    def _layer_pass(self, tokens: int, hidden: int, query: int, keys: int) -> int:
        """What the backward pass of one layer holds."""
        spec, size, groups = self.spec, self.size, self.spec.num_kv_heads
        rows = min(self.config.tile, tokens)
        tile = rows * (7 * size * spec.intermediate_size + (16 + 6 * size) * spec.hidden_size)
        around = 2 * hidden + (query + 2 * keys) + 2 * query  # input, its gradient; q, k, v; output, its gradient
        group = (query + 2 * keys + 8 * query // size) // groups  # gradients of one group, float32 sums of the kernel
        sums = self._trained_in_layer * (4 + 2 * self._gradient)
        tables = tokens * 4 * spec.head_dim * len(set(spec.ropes))
        return around + max(group, tile) + sums + tables
