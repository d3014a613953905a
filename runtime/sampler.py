"""From logits to one token: greedy, temperature, top-k, top-p (nucleus sampling, arXiv 1904.09751), seeded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those off; `max_tokens` caps the new tokens;
    `top_logprobs` likeliest tokens are told beside each one chosen."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0

    def generator(self) -> torch.Generator:
        """A CPU generator, so that a seed gives the same tokens on every device."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(
    logits: torch.Tensor, params: SamplingParams, generator: torch.Generator, allowed: torch.Tensor | None = None
) -> tuple[int, float]:
    """float32 logits [V] -> (token, its natural-log probability under the unmodified distribution).

    Only tokens that are true in `allowed` (bool [V], at least one) can be chosen.
    """
    shown = logits if allowed is None else logits.masked_fill(~allowed.to(logits.device), float("-inf"))
    if params.temperature == 0:
        token = int(shown.argmax())
    else:
        scaled = (shown - shown.max()) / params.temperature  # a tiny temperature then ends at greedy, not at NaN
        if params.top_k:
            kth = scaled.topk(min(params.top_k, scaled.numel())).values[-1]
            scaled = scaled.masked_fill(scaled < kth, float("-inf"))
        probs = scaled.softmax(-1)
        if params.top_p < 1:
            ordered, order = probs.sort(descending=True)
            outside = ordered.cumsum(-1) - ordered >= params.top_p  # the token that crosses top_p stays
            outside[0] = False
            probs = probs.scatter(0, order[outside], 0.0)
        token = int(torch.multinomial(probs.cpu(), 1, generator=generator))
    return token, float(logits[token] - logits.logsumexp(-1))


def likeliest(logits: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` tokens that float32 logits [V] favour, each with its natural-log probability, the likeliest first."""
    values, tokens = (logits - logits.logsumexp(-1)).topk(min(count, logits.numel()))
    return tuple(zip(tokens.tolist(), values.tolist(), strict=True))
