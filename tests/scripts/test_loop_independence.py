"""What a run's random numbers, validations, checkpoints and skipped steps may change, and what they may not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import compare_inits
import numpy as np
import pytest
import torch
import train_dit_lora
import train_sd_lora
from accelerate import Accelerator
from flow_fixtures import write_base as write_flow_base
from PIL import Image
from reference_loop import Call, Plan, Recorder, add_lora, assert_same, exported, folder_batches, plain_loop
from script_fixtures import losses, run_main, weights
from sd_fixtures import write_images
from torch import Tensor

from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.families.sd3 import StableDiffusion3Family
from lorainit_diffusers.training import checkpoints

SIDE = 16
NUM_HELDOUT = 7
Run = Callable[..., Path]


@pytest.fixture
def run(random_sd: Path, tmp_path: Path) -> Run:
    """Run the script of Stable Diffusion on small images."""
    write_images(tmp_path / "data" / "train", count=5, size=(SIDE, SIDE))
    write_images(tmp_path / "data" / "heldout", count=NUM_HELDOUT, size=(SIDE, SIDE), seed=1)

    def call(name: str = "out", **options: Any) -> Path:
        given: dict[str, Any] = {
            **{"pretrained_model_name_or_path": random_sd, "train_data_dir": tmp_path / "data"},
            **{"output_dir": tmp_path / name, "init": "gaussian", "rank": 2, "resolution": SIDE, "seed": 0},
            **{"max_train_steps": 3, "train_batch_size": 2, "validation_prompt": "x", "init_num_batches": 1},
            **{"validation_inference_steps": 1, "validation_guidance_scale": 1.0},
        }
        return run_main(train_sd_lora, {**given, **options})

    return call


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------------------------------- seeds


def test_what_happens_between_the_steps_does_not_change_them(run: Run) -> None:
    shared = {"lora_dropout": 0.2, "caption_dropout": 0.3, "train_text_encoder": True, "max_train_steps": 6}
    few = run("few", **shared, validation_steps=100)
    many = run("many", **shared, validation_steps=1, checkpointing_steps=2, validation_prompt=["a", "b", "c"])
    assert losses(few) == losses(many)
    assert_equal(weights(few), weights(many))
    assert len(losses(many, "validation_loss")) > len(losses(few, "validation_loss"))


@pytest.mark.parametrize("init", ["gaussian", "eva"])
def test_init_seed_decides_the_initialisation_alone(run: Run, monkeypatch: pytest.MonkeyPatch, init: str) -> None:
    """`gaussian` draws from the seed, `eva` takes other images and other noise."""
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    starts: list[dict[str, Tensor]] = []
    steps: list[list[Tensor]] = []
    for name, seeds in (("a", {"seed": 0}), ("b", {"seed": 0, "init_seed": 5}), ("c", {"seed": 5})):
        recorder.calls.clear()
        run(name, init=init, init_batch_size=2, **seeds)
        starts.append(recorder.start)
        trained = [call for call in recorder.calls if call.training]
        steps.append([torch.as_tensor(call.timesteps) for call in trained])
        steps[-1] += [call.batch["pixel_values"] for call in trained]
    assert not torch.equal(starts[0][next(iter(starts[0]))], starts[1][next(iter(starts[1]))])
    assert_equal(starts[1], starts[2])
    assert all(map(torch.equal, steps[0], steps[1]))
    assert not all(map(torch.equal, steps[1], steps[2]))


def test_every_micro_step_has_noise_of_its_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image, many times: whatever differs is the noise."""
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    run(max_train_samples=1, gradient_accumulation_steps=3, train_batch_size=4)
    steps = [call for call in recorder.calls if call.training]
    assert len(steps) == 9
    assert len({tuple(call.timesteps.tolist()) for call in steps if call.timesteps is not None}) == 9
    assert len({call.loss for call in steps}) == 9


# ---------------------------------------------------------------------------------------------------------- validation


def assert_stratified(timesteps: Tensor, num_timesteps: int = 1000) -> None:
    """Of n whole timesteps, one lies in each n-th of their range; [t, t + 1) may reach over an end of it."""
    part = num_timesteps / len(timesteps)
    for index, timestep in enumerate(sorted(timesteps.tolist())):
        assert index * part - 1 < timestep < (index + 1) * part, (index, timestep)


def assert_fixed_and_stratified(calls: Sequence[Call], num_validations: int, num_samples: int) -> None:
    """The calls of each validation cover the timesteps evenly, and are those of every other one."""
    size = len(calls) // num_validations
    first, *others = (calls[start : start + size] for start in range(0, len(calls), size))
    timesteps = [call.timesteps for call in first if call.timesteps is not None]
    assert len(torch.cat(timesteps)) == num_samples
    assert_stratified(torch.cat(timesteps))
    assert len(others) == num_validations - 1
    for other in others:
        for call, same in zip(other, first, strict=True):
            assert torch.equal(torch.as_tensor(call.timesteps), torch.as_tensor(same.timesteps))
            assert_equal(call.batch, same.batch)


def test_validation_timesteps_are_stratified_and_always_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    out = run(validation_steps=1, learning_rate=0.0, adam_weight_decay=0.0)
    assert_fixed_and_stratified(recorder.validations, 4, NUM_HELDOUT)
    assert len(set(losses(out, "validation_loss"))) == 1, "the weights were the same, so the noise was not"


