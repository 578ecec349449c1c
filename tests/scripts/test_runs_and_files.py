"""Whose files are whose, and what a resumed run is, with the scripts themselves."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_classifier_lora
import train_sd_lora
import train_vlm_lora
from classifier_fixtures import write_class_folder, write_classifier
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from script_fixtures import FAST as FAST_IMAGES
from script_fixtures import argv_of, read_json, run_main
from sd_fixtures import ROOT
from vlm_fixtures import write_base, write_questions

from lorainit_diffusers.training import hub, task
from lorainit_diffusers.training.checkpoints import find_checkpoint, list_checkpoints, load_training_state
from lorainit_diffusers.training.classification.options import ClassifierTrainingOptions
from lorainit_diffusers.training.classification.report import ClassPages
from lorainit_diffusers.training.log import RunLog
from lorainit_diffusers.training.options.fields import option_facts
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions
from lorainit_diffusers.training.output_dir import FILES_NAME, MARK, RUN_NAME
from lorainit_diffusers.training.questions.options import QuestionTrainingOptions
from lorainit_diffusers.training.task import TaskTraining

Run = Callable[..., Path]
FAST: dict[str, Any] = {
    **{"init": "gaussian", "rank": 2, "max_train_steps": 4, "train_batch_size": 4, "init_num_batches": 2},
    **{"validation_steps": 2, "learning_rate": 5e-3, "checkpointing_steps": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("base") / "vit")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folder(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture
def run(base: Path, data: Path, tmp_path: Path) -> Run:
    """Train a small classifier in `tmp_path / name`."""

    def run(name: str = "out", **options: Any) -> Path:
        given = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": tmp_path / name}
        return run_main(train_classifier_lora, {**FAST, **given, **options})

    return run


@pytest.fixture(scope="module")
def finished(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 2 and 4, to be copied."""
    output = tmp_path_factory.mktemp("finished") / "out"
    given = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": output}
    return run_main(train_classifier_lora, {**FAST, **given})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_and_stages(output: Path) -> list[tuple[Any, ...]]:
    """Every line of the log without its seconds."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [tuple((key, value) for key, value in line.items() if key != "step_s") for line in lines]


# -------------------------------------------------------------------------------------------------------- every file


def test_every_file_is_listed_and_has_the_mode_of_the_umask(run: Run, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        output = run(export_merged=True, report_to="tensorboard", checkpointing_steps=2)
    finally:
        os.umask(before)
    found = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    listed = set((output / MARK / FILES_NAME).read_text(encoding="utf-8").splitlines())
    ours = {name for name in found if not name.startswith((MARK, "logs/"))}
    assert ours - listed == set()
    assert "merged/model.safetensors" in ours
    wrong = {
        name: oct(path.stat().st_mode) for name, path in found.items() if stat.S_IMODE(path.stat().st_mode) != 0o640
    }
    assert wrong == {}


def test_no_file_of_an_image_run_is_missing_from_the_list(random_sd: Path, image_dir: Path, tmp_path: Path) -> None:
    given = {"pretrained_model_name_or_path": random_sd, "train_data_dir": image_dir, "output_dir": tmp_path / "out"}
    output = run_main(train_sd_lora, {**FAST_IMAGES, **given, "checkpointing_steps": 1, "export_merged": True})
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    listed = set((output / MARK / FILES_NAME).read_text(encoding="utf-8").splitlines())
    assert {name for name in found if not name.startswith(MARK)} - listed == set()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in output.rglob("*") if path.is_file()}
    assert len(modes) == 1


# --------------------------------------------------------------------------------------------- directories of others


@pytest.mark.parametrize("option", ["pretrained_model_name_or_path", "train_data_dir"])
@pytest.mark.parametrize("inside", ["", "deeper/out"])
def test_base_and_data_stay_as_they_are(
    run: Run, base: Path, data: Path, tmp_path: Path, option: str, inside: str
) -> None:
    places = {"pretrained_model_name_or_path": base, "train_data_dir": data}
    own = shutil.copytree(places[option], tmp_path / "own")
    before = contents(own)
    with pytest.raises(ValueError, match=rf"--output_dir .* and --{option} .* (overlap|are the same)") as error:
        run(**{option: own, "output_dir": own / inside})
    assert str(own) in str(error.value)
    assert contents(own) == before


@pytest.mark.parametrize("more", [{}, {"init_only": True}, {"resume_from_checkpoint": "latest"}], ids=str)
def test_files_of_others_stay_as_they_are(run: Run, tmp_path: Path, more: dict[str, Any]) -> None:
    for name in ("README.md", "config.json", "samples/mine.png", "metrics.jsonl", "adapter_model.safetensors"):
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds files that no run of this project wrote .*give a new or an empty"):
        run(**more)
    assert contents(tmp_path / "out") == before


def test_the_default_name_gets_a_number(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    first = run(output_dir=None, init_only=True)
    before = contents(first)
    second = run(output_dir=None, max_train_steps=2)
    assert (str(first), str(second)) == ("outputs/classifier-lora-gaussian", "outputs/classifier-lora-gaussian-2")
    assert "holds an earlier run, so this one goes to 'outputs/classifier-lora-gaussian-2'" in capsys.readouterr().out
    assert contents(first) == before
    assert read_json(second / "config.json")["arguments"]["output_dir"] == str(second)
    assert "gaussian-2" in (second / "README.md").read_text(encoding="utf-8")
    assert run(output_dir=None, resume_from_checkpoint="latest", max_train_steps=4) == second


def test_a_dry_run_writes_nothing(run: Run, random_sd: Path, image_dir: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    run("nowhere", dry_run=True, push_to_hub=True, report_to="tensorboard")
    subject = {
        **{"pretrained_model_name_or_path": random_sd, "instance_data_dir": image_dir / "train"},
        **{"instance_prompt": "a sks cat", "with_prior_preservation": True, "class_prompt": "a cat"},
        **{"num_class_images": 3, "variable_rank": True, "dry_run": True, "output_dir": tmp_path / "dry"},
    }
    run_main(train_sd_lora, {**FAST_IMAGES, **subject})
    assert contents(tmp_path) == before
    assert not (tmp_path / "dry").exists()


def test_two_scripts_at_once_end_with_one_run(base: Path, data: Path, tmp_path: Path) -> None:
    """The second is refused in one line that names the first, which is killed then and gone on with."""
    script = str(ROOT / "train_scripts" / "train_classifier_lora.py")
    given = {"pretrained_model_name_or_path": base, "train_data_dir": data, "output_dir": tmp_path / "out"}
    argv = argv_of({**FAST, **given, "max_train_steps": 2000, "validation_steps": 2000})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, script, *argv], env=environment, stdout=subprocess.DEVNULL)
    try:
        while first.poll() is None and not list_checkpoints(tmp_path / "out"):
            time.sleep(0.05)
        before = (tmp_path / "out" / MARK / RUN_NAME).read_bytes()
        for more in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}):
            with pytest.raises(ValueError, match=rf"is in use by train_classifier_lora \(process {first.pid} on "):
                run_main(train_classifier_lora, {**FAST, **given, **more})
        assert (tmp_path / "out" / MARK / RUN_NAME).read_bytes() == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    step = max(int(path.name.split("-")[1]) for path in list_checkpoints(tmp_path / "out"))
    more = {"max_train_steps": step, "validation_steps": 2000, "resume_from_checkpoint": "latest"}
    assert run_main(train_classifier_lora, {**FAST, **given, **more}).is_dir()


def test_what_is_uploaded_is_what_the_run_wrote(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []
    made = argparse.Namespace(repo_id="me/out")
    monkeypatch.setattr(hub.huggingface_hub, "create_repo", lambda name, **options: made)
    monkeypatch.setattr(hub.huggingface_hub, "upload_folder", lambda **options: calls.append(options))
    save = TaskTraining.write_files

    def save_and_drop_files(*args: Any) -> None:
        for name in (".env", "private/keys.txt", "photo.png", "samples/mine.png", "notes.md"):
            path = tmp_path / "out" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine", encoding="utf-8")
        save(*args)

    monkeypatch.setattr(TaskTraining, "write_files", save_and_drop_files)
    output = run(push_to_hub=True, report_to="tensorboard")
    names = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
    options = {name: calls[0][name] for name in ("allow_patterns", "ignore_patterns")}
    uploaded = set(filter_repo_objects(names, **options))
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "config.json", "loss.png"} <= uploaded
    for name in uploaded:
        assert (output / name).read_bytes() != b"mine"
        assert not name.startswith(("checkpoint", "logs", MARK, "predictions", "mistakes", "report.html"))


# ------------------------------------------------------------------------------------------------------ resumed runs


def test_every_option_that_differs_is_named_with_both_values(run: Run, finished: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    before = contents(output)
    changed = {
        **{"learning_rate": 0.5, "adam_weight_decay": 0.9, "rank": 3, "lora_layers": "q_proj", "crop_ratio": 0.5},
        **{"max_grad_norm": 2.0, "init_seed": 7, "label_smoothing": 0.2, "adam_beta1": 0.5, "mixed_precision": "bf16"},
    }
    with pytest.raises(ValueError, match="resume with the same") as error:
        run(**changed, max_train_steps=8, resume_from_checkpoint="latest")
    for name, value in changed.items():
        assert f"--{name} is {value!r}, but the checkpoint was written with " in str(error.value)
    assert "--lora_alpha is 3.0, but the checkpoint was written with 2.0" in str(error.value)
    assert "max_train_steps" not in str(error.value)
    assert contents(output) == before


def test_every_option_is_compared_or_says_why_not() -> None:
    """An option that is added later is compared unless somebody writes down why it may change."""
    for options in (ClassifierTrainingOptions, StableDiffusionOptions, QuestionTrainingOptions):
        facts = option_facts(options)
        for name in ("rank", "learning_rate", "seed", "lr_scheduler", "init_option", "mixed_precision", "allow_tf32"):
            assert (facts[name].may_change, facts[name].place) == (None, None)
        for name, fact in facts.items():
            assert fact.may_change is None or len(fact.may_change.split()) > 1, name


def test_the_steps_must_fit(run: Run, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = shutil.copytree(finished, tmp_path / "out")
    before = contents(output)
    with pytest.raises(
        ValueError, match=r"--max_train_steps is 3, but the checkpoint has done 4 steps; give at least 4"
    ):
        run(max_train_steps=3, resume_from_checkpoint="latest")
    assert contents(output) == before
    run(max_train_steps=4, resume_from_checkpoint="latest")
    said = capsys.readouterr().out
    assert "resuming at step 4 of 4 from checkpoint-4: nothing is left to train, the result is written again" in said
    assert (
        load_file(output / "adapter_model.safetensors").keys()
        == load_file(finished / "adapter_model.safetensors").keys()
    )
    run(max_train_steps=3, resume_from_checkpoint="checkpoint-2")
    assert "resuming at step 2 of 3 from checkpoint-2" in capsys.readouterr().out
    assert "| training | 3 steps" in (output / "README.md").read_text(encoding="utf-8")


def test_a_schedule_that_knows_the_end_cannot_be_extended(run: Run) -> None:
    run(lr_scheduler="cosine")
    with pytest.raises(
        ValueError, match=r"--max_train_steps is 8, .* written with 4, and every step of --lr_scheduler"
    ):
        run(lr_scheduler="cosine", max_train_steps=8, resume_from_checkpoint="latest")


def test_a_run_that_is_extended_is_one_of_that_length(run: Run, finished: Path, tmp_path: Path) -> None:
    whole = run("whole", max_train_steps=6)
    extended = shutil.copytree(finished, tmp_path / "extended")
    run("extended", max_train_steps=6, resume_from_checkpoint="latest")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, extended))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert steps_and_stages(extended) == steps_and_stages(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: Image.new("RGB", (40, 40), "pink").save(sorted((d / "train").rglob("*.png"))[0]), "has changed"),
        (lambda d: shutil.copy(sorted((d / "train").rglob("*.png"))[0], d / "train" / "red" / "zzz.png"), "is new"),
        (lambda d: sorted((d / "train").rglob("*.png"))[0].unlink(), "is missing"),
    ],
)
def test_changed_data_are_named(
    run: Run, data: Path, finished: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    own = shutil.copytree(data, tmp_path / "own")
    change(own)
    with pytest.raises(ValueError, match=f"the training data is not what the checkpoint was written with .*{message}"):
        run(train_data_dir=own, max_train_steps=6, resume_from_checkpoint="latest")


def test_a_base_with_other_weights_is_named_and_a_moved_one_is_fine(
    run: Run, base: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "out")
    moved = {
        **{"pretrained_model_name_or_path": shutil.copytree(base, tmp_path / "base")},
        **{"train_data_dir": shutil.copytree(data, tmp_path / "data"), "max_train_steps": 6},
    }
    other = load_file(tmp_path / "base" / "model.safetensors")
    run(**moved, resume_from_checkpoint="latest")
    name = next(iter(other))
    save_file({**other, name: other[name] + 1}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"the base is not what the checkpoint was written with .'model.safetensors' differs"
    ):
        run(**{**moved, "max_train_steps": 8}, resume_from_checkpoint="latest")


def test_a_checkpoint_of_an_earlier_version_is_resumed(run: Run, finished: Path, tmp_path: Path) -> None:
    """It has no mark, no identity, and lacks options that were added since."""
    output = shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns(MARK))
    for path in output.glob("checkpoint-*/state.json"):
        state = read_json(path)
        del state["extra"]["identity"]
        for name in ("label_smoothing", "lora_alpha", "hub_private", "overwrite_output_dir"):
            del state["extra"]["arguments"][name]
        path.write_text(json.dumps(state), encoding="utf-8")
        path.with_name("checksums.json").unlink()
    for name, value in (("label_smoothing", 0.3), ("lora_alpha", 64.0)):
        with pytest.raises(ValueError, match=rf"--{name} is {value}, but the checkpoint was written with (0\.0|2)"):
            run(**{name: value}, max_train_steps=6, resume_from_checkpoint="latest")
    run(max_train_steps=6, resume_from_checkpoint="latest")
    assert (output / MARK / RUN_NAME).is_file()
    assert next(line for line in steps_and_stages(output) if ("stage", "end") in line)[0] == ("step", 6)


@pytest.mark.parametrize("limit", [None, 1])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    run: Run, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: int | None
) -> None:
    whole = run("whole", max_train_steps=6)
    output = shutil.copytree(finished, tmp_path / "out")
    weights = output / "checkpoint-4" / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    before = contents(output)
    with pytest.raises(ValueError, match=r"checkpoint-4' is damaged: adapters\.safetensors has .* latest"):
        run(max_train_steps=6, resume_from_checkpoint="checkpoint-4")
    assert contents(output) == before
    capsys.readouterr()
    more = {"checkpoints_total_limit": limit, "checkpointing_steps": 3}
    run(max_train_steps=6, resume_from_checkpoint="latest", **(more if limit else {}))
    said = capsys.readouterr().out
    assert said.count("damaged") == 1
    assert "checkpoint-4 in " in said
    assert "resuming at step 2 of 6 from checkpoint-2" in said
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, output))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    best = [(folder / "best" / "adapter_model.safetensors").read_bytes() for folder in (whole, output)]
    assert best[0] == best[1]
    assert steps_and_stages(output) == steps_and_stages(whole)
    assert [path.name for path in list_checkpoints(output)] == [
        f"checkpoint-{n}" for n in ([6] if limit else [2, 4, 6])
    ]
    assert load_training_state(find_checkpoint(output, "latest")).step == 6


# ------------------------------------------------------------------------------------- kills during the final export


class Killed(BaseException):
    """As if the process ended here."""


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """End the run before its file operation of this number, counted from the first "end" line on."""
    count = [-1]
    write, replace = RunLog.write, os.replace

    def write_line(self: Any, line: dict[str, Any]) -> None:
        if line.get("stage") == "end":
            count[0] = 0
            if number == 0:
                raise Killed
        write(self, line)
        if line.get("stage") == "end" and number == 1:
            raise Killed

    def counted(*args: Any, **options: Any) -> None:
        if count[0] >= 0:
            count[0] += 1
            if count[0] == number - 1:
                raise Killed
        replace(*args, **options)

    monkeypatch.setattr(RunLog, "write", write_line)
    monkeypatch.setattr(os, "replace", counted)
    return count


def check_kills(run: Run, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: list[int]) -> None:
    """Kill a run at each of these operations, go on, and compare everything with an uninterrupted one."""
    monkeypatch.setattr(task, "plot_loss", lambda *args: None)
    want = {name for name in contents(expected) if name not in ("loss.png",)}
    output = run(resume_from_checkpoint="latest")
    for number in numbers:
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(Killed):
                run(resume_from_checkpoint="latest")
        run(resume_from_checkpoint="latest")
        assert steps_and_stages(output) == steps_and_stages(expected), number
        assert set(contents(output)) - {"loss.png"} == want, number
        first, second = (load_file(folder / "adapter_model.safetensors") for folder in (output, expected))
        assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_kills_during_the_export_of_a_classifier(
    run: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClassPages, "_draw_mistakes", lambda *args: Image.new("RGB", (8, 8)))
    shutil.copytree(finished, tmp_path / "out")
    check_kills(run, finished, tmp_path, monkeypatch, [0, 1, 2, 5, 8])


def test_kills_during_the_export_of_a_vision_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, questions = write_base(tmp_path / "base", "llava"), write_questions(tmp_path / "questions")

    def run(name: str = "out", **options: Any) -> Path:
        fast = {
            **{"pretrained_model_name_or_path": base, "train_data_file": questions / "train.jsonl", "rank": 2},
            **{"max_train_steps": 2, "train_batch_size": 3, "init": "gaussian", "max_new_tokens": 4},
            **{"output_dir": tmp_path / name, "seed": 0, "checkpointing_steps": 1},
        }
        return run_main(train_vlm_lora, {**fast, **options})

    expected = run("whole")
    check_kills(run, expected, tmp_path, monkeypatch, [0, 1, 3, 6])
