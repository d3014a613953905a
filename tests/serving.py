"""What the server tests share: a tiny engine, a server in a thread, an engine whose prefill can be held."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import uvicorn
from tiny import write_tiny

from lcconvert.runtime.api import make_app
from lcconvert.runtime.engine import Cancelled, Engine
from lcconvert.runtime.server import bind
from lcconvert.runtime.source import FolderSource
from lcconvert.runtime.texts import Texts

MODEL = "tiny"
SLOW = "~"  # a prompt with this character is held by `Held`
CONTEXT = 2048


class SharedTexts(Texts):
    """One for all servers of a tokenizer, because starting a child takes a while."""

    _of: ClassVar[dict[bytes, SharedTexts]] = {}

    @classmethod
    def of(cls, engine: Engine) -> SharedTexts:
        files = engine.tokenizer.files
        if (key := files["tokenizer.json"]) not in cls._of:
            cls._of[key] = cls(files)
            atexit.register(super(cls, cls._of[key]).close)
        return cls._of[key]

    def close(self) -> None:
        """Not before the process ends."""


def tiny_engine(folder: Path) -> Engine:
    """Random weights; without end tokens, so that an answer is as long as was asked."""
    engine = Engine.load(FolderSource(write_tiny(folder)), device="cpu", max_context=CONTEXT)
    engine.eos_ids = frozenset()
    return engine


@contextlib.contextmanager
def running(engine: Engine, **options: object) -> Iterator[str]:
    """A real server on a free port in a thread; yields its URL."""
    listener = bind(port=0)
    app = make_app(engine, model_name=MODEL, **{"texts": SharedTexts.of(engine), **options})
    config = uvicorn.Config(app, http="h11", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits for the condition; the generous limit only decides how long a broken test hangs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.005)


class Held:
    """Makes prompts with `SLOW` in them wait at their first layer border until `release`, as a long prompt would."""

    def __init__(self, engine: Engine) -> None:
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.left_early = threading.Event()
        self._engine, self._prefill = engine, engine.prefill
        self._mark = engine.tokenizer.encode(SLOW)[0]

    def __enter__(self) -> Held:
        self._engine.prefill = self._held_prefill
        return self

    def __exit__(self, *exc: object) -> None:
        self.gate.set()
        self._engine.prefill = self._prefill

    def release(self) -> None:
        self.gate.set()

    def _held_prefill(self, seq, ids, *, progress=None, cancelled=None, **options):  # type: ignore[no-untyped-def]
        if self._mark in ids:
            self.entered.set()
            layer = 0
            while not self.gate.wait(0.005):
                layer += 1
                progress(layer, 10**6)
                if cancelled():
                    self.left_early.set()
                    raise Cancelled("held prefill stopped")
        return self._prefill(seq, ids, progress=progress, cancelled=cancelled, **options)
