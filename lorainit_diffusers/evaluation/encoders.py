"""Feature extractors of the metrics: images and texts in, vectors out.

Two kinds of encoder, told apart by the `model_type` of their configuration: CLIP, which places images and texts in one
space, and vision backbones such as DINOv2, which know images only. Any object with the methods of `ImageEncoder` (or of
`ImageTextEncoder`) can stand in for them.

A number from one encoder says nothing beside a number from another, so every encoder has a name to print with a score.
Images go through Pillow and numpy even where torchvision is installed: the two resize differently, and a score must not
depend on what else is in the environment.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from lorainit_diffusers.loading.errors import first_line, loading_errors
from lorainit_diffusers.loading.files import check_config, check_own_code, check_weights
from lorainit_diffusers.loading.hub import hub_options
from lorainit_diffusers.loading.weights import check_complete, check_finite, load_model

DEFAULT_IMAGE_ENCODER = "facebook/dinov2-small"
DEFAULT_TEXT_ENCODER = "openai/clip-vit-base-patch32"

_NUM_PATCH_LAYERS = 4
_REMEDY = "give a folder in the transformers layout with safetensors weights, or a hub name"


@runtime_checkable
class ImageEncoder(Protocol):
    """What the image metrics need."""

    @property
    def name(self) -> str:
        """Printed beside every score."""
        ...

    def encode_images(self, images: Sequence[Image.Image], *, normalize: bool = True) -> Tensor:
        """One feature vector an image: (n, d) float32 on the CPU, of unit length unless `normalize` is off."""
        ...

    def patch_features(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Features of every patch at several depths: (n, tokens, d) float32 on the CPU each, not normalised."""
        ...


@runtime_checkable
class ImageTextEncoder(ImageEncoder, Protocol):
    """What the text metrics need: images and texts in one space."""

    def encode_texts(self, texts: Sequence[str], *, normalize: bool = True) -> Tensor:
        """One feature vector a text: (n, d) float32 on the CPU, of unit length unless `normalize` is off."""
        ...


