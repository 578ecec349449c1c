from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorainit_diffusers.training import run_lock
from lorainit_diffusers.training.run_lock import RunLock

# the file alone: the package would import torch
HOLDS = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("run_lock", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
lock = module.RunLock(Path(sys.argv[1]), "train_a")
assert lock.acquire() is None
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_is_told_who_is_first(tmp_path: Path) -> None:
    first, second = (RunLock(tmp_path / "lock", name) for name in ("train_a", "train_b"))
    assert first.holder() is None
    assert first.acquire() is None
    for told in (second.acquire(), second.holder()):
        assert told is not None
        assert told.startswith(f"train_a (process {os.getpid()} on {platform.node()}, started 2")
    first.release()
    assert second.acquire() is None
    assert second.is_held


@pytest.mark.parametrize("has_locks", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool
) -> None:
    if not has_locks:

        class NoLocks:
            LOCK_EX = LOCK_NB = 0

            @staticmethod
            def flock(*args: object) -> None:
                raise OSError(errno.ENOTSUP, "this file system has none")

        monkeypatch.setattr(run_lock, "fcntl", NoLocks)
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(path), run_lock.__file__], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    told = RunLock(path, "train_b").acquire()
    assert told is not None
    assert f"train_a (process {process.pid} on " in told
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert RunLock(path, "train_b").acquire() is None


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As the workers of a data loader, which may outlive a killed run by seconds."""
    lock = RunLock(tmp_path / "lock", "train_a")
    assert lock.acquire() is None
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    lock.release()
    try:
        assert RunLock(tmp_path / "lock", "train_b").acquire() is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_damaged_file_is_no_obstacle(tmp_path: Path) -> None:
    for text in ("", "{half", "[]", '{"pid": 1}'):
        (tmp_path / "lock").write_text(text, encoding="utf-8")
        lock = RunLock(tmp_path / "lock", "train_a")
        assert lock.acquire() is None
        (tmp_path / "lock").write_text(text, encoding="utf-8")
        assert RunLock(tmp_path / "lock", "train_b").acquire() == "another process"
        lock.release()
