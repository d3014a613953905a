"""`lcconvert ask`: a question on a folder that is read once. The second question only reads itself.

The folder is packed into one prompt whose question comes last. What comes before the question is a saved session; a
run restores what that shares with the folder as it is now, so after an edit everything from the first changed file on
is read again, and no more.

The surprising rule: the files are always read up to a whole page first, and the question after that, on a fresh run
too. So a question on a restored session meets the same cache as on a fresh run, and gets the same answer.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.pack import Pack, pack_folder
from lcconvert.convert.progress import progress
from lcconvert.convert.validate import identity
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.prefix_cache import Lease, PrefixCache, common_tokens
from lcconvert.runtime.sampler import SamplingParams
from lcconvert.runtime.sessions import SessionError, Sessions
from lcconvert.runtime.tokenizer import Tokenizer

Say = Callable[[str], None]
_BEFORE = "These are the files of a folder, each after a line with its path.\n\n"
_AFTER = "Answer from these files, and name the files that the answer is from by their paths.\n\nQuestion: "
_LISTED = 10


def default_sessions() -> Path:
    """Where sessions lie when no folder is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcconvert" / "sessions"


def ask(
    src: str,
    question: str,
    *,
    files: Path,
    exclude: tuple[str, ...] = (),
    session_dir: Path | None = None,
    max_tokens: int = 512,
    max_context: int | None = None,
    device: str | None = None,
    say: Say = lambda line: None,
) -> Iterator[str]:
    """Yields the answer's text as it comes, then a line with the files it names. `say` is told what is skipped, read
    and restored. UserError when the folder does not fit into the context."""
    source = open_checkpoint(src)
    if not question.strip():
        raise UserError("the question is empty; put it after the artifact, in quotes")
    engine = Engine.load(source, device=device, max_context=max_context)
    sessions = Sessions(session_dir or default_sessions(), engine, artifact := identity(source)[0])
    pack = pack_folder(files, exclude=exclude, control_tokens=engine.tokenizer.control_tokens)
    _tell_skipped(pack, say)
    ids = _prompt(engine.tokenizer, pack.text, question)
    if len(ids) + max_tokens > engine.max_context:
        raise _too_large(engine, pack, len(ids) + max_tokens)
    head = ids[: common_tokens(ids, _prompt(engine.tokenizer, pack.text, "?" + question))]
    name = _session_name(files, artifact)
    with _leased(engine, ids, max_tokens) as (cache, lease):
        _read(engine, cache, lease, head, sessions, name, say)
        pieces = engine.generate(ids[len(head) :].tolist(), SamplingParams(max_tokens=max_tokens), seq=lease.sequence)
        answer = ""
        for piece in pieces:
            answer += piece.text
            yield piece.text
    if named := files_named(answer, pack.paths):
        yield f"\n\nFiles it names: {', '.join(named)}"


def files_named(answer: str, paths: list[str]) -> list[str]:
    """The packed files that an answer names by path, or by a name that only one of them has; in order of mention."""
    names = [path.rpartition("/")[2] for path in paths]
    found = []
    for path, name in zip(paths, names, strict=True):
        for wanted in (path, name) if names.count(name) == 1 else (path,):
            if match := re.search(rf"(?<![\w/.-]){re.escape(wanted)}(?![\w/-]|\.\w)", answer):
                found.append((match.start(), path))
                break
    return [path for _, path in sorted(found)]


def _prompt(tokenizer: Tokenizer, text: str, question: str) -> np.ndarray:
    """Ids int32 [T]."""
    whole = _BEFORE + text + _AFTER + question
    chat = tokenizer.has_chat_template
    ids = tokenizer.encode_chat([{"role": "user", "content": whole}]) if chat else tokenizer.encode(whole, True)
    return np.array(ids, np.int32)


@contextmanager
def _leased(engine: Engine, ids: np.ndarray, max_tokens: int) -> Iterator[tuple[PrefixCache, Lease]]:
    cache = PrefixCache(engine, 0)
    lease = cache.lease(ids, len(ids) + max_tokens)
    assert lease is not None, "an empty cache has room for what fits its context"
    try:
        yield cache, lease
    finally:
        cache.end(lease)


def _read(
    engine: Engine, cache: PrefixCache, lease: Lease, head: np.ndarray, sessions: Sessions, name: str, say: Say
) -> None:
    """Brings `head` into the lease's sequence: what is saved of it is restored, the rest is read, all of it saved."""
    seq, started = lease.sequence, time.perf_counter()
    if saved := common_tokens(sessions.ids(name), head):
        try:
            sessions.restore(name, seq, saved)
        except SessionError as error:
            say(f"the saved session is not used: {error}")
    restored = seq.length
    say(f"{len(head)} tokens of files: {restored} restored, {len(head) - restored} read")
    if restored:
        say(f"restoring took {time.perf_counter() - started:.2f} s")
    if restored == len(head):
        return
    with progress(f"reading {len(head) - restored} tokens", engine.spec.num_layers, "layers") as bar:
        engine.prefill(seq, head[restored:].tolist(), progress=lambda *_: bar.advance())
    cache.keep(lease)
    if lease.kept is not None:
        try:
            say(f"saved as {sessions.save(name, lease.kept)}")
        except SessionError as error:  # the answer is still worth having
            say(f"not saved: {error}")


def _session_name(files: Path, artifact: str) -> str:
    where = files.resolve()
    digest = hashlib.sha256(f"{artifact} {where}".encode()).hexdigest()[:12]
    return f"ask-{re.sub(r'[^A-Za-z0-9]+', '-', where.name)[:40]}-{digest}"


def _tell_skipped(pack: Pack, say: Say) -> None:
    say(f"{len(pack.parts)} files packed, {len(pack.skipped)} skipped")
    for path, why in pack.skipped[:_LISTED]:
        say(f"  skipped {path}: {why}")
    if len(pack.skipped) > _LISTED:
        say(f"  and {len(pack.skipped) - _LISTED} more")


def _too_large(engine: Engine, pack: Pack, tokens: int) -> UserError:
    largest = sorted(pack.parts, key=lambda part: -len(part[1]))[:3]
    named = ", ".join(f"{path} ({len(text)} characters)" for path, text in largest)
    return UserError(
        f"the folder, the question and the answer take {tokens} tokens, the context is {engine.max_context}; leave "
        f"files out with --exclude PATTERN, the largest are {named}"
    )
