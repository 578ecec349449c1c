"""A validation loss has no dropout of any kind, in any family: equal to the last bit with and without it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from family_fixtures import batches_of, load_family
from torch import nn

from lorainit_diffusers import initialize
from lorainit_diffusers.evaluation import fixed_noise_loss
from lorainit_diffusers.families import TEXT_TO_IMAGE_FAMILIES
from lorainit_diffusers.families.augment import Augmentation
from lorainit_diffusers.families.base import evaluating

# What each kind of family does to the samples of a training step.
DROPOUT: dict[str, dict[str, Any]] = {
    **{name: {"caption_dropout": 0.9} for name in TEXT_TO_IMAGE_FAMILIES},
    "classifier": {
        "augmentation": Augmentation((0.3, 0.8), 0.5, 40.0, 0.5, 0.5, 0.5, 0.5, 0.5, erase=0.5),
        "label_smoothing": 0.3,
        "mixup_alpha": 0.5,
    },
    "vlm": {},  # that of the adapters only
}


def adapt(family: Any, batches: list[dict[str, Any]], lora_dropout: float) -> None:
    initialize(family, "orthonormal", batches, rank=2, lora_dropout=lora_dropout, progress=False)
    torch.manual_seed(1)
    for module in family.adapted.values():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:  # so that the dropout before A can be seen
                nn.init.normal_(parameter, std=0.3)
        module.train()


@pytest.mark.parametrize("kind", [*TEXT_TO_IMAGE_FAMILIES, "classifier", "vlm"])
def test_the_validation_loss_has_no_dropout(kind: str, tmp_path: Path) -> None:
    plain, dropped = load_family(kind, tmp_path / "base"), load_family(kind, tmp_path / "base", **DROPOUT[kind])
    batches = batches_of(kind, plain)
    adapt(plain, batches, 0.0)
    adapt(dropped, batches, 0.5)

    expected, loss = fixed_noise_loss(plain, batches, 4), fixed_noise_loss(dropped, batches, 4)
    assert loss == expected

    # ... which the training loss of the same weights has
    def training_loss(family: Any) -> float:
        torch.manual_seed(2)
        return sum(family.loss(batch, torch.Generator().manual_seed(5)).item() for batch in batches)

    assert training_loss(dropped) != training_loss(plain)
    assert all(module.training for module in dropped.adapted.values())


def test_modes_are_what_they_were_afterwards(tmp_path: Path) -> None:
    family = load_family("sd", tmp_path / "base", caption_dropout=0.5)
    family.unet.train()
    family.unet.mid_block.eval()
    modes = [module.training for module in family.unet.modules()]
    with evaluating(family):
        assert family.evaluates
        assert not any(module.training for module in family.unet.modules())
        assert not torch.is_grad_enabled()
        with pytest.raises(ValueError, match="a batch needs"), evaluating(family):
            family.loss({}, torch.Generator())
        assert family.evaluates
    assert not family.evaluates
    assert torch.is_grad_enabled()
    assert [module.training for module in family.unet.modules()] == modes


def test_a_family_of_a_user_needs_no_mode_of_its_own() -> None:
    family = SimpleNamespace(adapted={"model": nn.Dropout()})
    with evaluating(cast(Any, family)):
        assert not family.adapted["model"].training
    assert family.adapted["model"].training


def test_evaluating_has_no_dropout_and_no_gradients_and_gives_the_modes_back():
    on, off = nn.Dropout(0.5), nn.Dropout(0.5).eval()
    seen: list[tuple[bool, bool]] = []
    family = cast(Any, SimpleNamespace(adapted={"on": on, "off": off}))

    def fail() -> None:
        seen.append((on.training, torch.is_grad_enabled()))
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), evaluating(family):
        fail()
    assert seen == [(False, False)]
    assert on.training
    assert not off.training
    assert torch.is_grad_enabled()
