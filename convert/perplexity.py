"""Perplexity by position, on fixed targets: the same last tokens of a text, predicted with more and more context.

Plain perplexity over a growing window mixes the difficulty of the text with the use of context; with fixed targets
only the context changes. It still says little about retrieval (a model that forgets everything but its last 2K tokens
looks fine), so it stands beside the needles and never alone. The targets are a second prefill on top of the cached
context, as a follow-up question would be, so an artifact's KV quantization is part of the number. Logits exist for at
most 512 rows at a time.

LongPPL (arXiv 2410.23771) looks only at tokens that need a long context: those of the last 2,048 whose loss in the
native window is low and far below that with 512 tokens of context. The paper picks them with a strong model; here the
model picks its own, in the window it was made for, so the figure says what it keeps of that when the context grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from lcconvert.convert.cost import is_out_of_memory
from lcconvert.convert.haystack import Haystack
from lcconvert.convert.results import ContextPoint, Perplexity, PlainPerplexity, PositionBucket, Text
from lcconvert.convert.samples import SampleLog, sample_key
from lcconvert.runtime.engine import Engine

BLOCK = 512  # rows of [rows, vocab] logits held at once
PLAIN = 2048  # tokens of the plain figure
SHORTEST = 512
KEY_TARGETS = 2048  # of the last tokens, those that need the context are looked for
_KEY_STEP = 256  # of them scored by one pass over a short context
_KEY_GAIN, _KEY_LOSS = 2.0, 2.0  # nats: gained by the native window at least, left in it at most
_SEGMENT = 8192  # rows of hidden states held at once when every position is scored


@dataclass(frozen=True)
class Window:
    """One measurement: `context` tokens of text that end where the targets end (or begin the text: `plain`)."""

    context: int
    plain: bool


def windows(longest: int) -> list[Window]:
    """The plain window, then 512, 1K, 2K, ... and `longest` itself."""
    sizes = {longest}
    size = SHORTEST
    while size < longest:
        sizes.add(size)
        size *= 2
    return [Window(min(PLAIN, longest), True), *(Window(n, False) for n in sorted(sizes))]


def key_window(longest: int, native: int) -> int | None:
    """The window in which key tokens are told: the longest one inside the native window; None when that is short."""
    fitting = [w.context for w in windows(longest) if not w.plain and 2 * KEY_TARGETS <= w.context <= native]
    return max(fitting, default=None)


def run_perplexity(
    engine: Engine,
    text: Haystack,
    longest: int,
    targets: int,
    native: int,
    base: dict[str, Any],
    log: SampleLog,
    advance: Callable[[], None],
) -> Perplexity:
    """Measures every window up to `longest` that the log does not hold, shortest first; out of memory is a row.

    `native` is the window before any extension, in tokens.
    """
    ids = text.excerpt(engine.tokenizer, longest, "perplexity")
    bos = engine.tokenizer.encode("", add_special=True)[:1] if engine.tokenizer.bos_id is not None else []
    found: dict[Window, dict[str, Any]] = {}
    for window in windows(longest):
        key = sample_key(
            **base, kind="perplexity", text=text.sha256, context=window.context, plain=window.plain, longest=longest,
            targets=targets,
        )  # fmt: skip
        row = log.get(key)
        if row is None:
            try:
                result = measure(engine, ids, window, targets, bos)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                row = log.add(key, {"kind": "perplexity", "context": window.context, "plain": window.plain, **result})
        if row is not None:
            found[window] = row
        advance()
    short = None
    if key_window(longest, native) is not None:
        key = sample_key(**base, kind="key tokens", text=text.sha256, longest=longest)
        if (row := log.get(key)) is None:
            row = log.add(key, {"kind": "key tokens", "nll": _rounded(short_context(engine, ids, bos))})
        short = row["nll"]
        advance()
    return _summary(text, longest, targets, native, found, short)


def _summary(
    text: Haystack,
    longest: int,
    targets: int,
    native: int,
    found: dict[Window, dict[str, Any]],
    short: list[float] | None,
) -> Perplexity:
    keys: list[int] = []
    told = found.get(Window(key_window(longest, native) or 0, False))
    if short is not None and told is not None:
        keys = key_tokens(short, told["last"])
    plain = found.get(windows(longest)[0])
    points: list[ContextPoint] = []
    shortest: float | None = None
    for window in windows(longest)[1:]:
        row = found.get(window)
        if row is None:
            points.append(ContextPoint(context=window.context, state="out of memory", nll=None, ppl=None, change=None))
            continue
        last = row["last"]
        key_ppl = perplexity(sum(last[i] for i in keys) / len(keys)) if keys and last else None
        ppl = perplexity(row["nll"])
        shortest = shortest or ppl
        points.append(
            ContextPoint(
                context=window.context,
                state="measured",
                nll=row["nll"],
                ppl=ppl,
                change=ppl / shortest - 1,
                key_ppl=key_ppl,
            )
        )
    whole = found.get(Window(longest, False))
    buckets = (whole and whole["by_position"]) or (plain and plain["by_position"]) or []
    return Perplexity(
        text=Text(name=text.name, sha256=text.sha256, characters=len(text.text)),
        targets=targets,
        key_window=told["context"] if told else None,
        key_tokens=len(keys),
        plain=PlainPerplexity(context=min(PLAIN, longest), nll=plain["nll"], ppl=perplexity(plain["nll"]))
        if plain
        else None,
        by_context=points,
        by_position=[PositionBucket(**row, ppl=perplexity(row["nll"])) for row in buckets],
    )


def token_nll(engine: Engine, hidden: torch.Tensor, targets: list[int]) -> torch.Tensor:
    """Normed hidden states [T, H] and the T ids that follow them -> NLL in nats, float64 [T] on the CPU."""
    wanted = torch.tensor(targets, device=hidden.device)
    parts = [
        F.cross_entropy(engine.logits(hidden[i : i + BLOCK]), wanted[i : i + BLOCK], reduction="none").double().cpu()
        for i in range(0, len(targets), BLOCK)
    ]
    return torch.cat(parts)


def measure(engine: Engine, ids: list[int], window: Window, targets: int, bos: list[int]) -> dict[str, Any]:
    """Scores one window of `ids` (the whole excerpt): mean nats a target, and by position when every one is scored.

    Every position is scored in the plain window and in the longest one; else only the last `targets`, and in windows
    of twice `KEY_TARGETS` and more the last `KEY_TARGETS`, given as `last`. `bos` is what the tokenizer puts before
    every text; it counts as context.
    """
    text = window.context - len(bos)
    used = bos + (ids[:text] if window.plain else ids[len(ids) - text :])
    end, whole = len(used) - targets, window.context == len(ids) and window.context > PLAIN
    keyed = not window.plain and window.context >= 2 * KEY_TARGETS
    if window.plain:
        borders = [0]
    elif whole:  # the targets in a prefill of their own, as in the shorter windows
        borders = [*range(0, end, _SEGMENT), end]
    else:
        borders = [len(used) - KEY_TARGETS, end] if keyed else [end]
    nll = _scored(engine, used, [*borders, len(used) - 1])
    return {
        "nll": float((nll if window.plain else nll[-targets:]).mean()),
        "by_position": by_position(nll) if window.plain or whole else [],
        "last": _rounded(nll[-KEY_TARGETS:]) if keyed else [],
    }


def short_context(engine: Engine, ids: list[int], bos: list[int]) -> torch.Tensor:
    """NLL of the last `KEY_TARGETS` of `ids` with 512 tokens of context or a little more: float64 [KEY_TARGETS]."""
    parts = []
    for first in range(len(ids) - KEY_TARGETS, len(ids), _KEY_STEP):
        used = bos + ids[first - SHORTEST : first + _KEY_STEP]
        parts.append(_scored(engine, used, [len(bos) + SHORTEST, len(used) - 1]))
    return torch.cat(parts)


def key_tokens(short: list[float], native: list[float]) -> list[int]:
    """Indices of the tokens that a long context makes likely, from their losses in a short and the native window."""
    return [i for i, (a, b) in enumerate(zip(short, native, strict=True)) if a - b > _KEY_GAIN and b < _KEY_LOSS]


def _scored(engine: Engine, used: list[int], borders: list[int]) -> torch.Tensor:
    """NLL of what follows borders[0] (of used[1:] when that is 0), each stretch between borders a prefill of its own.

    The last border is len(used) - 1: the last token is only a target.
    """
    seq = engine.new_sequence()
    try:
        parts = []
        if first := borders[0]:
            parts.append(_nll_of(engine.prefill(seq, used[:first]), used[first]))
        for begin, end in pairwise(borders):
            hidden = engine.prefill(seq, used[begin:end], want="all")
            parts.append(token_nll(engine, hidden, used[begin + 1 : end + 1]))
        return torch.cat(parts)
    finally:
        engine.free(seq)


def _rounded(nll: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in nll.tolist()]


def _nll_of(logits: torch.Tensor, target: int) -> torch.Tensor:
    return -logits.log_softmax(-1)[target].double().cpu()[None]


def by_position(nll: torch.Tensor) -> list[dict[str, float]]:
    """Mean NLL by the position of the target, in buckets 1..256, 256..512, 512..1024, ..."""
    rows = []
    start, end = 1, 256
    while start <= len(nll):
        part = nll[start - 1 : end - 1]  # nll[i] belongs to the token at position i + 1
        rows.append({"start": start, "end": min(end, len(nll) + 1), "nll": float(part.mean())})
        start, end = end, end * 2
    return rows


def perplexity(nll: float) -> float:
    """exp(nll); a model that has broken down completely stays finite in JSON."""
    return math.exp(min(nll, 700.0))
