"""Chat templates and tokenization in processes of their own, with a limit on time and memory.

Both come with the artifact and are not trusted: a template is a program that may loop without end or ask for all the
memory there is, and a regular expression in tokenizer.json may take exponential time. Neither can be stopped inside the
serving process, so they run in children that are killed when they exceed what honest ones need; the next request gets a
new child. It also keeps a million tokens of text from competing with the event loop for the interpreter.

A child holds no more than the tokenizer (no torch). Children are started when they are needed, `_MOST` at most, so a
short prompt need not wait for a long one; they end with the parent, however that ends. The surprising rule: a child
that dies says "refused" to its own request only.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from lcconvert.runtime.errors import UserError
from lcconvert.runtime.tokenizer import Tokenizer

_MOST = 4  # children
_START = 60.0  # seconds a child has to read the tokenizer
_SECONDS, _SECONDS_PER_MIB = 10.0, 20.0  # for a request: always, and for its text; honest ones take a tenth of it
_MEMORY = 4 * 2**30  # bytes; a million tokens take about one


class TextRefused(UserError):
    """The text cannot be made into a prompt: the template refuses it, or time or memory ran out."""


class Texts:
    """Encodes for one artifact. Methods block; call them from any thread, `close` at the end."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """`files`: the tokenizer files, as `Tokenizer.from_files` takes them."""
        self._files = dict(files)
        self._lock = threading.Lock()
        self._free = threading.Semaphore(_MOST)
        self._idle: list[_Child] = []
        self._closed = False

    def start(self) -> None:
        """Starts a child now; UserError when it cannot read the tokenizer files within its limits."""
        with self._child():
            pass

    def encode(self, text: str) -> list[int]:
        """`Tokenizer.encode` with the model's own special tokens around."""
        return self._ask(len(text), "encode", text, add_special=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """`Tokenizer.encode_chat`."""
        size = sum(len(str(message)) for message in messages) + len(str(tools))
        return self._ask(size, "encode_chat", messages, tools=tools or None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for child in idle:
            child.end()

    def __enter__(self) -> Texts:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, size: int, method: str, *values: Any, **options: Any) -> list[int]:
        seconds = _SECONDS + _SECONDS_PER_MIB * size / 2**20
        with self._child() as child:
            return np.frombuffer(child.ask((method, values, options), seconds), np.int32).tolist()

    @contextlib.contextmanager
    def _child(self) -> Iterator[_Child]:
        """An idle child, or a new one; it is kept unless it had to be ended."""
        with self._free:
            with self._lock:
                child = self._idle.pop() if self._idle else None
            child = child or _Child(self._files)
            try:
                yield child
            finally:
                with self._lock:
                    keep = child.alive and not self._closed
                    if keep:
                        self._idle.append(child)
                if not keep:
                    child.end()


class _Child:
    """One process; whoever holds it is alone with it."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._pipe, far = Pipe()
        code = f"from lcconvert.runtime.texts import serve_texts; serve_texts({far.fileno()})"
        with far:  # its own session, so that Ctrl-C in a terminal reaches the parent alone
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code], pass_fds=[far.fileno()], start_new_session=True
            )
        self.alive = True
        try:
            self.ask(files, _START)
        except BaseException:
            self.end()
            raise

    def ask(self, what: Any, seconds: float) -> bytes:
        """The answer to `what`; TextRefused when there is none, and then the child may have been ended."""
        try:
            self._pipe.send(what)
            if not self._pipe.poll(seconds):
                self.end()
                raise TextRefused(
                    f"the chat template or tokenizer did not finish in {seconds:.0f} s; shorten the text, "
                    "or look into the artifact's template and tokenizer"
                )
            answer: bytes | str = self._pipe.recv()
        except (EOFError, OSError):
            self.end()
            answer = f"the chat template or tokenizer failed or needed over {_MEMORY >> 30} GiB; shorten the text"
        if isinstance(answer, str):
            raise TextRefused(answer)
        return answer

    def end(self) -> None:
        self.alive = False
        self._pipe.close()
        self._process.kill()
        self._process.wait()


def serve_texts(file: int) -> None:
    """What a child does: reads the tokenizer files, then answers one request after the other until the pipe closes."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(file) as pipe, contextlib.suppress(EOFError, OSError):
        tokenizer = None
        while True:
            asked, answer = pipe.recv(), b""
            try:
                if tokenizer is None:
                    tokenizer = Tokenizer.from_files(asked)
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic's message could quote the text
                else:
                    method, values, options = asked
                    answer = np.array(getattr(tokenizer, method)(*values, **options), np.int32).tobytes()
            except UserError as error:
                pipe.send(str(error))
            except BaseException as error:  # the tokenizer library raises its panics past Exception
                pipe.send(f"the chat template or tokenizer failed ({type(error).__name__}); change the text")
            else:
                pipe.send(answer)
