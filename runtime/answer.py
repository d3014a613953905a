"""One answer in the making: logits in, a piece of text out, until an end token, a stop string or the limit.

Apart from the engine, so that one answer alone (`Engine.generate`) and many in one decode step (the server's worker)
choose tokens and cut text by the same code. It holds no cache: whoever owns the sequence feeds the token back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lcconvert.runtime.sampler import SamplingParams, likeliest, sample

if TYPE_CHECKING:
    import torch

    from lcconvert.runtime.grammar import Constraint
    from lcconvert.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """One generated token: the text it completes (may be empty), its natural-log probability, why generation ended, and
    as many of the likeliest tokens in its place as were asked for."""

    token: int
    text: str
    logprob: float
    finish: Literal["stop", "length"] | None = None
    top: tuple[tuple[int, float], ...] = ()


class Answer:
    """State of one answer: its random generator, its text not yet given out, its token count."""

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer,
        eos_ids: frozenset[int],
        constraint: Constraint | None = None,
    ):
        """`constraint`: what the text must become; the answer ends when nothing can follow."""
        self._params, self._eos_ids, self._constraint = params, eos_ids, constraint
        self._generator, self._stream = params.generator(), tokenizer.stream()
        self._held = ""
        self.count = 0

    def push(self, logits: torch.Tensor, *, full: bool = False) -> Piece:
        """Chooses a token from float32 logits [V]; `full`: the context has no room for another one after it.

        Text that may be the beginning of a stop string is held back until it is decided; a stop string itself is never
        given out. Must not be called again after a piece with `finish`.
        """
        allowed = None if self._constraint is None else self._constraint.allowed()
        token, logprob = sample(logits, self._params, self._generator, allowed)
        top = likeliest(logits, self._params.top_logprobs) if self._params.top_logprobs else ()
        self.count += 1
        if token in self._eos_ids:
            return Piece(token, self._held + self._stream.flush(), logprob, "stop", top)
        self._held += self._stream.push(token)
        complete = self._constraint is not None and self._constraint.accept(token)
        full = full or self.count >= self._params.max_tokens
        if full or complete:
            self._held += self._stream.flush()
        text, self._held, stopped = _cut_at_stop(self._held, self._params.stop)
        if stopped:
            return Piece(token, text, logprob, "stop", top)
        if full or complete:
            return Piece(token, text + self._held, logprob, "stop" if complete else "length", top)
        return Piece(token, text, logprob, None, top)


def _cut_at_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str, bool]:
    """(text to give out, text to hold back, whether a stop string was met)."""
    found = min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=-1)
    if found >= 0:
        return text[:found], "", True
    longest = max((len(stop) for stop in stops), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return text[:-size], text[-size:], False
    return text, "", False