@dataclass(frozen=True, eq=False)
class VisionEncoder:
    """A vision backbone of transformers: DINO, DINOv2, ViT, ...

    The feature is the model's pooled output where it has one (for DINOv2 the class token after the last normalisation,
    for convolutional models the mean over positions), else the class token.

    Attributes:
        name: Printed beside every score.
        model: Takes `pixel_values`; in evaluation mode, float32.
        image_processor: Of transformers; images to `pixel_values`.
        batch_size: Images at a time.
    """

    name: str
    model: Any
    image_processor: Any
    batch_size: int = 32

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], *, normalize: bool = True) -> Tensor:
        """One feature vector an image: (n, d) float32 on the CPU, of unit length unless `normalize` is off.

        Raises:
            ValueError: When there is no image.
        """
        features: list[Tensor] = []
        for pixel_values in _pixel_batches(self, images):
            output = self.model(pixel_values=pixel_values)
            pooled = getattr(output, "pooler_output", None)
            features.append((output.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1))
        return _features(features, normalize)

    def patch_features(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Outputs of up to four blocks at even depths, without class and register tokens: (n, tokens, d) each.

        Raises:
            ValueError: When there is no image.
        """
        return _patch_features(self.model, self.model.config, _pixel_batches(self, images))


@dataclass(frozen=True, eq=False)
class ClipEncoder:
    """A `CLIPModel` of transformers; features are its projections into the space that images and texts share.

    Attributes:
        name: Printed beside every score.
        model: A `CLIPModel` in evaluation mode, float32.
        image_processor: Of transformers; images to `pixel_values`.
        tokenizer: Of transformers; its texts are cut to the model's length.
        batch_size: Images or texts at a time.
    """

    name: str
    model: Any
    image_processor: Any
    tokenizer: Any
    batch_size: int = 32

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], *, normalize: bool = True) -> Tensor:
        """One feature vector an image: (n, d) float32 on the CPU, of unit length unless `normalize` is off.

        Raises:
            ValueError: When there is no image.
        """
        outputs = [self.model.get_image_features(pixel_values=pixels) for pixels in _pixel_batches(self, images)]
        return _features([_projected(output) for output in outputs], normalize)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], *, normalize: bool = True) -> Tensor:
        """One feature vector a text: (n, d) float32 on the CPU, of unit length unless `normalize` is off.

        Texts longer than the model reads are cut, as in CLIPScore.

        Raises:
            ValueError: When there is no text.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"encoder {self.name!r} takes a non-empty list of texts, not {texts!r}")
        length = self.model.config.text_config.max_position_embeddings
        outputs: list[Tensor] = []
        for start in range(0, len(texts), self.batch_size):
            batch = list(texts[start : start + self.batch_size])
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            tokens = {key: tokens[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
            outputs.append(_projected(self.model.get_text_features(**tokens)))
        return _features(outputs, normalize)

    def patch_features(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Outputs of up to four blocks of the image tower at even depths: (n, tokens, d) each, no class token.

        Raises:
            ValueError: When there is no image.
        """
        return _patch_features(self.model.vision_model, self.model.config.vision_config, _pixel_batches(self, images))


def load_encoder(
    path_or_name: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    batch_size: int = 32,
) -> ImageEncoder:
    """Load an encoder in float32: CLIP by its `model_type`, anything else as a vision backbone.

    The encoder is named after the hub repository, or after the last part of a local folder's path.

    Args:
        path_or_name: Folder in the transformers layout with safetensors weights, or a hub name.
        device: Where the model runs.
        revision: Of the hub repository.
        batch_size: Images or texts at a time.

    Returns:
        A `ClipEncoder`, which is an `ImageTextEncoder` too, or a `VisionEncoder`. See `require_text_encoder`.

    Raises:
        FileNotFoundError: When there is no such encoder, or parts of it are missing.
        ValueError: When the model is no image encoder, or its checkpoint lacks weights.
    """
    source = os.fspath(path_or_name)
    _check_folder(source)
    name = Path(source).resolve().name if Path(source).is_dir() else source
    hub = {"revision": revision, **hub_options("encoder", source, "config.json", revision=revision)}
    with loading_errors("encoder", source, _REMEDY):
        try:
            config: Any = AutoConfig.from_pretrained(source, trust_remote_code=False, **hub)
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise
            raise ValueError(f"encoder {source!r} is not a model of transformers: {first_line(error)}") from error
    is_clip = config.model_type == "clip"
    if is_clip and Path(source).is_dir():
        _check_tokenizer(Path(source))
    # DINO checkpoints of ViT come without a pooler, or with one that was never trained
    options: dict[str, Any] = {"add_pooling_layer": False} if config.model_type == "vit" else {}
    model, problems = load_model(
        AutoModel, source, what="encoder", remedy=_REMEDY, same_class=not options, config=config, **hub, **options
    )
    with loading_errors("encoder", source, _REMEDY):
        image_processor = AutoImageProcessor.from_pretrained(
            source, trust_remote_code=False, **hub, **_without_torchvision()
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub) if is_clip else None
    if not is_clip and model.main_input_name != "pixel_values":
        raise ValueError(
            f"encoder {source!r} is of type {config.model_type!r}, which does not take images alone; give a CLIP model "
            f"(such as {DEFAULT_TEXT_ENCODER}) or a vision backbone (such as {DEFAULT_IMAGE_ENCODER})"
        )
    check_complete(problems, model, f"the checkpoint of encoder {source!r}")
    check_finite(model, f"the checkpoint of encoder {source!r}")
    model.to(device=device, dtype=torch.float32).requires_grad_(False)
    if not is_clip:
        return VisionEncoder(name, model, image_processor, batch_size)
    end = config.text_config.eos_token_id
    # CLIP reads a text's feature at its end token; 2 is the value of old configurations, which stands for "largest id"
    if end not in (2, cast(Any, tokenizer).eos_token_id):
        raise ValueError(
            f"encoder {source!r} looks for the end token {end}, but its tokenizer ends texts with "
            f"{cast(Any, tokenizer).eos_token_id}; set text_config.eos_token_id in its config.json"
        )
    return ClipEncoder(name, model, image_processor, tokenizer, batch_size)


def require_text_encoder(encoder: ImageEncoder) -> ImageTextEncoder:
    """The same encoder, if it reads texts.

    Raises:
        ValueError: When it knows images only.
    """
    if not isinstance(encoder, ImageTextEncoder):
        raise ValueError(
            f"encoder {encoder.name!r} knows images only and has no text alignment; "
            f"give a CLIP model, such as {DEFAULT_TEXT_ENCODER}"
        )
    return encoder


def _pixel_batches(encoder: VisionEncoder | ClipEncoder, images: Sequence[Image.Image]) -> Iterator[Tensor]:
    """Preprocessed images, (batch, 3, height, width), on the model's device."""
    if not images:
        raise ValueError(f"encoder {encoder.name!r} was given no images")
    for start in range(0, len(images), encoder.batch_size):
        batch = [image.convert("RGB") for image in images[start : start + encoder.batch_size]]
        yield encoder.image_processor(images=batch, return_tensors="pt")["pixel_values"].to(encoder.model.device)


def _features(batches: Sequence[Tensor], normalize: bool) -> Tensor:
    features = torch.cat([batch.float().cpu() for batch in batches])
    return F.normalize(features, dim=-1) if normalize else features


def _projected(output: Any) -> Tensor:
    """Transformers 4 returns the projection itself, transformers 5 an object that holds it."""
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.no_grad()
def _patch_features(model: Any, config: Any, pixel_batches: Iterator[Tensor]) -> list[Tensor]:
    batches: list[list[Tensor]] = []
    for pixel_values in pixel_batches:
        # the first of the hidden states is the embedding: no block has seen it
        hidden_states = model(pixel_values=pixel_values, output_hidden_states=True).hidden_states[1:]
        count = min(_NUM_PATCH_LAYERS, len(hidden_states))
        chosen = [hidden_states[len(hidden_states) * (index + 1) // count - 1] for index in range(count)]
        patch = getattr(config, "patch_size", 1)
        num_patches = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
        batches.append([_tokens(states, num_patches).float().cpu() for states in chosen])
    return [torch.cat(layer) for layer in zip(*batches, strict=True)]


def _tokens(states: Tensor, num_patches: int) -> Tensor:
    """(n, tokens, d) of (n, special + patches, d), where class and register tokens come first, or of (n, d, h, w)."""
    return states[:, -num_patches:] if states.ndim == 3 else states.flatten(2).transpose(1, 2)


def _without_torchvision() -> dict[str, Any]:
    """The option that selects the image processors on Pillow and numpy; transformers 5 has renamed it."""
    renamed = importlib.util.find_spec("transformers.image_processing_backends") is not None
    return {"backend": "pil"} if renamed else {"use_fast": False}


def _check_folder(source: str) -> None:
    """Say what is missing in a local folder; transformers' own answers differ between its versions."""
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or "\\" in source:
            raise FileNotFoundError(
                f"encoder {source!r} is not a folder; give a folder in the transformers layout or a hub name"
            )
        return
    _check_any(folder, ("config.json",), "its configuration; a folder in the transformers layout is needed")
    config = check_config(folder, f"encoder {source!r}")
    # without it transformers 4 guesses the type from the name of the folder
    if "model_type" not in config:
        raise ValueError(f"encoder {source!r} is not a model of transformers: its config.json names no model_type")
    check_own_code(config, config["model_type"] in CONFIG_MAPPING, "encoder", source)
    check_weights(folder, f"encoder {source!r}", "model")
    _check_any(
        folder,
        ("preprocessor_config.json", "processor_config.json"),
        "how images are prepared; save the image processor into the folder",
    )


def _check_tokenizer(folder: Path) -> None:
    _check_any(folder, ("tokenizer.json", "vocab.json"), "its tokenizer; save the tokenizer into the folder")


def _check_any(folder: Path, files: Sequence[str], meaning: str) -> None:
    if not any((folder / file).is_file() for file in files):
        raise FileNotFoundError(f"encoder {str(folder)!r} has no {' or '.join(files)}: {meaning}")
