"""`lcconvert ask`: questions on a folder that is read once. The second question only reads itself.

The folder is packed into the first message of a conversation, whose question comes after it. What comes before that
question is a saved session; a run restores what that shares with the folder as it is now, so after an edit everything
from the first changed file on is read again, and no more. Further questions of one run meet what is still in memory,
and the folder is looked at again before each.

The surprising rule: the files are always read up to a whole page first, and the question after that, on a fresh run
too. So a question on a restored session meets the same cache as on a fresh run, and gets the same answer.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TextIO

import numpy as np

from lcconvert.convert.checkpoint import open_checkpoint
from lcconvert.convert.pack import Pack, pack_folder
from lcconvert.convert.progress import progress
from lcconvert.convert.validate import identity
from lcconvert.runtime.engine import Engine
from lcconvert.runtime.errors import UserError
from lcconvert.runtime.packed import AFTER, BEFORE
from lcconvert.runtime.prefix_cache import Lease, PrefixCache, common_tokens
from lcconvert.runtime.sampler import SamplingParams
from lcconvert.runtime.sessions import SessionError, Sessions

Say = Callable[[str], None]
_LISTED = 10


def default_cache() -> Path:
    """Where sessions and the text of PDF files lie when no folder is given."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcconvert"


def questions(first: str | None, typed: TextIO | None) -> Iterator[str]:
    """The question of the command line, if any, then the lines of `typed`; empty ones are passed over. UserError when
    there is nothing to come."""
    if typed is None and not (first and first.strip()):
        raise UserError("the question is missing; put it after the artifact, in quotes, or type questions with --chat")
    return (line.strip() for line in chain([first or ""], _lines(typed) if typed else ()) if line.strip())


def _lines(typed: TextIO) -> Iterator[str]:
    while True:
        if typed.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        if not (line := typed.readline()):
            return
        yield line


def ask(
    src: str,
    asked: Iterable[str],
    *,
    files: Path,
    exclude: tuple[str, ...] = (),
    session_dir: Path | None = None,
    max_tokens: int = 512,
    max_context: int | None = None,
    device: str | None = None,
    say: Say = lambda line: None,
) -> Iterator[str]:
    """Yields the text of the answers as it comes, and after each a line with the files it names; the questions are one
    conversation. `say` is told what is skipped, read and restored. UserError when the folder and what was said do not
    fit into the context."""
    source = open_checkpoint(src)
    engine = Engine.load(source, device=device, max_context=max_context)
    artifact = identity(source)[0]
    sessions = Sessions(session_dir or default_cache() / "sessions", engine, artifact)
    cache, name, said = PrefixCache(engine), _session_name(files, artifact), list[dict[str, str]]()
    text, head, told = "", np.empty(0, np.int32), None
    for question in asked:
        pack = pack_folder(
            files, exclude=exclude, control_tokens=engine.tokenizer.control_tokens, text_cache=default_cache() / "pdf"
        )
        if pack.skipped != told:
            _tell_skipped(pack, say)
            told = pack.skipped
        said.append({"role": "user", "content": question})
        ids = _prompt(engine, pack, said)
        if len(ids) + max_tokens > engine.max_context:
            raise _too_large(engine, pack, len(ids) + max_tokens)
        if pack.text != text:
            other = _prompt(engine, pack, [{"role": "user", "content": "?" + said[0]["content"]}])
            text, head = pack.text, ids[: common_tokens(ids, other)]
        lease = cache.lease(ids, len(ids) + max_tokens)
        assert lease is not None, "nothing else runs, so there is room for what fits the context"
        answer = ""
        try:
            _read(engine, cache, lease, head, sessions, name, say)
            rest = ids[lease.sequence.length :].tolist()
            for piece in engine.generate(rest, SamplingParams(max_tokens=max_tokens), seq=lease.sequence):
                answer += piece.text
                yield piece.text
            cache.keep(lease)
        finally:
            cache.end(lease)
        said.append({"role": "assistant", "content": answer})
        named = files_named(answer, pack.paths)
        yield f"\n\nFiles it names: {', '.join(named)}\n" if named else "\n"


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


def _prompt(engine: Engine, pack: Pack, said: list[dict[str, str]]) -> np.ndarray:
    """Ids int32 [T] of a conversation whose first message has the files before it."""
    first = {"role": "user", "content": BEFORE + pack.text + AFTER + said[0]["content"]}
    tokenizer = engine.tokenizer
    if tokenizer.has_chat_template:
        ids = tokenizer.encode_chat([first, *said[1:]])
    else:
        ids = tokenizer.encode("\n\n".join(message["content"] for message in [first, *said[1:]]), True)
    return np.array(ids, np.int32)


def _read(
    engine: Engine, cache: PrefixCache, lease: Lease, head: np.ndarray, sessions: Sessions, name: str, say: Say
) -> None:
    """Brings `head` into the lease's sequence: what is neither in memory nor saved of it is read, then all is saved."""
    seq, started = lease.sequence, time.perf_counter()
    if (saved := common_tokens(sessions.ids(name), head)) > seq.length:
        try:
            sessions.restore(name, seq, saved)
            say(f"restoring took {time.perf_counter() - started:.2f} s")
        except SessionError as error:
            say(f"the saved session is not used: {error}")
    had = min(seq.length, len(head))
    say(f"{len(head)} tokens of files: {had} reused, {len(head) - had} read")
    if had == len(head):
        return
    with progress(f"reading {len(head) - had} tokens", engine.spec.num_layers, "layers") as bar:
        engine.prefill(seq, head[had:].tolist(), progress=lambda *_: bar.advance())
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
        f"the folder, what is said and the answer take {tokens} tokens, the context is {engine.max_context}; leave "
        f"files out with --exclude PATTERN, the largest are {named}"
    )
