"""What a comparison trains: for every family a task, which is a base with its data. A task is one process's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.utils.data import default_collate

from lorainit_diffusers.comparison.options import TASKS, ComparisonOptions, ImageComparisonOptions, load
from lorainit_diffusers.evaluation import fixed_noise_loss
from lorainit_diffusers.families import family_class
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.training.banner import Line, cut_lines
from lorainit_diffusers.training.bundled import BUNDLED_BASES
from lorainit_diffusers.training.data.captioned_images import CaptionedImages, caption_columns, fixed_batches
from lorainit_diffusers.training.data.images import ImageRecord
from lorainit_diffusers.training.data.notes import DataNotes, print_once
from lorainit_diffusers.training.data.order import DataOrder
from lorainit_diffusers.training.data.text_to_image import read_data
from lorainit_diffusers.training.options.fields import given
from lorainit_diffusers.training.run import weight_dtype
from lorainit_diffusers.training.start import lora_targets
from lorainit_diffusers.training.task import Task

# Prompts that have nothing to do with the training images: the bundled bases know emoji only.
EMOJI_DRIFT_PROMPTS = tuple(
    f"a {style} emoji of {name}"
    for style, name in (
        *(("noto", "rocket"), ("twemoji", "apple"), ("fluent", "smiling face"), ("emojione", "dog face")),
        *(("noto", "house"), ("twemoji", "alarm clock"), ("fluent", "tree"), ("emojione", "pizza")),
    )
)
DRIFT_PROMPTS = (
    "a photo of a house by a lake",
    "an oil painting of a ship at sea",
    "a photo of a bowl of fruit on a table",
    "a portrait of an old man",
    "a photo of a mountain road",
    "a watercolour of a tree in autumn",
    "a photo of a bicycle against a wall",
    "a street at night in the rain",
)
# For bases of ImageNet's classes, which know no sentences.
DRIFT_CLASSES = (
    *("golden retriever", "volcano", "pizza", "castle"),
    *("sports car", "balloon", "daisy", "space shuttle"),
)
# Fewer validation samples than this and their loss is passed over several times, each with its own noise.
MIN_VALIDATION_SAMPLES = 40


class ComparedTask(Protocol):
    """A base with its data, as far as a comparison needs it.

    Attributes:
        primary_metric: Name of what runs are compared by, one of those that `validate` returns.
    """

    primary_metric: str

    @property
    def family(self) -> ModelFamily:
        """What is adapted and trained."""
        ...

    @property
    def targets(self) -> Mapping[str, Sequence[str]]:
        """Layers that get an adapter, by component."""
        ...

    def batches(self, seed: int, batch_size: int, numbers: range) -> Iterator[dict[str, Any]]:
        """The batches of these numbers that the family's training script trains on with this seed."""
        ...

    def validate(self) -> dict[str, float]:
        """Metrics by name from one pass over the validation samples; the same in every call."""
        ...


def make_task(options: ComparisonOptions, device: torch.device) -> ComparedTask:
    """The base of `--family` with its data.

    Raises:
        ValueError, FileNotFoundError: For what the user can mend; on the data, before the base is loaded.
    """
    if isinstance(options, ImageComparisonOptions):
        return TextToImageTask(options, device)
    return make_answer_task(options, device)


def make_answer_task(options: ComparisonOptions, device: torch.device) -> Task:
    """As `make_task`, for a family of models that answer."""
    return load(TASKS[options.family].task)(options, device, weight_dtype(options.mixed_precision))


