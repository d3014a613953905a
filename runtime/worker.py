"""One thread owns the engine; requests queue for it and their tokens travel back to the event loop.

Torch work never runs on the event loop, so `/health` answers while a long prompt is read. The thread goes in turns:
one token for every running generation, up to 8 of them in one step, then the prefill of the request that has waited
longest. A turn is also taken between the layers of a prefill, so answers keep coming while a long prompt is read, and a
prompt of at most a sixteenth of its length is let in. Cancelled work stops within one layer.

The surprising rule: a request is admitted only when its prompt plus its `max_tokens` fits beside what is already
promised to running requests, all within `engine.max_context` tokens; pages it shares with them count once. So nothing
that was started runs out of cache half way, and strict first-come order means a long request cannot be starved by short
ones. What a request has read stays cached after it (`prefix_cache.py`), also when its client has left; of a request
that names a session it is saved too, once its answer is out, unless what is saved covers nearly all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lcconvert.runtime.answer import Answer, Piece
from lcconvert.runtime.decode import MOST_SEQUENCES
from lcconvert.runtime.engine import Cancelled
from lcconvert.runtime.metrics import Metrics
from lcconvert.runtime.prefix_cache import Lease, PrefixCache, common_tokens
from lcconvert.runtime.sessions import SessionError, Sessions

if TYPE_CHECKING:
    import torch

    from lcconvert.runtime.engine import Engine
    from lcconvert.runtime.grammar import Constraint
    from lcconvert.runtime.sampler import SamplingParams

_log = logging.getLogger(__name__)
_PROGRESS_EVERY = 0.2  # seconds between progress reports of one prefill; the first and the last always go out
_ASIDE = 16  # a prompt this many times shorter than the one being read is let in between its layers


class Rejected(Exception):
    """The worker takes no more work now: the queue is full or the server is stopping."""


class Stopped(Exception):
    """The work was given up before its end because the server is stopping."""


class ClientLeft(Stopped):
    """The work was given up because nobody waits for it."""


class TimedOut(Stopped):
    """The work was given up because it took longer than its request allowed."""


@dataclass(frozen=True)
class Progress:
    """Layers of the prefill done, and in all."""

    done: int
    total: int


class Job:
    """One request as both threads see it. Create it on the event loop."""

    def __init__(
        self,
        ids: list[int],
        params: SamplingParams,
        *,
        progress: bool = False,
        session: str | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.ids = ids
        self.session = session
        self.params = params
        self.progress = progress
        self.constraint = constraint
        self.cached = 0  # prompt tokens that were not read again; known before the first piece
        self.created = time.perf_counter()
        self._events: asyncio.Queue[Piece | Progress | Exception] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._cancelled = threading.Event()

    @property
    def tokens(self) -> int:
        """Cache tokens this job can come to need."""
        return len(self.ids) + self.params.max_tokens

    @cached_property
    def ids_array(self) -> np.ndarray:
        """`ids` as int32 [T]."""
        return np.array(self.ids, np.int32)

    async def next(self, timeout: float | None = None) -> Piece | Progress | None:
        """The next event, or None after `timeout` seconds without one. Raises what ended the job early."""
        try:
            event = await asyncio.wait_for(self._events.get(), timeout)
        except TimeoutError:
            return None
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self, reason: Stopped) -> None:
        """The reader gets `reason` now; the engine lets go of the job within one layer. Any thread may call it."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self._send(reason)

    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def post(self, event: Piece | Progress | Exception) -> None:
        """From the engine thread. A cancelled job has no reader any more."""
        if not self._cancelled.is_set():
            self._send(event)

    def _send(self, event: Piece | Progress | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so is every reader
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


@dataclass(eq=False)
class _Running:
    job: Job
    lease: Lease
    answer: Answer | None = None  # from the end of the prefill on
    token: int = 0  # the newest one, not in the cache yet


class Worker:
    """Owns `engine` from `start()` to `stop()`; every other method is called on the event loop."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        *,
        max_waiting: int = 256,
        max_running: int = 32,
        prefix_cache: int | None = None,
        sessions: Sessions | None = None,
    ) -> None:
        """`prefix_cache`: tokens to keep of requests that have ended, see `PrefixCache`."""
        self._sessions = sessions
        self._unsaved: deque[_Running] = deque()  # ended, and their sessions are to be saved
        self._saving = False
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._engine = engine
        self._cache = PrefixCache(engine, prefix_cache)
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._max_running = max_running
        self._waiting: deque[Job] = deque()
        self._running: list[_Running] = []
        self._wake = threading.Condition()  # guards _waiting, _running, _calls, _draining, _stopping
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lcconvert-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def state(self) -> dict[str, int | bool]:
        with self._wake:
            return {
                "alive": self._thread.is_alive(),
                "stopping": self._draining,
                "running": len(self._running),
                "waiting": len(self._waiting),
            }

    def free_tokens(self) -> int:
        """Tokens of cache that are not promised to running requests."""
        return self._cache.free_tokens

    def submit(self, job: Job) -> None:
        """Queues the job; raises `Rejected` when the queue is full or the server is stopping."""
        with self._wake:
            if self._draining:
                raise Rejected("the server is stopping; send the request again when it is back")
            if len(self._waiting) >= self._max_waiting:
                raise Rejected(f"{len(self._waiting)} requests are waiting, the most this server queues; retry later")
            self._waiting.append(job)
            self._metrics.waiting.set(len(self._waiting))
            self._wake.notify()

    def cancel(self, job: Job, reason: Stopped) -> None:
        """Takes the job out of the queue, or makes the engine leave it."""
        self._leave_queue(job)
        job.cancel(reason)

    def save_session(self, name: str) -> Future[int]:
        """Saves the newest kept context of a session; the tokens saved. KeyError when none is kept."""

        def save() -> int:
            if self._sessions is None or (kept := self._cache.named(name)) is None:
                raise KeyError(name)
            self._sessions.save(name, kept)
            return len(kept.ids)

        future: Future[int] = Future()
        with self._wake:
            if self._draining:
                raise Rejected("the server is stopping; its sessions are saved already")
            self._calls.append((save, future))
            self._wake.notify()
        return future

    def drain(self, seconds: float) -> None:
        """Refuses new and queued work now; running answers may finish for `seconds`, then they are cancelled."""
        with self._wake:
            self._draining = True
            waiting = list(self._waiting)
        for job in waiting:
            self.cancel(job, Stopped("the server is stopping"))
        asyncio.get_running_loop().call_later(seconds, self._cancel_running)

    def stop(self, timeout: float = 60.0) -> None:
        """Ends the thread after the current layer and frees every sequence. Blocks for at most `timeout` seconds."""
        with self._wake:
            self._draining = self._stopping = True
            self._wake.notify()
        self._cancel_running()
        self._thread.join(timeout)

    def _cancel_running(self) -> None:
        with self._wake:
            running = list(self._running)
        for run in running:
            run.job.cancel(Stopped("the server is stopping"))

    # The engine thread

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # also when a bug ends the thread: nobody is left waiting, and `alive` turns false
            with self._wake:
                self._draining = True
                left = [run.job for run in self._running] + list(self._waiting)
                self._waiting.clear()
                for _, future in self._calls:
                    future.cancel()
            for job in left:
                job.post(Stopped("the engine has stopped"))

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or self._running or self._waiting or self._calls)
                if self._stopping:
                    break
            self._turn()
        for run in [run for run in self._running if run not in self._unsaved]:
            self._drop(run)
        self._save_sessions()
        self._cache.clear()

    def _turn(self, longest_prompt: int | None = None) -> None:
        """A token for every running job, then the prefill of the oldest waiting one (up to `longest_prompt` ids)."""
        self._run_calls()
        self._decode()
        self._save_sessions()
        if (run := self._admit(longest_prompt)) is not None:
            self._prefill(run)
        self._metrics.kv_tokens.set(sum(run.lease.sequence.length for run in self._running))
        self._metrics.kept_tokens.set(self._cache.kept_tokens)
        self._metrics.evicted.set(self._cache.evicted)

    def _admit(self, longest_prompt: int | None) -> _Running | None:
        """Starts the oldest waiting job, if there is room for it beside what running jobs were promised."""
        with self._wake:
            if self._stopping or not self._waiting or len(self._running) >= self._max_running:
                return None
            job = self._waiting[0]
        if longest_prompt is not None and len(job.ids) > longest_prompt:
            return None
        try:
            lease = self._cache.lease(job.ids_array, job.tokens)
        except Exception as error:
            self._leave_queue(job)
            self._fail(job, error)
            return None
        if lease is None:
            return None
        run = _Running(job, lease)
        with self._wake:
            self._running.append(run)
            self._metrics.running.set(len(self._running))
            if self._stopping:  # since this job left the queue
                job.cancel(Stopped("the server is stopping"))
        if not self._leave_queue(job):  # its client has just left
            self._drop(run)
            return None
        self._metrics.queue_seconds.observe(time.perf_counter() - job.created)
        return run

    def _run_calls(self) -> None:
        while self._calls and not self._saving:
            work, future = self._calls.popleft()
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

    def _leave_queue(self, job: Job) -> bool:
        """Whether the job was still waiting."""
        with self._wake:
            found = job in self._waiting
            if found:
                self._waiting.remove(job)
            self._metrics.waiting.set(len(self._waiting))
            return found

    def _between_layers(self, job: Job) -> Callable[[int, int], None]:
        """The engine's progress callback: reports to the reader if it asked, and takes a turn for the others."""
        last = 0.0

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if job.progress and (done >= total or now - last >= _PROGRESS_EVERY):
                last = now
                job.post(Progress(done, total))
            if not job.cancelled():
                self._turn(len(job.ids) // _ASIDE)

        return report

    def _prefill(self, run: _Running) -> None:
        """Reads the prompt of one job and gives out its first token."""
        job, lease = run.job, run.lease
        started = time.perf_counter()
        try:
            self._restore(run)
            job.cached = lease.cached
            report, rest = self._between_layers(job), job.ids[lease.cached :]
            logits = self._engine.prefill(lease.sequence, rest, progress=report, cancelled=job.cancelled)
            self._cache.keep(lease, job.session)
            run.answer = self._engine.answer(job.params, job.constraint)
        except Cancelled:
            self._drop(run)
            return
        except Exception as error:
            self._fail(job, error)
            self._drop(run)
            return
        self._metrics.prefill_seconds.observe(time.perf_counter() - started)
        self._metrics.prompt_tokens.inc(len(rest))
        self._metrics.cached_tokens.inc(lease.cached)
        self._metrics.prefixes.labels("hit" if lease.cached else "miss").inc()
        self._push(run, logits)

    def _restore(self, run: _Running) -> None:
        """Takes from the job's session what is not kept in memory."""
        job, lease = run.job, run.lease
        if job.session is None or self._sessions is None:
            return
        saved = common_tokens(self._sessions.ids(job.session), job.ids_array[: len(job.ids) - 1])
        if saved <= lease.cached:
            return
        try:
            started = time.perf_counter()
            self._sessions.restore(job.session, lease.sequence, saved, between=lambda: self._turn(0))
            self._metrics.restore_seconds.observe(time.perf_counter() - started)
        except SessionError as error:
            _log.warning("session %s is not restored: %s", job.session, error)
            return
        lease.cached = saved
        self._metrics.restored_tokens.inc(saved)

    def _save_sessions(self) -> None:
        """Saves what ended jobs have read under their sessions, unless that is saved already, and ends them.

        Other jobs get turns meanwhile, so this must not run while a step's tokens are being given out; and there is one
        save at a time, for two of one name would write the same file.
        """
        if self._saving:
            return
        self._saving = True
        try:
            self._save_all()
        finally:
            self._saving = False

    def _save_all(self) -> None:
        while self._unsaved:
            run = self._unsaved.popleft()
            name, kept = run.job.session, run.lease.kept
            assert self._sessions is not None
            assert name is not None
            assert kept is not None
            try:
                if not self._sessions.covers(name, kept.ids):
                    self._sessions.save(name, kept, between=None if self._stopping else lambda: self._turn(0))
            except Exception:  # the answer is out; a session that is not saved is read again
                _log.exception("session %s is not saved", name)
            self._end(run)

    def _decode(self) -> None:
        """One token for every job whose prompt is read."""
        for run in [run for run in self._running if run.answer is not None and run.job.cancelled()]:
            self._drop(run)
        ready = [run for run in self._running if run.answer is not None]
        for first in range(0, len(ready), MOST_SEQUENCES):
            group = ready[first : first + MOST_SEQUENCES]
            started = time.perf_counter()
            try:
                logits = self._engine.decode_batch([run.lease.sequence for run in group], [run.token for run in group])
            except Exception as error:  # how far the step came is not known, so none of its sequences can go on
                for run in group:
                    self._fail(run.job, error)
                    self._drop(run, broken=True)
                continue
            for run, row in zip(group, logits, strict=True):
                self._push(run, row)
            self._metrics.decode_seconds.observe(time.perf_counter() - started)
            self._metrics.decode_sequences.observe(len(group))

    def _push(self, run: _Running, logits: torch.Tensor) -> None:
        """The next token of one job, from float32 logits [V]."""
        job = run.job
        assert run.answer is not None
        try:
            piece = run.answer.push(logits, full=run.lease.sequence.length >= self._engine.max_context)
        except Exception as error:
            self._fail(job, error)
            self._drop(run)
            return
        run.token = piece.token
        self._metrics.generated_tokens.inc()
        if piece.finish is not None:
            self._drop(run)  # before the client hears of the end, so that its next request finds the room
        job.post(piece)

    def _fail(self, job: Job, error: Exception) -> None:
        _log.error("a request failed in the engine", exc_info=error)
        job.post(error)

    def _drop(self, run: _Running, *, broken: bool = False) -> None:
        """Ends a generation, whatever state it is in. What it has read is kept, unless it is `broken`, and saved at the
        end of the turn if it names a session."""
        if run.answer is not None and not broken:
            run.answer = None
            self._cache.keep(run.lease, run.job.session)
            if self._sessions is not None and run.job.session is not None and run.lease.kept is not None:
                self._unsaved.append(run)
                return
        self._end(run)

    def _end(self, run: _Running) -> None:
        """Gives back what was promised to a job."""
        self._cache.end(run.lease)
        with self._wake:
            self._running.remove(run)
            self._metrics.running.set(len(self._running))
