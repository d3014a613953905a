"""What calibration text shows about one layer at a time: input second moments, the reach of K and V, block selectors.

Only one layer is in memory, and with it the samples' hidden states at its input; a layer is observed with its original
weights, quantized, and run again, so that later layers are calibrated on the inputs they will really get. The decoder
as a whole is never loaded.

The surprising rule: the peak of K is taken over the lengths of its rotary pairs, not over its components. A rotation
keeps that length, so a scale found at position 2,000 cannot overflow at position 1,000,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from lcconvert.convert.corpus import Corpus
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.selector_calibration import calibrate_alpha
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import QuantLayout
from lcconvert.runtime.model import Layer, layer_tables, read_tensor, scaled
from lcconvert.runtime.sidecar import AttentionPolicy
from lcconvert.runtime.source import TensorSource
from lcconvert.runtime.spec import ModelSpec
from lcconvert.runtime.tokenizer import Tokenizer

# linear layers of a decoder layer that see the same input, so share its moments
SHARED_INPUT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_CHARS = 8  # characters tokenized for each token wanted; no text that is worth calibrating on has longer tokens
_FP8_MAX = 448.0
# Room above the largest value seen. e4m3 is a floating format: a doubled scale costs one of 17 binades, no precision.
_KV_MARGIN = 2.0


def calibration_windows(
    texts: Sequence[str], tokenizer: Tokenizer, *, samples: int, length: int, seed: int
) -> torch.Tensor:
    """int64 [samples, length] token windows drawn from `texts`, or from the bundled text's first fifth when empty.

    That part ends before the place perplexity is measured on and before the half that needles hide in.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(choices: int) -> int:
        return int(torch.randint(max(1, choices), (1,), generator=generator))

    if texts:
        tokens = Corpus.read(texts, tokenizer, need=4 * samples * length, seed=seed).tokens.tolist()
        starts = [draw(len(tokens) - length + 1) for _ in range(samples)]
        windows = [tokens[start : start + length] for start in starts]
    else:
        text = Haystack.load().text
        text, size = text[: min(300_000, len(text) // 5)], length * _CHARS
        starts = [draw(len(text) - size) for _ in range(samples)]
        windows = [tokenizer.encode(text[start : start + size])[:length] for start in starts]
    if (shortest := min(map(len, windows))) < length:
        where = ", ".join(texts) or "the bundled text"
        raise UserError(
            f"calibration wants windows of {length} tokens but {where} holds {shortest}; "
            "give more text or a smaller length"
        )
    return torch.tensor(windows)


def load_layer(source: TensorSource, spec: ModelSpec, number: int, device: torch.device) -> Layer:
    """Layer `number`, unquantized, float32 on a CPU and in the stored dtype elsewhere.

    UserError names a tensor that is misshapen or not finite.
    """
    prefix = f"model.layers.{number}"
    with torch.device("meta"):
        layer = Layer(spec, QuantLayout(), number)
    stored = source.info(f"{prefix}.mlp.down_proj.weight")[0]
    state = {}
    for leaf, wanted in layer.state_dict().items():
        name = f"{prefix}.{leaf}"
        tensor = read_tensor(source, name, wanted.shape)
        state[leaf] = tensor.to(device, torch.float32 if device.type == "cpu" else stored)
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False).eval()


@dataclass(frozen=True)
class Observed:
    """moments: E[x x^T] float32 [K, K] by the first name of each `SHARED_INPUT` row; k_scale, v_scale: float32 [Hkv];
    alpha: float32 [Hq] and the share of skippable key blocks it keeps, None unless asked for."""

    moments: dict[str, torch.Tensor]
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    alpha: torch.Tensor | None = None
    kept: float | None = None


class Calibration:
    """The samples on their way through the layers: hidden states [S, T, H] at the input of the next layer."""

    def __init__(self, source: TensorSource, spec: ModelSpec, windows: torch.Tensor, device: torch.device):
        embedding = source.tensor("model.embed_tokens.weight")
        if (top := int(windows.max())) >= len(embedding):
            raise UserError(
                f"{source.name}: the tokenizer makes id {top} but the model has {len(embedding)} embeddings"
            )
        dtype = torch.float32 if device.type == "cpu" else embedding.dtype
        self.hidden = scaled(spec, F.embedding(windows, embedding).to(device, dtype))  # [S, T, H]
        positions = torch.arange(windows.shape[1], device=device)
        self.tables = layer_tables(spec, positions)

    @torch.no_grad()
    def observe(self, layer: Layer, policy: AttentionPolicy | None, mass: float) -> Observed:
        """Runs `layer` on every sample without moving on.

        `policy`: calibrate its alpha, on the first sample, to recall `mass` of the attention.
        """
        moments: dict[str, torch.Tensor] = {}

        def accumulate(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).float()
            if name in moments:
                moments[name].addmm_(x.T, x)
            else:
                moments[name] = x.T @ x

        hooks = [
            layer.get_submodule(names[0]).register_forward_pre_hook(partial(accumulate, names[0]))
            for names in SHARED_INPUT
        ]
        k_peak, v_peak = torch.zeros(2, 1, device=self.hidden.device)
        alpha = kept = None
        for number, x in enumerate(self.hidden):
            q, k, v = layer.qkv(x, *self.tables[layer.number])
            k_peak = torch.maximum(k_peak, torch.hypot(*k.float().chunk(2, dim=-1)).amax((0, 2)))  # [Hkv]
            v_peak = torch.maximum(v_peak, v.float().abs().amax((0, 2)))
            layer.finish(x, layer.attend(q[None], k[None], v[None])[0].flatten(1))
            if policy is not None and number == 0 and layer.window is not None:
                alpha, kept = torch.zeros(q.shape[1]), 1.0  # nothing is skipped within a window
            elif policy is not None and number == 0:
                alpha, kept = calibrate_alpha(q, k, policy, mass)
        for hook in hooks:
            hook.remove()
        tokens = self.hidden.shape[0] * self.hidden.shape[1]
        return Observed(
            {name: total / tokens for name, total in moments.items()},
            k_peak * (_KV_MARGIN / _FP8_MAX),
            v_peak * (_KV_MARGIN / _FP8_MAX),
            alpha,
            kept,
        )

    @torch.no_grad()
    def advance(self, layer: Layer) -> None:
        """Moves every sample through `layer`, one at a time."""
        for number, x in enumerate(self.hidden):
            q, k, v = layer.qkv(x, *self.tables[layer.number])
            self.hidden[number] = layer.finish(x, layer.attend(q[None], k[None], v[None])[0].flatten(1))
