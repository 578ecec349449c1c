"""Ten steps of the training loop, against the plain loop of `reference_loop.py`: the same numbers to 1e-6."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import compare_inits
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import train_classifier_lora
import train_dit_lora
import train_sd_lora
import train_vlm_lora
from classifier_fixtures import CLASSES, picture, write_classifier
from flow_fixtures import write_base as write_flow_base
from reference_loop import (
    Plan,
    Recorder,
    Trace,
    adapter_file,
    add_lora,
    answer_batches,
    assert_same,
    column,
    data_order,
    exported,
    folder_batches,
    num_answer_tokens,
    plain_loop,
    seed_of,
    write_answers,
)
from safetensors.torch import load_file
from script_fixtures import changes, run_main, weights
from sd_fixtures import write_images
from vlm_fixtures import write_base as write_vlm_base

from lorainit_diffusers.families.augment import Augmentation
from lorainit_diffusers.families.classifier import ClassifierFamily
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.families.sd3 import StableDiffusion3Family
from lorainit_diffusers.families.vlm import VisionLanguageFamily

SIDE = 16
NUM_IMAGES = 5  # batches run over the ends of epochs
PICTURES = {"validation_prompt": "x", "validation_inference_steps": 1, "validation_guidance_scale": 1.0}
COMMON: dict[str, Any] = {"init": "gaussian", "rank": 2, "resolution": SIDE, "seed": 3, **PICTURES}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of the resolution that is trained: nothing is resized or cropped."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", count=NUM_IMAGES, size=(SIDE, SIDE))
    write_images(folder / "heldout", count=3, size=(SIDE, SIDE), seed=1)
    return folder


def log_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_log(directory: Path, trace: Trace) -> None:
    """Losses, learning rates and gradient norms of the log are those of the plain loop."""
    lines = log_of(directory)
    for name, expected in (("loss", trace.losses), ("lr", trace.rates), ("grad_norm", trace.norms)):
        assert column(lines, name) == pytest.approx(expected, rel=2e-6, abs=1e-6), name
    assert len(set(trace.losses)) == len(trace.losses)


def assert_validations(
    recorder: Recorder, expected: Mapping[int, Mapping[str, torch.Tensor]], tolerance: float = 1e-6
) -> None:
    """The first batch of every validation found these weights, by step."""
    calls = recorder.validations
    per_validation = len(calls) // len(expected)
    for index, found in enumerate(expected.values()):
        for call in calls[index * per_validation : (index + 1) * per_validation]:
            assert_same({name: call.weights[name] for name in found}, found, tolerance)


def test_stable_diffusion(random_sd: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once: text encoder, accumulation, warm-up, clipping, dropouts, loss weights, moving average."""
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    options: dict[str, Any] = {
        **{"pretrained_model_name_or_path": random_sd, "train_data_dir": images, "output_dir": tmp_path / "out"},
        **{**COMMON, "lora_alpha": 3, "lora_dropout": 0.1, "train_text_encoder": True},
        **{"max_train_steps": 10, "train_batch_size": 2, "gradient_accumulation_steps": 3},
        **{"learning_rate": 2e-3, "text_encoder_lr": 5e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 3},
        **{"max_grad_norm": 0.165, "adam_weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.99},
        **{"adam_epsilon": 1e-6, "use_ema": True, "ema_decay": 0.4, "validation_steps": 4},
        **{"snr_gamma": 5.0, "noise_offset": 0.1, "caption_dropout": 0.3},
    }
    out = run_main(train_sd_lora, options)

    family = StableDiffusionFamily.from_pretrained(
        random_sd, train_text_encoder=True, snr_gamma=5.0, noise_offset=0.1, caption_dropout=0.3
    )
    parameters = add_lora(family.adapted, recorder.start, alpha=3, dropout=0.1)
    plan = Plan(
        learning_rate=2e-3,
        other_rates={"text_encoder": 5e-4},
        seed=3,
        accumulation=3,
        schedule="cosine",
        warmup=3,
        max_grad_norm=0.165,
        weight_decay=0.1,
        betas=(0.8, 0.99),
        epsilon=1e-6,
        ema_decay=0.4,
    )
    monkeypatch.undo()
    trace = plain_loop(family, parameters, folder_batches(family, images / "train", 2, seed=3), plan)
    assert_log(out, trace)
    assert min(trace.norms) < 0.165 < max(trace.norms), "some steps are clipped, and some are not"
    averages = trace.averages
    assert_validations(recorder, {step: averages[step] for step in (0, 4, 8, 10)})
    base, *later = recorder.drawn_with
    assert not base
    for found, step in zip(later, (0, 4, 8, 10), strict=True):
        assert_same(found, averages[step])
    ours = {name.replace("text_encoder.text_model.", "text_encoder."): value for name, value in weights(out).items()}
    assert_same(ours, {n.replace(".text_model.", "."): value for n, value in exported(averages[10], 1.5).items()})
    moved = [float((averages[10][name] - averages[0][name]).abs().max()) for name in averages[0]]
    apart = [float((averages[10][name] - trace.weights[10][name]).abs().max()) for name in averages[0]]
    assert min(moved) > 1e-4
    assert max(apart) > 1e-4


def test_flow_matching(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stable Diffusion 3 through its own script, another schedule, weights of the noise levels, no moving average."""
    base = write_flow_base(tmp_path / "base", "sd3")
    recorder = Recorder(monkeypatch, StableDiffusion3Family)
    options: dict[str, Any] = {
        **{"family": "sd3", "pretrained_model_name_or_path": base, "train_data_dir": images},
        **{**COMMON, "output_dir": tmp_path / "out", "max_train_steps": 10, "train_batch_size": 3},
        **{"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "lr_scheduler": "linear", "lr_warmup_steps": 2},
        **{"weighting_scheme": "cosmap", "validation_steps": 5},
    }
    out = run_main(train_dit_lora, options)
    family = StableDiffusion3Family.from_pretrained(base, weighting_scheme="cosmap")
    parameters = add_lora(family.adapted, recorder.start, alpha=2)
    plan = Plan(learning_rate=1e-3, seed=3, accumulation=2, schedule="linear", warmup=2)
    monkeypatch.undo()
    trace = plain_loop(family, parameters, folder_batches(family, images / "train", 3, seed=3), plan)
    assert_log(out, trace)
    assert_validations(recorder, {step: trace.weights[step] for step in (0, 5, 10)})
    assert_same(weights(out), exported(trace.weights[10], 1.0))


def test_offset(random_sd: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The initial factors are subtracted in every step, without the adapter's dropout, and are no part of the file."""
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    options: dict[str, Any] = {
        **{"pretrained_model_name_or_path": random_sd, "train_data_dir": images, "output_dir": tmp_path / "out"},
        **{**COMMON, "init": "pissa", "lora_alpha": 1, "lora_dropout": 0.2, "max_train_steps": 10},
        **{"train_batch_size": 2, "learning_rate": 1e-3, "validation_steps": 5},
    }
    out = run_main(train_sd_lora, options)
    family = StableDiffusionFamily.from_pretrained(random_sd)
    parameters = add_lora(family.adapted, recorder.start, alpha=1, dropout=0.2)
    initial = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def subtract(layer: str) -> Any:
        product = 0.5 * initial[f"{layer}.lora_B"] @ initial[f"{layer}.lora_A"]
        return lambda module, inputs, output: output - inputs[0] @ product.T

    layers = sorted({name.rpartition(".")[0] for name in initial})
    for layer in layers:
        family.unet.get_submodule(layer.removeprefix("unet.")).register_forward_hook(subtract(layer))
    monkeypatch.undo()
    trace = plain_loop(family, parameters, folder_batches(family, images / "train", 2, 3), Plan(1e-3, seed=3))
    assert_log(out, trace)
    assert_validations(recorder, {step: trace.weights[step] for step in (0, 5, 10)}, tolerance=5e-6)
    saved = changes(out)
    assert saved.keys() == set(layers)
    for layer in layers:
        products = [0.5 * now[f"{layer}.lora_B"] @ now[f"{layer}.lora_A"] for now in (trace.weights[10], initial)]
        torch.testing.assert_close(saved[layer], products[0] - products[1], rtol=0.0, atol=5e-6)
        assert (products[0] - products[1]).abs().max() > 1e-3


def test_prior_preservation(random_sd: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch has as many images of the class, in an order of their own; their mean loss counts by its weight."""
    subject, cats = images / "train", write_images(tmp_path / "cats", count=3, size=(SIDE, SIDE), seed=7)
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    options: dict[str, Any] = {
        **{"pretrained_model_name_or_path": random_sd, "instance_data_dir": subject, "instance_prompt": "a sks cat"},
        **{"with_prior_preservation": True, "class_prompt": "a cat", "class_data_dir": cats, "num_class_images": 3},
        **{**COMMON, "output_dir": tmp_path / "out", "max_train_steps": 10, "train_batch_size": 2},
        **{"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "prior_loss_weight": 0.3},
    }
    out = run_main(train_sd_lora, options)
    family = StableDiffusionFamily.from_pretrained(random_sd)
    parameters = add_lora(family.adapted, recorder.start, alpha=2)
    own = folder_batches(family, subject, 2, 3, prompt="a sks cat")
    of_class = folder_batches(family, cats, 2, seed_of(3, "class"), prompt="a cat")

    def pair(number: int) -> dict[str, torch.Tensor]:
        ours, theirs = own(number), of_class(number)
        return {
            "is_class": torch.tensor([0, 0, 1, 1]),
            **{name: torch.cat([ours[name], theirs[name]]) for name in ours},
        }

    squares: list[torch.Tensor] = []
    own_mse = F.mse_loss

    def mse(*args: Any, **options: Any) -> torch.Tensor:
        squares.append(own_mse(*args, **options))
        return squares[-1]

    class Weighted:
        """The mean over the subject's images plus the weight times the mean over those of the class."""

        @staticmethod
        def loss(batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> torch.Tensor:
            family.loss(batch, generator)
            losses = squares.pop().mean(dim=(1, 2, 3))
            return losses[:2].mean() + 0.3 * losses[2:].mean()

    monkeypatch.undo()
    monkeypatch.setattr(F, "mse_loss", mse)
    trace = plain_loop(Weighted, parameters, pair, Plan(learning_rate=1e-3, seed=3, accumulation=2))
    assert_log(out, trace)
    assert_same(weights(out), exported(trace.weights[10], 1.0))


def test_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier whose head has a learning rate of its own, on augmented images."""
    base = write_classifier(tmp_path / "base")
    pixels, labels = [], []
    for label, name in enumerate(sorted(CLASSES)):
        for split, count in (("train", 3), ("validation", 1)):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                image = picture(name, 10 * label + index, side=SIDE).crop((0, 0, SIDE, SIDE))
                image.save(tmp_path / "data" / split / name / f"{index}.png")
                if split == "train":
                    pixels.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
                    labels.append(label)
    recorder = Recorder(monkeypatch, ClassifierFamily)
    options: dict[str, Any] = {
        **{"pretrained_model_name_or_path": base, "train_data_dir": tmp_path / "data", "output_dir": tmp_path / "out"},
        **{"init": "gaussian", "rank": 2, "seed": 5, "max_train_steps": 10, "train_batch_size": 4},
        **{"gradient_accumulation_steps": 2, "learning_rate": 2e-3, "head_lr": 5e-4, "lr_scheduler": "cosine"},
        **{"label_smoothing": 0.1, "mixup_alpha": 0.4, "color_jitter": 0.2, "use_ema": True, "ema_decay": 0.5},
        **{"validation_steps": 3},
    }
    out = run_main(train_classifier_lora, options)

    augmentation = Augmentation(crop_scale=(0.6, 1.0), flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2)
    family = ClassifierFamily.from_pretrained(
        base, class_names=sorted(CLASSES), augmentation=augmentation, label_smoothing=0.1, mixup_alpha=0.4
    )
    parameters = add_lora(family.adapted, recorder.start, alpha=2)
    for name, head in family.heads.items():
        for key, parameter in head.named_parameters():
            parameters[f"{name}.{key}"] = parameter
            parameter.requires_grad_(True)
    assert recorder.start.keys() == parameters.keys()

    def batch(number: int) -> dict[str, torch.Tensor]:
        chosen = [index for index, _ in data_order(len(labels), 4, 5, number)]
        return {"pixel_values": torch.stack(pixels)[chosen], "labels": torch.tensor(labels)[chosen]}

    plan = Plan(
        learning_rate=2e-3, other_rates={"model.classifier": 5e-4}, seed=5, accumulation=2, schedule="cosine",
        ema_decay=0.5,
    )  # fmt: skip
    monkeypatch.undo()
    trace = plain_loop(family, parameters, batch, plan)
    assert_log(out, trace)
    averages = trace.averages[10]
    heads = {name: value for name, value in averages.items() if "lora_" not in name}
    assert_same(adapter_file(out), {**exported(averages, 1.0), **heads})


@pytest.mark.parametrize("accumulation", [1, 4])
def test_vision_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int) -> None:
    """Answers of different lengths: a step is what one batch of all its questions would be."""
    base = write_vlm_base(tmp_path / "base", "llava")
    options: dict[str, Any] = {
        **{"pretrained_model_name_or_path": base, "train_data_file": write_answers(tmp_path / "data")},
        **{"init": "gaussian", "rank": 2, "seed": 7, "max_train_steps": 10, "train_batch_size": 1},
        **{"gradient_accumulation_steps": accumulation, "learning_rate": 1e-3, "lr_scheduler": "linear"},
        **{"output_dir": tmp_path / "out", "max_new_tokens": 2},
    }
    recorder = Recorder(monkeypatch, VisionLanguageFamily)
    out = run_main(train_vlm_lora, options)

    family = VisionLanguageFamily.from_pretrained(base)
    parameters = add_lora(family.adapted, recorder.start, alpha=2)
    plan = Plan(learning_rate=1e-3, seed=7, accumulation=accumulation, schedule="linear")
    monkeypatch.undo()
    trace = plain_loop(family, parameters, answer_batches(family, 1, 7), plan, size_of=num_answer_tokens)
    assert_log(out, trace)
    assert_same(adapter_file(out), exported(trace.weights[10], 1.0))


# ---------------------------------------------------------------------------------------------------------- comparison


def test_comparison(random_sd: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the comparison: schedule, clipping, the rate of A, latents encoded once."""
    recorder = Recorder(monkeypatch, StableDiffusionFamily)
    monkeypatch.setattr("lorainit_diffusers.comparison.run.write_report", lambda *args: [])
    options: dict[str, Any] = {
        **{"pretrained_model_name_or_path": random_sd, "train_data_dir": images, "output_dir": tmp_path / "out"},
        **{"inits": ["gaussian:a_lr_ratio=0.25"], "learning_rates": [2e-3], "seeds": [3], "num_workers": 1},
        **{"rank": 2, "resolution": SIDE, "max_train_steps": 10, "train_batch_size": 3, "eval_steps": [0, 4, 10]},
        **{"lr_scheduler": "cosine", "lr_warmup_steps": 3, "max_grad_norm": 0.13, "adam_epsilon": 1e-6},
        **{"caption_dropout": 0.3, "image_metrics": "none", "image_steps": [0, 6, 10]},
    }
    out = run_main(compare_inits, options)
    (folder,) = (out / "runs").iterdir()

    family = StableDiffusionFamily.from_pretrained(random_sd, caption_dropout=0.3)
    parameters = add_lora(family.adapted, recorder.start, alpha=2)
    everything = folder_batches(family, images / "train", NUM_IMAGES, 3)(0)  # the first epoch
    place = {index: row for row, (index, _) in enumerate(data_order(NUM_IMAGES, NUM_IMAGES, 3, 0))}
    mean, std = family.encode_images(everything.pop("pixel_values"))

    def batch(number: int) -> dict[str, torch.Tensor]:
        keys = data_order(NUM_IMAGES, 3, 3, number)
        draws = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for _, seed in keys]
        chosen = [place[index] for index, _ in keys]
        captioned = {name: values[chosen] for name, values in everything.items()}
        return {"latents": mean[chosen] + std[chosen] * torch.stack(draws), **captioned}

    plan = Plan(
        learning_rate=2e-3, other_rates={"lora_A": 5e-4}, seed=3, schedule="cosine", warmup=3, max_grad_norm=0.13,
        epsilon=1e-6,
    )  # fmt: skip
    monkeypatch.undo()
    trace = plain_loop(family, parameters, batch, plan)
    assert [call.loss for call in recorder.calls if call.training] == pytest.approx(trace.losses, rel=2e-6)
    assert min(trace.norms) < 0.13 < max(trace.norms)
    for step in (0, 6, 10):
        snapshot = load_file(folder / "snapshots" / f"step-{step:06d}.safetensors")
        assert_same({name: t for name, t in snapshot.items() if "lora_" in name}, trace.weights[step])
    assert_validations(recorder, {step: trace.weights[step] for step in (0, 4, 6, 10)})
