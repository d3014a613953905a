"""`lcconvert generate`: one prompt, one streamed answer, through the same engine that serves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.progress import progress
from lcconvert.convert.settings import make_config
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.sampler import SamplingParams
from lcconvert.runtime.sidecar import KVConfig, Sidecar


def generate(
    src: str,
    *,
    prompt: str | None,
    prompt_file: Path | None,
    raw: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: tuple[str, ...],
    kv: str | None,
    attention: str | None,
    device: str | None,
) -> Iterator[str]:
    """Yields the answer's text piece by piece; the file's text comes before the prompt."""
    text = "\n\n".join(part for part in (_read(prompt_file), prompt) if part)
    if not text:
        raise UserError("there is no prompt; give --prompt or --prompt-file")
    params = SamplingParams(temperature, top_p, top_k, seed, max_tokens, stop)
    engine = load_engine(src, kv=kv, attention=attention, device=device)
    tokenizer = engine.tokenizer
    chat = tokenizer.has_chat_template and not raw
    ids = tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text, True)
    with ExitStack() as stack:
        bar = stack.enter_context(progress(f"prefill of {len(ids)} tokens", engine.spec.num_layers, "layers"))
        for piece in engine.generate(ids, params, progress=lambda *_: bar.advance()):
            stack.close()  # the first token is here: the bar ends before text begins
            yield piece.text


def load_engine(src: str, *, kv: str | None, attention: str | None, device: str | None) -> Engine:
    """The engine of `src` with the KV scheme or the policy (see `AttentionPolicy.named`) exchanged when asked."""
    source = open_checkpoint(src)
    policy = Sidecar.read(source).attention
    if attention is not None:
        policy = policy.named(attention)
    scheme = None if kv is None else make_config(KVConfig, {"scheme": kv}, "--kv")
    return Engine.load(source, device=device, kv=scheme, attention=policy)


def _read(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read as UTF-8 text ({error}); give another file") from None
