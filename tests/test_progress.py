"""Bars on terminals, lines elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from lorainit_diffusers import progress
from lorainit_diffusers.progress import GridProgress, duration, progress_bar


class Screen(io.StringIO):
    """What a terminal or a log file gets."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def screen(monkeypatch):
    def set_up(terminal: bool) -> Screen:
        stream = Screen(terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return set_up


def test_a_bar_is_drawn_on_a_terminal_and_nowhere_else(screen):
    written = screen(terminal=False)
    assert list(progress_bar(range(3), desc="sampling")) == [0, 1, 2]
    assert written.getvalue() == ""
    written = screen(terminal=True)
    assert list(progress_bar(range(3), desc="sampling", leave=False, mininterval=0)) == [0, 1, 2]
    assert "sampling" in written.getvalue()
    written = screen(terminal=True)
    assert list(progress_bar(range(3), desc="sampling", shown=False)) == [0, 1, 2]
    assert written.getvalue() == ""


def test_a_log_file_gets_a_line_for_each_finished_run_with_the_time_that_is_left(screen, monkeypatch):
    written = screen(terminal=False)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    finished = [1]  # of an earlier call
    with GridProgress("training", 40, 4, lambda: finished[0]) as grid:
        grid.skip(10)
        for evaluation in range(30):
            now[0] += 12.0
            finished[0] += evaluation in (10, 20)  # a run's result is there once its next one has begun
            grid.update()
        finished[0] += 1
    lines = written.getvalue().splitlines()
    assert lines == [
        "training: 4 runs, 1 of them finished already",
        "training: 2 of 4 runs finished, about 4 min left",  # 11 evaluations took 132 s, 19 are left
        "training: 3 of 4 runs finished, about 2 min left",
        "training: 4 of 4 runs finished",
    ]
    assert "\r" not in written.getvalue()


def test_a_terminal_gets_the_bar_alone(screen):
    written = screen(terminal=True)
    with GridProgress("sampling", 4, 2, lambda: 0) as grid:
        grid.skip(2)
        grid.update(2)
    assert grid.n == 4
    assert "sampling: 100%" in written.getvalue()
    assert "finished" not in written.getvalue()


def test_other_processes_show_nothing(screen):
    written = screen(terminal=False)
    with GridProgress("training", 4, 2, lambda: 2, shown=False) as grid:
        grid.update(4)
    assert written.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (95, "2 min"), (5000, "83 min"), (9000, "2.5 h")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words
