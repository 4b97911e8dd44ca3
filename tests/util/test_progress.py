"""Where there is no terminal, long work tells where it is now and then, also if it is made of many short parts."""

import pytest

from laserrec.util import progress
from laserrec.util.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that can be set forward."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Progress, "_next_line", progress._LINE_SECONDS)
    return now


def test_a_line_every_half_minute_of_all_bars_together(clock, capsys):
    for epoch in range(8):  # of ten seconds each
        with Progress(f"epoch {epoch}", 2) as bar:
            for _ in range(2):
                clock[0] += 5
                bar.advance(loss=0.5)
    assert capsys.readouterr().err.splitlines() == ["epoch 2: 2/2  loss 0.5000", "epoch 5: 2/2  loss 0.5000"]


def test_nothing_is_told_where_it_is_switched_off(clock, capsys):
    clock[0] = 100.0
    with Progress("quiet", 1, show=False) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""
