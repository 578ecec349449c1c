"""What tests of the flow-matching families share: bases by family, batches, one training step, stock pipelines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    FluxPipeline,
    Lumina2Pipeline,
    QwenImagePipeline,
    SanaPipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from dit_fixtures import write_random_flux, write_random_sd3
from flux2_fixtures import write_random_flux2
from lumina2_fixtures import write_random_lumina2
from PIL import Image
from qwen_image_fixtures import write_random_qwen_image
from sana_fixtures import write_random_sana
from torch import Tensor
from wan_fixtures import write_random_wan
from z_image_fixtures import write_random_z_image

from lorainit_diffusers.export import save_diffusers_lora
from lorainit_diffusers.families import family_class
from lorainit_diffusers.families.flow_matching import FlowMatchingFamily
from lorainit_diffusers.families.text_to_image import TextToImageFamily

# A kind is the short name of a family, and after a hyphen which of its bases.
WRITERS: dict[str, Any] = {
    "sd3": write_random_sd3,
    "flux": write_random_flux,
    "flux-kontext": partial(write_random_flux, kontext=True),
    "lumina2": write_random_lumina2,
    "flux2-dev": write_random_flux2,
    "flux2-klein": partial(write_random_flux2, klein=True),
    "qwen_image": write_random_qwen_image,
    "z_image": write_random_z_image,
    "sana": write_random_sana,
    "wan": write_random_wan,
}
STOCK: dict[str, type[DiffusionPipeline]] = {
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
    "flux-kontext": FluxKontextPipeline,
    "lumina2": Lumina2Pipeline,
    "flux2-dev": Flux2Pipeline,
    "flux2-klein": Flux2KleinPipeline,
    "qwen_image": QwenImagePipeline,
    "z_image": ZImagePipeline,
    "sana": SanaPipeline,
    "wan": WanPipeline,
}
KINDS = list(WRITERS)
# Tokens where the usual ones take time. The system message of Flux 2 alone has 173 letters.
TOKENS = {
    **{"flux": 24, "flux-kontext": 24, "flux2-dev": 196, "flux2-klein": 24},
    **{"qwen_image": 256, "z_image": 48, "sana": 24, "wan": 24},
}
# How a pipeline is told its guidance where it is not by `guidance_scale`.
GUIDANCE: dict[str, dict[str, Any]] = {
    "flux-kontext": {"guidance_scale": 3.0, "max_area": 32 * 32},
    "qwen_image": {"true_cfg_scale": 3.0, "negative_prompt": ""},
    "sana": {"guidance_scale": 3.0, "use_resolution_binning": False},
    "wan": {"guidance_scale": 3.0, "num_frames": 1},
}
CAPTIONS = ["cat 0", "a dog", "one long house"]


def write_base(folder: Path, kind: str, **options: Any) -> Path:
    """Write a random base of this family, the same one every time."""
    torch.manual_seed(0)
    WRITERS[kind](folder, **options)
    return folder


def kind_class(kind: str) -> type[TextToImageFamily]:
    return family_class(kind.partition("-")[0])


def load(base: Path, kind: str, **options: Any) -> FlowMatchingFamily:
    if kind in TOKENS:
        options = {"max_sequence_length": TOKENS[kind], **options}
    family = kind_class(kind).from_pretrained(base, **options)
    assert isinstance(family, FlowMatchingFamily)
    return family


def load_stock(base: Path, kind: str, **options: Any) -> Any:
    stock: Any = STOCK[kind].from_pretrained(base, **options)
    stock.set_progress_bar_config(disable=True)
    return stock


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(family: FlowMatchingFamily, captions: list[str] | None = None) -> dict[str, Tensor]:
    captions = captions or CAPTIONS
    pixel_values = torch.rand(len(captions), 3, 32, 32, generator=seeded(7)) * 2 - 1
    return {"pixel_values": pixel_values, **family.caption_inputs(captions)}


def pixel_difference(ours: Image.Image, theirs: Image.Image) -> int:
    """The largest difference of two images' 8-bit channels; an error where one is flat, which shows nothing."""
    first, second = (np.asarray(image).astype(int) for image in (ours, theirs))
    assert first.std() > 1
    return int(np.abs(first - second).max())


class Inputs:
    """Keyword arguments of a module's forward calls, in order."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []

        def record(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.calls.append(kwargs)

        self._handle = module.register_forward_pre_hook(record, with_kwargs=True)

    def stop(self) -> list[dict[str, Any]]:
        self._handle.remove()
        return self.calls


def train_one_step(family: FlowMatchingFamily, learning_rate: float = 0.02) -> None:
    """One Adam step on everything trainable: it moves each number that got a gradient by about the rate."""
    parameters = [p for module in family.adapted.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    family.loss(make_batch(family), seeded(5)).backward()
    optimizer.step()


def assert_stock_loader_reproduces(family: FlowMatchingFamily, base: Path, kind: str, folder: Path) -> None:
    """Save, load into the stock pipeline on the original base, and compare conditioning and predictions.

    The denoiser is compared on the very inputs that ours gets, so that nothing else hides in the difference.
    """
    path = save_diffusers_lora(family.adapted, folder)
    without = {} if family.text_encoders.keys() == family.TEXT_ENCODERS.keys() else NO_T5
    stock = load_stock(base, kind, **without)
    recorded = Inputs(family.denoiser)
    with torch.no_grad():
        family.loss(make_batch(family), seeded(6))
        kwargs = recorded.stop()[0]
        ours, untrained = _output(family.denoiser, kwargs), _output(stock.transformer, kwargs)
        stock.load_lora_weights(str(path.parent), weight_name=path.name)
        theirs = _output(stock.transformer, kwargs)
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
        assert (ours - untrained).abs().max() > 1e-2, "the adapter does nothing: the comparison shows nothing"
        for component in family.adapted.keys() - {"transformer"}:
            input_ids = family.caption_inputs(CAPTIONS)[f"input_ids{component.removeprefix('text_encoder')}"]
            outputs = [
                getattr(holder, component)(input_ids, output_hidden_states=True)
                for holder in (family, stock, load_stock(base, kind, **without))
            ]
            for index, output in enumerate((0, "hidden_states")):
                ours, theirs, untrained = (out[output][-2] if index else out[output] for out in outputs)
                torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
                assert (ours - untrained).abs().max() > 1e-2


def _output(transformer: Any, kwargs: dict[str, Any]) -> Tensor:
    output = transformer(**kwargs)[0]
    return torch.stack(output) if isinstance(output, list) else output


def draw(pipeline: Any, family: FlowMatchingFamily, kind: str, prompt: str = "a cat", seed: int = 3) -> np.ndarray:
    """(height, width, 3) in [0, 1] of two steps of a whole pipeline, which encodes the prompt itself."""
    options: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    options |= {"max_sequence_length": family.max_sequence_length, **GUIDANCE.get(kind, {"guidance_scale": 3.0})}
    return pipeline(prompt=prompt, generator=seeded(seed), return_dict=False, **options)[0][0]


NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
