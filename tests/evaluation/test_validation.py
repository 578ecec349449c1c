from __future__ import annotations

from pathlib import Path
from typing import Any

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


def same_images(family: StableDiffusionFamily, sizes: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """Batches of these sizes of one latent image, which is zero: what the denoiser sees is the noise."""
    input_ids = family.tokenize(["a cat"])
    return [{"latents": torch.zeros(size, 4, 8, 8), "input_ids": input_ids.expand(size, -1)} for size in sizes]


def test_every_image_of_every_batch_has_noise_of_its_own(random_sd: Path) -> None:
    family = StableDiffusionFamily.from_pretrained(random_sd)
    seen: list[torch.Tensor] = []
    hook = family.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(1)))
    fixed_noise_loss(family, same_images(family, (2, 2, 2)), 6)
    hook.remove()
    directions = torch.nn.functional.normalize(torch.cat(seen))
    assert (directions @ directions.T - torch.eye(6)).abs().max() < 0.5


def test_images_count_alike_in_batches_of_any_size(random_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = StableDiffusionFamily.from_pretrained(random_sd)
    losses: list[float] = []
    own = family.loss

    def loss(*args: Any) -> torch.Tensor:
        losses.append(float(value := own(*args)))
        return value

    monkeypatch.setattr(family, "loss", loss)
    found = fixed_noise_loss(family, same_images(family, (5, 1)), 6)
    assert found == pytest.approx((5 * losses[0] + losses[1]) / 6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)
