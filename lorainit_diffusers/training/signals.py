"""Signals that ask a run to stop: SIGINT (Ctrl-C), SIGTERM and SIGUSR1, as people and the schedulers of clusters send.

While the steps are trained (`StopRequest`), the first one lets the step finish with its validation and has a checkpoint
written; a second one ends the run at once. At any other time (`stopping_at_once`) the first one ends it. The exit code
is 128 and the signal's number, as a shell has it: 130, 143, and 138 on Linux. It is never 0, SIGUSR1's included: a run
that is not finished must not look like one to what is started after it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

RESUME = "repeat the command with --resume_from_checkpoint latest to go on"
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
# A launcher of several processes passes on what the terminal has sent to each of them already.
_SAME_S = 2.0


class StoppedError(SystemExit):
    """A signal ended the run.

    Attributes:
        number: Of the signal.
        message: For the user: when it came, what is saved, how to go on.
    """

    def __init__(self, number: int, *, step: int | None = None, steps: int | None = None, second: bool = False) -> None:
        """What came when.

        Args:
            number: Of the signal.
            step: Whose checkpoint is written; `None` for none.
            steps: Of the whole run.
            second: Whether the run was about to stop already.
        """
        super().__init__(128 + number)
        self.number = number
        when = "at once, by the second signal" if second else "while no step was trained"
        if step is not None:
            when = f"after step {step} of {steps}; checkpoint-{step} is written"
        self.message = f"stopped by {signal.Signals(number).name} {when}; {RESUME}"


@contextmanager
def stopping_at_once() -> Generator[None, None, None]:
    """Inside the block a signal ends the run at once, in order: files are whole, locks are released, one line says it.

    Raises:
        StoppedError: In the main thread, when a signal comes.
    """
    try:
        with _handled(_stop_at_once):
            yield
    except StoppedError as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped.message, flush=True)
        raise


class StopRequest:
    """Within `with StopRequest() as request:` a signal is a request, which the loop hears at the end of its step."""

    def __init__(self) -> None:
        self.number = 0
        self._came = 0.0
        self._handling: Any = None

    def __enter__(self) -> StopRequest:
        self._handling = _handled(self._note)
        self._handling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handling.__exit__(*error)

    def heard(self, accelerator: Accelerator) -> int:
        """The number of the signal that came to any of the processes, the same in all of them; 0 where none did.

        Every process must call it after the same step: they stop together.
        """
        if accelerator.num_processes > 1:
            mine = torch.tensor([self.number], device=accelerator.device)
            self.number = int(cast(Tensor, accelerator.gather(mine)).max())
        return self.number

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number:
            if now - self._came < _SAME_S and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                return
            raise StoppedError(number, second=True)
        self.number, self._came = number, now
        if os.environ.get("RANK", "0") == "0":
            said = f"{signal.Signals(number).name}: the run stops after this step; a second signal ends it at once"
            os.write(2, f"\n{said}\n".encode())  # `print` may not be entered again where the signal came inside of it


def leave_to_main(worker: int) -> None:
    """`worker_init_fn` of a `DataLoader`: its processes go on until the main one has finished its step.

    A terminal and a cluster's scheduler send a signal to every process of a run.
    """
    for name in _NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    raise StoppedError(number)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Generator[None, None, None]:
    """Inside the block the signals come to `handler`; in another thread than the main one nothing is changed.

    A signal that is ignored stays so (`nohup`), and one that something outside of Python handles.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in _NAMES:
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None and signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
