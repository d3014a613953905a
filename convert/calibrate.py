"""What calibration text shows about one layer at a time: input second moments, the reach of K and V, block selectors.

Only one layer is in memory, and with it the samples' hidden states twice: as the layers rounded so far give them, and
as the original ones did. Linear layers are shown in the order they run, each group after the ones before it have been
rounded, so every moment is of inputs that will really come. From the pair follows what rounding has cost so far, which
the next weights are asked to give back (GPTAQ, arXiv 2504.02692; the residual stream likewise). The decoder as a whole
is never loaded.

The surprising rule: the peak of K is taken over the lengths of its rotary pairs, not over its components. A rotation
keeps that length, so a scale found at position 2,000 cannot overflow at position 1,000,000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lcconvert.convert.corpus import Corpus
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.selector_calibration import calibrate_alpha
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.linear import QuantLayout
from lcconvert.runtime.model import MLP, Experts, Layer, layer_tables, read_tensor, scaled
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


def shared_input(layer: Layer) -> tuple[tuple[str, ...], ...]:
    """`SHARED_INPUT` of `layer`, where experts may take the place of the MLP."""
    if not isinstance(layer.mlp, Experts):
        return SHARED_INPUT
    named = (f"mlp.experts.{number}." for number in range(len(layer.mlp.mlps)))
    rows = (
        (tuple(f"{name}{leaf}_proj" for leaf in leaves)) for name in named for leaves in (("gate", "up"), ("down",))
    )
    return *SHARED_INPUT[:2], *rows


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
    stored = source.info("model.embed_tokens.weight")[0]  # a decoded weight is float32
    state = {}
    for leaf, wanted in layer.state_dict().items():
        name = f"{prefix}.{leaf}"
        tensor = read_tensor(source, name, wanted.shape)
        state[leaf] = tensor.to(device, torch.float32 if device.type == "cpu" else stored)
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False).eval()


@dataclass(frozen=True)
class Moments:
    """What linear layers with one input saw, x as it will be and x' as it was in the original model, means over tokens.

    inputs: E[x x^T] float32 [K, K]. missing: E[(x' - x) x^T] float32 [K, K]. owed: E[(r' - r) x^T] float32 [N, K] where
    the output of the one layer is added to r; None where it is not.
    """

    inputs: torch.Tensor
    missing: torch.Tensor
    owed: torch.Tensor | None
    tokens: int = 0

    def debt(self, weight: torch.Tensor) -> torch.Tensor:
        """E[(W x' + r' - W x - r) x^T] for W float32 [N, K]: what the outputs lack, against the inputs; [N, K]."""
        lacking = weight @ self.missing
        return lacking if self.owed is None else lacking.add_(self.owed)


@dataclass(frozen=True)
class Reach:
    """k_scale, v_scale: float32 [Hkv]; alpha: float32 [Hq] and the share of skippable key blocks it keeps, None unless
    asked for."""

    k_scale: torch.Tensor
    v_scale: torch.Tensor
    alpha: torch.Tensor | None = None
    kept: float | None = None


class Calibration:
    """The samples on their way through the layers: hidden states [S, T, H] at the input of the next layer.

    `hidden` comes out of rounded layers, `exact` out of the original ones.
    """

    def __init__(self, source: TensorSource, spec: ModelSpec, windows: torch.Tensor, device: torch.device):
        embedding = source.tensor("model.embed_tokens.weight")
        if (top := int(windows.max())) >= len(embedding):
            raise UserError(
                f"{source.name}: the tokenizer makes id {top} but the model has {len(embedding)} embeddings"
            )
        dtype = torch.float32 if device.type == "cpu" else embedding.dtype
        self.hidden = scaled(spec, F.embedding(windows, embedding).to(device, dtype))  # [S, T, H]
        self.exact = self.hidden.clone()
        positions = torch.arange(windows.shape[1], device=device)
        self.tables = layer_tables(spec, positions)
        self.last = spec.num_layers - 1

    @torch.no_grad()
    def walk(
        self, layer: Layer, policy: AttentionPolicy | None, mass: float, reached: Callable[[Reach], None]
    ) -> Iterator[tuple[tuple[str, ...], Moments | None]]:
        """Takes every sample through `layer`: yields each `shared_input` row with what it sees, before it runs; None
        for an expert that no token chose.

        The caller rounds those weights in place before it goes on. `reached` is called once K and V are known;
        `policy`: calibrate its alpha, on the first sample, to recall `mass` of the attention.
        """
        exact = deepcopy(layer)
        tables = self.tables[layer.number]
        seen = _Sums()
        for x, original in zip(self.hidden, self.exact):
            seen.add(layer.input_layernorm(x), exact.input_layernorm(original))
        yield SHARED_INPUT[0], seen.means()

        seen = _Sums()
        attended, k_peak, v_peak = [], *torch.zeros(2, 1, device=self.hidden.device)
        alpha = kept = None
        residual = isinstance(layer.post_self_attn_layernorm, nn.Identity)  # outputs are added as they are
        for number, (x, original) in enumerate(zip(self.hidden, self.exact)):
            q, k, v = layer.qkv(x, *tables)
            k_peak = torch.maximum(k_peak, torch.hypot(*k.float().chunk(2, dim=-1)).amax((0, 2)))  # [Hkv]
            v_peak = torch.maximum(v_peak, v.float().abs().amax((0, 2)))
            if policy is not None and number == 0 and layer.window is not None:
                alpha, kept = torch.zeros(q.shape[1]), 1.0  # nothing is skipped within a window
            elif policy is not None and number == 0:
                alpha, kept = calibrate_alpha(q, k, policy, mass)
            attended.append(_attend(layer, q, k, v))
            wanted = _attend(exact, *exact.qkv(original, *tables))
            seen.add(attended[-1], wanted, original - x if residual else None)
            original += exact.post_self_attn_layernorm(exact.self_attn.o_proj(wanted))
        reached(Reach(k_peak * (_KV_MARGIN / _FP8_MAX), v_peak * (_KV_MARGIN / _FP8_MAX), alpha, kept))
        yield SHARED_INPUT[1], seen.means()

        for x in self.hidden:
            x += layer.post_self_attn_layernorm(layer.self_attn.o_proj(attended.pop(0)))
        yield from self._through_experts(layer, exact) if layer.routed else self._through_mlp(layer, exact)
        if layer.number < self.last:
            for x in self.hidden:
                x += layer.post_mlp_layernorm(layer.mlp(layer.post_attention_layernorm(x)))

    def _through_mlp(self, layer: Layer, exact: Layer) -> Iterator[tuple[tuple[str, ...], Moments]]:
        mlp, original_mlp = layer.mlp, exact.mlp
        assert isinstance(mlp, MLP)
        assert isinstance(original_mlp, MLP)
        seen = _Sums()
        for x, original in zip(self.hidden, self.exact):
            seen.add(layer.post_attention_layernorm(x), exact.post_attention_layernorm(original))
        yield SHARED_INPUT[2], seen.means()

        seen = _Sums()
        residual = isinstance(layer.post_mlp_layernorm, nn.Identity)
        for x, original in zip(self.hidden, self.exact):
            wanted = original_mlp.gated(exact.post_attention_layernorm(original))
            seen.add(mlp.gated(layer.post_attention_layernorm(x)), wanted, original - x if residual else None)
            original += exact.post_mlp_layernorm(original_mlp.down_proj(wanted))
        yield SHARED_INPUT[3], seen.means()

    def _through_experts(self, layer: Layer, exact: Layer) -> Iterator[tuple[tuple[str, ...], Moments | None]]:
        """Every expert is shown the tokens that choose it now, as they are and as they were."""
        experts, originals = layer.mlp, exact.mlp
        assert isinstance(experts, Experts)
        assert isinstance(originals, Experts)
        routed = [experts.routes(layer.post_attention_layernorm(x))[0] for x in self.hidden]
        names = shared_input(layer)[2:]
        for number, (expert, original_expert) in enumerate(zip(experts.mlps, originals.mlps)):
            inputs, inner = _Sums(), _Sums()
            for x, original, chosen in zip(self.hidden, self.exact, routed):
                rows = (chosen == number).any(-1)
                inputs.add(layer.post_attention_layernorm(x[rows]), exact.post_attention_layernorm(original[rows]))
            yield names[2 * number], inputs.means() if inputs.tokens else None
            for x, original, chosen in zip(self.hidden, self.exact, routed):
                rows = (chosen == number).any(-1)
                wanted = original_expert.gated(exact.post_attention_layernorm(original[rows]))
                inner.add(expert.gated(layer.post_attention_layernorm(x[rows])), wanted)
            yield names[2 * number + 1], inner.means() if inner.tokens else None
        for original in self.exact:
            original += exact.post_mlp_layernorm(originals(exact.post_attention_layernorm(original)))


class _Sums:
    """`Moments` while the samples come by."""

    def __init__(self) -> None:
        self.tokens = 0
        self.inputs: torch.Tensor | None = None
        self.missing: torch.Tensor | None = None
        self.owed: torch.Tensor | None = None

    def add(self, x: torch.Tensor, original: torch.Tensor, lacking: torch.Tensor | None = None) -> None:
        """x and x' [T, K], and r' - r [T, N]."""
        self.tokens += len(x)
        self.inputs = _added(self.inputs, x, x)
        self.missing = _added(self.missing, original - x, x)
        if lacking is not None:
            self.owed = _added(self.owed, lacking, x)

    def means(self) -> Moments:
        """Once, at the end."""
        assert self.inputs is not None
        assert self.missing is not None
        owed = None if self.owed is None else self.owed.div_(self.tokens)
        return Moments(self.inputs.div_(self.tokens), self.missing.div_(self.tokens), owed, self.tokens)


def _added(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a^T @ b, float32 [Ka, Kb]; 16-bit a and b [T, K] are multiplied exactly, by tensor cores."""
    if total is None:
        total = torch.zeros(a.shape[1], b.shape[1], device=a.device)
    if a.is_cuda and a.dtype != torch.float32:
        return total.add_(torch.mm(a.T, b, out_dtype=torch.float32))
    return total.addmm_(a.T.float(), b.float())


def _attend(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One sample, [T, heads, D] each -> [T, Hq * D]."""
    return layer.attend(q[None], k[None], v[None])[0].flatten(1)
