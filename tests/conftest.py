"""Fixtures shared by all tests: small Stable Diffusion bases, and few threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sd_fixtures import ROOT, write_images, write_random_sd, write_random_sdxl


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)  # the models are tiny, and there is a worker for each core


@pytest.fixture(scope="session")
def random_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion pipeline folder: 32x32 images, 8x8x4 latents, 56k parameters in the UNet.

    Tests that need no learned weights use it, so that they depend on no bundled file and take milliseconds.
    """
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "random-sd"
    write_random_sd(folder)
    return folder


@pytest.fixture(scope="session")
def random_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion XL pipeline folder: 32x32 images, 8x8x4 latents, 350k parameters in the UNet."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "random-sdxl"
    write_random_sdxl(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd(random_sd: Path) -> Path:
    """The bundled base, or the random one in a checkout without the assets."""
    bundled = ROOT / "assets" / "models" / "tiny-sd"
    return bundled if (bundled / "model_index.json").is_file() else random_sd


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    """Four captioned training images and two held-out ones."""
    write_images(tmp_path / "data" / "train")
    write_images(tmp_path / "data" / "heldout", count=2, seed=1)
    return tmp_path / "data"
