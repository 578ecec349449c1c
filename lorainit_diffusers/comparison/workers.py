"""The processes that work on the parts of a grid on this machine, one part each."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorainit_diffusers.files import announce

if TYPE_CHECKING:
    from lorainit_diffusers.progress import GridProgress

# Seconds between two looks at what the workers have done.
_INTERVAL_S = 1.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def run_workers(work: Callable[[int], None], logs: Sequence[Path], bar: GridProgress, count: Callable[[], int]) -> None:
    """Work on every part in a process of its own, and show the common progress.

    A worker is a new interpreter, so that it has its share of the threads from the beginning.

    Args:
        work: Does the part of this number; it is sent to the worker, so it must be a function of a module, or a
            `functools.partial` of one.
        logs: What each worker writes; one a worker.
        bar: Hears of what all of them have done.
        count: Evaluations that are done.

    Raises:
        ValueError: When a worker fails; the message has its reason and its log.
    """
    for log in logs:
        announce(log)
    bar.skip(count())
    context = multiprocessing.get_context("spawn")
    earlier = set(multiprocessing.active_children())
    with _threads_for(len(logs)):
        pool = ProcessPoolExecutor(len(logs), mp_context=context, initializer=end_with, initargs=(os.getpid(),))
        try:
            futures = [pool.submit(_logged, work, part, log) for part, log in enumerate(logs)]
            while wait(futures, timeout=_INTERVAL_S).not_done:
                bar.update(count() - bar.n)
                _check(futures, logs)
            bar.update(count() - bar.n)
            _check(futures, logs)
        except BaseException:
            # of a failure or an interruption, the other workers hear that nobody waits for them
            for process in set(multiprocessing.active_children()) - earlier:
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _check(futures: Sequence[Future[None]], logs: Sequence[Path]) -> None:
    """See that no worker has failed.

    Raises:
        ValueError: When one has.
    """
    for future, log in zip(futures, logs, strict=True):
        if future.done() and (error := future.exception()) is not None:
            reason = str(error).strip() or type(error).__name__
            raise ValueError(f"a worker failed ({log}): {reason.splitlines()[-1]}") from error


def _logged(work: Callable[[int], None], part: int, log: Path) -> None:
    """Do a part with everything that this process prints in a file."""
    with log.open("w", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
        try:
            work(part)
        except BaseException as error:
            print(f"error: {error}", file=sys.stderr)
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


def end_with(parent: int) -> None:
    """End this worker when the process that started it is gone: a restarted comparison has workers of its own."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _threads_for(num_workers: int) -> Generator[None, None, None]:
    """New processes get an equal share of the cores inside the block; libraries read that as they are imported."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(max(1, (os.cpu_count() or 1) // num_workers))))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
