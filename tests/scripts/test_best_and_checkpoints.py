"""The LoRA of the best validation and those in the checkpoints: which they are, that stock loaders read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import train_classifier_lora
import train_dit_lora
import train_sd_lora
from classifier_fixtures import CLASSES, write_class_folder, write_classifier
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from pixart_fixtures import write_random_dit
from safetensors.torch import load_file
from script_fixtures import read_json, run_main, weights
from sd_fixtures import write_images
from torch import Tensor
from transformers import AutoModelForImageClassification

from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.training import checkpoints, text_to_image
from lorainit_diffusers.training.data.text_to_image import TrainingData

SIDE = 16
Run = Callable[..., Path]


@pytest.fixture
def run(random_sd: Path, tmp_path: Path) -> Run:
    """Run the script of Stable Diffusion on small images, some of which are held out."""
    write_images(tmp_path / "data" / "train", count=5, size=(SIDE, SIDE))
    write_images(tmp_path / "data" / "heldout", count=3, size=(SIDE, SIDE), seed=1)

    def call(name: str = "out", script: Any = train_sd_lora, **options: Any) -> Path:
        given: dict[str, Any] = {
            **{"pretrained_model_name_or_path": random_sd, "train_data_dir": tmp_path / "data"},
            **{"output_dir": tmp_path / name, "init": "cntlora", "rank": 2, "resolution": SIDE, "seed": 0},
            **{"max_train_steps": 4, "train_batch_size": 2, "validation_prompt": "x", "init_num_batches": 2},
            **{"validation_inference_steps": 1, "validation_guidance_scale": 1.0, "learning_rate": 1e-2},
        }
        return run_main(script, {**given, **options})

    return call


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Validation losses as the test says, one a call."""

    def set_losses(values: Sequence[float]) -> None:
        left = iter(values)
        monkeypatch.setattr(TrainingData, "validation_loss", lambda self: next(left))

    return set_losses


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "options", [{}, {"use_ema": True, "ema_decay": 0.5}, {"init": "gaussian", "train_text_encoder": True}]
)
def test_every_checkpoint_holds_the_lora_that_the_run_would_save(run: Run, options: dict[str, Any]) -> None:
    out = run(checkpointing_steps=2, **options)
    shorter = run("shorter", max_train_steps=2, **options)
    assert_equal(weights(out / "checkpoint-4"), weights(out))
    assert_equal(weights(out / "checkpoint-2"), weights(shorter))
    assert any(not torch.equal(weights(out)[name], weights(shorter)[name]) for name in weights(out))


def test_the_stock_pipeline_loads_a_checkpoint_by_its_folder(
    run: Run, random_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(checkpointing_steps=2)
    # diffusers asks for the file's name where the hub is said to be off, although the folder is a local one
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
    outputs: list[Any] = []
    for place in (out / "checkpoint-4", out / "checkpoint-2", out, None):
        pipeline: Any = StableDiffusionPipeline.from_pretrained(random_sd)
        if place is not None:
            options = {"weight_name": "pytorch_lora_weights.safetensors"} if place == out else {}
            pipeline.load_lora_weights(str(place), **options)
        sample = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)
        width = pipeline.unet.config.cross_attention_dim
        with torch.no_grad():
            outputs.append(pipeline.unet(sample, 10, torch.ones(1, 7, width)).sample)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-6)
    assert not torch.allclose(outputs[1], outputs[3], atol=1e-6)


def test_stock_peft_loads_a_checkpoint_and_the_best_of_a_classifier(tmp_path: Path) -> None:
    base = write_classifier(tmp_path / "base")
    write_class_folder(tmp_path / "data", CLASSES)
    out = run_main(
        train_classifier_lora,
        {
            **{
                "pretrained_model_name_or_path": base,
                "train_data_dir": tmp_path / "data",
                "output_dir": tmp_path / "o",
            },
            **{"init": "cntlora", "rank": 2, "max_train_steps": 4, "train_batch_size": 4, "init_num_batches": 2},
            **{"validation_steps": 2, "checkpointing_steps": 2, "learning_rate": 1e-2},
        },
    )
    best = read_json(out / "best" / "best.json")
    assert best["metric"] == "accuracy"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    validations = [line for line in lines if "accuracy" in line and "stage" not in line]
    assert best["value"] == max(line["accuracy"] for line in validations)
    assert best["step"] == next(line["step"] for line in validations if line["accuracy"] == best["value"])
    logits: list[Tensor] = []
    for place in (out / "checkpoint-4", out, out / "best"):
        model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained(base), str(place)).eval()
        side = model.config.image_size
        with torch.no_grad():
            logits.append(model(torch.ones(1, 3, side, side)).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.isfinite(logits[2]).all()


def test_a_checkpoint_of_a_base_without_a_lora_loader_is_a_folder_for_peft(run: Run, tmp_path: Path) -> None:
    write_random_dit(tmp_path / "dit")
    out = run(
        script=train_dit_lora,
        family="dit",
        pretrained_model_name_or_path=tmp_path / "dit",
        train_data_dir=write_classes(tmp_path / "classes"),
        validation_prompt="1",
        checkpointing_steps=4,
        max_train_steps=4,
    )
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / "checkpoint-4" / name).is_file()
    assert_equal(
        load_file(out / "checkpoint-4" / "adapter_model.safetensors"), load_file(out / "adapter_model.safetensors")
    )


