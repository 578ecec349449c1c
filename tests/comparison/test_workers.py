"""Workers in processes of their own: their parts, their logs, their share of the threads, failure and orphans."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from sd_fixtures import ROOT

from lorainit_diffusers.comparison.workers import run_workers
from lorainit_diffusers.progress import GridProgress


def note(folder: Path, part: int) -> None:
    print(f"part {part}")
    threads = os.environ["OMP_NUM_THREADS"]
    (folder / f"{part}.txt").write_text(f"{threads} {os.getpid()}", encoding="utf-8")


def fail_or_wait(folder: Path, part: int) -> None:
    if part == 0:
        raise FileNotFoundError("first line\nthe image cat.png is missing")
    time.sleep(60)
    (folder / "late.txt").write_text("", encoding="utf-8")


def wait_for_ever(folder: Path, part: int) -> None:
    (folder / f"{part}.pid").write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(60)


def logs(folder: Path, count: int = 2) -> list[Path]:
    return [folder / f"worker-{number}.log" for number in range(count)]


def progress() -> GridProgress:
    return GridProgress("testing", 2, 2, lambda: 0, shown=False)


@pytest.mark.slow
def test_each_part_is_a_process_with_its_share_of_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with progress() as bar:
        run_workers(partial(note, tmp_path), logs(tmp_path), bar, lambda: len(list(tmp_path.glob("?.txt"))))
    found = [(tmp_path / f"{part}.txt").read_text(encoding="utf-8").split() for part in (0, 1)]
    assert [threads for threads, _ in found] == ["3", "3"]
    assert str(os.getpid()) not in [process for _, process in found]
    assert [log.read_text(encoding="utf-8") for log in logs(tmp_path)] == ["part 0\n", "part 1\n"]
    assert bar.n == 2
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.slow
def test_a_failure_is_named_at_once_and_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    with (
        progress() as bar,
        pytest.raises(ValueError, match=r"failed \(.*worker-0\.log\): the image cat\.png is missing"),
    ):
        run_workers(partial(fail_or_wait, tmp_path), logs(tmp_path), bar, lambda: 0)
    assert time.monotonic() - start < 30
    assert not (tmp_path / "late.txt").exists()
    assert "error: first line" in logs(tmp_path)[0].read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="asks for processes by their number")
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(Path(__file__).parent), str(ROOT / 'tests')]!r}\n"
        "from pathlib import Path\nfrom test_workers import *\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    with progress() as bar:\n"
        "        run_workers(partial(wait_for_ever, folder), logs(folder), bar, lambda: 0)\n"
    )
    script = tmp_path / "start.py"
    script.write_text(code, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    workers = [int(path.read_text(encoding="utf-8")) for path in tmp_path.glob("*.pid")]
    parent.kill()
    parent.wait()
    assert len(workers) == 2
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(is_running, workers))


def is_running(process: int) -> bool:
    """Whether there is a process of this number that has not ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
