"""What a training logs where there is no terminal, and when its loss runs away."""

import pytest

from wgpt.training import report
from wgpt.training.report import Report


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_half_minute_without_a_terminal(clock, caplog):
    caplog.set_level("INFO")
    told = Report(start=10, total=110, is_shown=True)
    for step in range(11, 51):
        clock[0] += 2.0
        told.step(step, 4.0, 1000)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "step 25 of 110" in lines[0]
    assert lines[1] == "step 40 of 110: nll 4.000, 500 tokens/s, 0.5 steps/s, 2.33 min left"
    assert told.n_tokens == 40_000


def test_other_processes_say_nothing(clock, caplog):
    caplog.set_level("INFO")
    told = Report(0, 100, is_shown=False)
    for step in range(1, 100):
        clock[0] += 40.0
        told.step(step, 4.0 + step, 10)
    assert not caplog.records


def test_a_loss_that_runs_away_is_told_once(clock, caplog):
    told = Report(0, 400, is_shown=True)
    for step in range(1, 101):  # falls, with noise
        told.step(step, 7.0 - step / 50 + 0.5 * (step % 2), 10)
    assert not caplog.records
    for step in range(101, 200):
        told.step(step, 5.0 + (step - 100) / 10, 10)
    (warning,) = [r.getMessage() for r in caplog.records if "diverges" in r.getMessage()]
    assert "lower --lr" in warning