def split_records(
    options: ImageComparisonOptions, notes: DataNotes | None = None
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out images; where the data has no `heldout` split, every fourth image is held out.

    Raises:
        ValueError: When there are too few images to hold any out.
    """
    records, heldout = read_data(options, notes)
    if heldout:
        return records, heldout
    unique = list(dict.fromkeys(records))  # a repeated image must not be on both sides
    if len(unique) < 4:
        raise ValueError(
            f"a comparison needs held-out images: the data has {len(unique)} images and no heldout folder beside "
            "train; add images, so that a quarter of them can be held out"
        )
    return [r for i, r in enumerate(unique) if i % 4 != 3] * options.repeats, unique[3::4]


class TextToImageTask:
    """One base, one dataset: batches and the validation loss.

    Latents are encoded once, and captions, too, unless the text encoders are trained.

    Attributes:
        primary_metric: Name of what `validate` measures.
        family: What is adapted and trained: `family.adapted`, `family.loss`.
        targets: Layers that get an adapter, by component.
    """

    primary_metric: str = "validation_loss"

    def __init__(self, options: ImageComparisonOptions, device: torch.device) -> None:
        self.options = options
        self.records, self.heldout = split_records(options)
        self.family = load_family(options, device, weight_dtype(options.mixed_precision))
        if options.draws_images:
            check_drift_prompts(options, self.family)
        for label, text in captions_cut(self.family, [*self.records, *self.heldout]):
            print_once(f"{label}: {text}")
        resolution = resolution_of(options, self.family)
        if resolution % self.family.resolution_multiple:
            raise ValueError(f"--resolution {resolution} is not a multiple of {self.family.resolution_multiple}")
        encode = self.family.caption_inputs if options.train_text_encoder else self.family.embed_captions
        self.train_set, self.validation_set = (
            CaptionedImages(some, caption_columns(some, encode), resolution, True, False)
            for some in (self.records, self.heldout)
        )
        if not options.train_text_encoder:
            self.family.release_text_encoders([])
        for images in (self.train_set, self.validation_set):
            images.cache_latents(self.family.encode_images, options.train_batch_size, progress=False)
        self.targets: Mapping[str, Sequence[str]] = lora_targets(options, self.family, self.family.DENOISER)

    def batches(self, seed: int, batch_size: int, numbers: range) -> Iterator[dict[str, Tensor]]:
        """The batches of these numbers that the family's training script trains on with this seed."""
        for keys in DataOrder(len(self.train_set), batch_size, seed, numbers):
            yield default_collate([self.train_set[key] for key in keys])

    def validate(self) -> dict[str, float]:
        """Loss on the held-out images; noise and timesteps are the same in every call."""
        repeats = -(-MIN_VALIDATION_SAMPLES // len(self.validation_set))
        size = self.options.train_batch_size
        batches = (b for _ in range(repeats) for b in fixed_batches(self.validation_set, size))
        return {self.primary_metric: fixed_noise_loss(self.family, batches, repeats * len(self.validation_set))}


def load_family(options: ImageComparisonOptions, device: torch.device, dtype: torch.dtype) -> TextToImageFamily:
    """The base in this precision, with the options of its family."""
    kind = family_class(options.family)
    family = kind.from_pretrained(
        options.pretrained_model_name_or_path,
        revision=options.revision,
        variant=options.variant,
        cache_dir=options.cache_dir,
        weight_dtype=dtype,
        device=device,
        train_text_encoder=options.train_text_encoder,
        caption_dropout=options.caption_dropout,
        **{name: getattr(options, name) for name in kind.OPTIONS},
    )
    if device.type == "cpu" and kind.DENOISER == "unet":
        # The backward pass of the fused attention is slow on processors: plain products are 1.2 times as fast.
        family.denoiser.set_attn_processor(AttnProcessor())
    return family


def resolution_of(options: ImageComparisonOptions, family: TextToImageFamily) -> int:
    """Side of the images: what `--resolution` says, or the base's own."""
    return given(options.resolution) or family.resolution


def captions_cut(family: TextToImageFamily, records: Sequence[ImageRecord]) -> list[Line]:
    """The captions that a base cannot take whole, for the banner."""
    names = {record.caption: record.path.name for record in records}
    return cut_lines(list(names.values()), family.caption_lengths(list(names)))


def is_bundled(options: ComparisonOptions) -> bool:
    """Whether the base is a bundled one."""
    return str(options.pretrained_model_name_or_path) in BUNDLED_BASES.values()


def drift_prompts(options: ImageComparisonOptions) -> list[str]:
    """Prompts that have nothing to do with the data: the user's, or what suits the base."""
    if options.drift_prompts:
        return options.drift_prompts
    if is_bundled(options):
        return list(EMOJI_DRIFT_PROMPTS)
    return list(DRIFT_PROMPTS if family_class(options.family).TEXT_ENCODERS else DRIFT_CLASSES)


def check_drift_prompts(options: ImageComparisonOptions, family: TextToImageFamily) -> None:
    """See that the base takes these prompts, before hours of training.

    Raises:
        ValueError: For one that is no class of a base of classes.
    """
    try:
        family.caption_inputs(drift_prompts(options))
    except ValueError as error:
        raise ValueError(f"--drift_prompts: {error}") from error
