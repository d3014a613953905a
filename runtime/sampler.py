"""From logits to one token: greedy, temperature, top-k, top-p (nucleus sampling, arXiv 1904.09751), seeded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those off; `max_tokens` caps the new tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 256
    stop: tuple[str, ...] = ()

    def generator(self) -> torch.Generator:
        """A CPU generator, so that a seed gives the same tokens on every device."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> tuple[int, float]:
    """float32 logits [V] -> (token, its natural-log probability under the unmodified distribution)."""
    if params.temperature == 0:
        token = int(logits.argmax())
    else:
        scaled = (logits - logits.max()) / params.temperature  # a tiny temperature then ends at greedy, not at NaN
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
