"""A process that fails ends all: within seconds, with an exit code that is not 0 and one error line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sd_fixtures import ROOT, write_images
from two_processes import free_port

from lorainit_diffusers.training import cli
from lorainit_diffusers.training.cli import run_script


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank", "line"),
    [
        ("collection", 1, "error: process 1 of 2: RuntimeError: failed in collection, on purpose"),
        ("training", 1, "error: process 1 of 2: RuntimeError: failed in training, on purpose"),
        ("saving", 0, "error: process 0 of 2: RuntimeError: failed in saving, on purpose"),
        ("killed", 1, None),
        ("image", 0, "error: "),
    ],
)
def test_all_end(where: str, rank: int, line: str | None, random_sd: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "data" / "train", count=6)
    if where == "image":
        image = sorted((tmp_path / "data" / "train").glob("*.png"))[3]
        image.write_bytes(image.read_bytes()[:-200])
    options = {
        **{"pretrained_model_name_or_path": random_sd, "train_data_dir": tmp_path / "data", "rank": 2},
        **{"output_dir": tmp_path / "out", "init_num_batches": 3, "train_batch_size": 1, "max_train_steps": 6},
        **{"validation_prompt": "x", "validation_inference_steps": 1, "checkpointing_steps": 4},
    }
    argv = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    failed_at = tmp_path / "failed_at"
    environment["FAILED_AT"] = str(failed_at)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_port()), str(ROOT / "tests" / "failing_process.py"), where, str(rank), *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if where != "image":
        assert time.time() - float(failed_at.read_text(encoding="utf-8")) < 15
    assert done.returncode != 0
    said = re.findall(r"\berror: .*", done.stderr)
    if line is None:  # it could say nothing; the other one may have been stopped before it spoke
        assert len(said) <= 1
    else:
        assert len(said) == 1, done.stderr
        assert said[0].startswith(line)


def end_of(monkeypatch: pytest.MonkeyPatch, error: Exception, **environment: str) -> tuple[str, int, float]:
    """What a process among several says when its main raises, its exit code, and how long it waits before."""
    found: list[tuple[str, int]] = []
    waited: list[float] = []

    def end(text: str, code: int) -> None:
        found.append((text, code))
        raise SystemExit(code)

    def main() -> None:
        raise error

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "_end_process", end)
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    with pytest.raises(SystemExit):
        run_script(main)
    return *found[0], sum(waited)


def test_what_one_of_several_says(monkeypatch: pytest.MonkeyPatch) -> None:
    several = {"WORLD_SIZE": "4", "RANK": "2"}
    assert end_of(monkeypatch, ValueError("a\nb"), **several) == ("error: a b", 2, 0)
    text, code, waited = end_of(monkeypatch, RuntimeError("odd"), **several)
    assert text.startswith("Traceback")
    assert text.endswith("error: process 2 of 4: RuntimeError: odd")
    assert (code, waited) == (1, 0)
    text, code, waited = end_of(monkeypatch, RuntimeError("[gloo] Connection closed by peer [::1]"), **several)
    assert text == "error: process 2 of 4 has lost another one, whose own message says why it ended"
    assert code == 1
    assert waited > 0


def test_a_single_process_raises_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise RuntimeError("odd")

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match="odd"):
        run_script(main)