def test_noise_levels_of_a_flow_are_stratified_alike(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_flow_base(tmp_path / "base", "sd3", shift=1.0)
    recorder = Recorder(monkeypatch, StableDiffusion3Family)
    options = {
        **{"family": "sd3", "pretrained_model_name_or_path": base, "train_data_dir": tmp_path / "data"},
        **{"output_dir": tmp_path / "flow", "init": "gaussian", "rank": 2, "resolution": SIDE, "seed": 0},
        **{"max_train_steps": 1, "train_batch_size": 2, "validation_prompt": "x", "validation_inference_steps": 1},
        **{"weighting_scheme": "none", "validation_guidance_scale": 1.0},
    }
    run_main(train_dit_lora, options)
    for call in recorder.validations:
        call.timesteps = torch.as_tensor(call.timesteps) - 1  # they go from 1000 down to 1
    assert_fixed_and_stratified(recorder.validations, 2, NUM_HELDOUT)


def test_validations_of_the_comparison_are_stratified_over_all_passes(
    run: Run, random_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    monkeypatch.setattr("lorainit_diffusers.comparison.run.write_report", lambda *args: [])
    options = {
        **{"pretrained_model_name_or_path": random_sd, "train_data_dir": tmp_path / "data", "rank": 2},
        **{"output_dir": tmp_path / "comparison", "inits": ["gaussian"], "learning_rates": [1e-3], "seeds": [0]},
        **{"max_train_steps": 2, "train_batch_size": 3, "resolution": SIDE, "eval_steps": [0, 2], "num_workers": 1},
        **{"image_metrics": "none", "image_steps": [0]},
    }
    run_main(compare_inits, options)
    assert_fixed_and_stratified(recorder.validations, 2, 6 * NUM_HELDOUT)  # at least 40 samples


# ------------------------------------------------------------------------------------------ class images as a reference


def test_measured_pretraining_sees_the_class_images(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Black pictures are learnt, white ones stand for the pre-training data: two passes, each over one kind."""
    for folder, value in (("subject", 0), ("class", 255)):
        (tmp_path / folder).mkdir()
        for index in range(3):
            Image.fromarray(np.full((SIDE, SIDE, 3), value, np.uint8)).save(tmp_path / folder / f"{index}.png")
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    run(
        **{"train_data_dir": None, "instance_data_dir": tmp_path / "subject", "instance_prompt": "a sks cat"},
        **{"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": tmp_path / "class"},
        **{"num_class_images": 3, "init": "cntlora", "init_option": ["constraint=alignment", "pretraining=measured"]},
        **{"init_num_batches": 2, "init_only": True},
    )
    shades = [float(call.batch["pixel_values"].mean()) for call in recorder.calls]
    assert shades == [-1.0, -1.0, 1.0, 1.0]


# --------------------------------------------------------------------------------------------------------- checkpoints


def usable(output_dir: Path) -> list[int]:
    """Steps of the checkpoints that can be loaded right now."""
    found: list[int] = []
    for path in output_dir.glob("checkpoint-*"):
        try:
            found.append(checkpoints.load_training_state(path).step)
        except (FileNotFoundError, ValueError):
            continue
    return sorted(found)


@pytest.mark.parametrize("limit", [1, 2])
def test_there_is_a_usable_checkpoint_at_every_moment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Looked at before and after everything that is deleted or moved, as a kill would find it."""
    moments: list[list[int]] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            moments.append(usable(tmp_path / "out"))
            result = original(*args, **options)
            moments.append(usable(tmp_path / "out"))
            return result

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (shutil, "rmtree")):
        watch(owner, name)
    run(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=limit)
    started = next(index for index, steps in enumerate(moments) if steps)
    assert all(moments[started:]), moments
    assert {1, 2, 3, 4} <= {step for steps in moments for step in steps}
    assert usable(tmp_path / "out") == [1, 2, 3, 4][-limit:]


# ------------------------------------------------------------------------------------------------------- skipped steps


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate scales the losses, as for float16 on a GPU; the base stays in float32."""
    original = Accelerator.__init__

    def with_scaler(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

    def unscale(self: Any, optimizer: Any = None) -> None:
        for one in self._optimizers:
            self.scaler.unscale_(one.optimizer)

    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)


@pytest.mark.usefixtures("scaler")
@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # the scaler's way to see whether it was called
def test_a_step_that_the_scaler_skips_changes_nothing(
    run: Run, random_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights nor schedule, average and optimiser move; the next step is what this one would have been."""
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    recorded = StableDiffusionFamily.loss

    def overflowing(family: Any, batch: Any, generator: torch.Generator) -> Tensor:
        value = recorded(family, batch, generator)
        if sum(call.training for call in recorder.calls) == 3 and value.requires_grad:
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    monkeypatch.setattr(StableDiffusionFamily, "loss", overflowing)
    average = {"use_ema": True, "ema_decay": 0.9}
    out = run(max_train_steps=6, lr_scheduler="linear", lr_warmup_steps=2, validation_steps=100, **average)
    monkeypatch.undo()

    family = StableDiffusionFamily.from_pretrained(random_sd)
    parameters = add_lora(family.adapted, recorder.start, alpha=2)
    plan = Plan(1e-3, steps=6, schedule="linear", warmup=2, ema_decay=0.9, skipped=frozenset({3}))
    trace = plain_loop(family, parameters, folder_batches(family, tmp_path / "data" / "train", 2, 0), plan)
    assert losses(out) == pytest.approx(trace.losses, rel=2e-6)
    assert losses(out, "lr") == pytest.approx(trace.rates, rel=1e-9)
    assert trace.rates[2] == trace.rates[3] != trace.rates[4]
    assert_same(weights(out), exported(trace.averages[6], 1.0))
