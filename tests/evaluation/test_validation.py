from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorainit_diffusers.evaluation import fixed_noise_loss
from lorainit_diffusers.families.sd import StableDiffusionFamily


def test_loss_is_the_same_in_every_call_and_follows_the_weights(random_sd: Path) -> None:
    family = StableDiffusionFamily.from_pretrained(random_sd)
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    input_ids = family.tokenize(["a cat"] * 5)
    batches = [{"latents": latents[i : i + 2], "input_ids": input_ids[i : i + 2]} for i in (0, 2, 4)]
    torch.manual_seed(1)
    first = fixed_noise_loss(family, batches, 5)
    torch.manual_seed(2)
    assert fixed_noise_loss(family, batches, 5) == first
    family.unet.conv_out.weight.data.add_(0.1)
    assert fixed_noise_loss(family, batches, 5) != first
    with pytest.raises(ValueError, match="no validation batches"):
        fixed_noise_loss(family, [], 5)