def write_classes(folder: Path) -> Path:
    write_images(folder, count=2, size=(32, 32))
    lines = [{"file_name": f"{index:02d}.png", "text": str(index + 1)} for index in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


# ----------------------------------------------------------------------------------------------------------- best step


def test_the_best_step_is_kept_and_named(
    run: Run, scripted: Callable[[Sequence[float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    scripted([0.9, 0.7, 0.5, 0.5, 0.6])
    out = run(validation_steps=1, checkpointing_steps=2, checkpoints_total_limit=1)
    lines = capsys.readouterr().out.strip().splitlines()
    sentence = "best: step 2, validation loss 0.500 (best/); the last step has 0.600"
    assert lines[-1] == sentence
    assert sentence in (out / "README.md").read_text("utf-8")
    expected = {"step": 2, "metric": "validation_loss", "value": 0.5}
    assert read_json(out / "best" / "best.json") == {**expected, "larger_is_better": False}
    assert read_json(out / "config.json")["best"] == {
        **expected,
        **{"directory": "best", "last_step": 4, "last_value": 0.6},
    }
    scripted([0.9, 0.7, 0.5])
    shorter = run("shorter", validation_steps=1, max_train_steps=2)
    assert_equal(weights(out / "best"), weights(shorter))
    assert (
        lines[-1]
        != capsys.readouterr().out.strip().splitlines()[-1]
        == ("best: step 2, the last, validation loss 0.500 (best/)")
    )
    assert [path.name for path in checkpoints.list_checkpoints(out)] == ["checkpoint-4"]


def test_the_averaged_weights_are_what_is_best(run: Run, scripted: Callable[[Sequence[float]], None]) -> None:
    scripted([0.9, 0.3, 0.4, 0.4, 0.4])
    out = run(validation_steps=1, use_ema=True, ema_decay=0.5)
    scripted([0.9, 0.3])
    assert_equal(weights(out / "best"), weights(run("one", max_train_steps=1, use_ema=True, ema_decay=0.5)))


@pytest.mark.parametrize("values", [[0.9, 0.8, 0.3, 0.5, 0.2, 0.6, 0.7], [0.1, 0.8, 0.3, 0.5, 0.2, 0.6, 0.7]])
@pytest.mark.parametrize("damage", ["later", "gone", "none"])
def test_a_resumed_run_keeps_what_the_uninterrupted_one_keeps(
    run: Run, scripted: Callable[[Sequence[float]], None], tmp_path: Path, damage: str, values: list[float]
) -> None:
    """Killed somewhere after checkpoint 3, when a later step may have become the best."""
    options: dict[str, Any] = {"max_train_steps": 6, "validation_steps": 1, "checkpointing_steps": 3}
    scripted(values)
    whole = run("whole", **options)
    shutil.copytree(whole, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-6")
    if damage == "gone":
        shutil.rmtree(tmp_path / "killed" / "best")
    if damage == "later":  # what a run with other numbers has left
        (tmp_path / "killed" / "best" / "best.json").write_text("{}", encoding="utf-8")
        (tmp_path / "killed" / "best" / "stray.txt").write_text("x", encoding="utf-8")
    scripted(values[4:])
    resumed = run("killed", **options, resume_from_checkpoint="latest")
    assert_equal(weights(resumed), weights(whole))
    assert_equal(weights(resumed / "best"), weights(whole / "best"))
    assert {path.name for path in (resumed / "best").iterdir()} == {path.name for path in (whole / "best").iterdir()}
    assert read_json(resumed / "best" / "best.json") == read_json(whole / "best" / "best.json")
    assert not list(resumed.glob(".best*"))


def test_without_validation_data_or_on_request_nothing_is_kept(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = write_images(tmp_path / "alone", count=2, size=(SIDE, SIDE))
    without = run("a", train_data_dir=alone, max_train_steps=1, checkpointing_steps=1)
    assert not (without / "best").exists()
    assert read_json(without / "config.json")["best"] is None
    off = run("b", max_train_steps=1, **{"no-keep_best": True})
    assert not (off / "best").exists()
    assert "best:" not in capsys.readouterr().out


def test_the_readmes_kind_of_run_finds_a_minimum_in_the_middle(run: Run) -> None:
    """The curve is the run's own here: what is kept is where the log is lowest."""
    out = run(max_train_steps=6, validation_steps=2, learning_rate=0.1)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    values = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    best = read_json(out / "best" / "best.json")
    assert (best["step"], best["value"]) == min(values.items(), key=lambda item: (item[1], item[0]))


# --------------------------------------------------------------------------------------------------- held-out fraction


def test_a_fraction_of_the_images_is_held_out_by_content(run: Run, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "alone", count=5, size=(SIDE, SIDE))
    shutil.copy(folder / "00.png", folder / "copy.png")
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"file_name": "copy.png", "text": "a copy"}) + "\n")
    sides: list[tuple[set[str], set[str]]] = []

    def note(args: Any, *rest: Any) -> Any:
        records, heldout = read(args, *rest)
        sides.append(({r.path.name for r in records}, {r.path.name for r in heldout}))
        return records, heldout

    read = text_to_image.read_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_to_image, "read_data", note)
        out = run("a", train_data_dir=folder, validation_fraction=0.4, max_train_steps=1, repeats=2)
        run("b", train_data_dir=folder, validation_fraction=0.4, max_train_steps=1, seed=5)
    assert (out / "best" / "best.json").is_file()
    assert sides[0] == sides[1]
    train, heldout = sides[0]
    assert not train & heldout
    assert len(train | heldout) == 6
    assert {"00.png", "copy.png"} <= train or {"00.png", "copy.png"} <= heldout
    assert len(heldout - {"copy.png"}) == 2  # of five different pictures


@pytest.mark.parametrize("value", ["0", "1", "nan", "-0.5", "1.5"])
def test_a_fraction_lies_between_0_and_1(run: Run, value: str) -> None:
    with pytest.raises(ValueError, match=r"--validation_fraction .*: must lie between 0 and 1"):
        run(validation_fraction=value)


def test_a_fraction_of_data_that_hold_some_out_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--validation_fraction 0\.5: the data have a held-out part"):
        run(validation_fraction=0.5)
    write_images(tmp_path / "one", count=1, size=(SIDE, SIDE))
    with pytest.raises(ValueError, match=r"--validation_fraction 0\.5: the data have one picture only"):
        run(validation_fraction=0.5, train_data_dir=tmp_path / "one")


# ----------------------------------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("where", ["gradient", "weight"])
@pytest.mark.parametrize("bad_step", [3, 4])
def test_a_step_that_is_not_finite_leaves_the_last_good_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, bad_step: int
) -> None:
    """A checkpoint a step and a limit of one: what replaces the last good one must be good."""
    seen = 0
    original = StableDiffusionFamily.loss

    def explode(self: Any, batch: Any, generator: Any) -> Tensor:
        nonlocal seen
        loss = original(self, batch, generator)
        if loss.requires_grad and not self.evaluates:
            seen += 1
            if seen == bad_step:
                loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    def spoil(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        found = step(self, *args, **options)
        if seen == bad_step:
            self.param_groups[0]["params"][0].data[0, 0] = float("nan")
        return found

    if where == "gradient":
        monkeypatch.setattr(StableDiffusionFamily, "loss", explode)
        message = rf"gradient of unet\..* is not finite at step {bad_step}, where the loss is [\d.]+; lower --learning"
    else:
        step = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
        message = r"the weight unet\..*lora_A.* is not finite after a step with the learning rate 0\.01"
    with pytest.raises(ValueError, match=message) as error:
        run(checkpointing_steps=1, checkpoints_total_limit=1, validation_steps=1)
    good = f"checkpoint-{bad_step - 1}"
    assert f"the last good state is {good} (--resume_from_checkpoint latest)" in str(error.value)
    monkeypatch.undo()
    out = tmp_path / "out"
    assert [path.name for path in checkpoints.list_checkpoints(out)] == [good]
    for path in (out / good).rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())
    assert not (out / "pytorch_lora_weights.safetensors").exists()
    resumed = run(checkpointing_steps=1, checkpoints_total_limit=1, validation_steps=1, resume_from_checkpoint="latest")
    assert_equal(weights(resumed), weights(run("whole", validation_steps=1)))
