"""Progress: bars on a terminal, lines or nothing elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*iterable: Any, shown: bool = True, **options: Any) -> Any:
    """A bar of tqdm, with its options; none where `shown` is false or standard error is no terminal.

    A log file would be full of a bar that is drawn again and again.
    """
    return tqdm(*iterable, disable=None if shown else True, **options)


class GridProgress:
    """Progress over many runs, each of which reports its evaluations.

    On a terminal it is a bar over the evaluations; elsewhere a line for each run that is finished, with an estimate of
    the time that is left, so that a log file can be read.

    Args:
        what: Is done, such as `training`.
        total: Evaluations of all runs.
        num_runs: All runs.
        count_finished: How many of them are finished now.
        shown: Whether this process shows anything.
    """

    def __init__(
        self, what: str, total: int, num_runs: int, count_finished: Callable[[], int], *, shown: bool = True
    ) -> None:
        self.what, self.total, self.num_runs, self.count_finished = what, total, num_runs, count_finished
        self.lines = shown and not sys.stderr.isatty()
        self.bar = progress_bar(total=total, desc=what, unit="evaluation", shown=shown)
        self.n = self._before = 0
        self._finished = count_finished() if self.lines else 0
        self._started = time.monotonic()

    def __enter__(self) -> GridProgress:
        if self.lines:
            earlier = f", {self._finished} of them finished already" if self._finished else ""
            print(f"{self.what}: {self.num_runs} runs{earlier}", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._print_finished()
        self.bar.close()

    def skip(self, evaluations: int) -> None:
        """Count evaluations of an earlier call: they say nothing of the time that is left."""
        self._before += evaluations
        self._advance(evaluations)

    def update(self, evaluations: int = 1) -> None:
        """Count evaluations of now."""
        self._advance(evaluations)
        self._print_finished()

    def _advance(self, evaluations: int) -> None:
        self.n += evaluations
        self.bar.update(evaluations)

    def _print_finished(self) -> None:
        if not self.lines or (finished := self.count_finished()) == self._finished:
            return
        self._finished = finished
        done, seconds = self.n - self._before, time.monotonic() - self._started
        left = seconds / done * (self.total - self.n) if done > 0 else 0.0
        rest = f", about {duration(left)} left" if finished < self.num_runs and done > 0 else ""
        print(f"{self.what}: {finished} of {self.num_runs} runs finished{rest}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in words, of the size that one plans with."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
