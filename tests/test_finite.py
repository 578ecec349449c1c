"""Nothing that is not finite is ever written, by any of the formats, and what was there before stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier_fixtures import random_classifier
from torch import nn

from lorainit_diffusers import initialize, save_diffusers_lora, save_kohya_lora, save_merged, save_peft_lora
from lorainit_diffusers.adapters import trainable_parameters
from lorainit_diffusers.finite import check_finite, first_not_finite
from lorainit_diffusers.training.checkpoints import load_training_state, save_training_state

BAD = [math.nan, math.inf, -math.inf]


def adapted(method: str = "pissa", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = random_classifier()
    initialize(model, method, rank=2, target_modules=["query", "value", "q_proj", "v_proj"], progress=False, **options)
    return model


SAVERS: dict[str, Callable[[nn.Module, Path], object]] = {
    "diffusers": lambda model, folder: save_diffusers_lora({"unet": model}, folder),
    "kohya": lambda model, folder: save_kohya_lora({"unet": model}, folder / "k.safetensors", sdxl=False),
    "peft": lambda model, folder: save_peft_lora(model, folder, full_modules=["classifier"]),
    "merged": lambda model, folder: save_merged(model, folder),
}


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_magnitude_vector"])
@pytest.mark.parametrize("saver", SAVERS)
def test_no_format_takes_factors_that_are_not_finite(saver: str, part: str, value: float, tmp_path: Path) -> None:
    dora = part == "lora_magnitude_vector"
    model = adapted("kaiming", use_dora=True) if dora else adapted()
    SAVERS[saver](model, tmp_path / "good")
    name, parameter = next((n, p) for n, p in model.named_parameters() if part in n and p.requires_grad)
    with torch.no_grad():
        parameter.flatten()[0] = value
    with pytest.raises(ValueError, match=r"is not written: .*not finite.*lower learning rate") as error:
        SAVERS[saver](model, tmp_path / "bad")
    assert name.split(f".{part}")[0].removeprefix("base_model.model.") in str(error.value)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("value", BAD)
def test_a_head_that_is_not_finite_is_not_saved(value: float, tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        model.get_parameter("classifier.bias")[1] = value
    with pytest.raises(ValueError, match=r"'classifier\.bias' holds values that are not finite"):
        save_peft_lora(model, tmp_path / "bad", full_modules=["classifier"])
    assert not (tmp_path / "bad").exists()


def test_a_sum_that_float16_cannot_hold_is_not_merged(tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.mul_(3e3)
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.half()
    with pytest.raises(ValueError, match=r"the merged model is not written: .*not finite"):
        save_merged(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["weight", "optimiser"])
def test_a_checkpoint_that_is_not_finite_leaves_the_last_good_one(where: str, value: float, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()

    def save() -> None:
        state = model.state_dict()
        save_training_state(tmp_path / "checkpoint-1", tensors=state, optimizer=optimizer, lr_scheduler=None, step=1)

    save()
    good = load_training_state(tmp_path / "checkpoint-1").tensors
    with torch.no_grad():
        if where == "weight":
            model.weight[0, 0] = value
        else:
            optimizer.state[model.bias]["exp_avg"][0] = value
    with pytest.raises(ValueError, match=r"step 1 is not written: .*not finite"):
        save()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    again = load_training_state(tmp_path / "checkpoint-1").tensors
    assert all(torch.equal(good[name], again[name]) for name in good)


def test_more_files_come_with_the_checkpoint_or_not_at_all(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    options: dict[str, Any] = {"tensors": model.state_dict(), "optimizer": optimizer, "lr_scheduler": None, "step": 1}
    folder = tmp_path / "checkpoint-1"
    save_training_state(folder, **options, write_more=lambda place: (place / "more.txt").write_text("1") and None)
    assert (folder / "more.txt").read_text() == "1"

    def fail(place: Path) -> None:
        (place / "more.txt").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_training_state(folder, **options, write_more=fail)
    assert (folder / "more.txt").read_text() == "1"
    assert load_training_state(folder).step == 1


def test_the_first_bad_tensor_is_named() -> None:
    tensors = {"a": torch.ones(2), "count": torch.tensor([1]), "b": torch.tensor([math.nan]), "c": torch.tensor([1.0])}
    assert first_not_finite(tensors) == "b"
    assert first_not_finite({"a": tensors["a"], "count": tensors["count"]}) is None
    assert first_not_finite({}) is None
    with pytest.raises(ValueError, match="the file is not written: 'b'"):
        check_finite(tensors, "the file")
