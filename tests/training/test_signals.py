"""Signals that ask a run to stop: in this process, and in a run of a script."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import train_classifier_lora
from classifier_fixtures import write_class_folder, write_classifier
from safetensors.torch import load_file
from script_fixtures import argv_of, run_main
from sd_fixtures import ROOT
from torch.utils.data import DataLoader

from lorainit_diffusers.training import loop, task
from lorainit_diffusers.training.checkpoints import list_checkpoints
from lorainit_diffusers.training.loop import StepOutcome, train_steps
from lorainit_diffusers.training.signals import StoppedError, StopRequest, leave_to_main, stopping_at_once

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
FAST: dict[str, Any] = {
    **{"init": "gaussian", "rank": 2, "train_batch_size": 4, "init_num_batches": 2, "learning_rate": 5e-3},
    **{"validation_steps": 7, "lora_dropout": 0.2},
}


@pytest.fixture(autouse=True)
def handlers() -> Generator[None, None, None]:
    """What handles the signals is afterwards what it was; before, Python's own: jobs in the background ignore some."""
    outside = {number: signal.getsignal(number) for number, _ in CODES}
    for number in outside:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    before = [signal.getsignal(number) for number, _ in CODES]
    yield
    after = [signal.getsignal(number) for number, _ in CODES]
    for number, handler in outside.items():
        signal.signal(number, handler)
    assert after == before


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The loop with steps that do nothing but what `during` does; everything that happens, in order."""

    def run(during: Callable[[int], object], *, accelerator: Any = None, checkpointing_steps: int = 100) -> list[str]:
        happened: list[str] = []

        def take_step(*args: Any) -> StepOutcome:
            during(args[-1])
            happened.append(f"step {args[-1]}")
            return StepOutcome(1.0, 1.0, 0.1, used=True)

        @contextmanager
        def applied() -> Generator[None, None, None]:
            yield

        one = SimpleNamespace(num_processes=1, wait_for_everyone=lambda: None, end_training=lambda: None)
        options = SimpleNamespace(max_train_steps=6, validation_steps=3, checkpointing_steps=checkpointing_steps)
        fake = SimpleNamespace(
            **{"options": options, "first_step": 0, "is_main": True, "output_dir": "nowhere"},
            accelerator=accelerator or one,
        )
        monkeypatch.setattr(loop, "take_step", take_step)
        try:
            train_steps(
                cast(Any, fake),
                cast(Any, SimpleNamespace(adapted={})),
                iter(()),
                cast(Any, SimpleNamespace(average=SimpleNamespace(applied=applied))),
                cast(Any, SimpleNamespace(write=lambda line: None)),
                validate=lambda step: happened.append(f"validate {step}"),
                save=lambda step: happened.append(f"save {step}"),
            )
        except StoppedError as stopped:
            happened.append(f"{stopped.code}: {stopped.message}")
        return happened

    return run


def at(step: int, *numbers: int) -> Callable[[int], None]:
    def during(now: int) -> None:
        for number in numbers if now == step else ():
            os.kill(os.getpid(), number)

    return during


@pytest.mark.parametrize(("number", "code"), CODES)
def test_the_step_is_finished_and_saved(steps: Callable[..., list[str]], number: signal.Signals, code: int) -> None:
    happened = steps(at(2, number))
    assert happened[:3] == ["step 1", "step 2", "save 2"]
    resume = "repeat the command with --resume_from_checkpoint latest to go on"
    assert happened[3:] == [f"{code}: stopped by {number.name} after step 2 of 6; checkpoint-2 is written; {resume}"]


def test_the_validation_of_the_step_comes_before_its_checkpoint(steps: Callable[..., list[str]]) -> None:
    """The resumed run begins with the next step: without it, its log and its best step would be others."""
    happened = steps(at(3, signal.SIGTERM), checkpointing_steps=3)
    assert happened[:5] == ["step 1", "step 2", "step 3", "validate 3", "save 3"]
    assert happened[5].startswith("143: ")
    assert len(happened) == 6


def test_a_second_signal_ends_at_once(steps: Callable[..., list[str]]) -> None:
    happened = steps(at(2, signal.SIGTERM, signal.SIGINT))
    assert happened[:1] == ["step 1"]
    assert happened[1].startswith("130: stopped by SIGINT at once")
    assert len(happened) == 2


def test_what_a_launcher_passes_on_is_no_second_signal(
    steps: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several processes, each has the terminal's Ctrl-C already."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "save 2" in steps(at(2, signal.SIGINT, signal.SIGINT))
    clock = iter((0.0, 3.0))
    monkeypatch.setattr("lorainit_diffusers.training.signals.time.monotonic", lambda: next(clock))
    assert "save 2" not in steps(at(2, signal.SIGINT, signal.SIGINT))


@pytest.mark.parametrize("others", [0, signal.SIGTERM])
def test_processes_stop_at_the_same_step(steps: Callable[..., list[str]], others: int) -> None:
    """One of two hears the signal of the other at the end of the step, and nothing is asked for where it is alone."""
    asked: list[int] = []

    def gather(mine: torch.Tensor) -> torch.Tensor:
        asked.append(int(mine))
        return torch.cat([mine, torch.tensor([others if len(asked) == 4 else 0])])

    two = SimpleNamespace(
        **{"num_processes": 2, "device": "cpu", "gather": gather},
        **{"wait_for_everyone": lambda: None, "end_training": lambda: None},
    )
    happened = steps(lambda step: None, accelerator=two)
    assert asked == [0] * (4 if others else 6)
    assert ("save 4" in happened) == bool(others)
    assert ("step 5" in happened) == (not others)


def test_no_signal_changes_nothing(steps: Callable[..., list[str]]) -> None:
    happened = steps(lambda step: None, checkpointing_steps=5)
    assert [what for what in happened if "step" not in what] == ["validate 3", "save 5", "validate 6"]


def test_outside_of_the_steps_a_signal_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StoppedError) as stopped, stopping_at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    said = capsys.readouterr().out
    assert said.startswith("stopped by SIGTERM while no step was trained; repeat the command with --resume_from_")
    assert said.count("\n") == 1


def test_an_ignored_signal_stays_so_and_other_threads_change_nothing() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under `nohup`
    try:
        with StopRequest() as request:
            os.kill(os.getpid(), signal.SIGINT)
        assert request.number == 0
    finally:
        signal.signal(signal.SIGINT, before)
    found: list[Any] = []

    def work() -> None:
        with StopRequest():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_processes_that_decode_images_go_on(number: signal.Signals) -> None:
    """A terminal and a scheduler send the signal to all of them."""
    loader = DataLoader(list(range(40)), batch_size=1, num_workers=1, worker_init_fn=leave_to_main)
    batches = iter(loader)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(cast(int, worker.pid), number)
    assert [int(batch) for batch in batches] == list(range(1, 40))


# ------------------------------------------------------------------------------------------------------------- scripts


def given(tmp_path: Path, name: str, **more: Any) -> dict[str, Any]:
    base, data = tmp_path / "vit", tmp_path / "colours"
    if not base.exists():
        write_classifier(base)
        write_class_folder(data)
    places = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": tmp_path / name}
    return {**FAST, **places, **more}


def assert_same_run(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    logs = [
        [{k: v for k, v in json.loads(line).items() if k != "step_s"} for line in (folder / "metrics.jsonl").open()]
        for folder in (first, second)
    ]
    assert logs[0] == logs[1]
    best = [(folder / "best" / "best.json").read_bytes() for folder in (first, second)]
    assert best[0] == best[1]


def test_a_stopped_script_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    script = str(ROOT / "train_scripts" / "train_classifier_lora.py")
    options = given(tmp_path, "out", max_train_steps=3000, checkpointing_steps=3000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, *argv_of(options)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.read_bytes().count(b'"loss"') >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "SIGTERM: the run stops after this step" in errors
    assert "Traceback" not in errors
    (checkpoint,) = list_checkpoints(tmp_path / "out")
    step = int(checkpoint.name.split("-")[1])
    assert f"stopped by SIGTERM after step {step} of 3000; {checkpoint.name} is written; repeat the command" in said
    more = {"max_train_steps": step + 3, "checkpointing_steps": 3000}
    whole = run_main(train_classifier_lora, given(tmp_path, "whole", **more))
    resumed = run_main(train_classifier_lora, given(tmp_path, "out", **more, resume_from_checkpoint="latest"))
    assert_same_run(resumed, whole)


@pytest.mark.parametrize("when", ["base", "end"])
def test_a_signal_during_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], when: str
) -> None:
    """Before the first step there is nothing to save; after the last one its checkpoint is written."""
    evaluate = task.TaskTraining.evaluate
    more = {"max_train_steps": 4, "checkpointing_steps": 3}

    def stopped(self: Any, stage: str, log: Any) -> None:
        if stage == when:
            os.kill(os.getpid(), signal.SIGTERM)
        evaluate(self, stage, log)

    with monkeypatch.context() as patch:
        patch.setattr(task.TaskTraining, "evaluate", stopped)
        with pytest.raises(SystemExit) as ended:
            run_main(train_classifier_lora, given(tmp_path, "out", **more))
    assert ended.value.code == 143
    names = [path.name for path in list_checkpoints(tmp_path / "out")]
    assert names == (["checkpoint-3", "checkpoint-4"] if when == "end" else [])
    said = capsys.readouterr().out
    assert ("after step 4 of 4; checkpoint-4 is written" if when == "end" else "while no step was trained") in said
    resumed = run_main(train_classifier_lora, given(tmp_path, "out", **more, resume_from_checkpoint="latest"))
    whole = run_main(train_classifier_lora, given(tmp_path, "whole", **more))
    assert_same_run(resumed, whole)
