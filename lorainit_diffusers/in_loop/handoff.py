"""A function that asks for values, run in turns with a caller that has them.

`initialize` calls a loss for every batch; a training loop that somebody else wrote computes losses and calls nobody. So
the function runs on a thread of its own, strictly in turns with the caller's: while one of the two runs, the other
waits, and nothing ever runs at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")
Result = TypeVar("Result")


class _Cancelled(BaseException):
    """Unwinds the function whose caller gave up; no `except Exception` may stop it."""


class Handoff(Generic[Value, Result]):
    """Runs `work(take)` in turns with the caller; `take()` in it returns what the caller gives next.

    Attributes:
        finished: Whether `work` has returned or raised.
    """

    def __init__(self, work: Callable[[Callable[[], Value]], Result]) -> None:
        self.finished = False
        self._result: list[Result] = []
        self._error: BaseException | None = None
        self._to_work: SimpleQueue[Value | _Cancelled] = SimpleQueue()
        self._to_caller: SimpleQueue[None] = SimpleQueue()
        num_threads = torch.get_num_threads()
        device = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

        def run() -> None:
            torch.set_num_threads(num_threads)  # torch keeps these two for each thread
            if device is not None:
                torch.cuda.set_device(device)
            try:
                self._result.append(work(self._take))
            except BaseException as error:
                self._error = error
            self.finished = True
            self._to_caller.put(None)

        self._thread = threading.Thread(target=run, name="lorainit collection", daemon=True)

    def _take(self) -> Value:
        self._to_caller.put(None)
        value = self._to_work.get()
        if isinstance(value, _Cancelled):
            raise value
        return value

    def start(self) -> None:
        """Let the function run until it asks for its first value, or ends."""
        self._thread.start()
        self._wait()

    def give(self, value: Value) -> None:
        """Hand over the value that the function waits for; returns when it asks for the next one, or has ended.

        Raises:
            BaseException: What the function raised.
        """
        self._to_work.put(value)
        self._wait()

    def cancel(self) -> None:
        """Make a function that waits for a value unwind; its context managers put back what they changed."""
        if not self.finished and self._thread.is_alive():
            self._to_work.put(_Cancelled())
            self._to_caller.get()
            self._thread.join()

    def result(self) -> Result:
        """What the function returned, once it has finished."""
        return self._result[0]

    def _wait(self) -> None:
        self._to_caller.get()
        if self.finished:
            self._thread.join()
            if self._error is not None:
                raise self._error
