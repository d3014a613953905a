"""When training is saved and stopped."""

import signal

import pytest

from lcconvert.convert import stopping
from lcconvert.convert.stopping import SavingTimes, stop_at_border


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


def test_a_signal_sent_twice_at_once_is_one_request_and_a_later_one_interrupts(clock: list[float]) -> None:
    with stop_at_border() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # as `timeout` does, to the process and to its group
        assert stop.is_set()
        clock[0] += 1.0
        signal.raise_signal(signal.SIGTERM)
        clock[0] += 5.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_saves_by_steps_and_by_time(clock: list[float]) -> None:
    saves = SavingTimes(50)
    assert [step for step in range(1, 101) if saves.due(step)] == [50, 100]
    clock[0] += 121.0
    assert saves.due(7)
    with saves.saving():
        clock[0] += 30.0
    assert not saves.due(8)
    clock[0] += 500.0
    assert not saves.due(9)  # 30 s of saving are worth 600 s of work
    clock[0] += 101.0
    assert saves.due(10)
    assert not SavingTimes(0).due(50)
