"""When a long training is saved and how it is stopped: at the border of a step, with nothing lost.

Checkpoints come every so many steps, and whenever much time has passed since the last one, because steps of a recipe
differ a hundredfold: a tenth of a second for a window, half a minute for a million tokens.

Surprising rule: a second signal within two seconds belongs to the first. `timeout` signals a process and then its
group, a terminal signals the group, and neither user has asked twice.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME_REQUEST = 2.0  # seconds
_LONGEST_UNSAVED = 120.0  # seconds of work that a kill may cost
_SAVING_SHARE = 0.05  # of the time that saving may take


@contextmanager
def stop_at_border() -> Iterator[threading.Event]:
    """Sets the event on the first Ctrl-C or SIGTERM, so that the step at hand is finished; a later one interrupts."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    first = 0.0

    def request(signum: int, frame: FrameType | None) -> None:
        nonlocal first
        if stop.is_set() and time.monotonic() - first > _SAME_REQUEST:
            raise KeyboardInterrupt
        first = first if stop.is_set() else time.monotonic()
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SavingTimes:
    """Whether a checkpoint is due; told of every one, so that a large one, which takes long, comes less often."""

    def __init__(self, every: int):
        """every: steps; 0 is never."""
        self._every, self._saved, self._took = every, time.monotonic(), 0.0

    def due(self, step: int) -> bool:
        wait = max(_LONGEST_UNSAVED, self._took / _SAVING_SHARE)
        return bool(self._every) and (step % self._every == 0 or time.monotonic() - self._saved > wait)

    @contextmanager
    def saving(self) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self._saved = time.monotonic()
        self._took = self._saved - begin
