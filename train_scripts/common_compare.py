"""What `compare_inits.py` trains and scores: for every family a task, which is a base with its data.

`TextToImageTask` is that of text-to-image bases, whose samples `ImageScorer` draws and scores; `TASKS` says where those
of the other families are. A task is one process's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from common import BUNDLED_BASES, ROOT, derive_seed, evaluating, print_once
from common_banner import data_source
from common_compare_options import TASKS as TASKS
from common_compare_options import TaskKind as TaskKind
from common_data import (
    CaptionedImages,
    DataNotes,
    DataOrder,
    ImageRecord,
    caption_columns,
    fixed_batches,
    load_image,
    read_data,
)
from common_run import lora_targets, weight_dtype
from common_tasks import Task
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from lorainit_diffusers import adapters
from lorainit_diffusers.evaluation import fixed_noise_loss, metrics
from lorainit_diffusers.evaluation.encoders import ImageEncoder, ImageTextEncoder, load_encoder
from lorainit_diffusers.families import family_class
from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.training.banner import Line, caption_line, count_line, cut_lines, size_lines

BUNDLED_ENCODER = ROOT / "assets" / "models" / "tiny-clip"
HUB_ENCODERS = ("facebook/dinov2-small", "openai/clip-vit-base-patch32")
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
# Samples of one prompt, for the diversity among them.
NUM_DIVERSITY_PROMPTS = 2
NUM_DIVERSITY_SAMPLES = 4
# Fewer validation samples than this and their loss is passed over several times, each with its own noise.
MIN_VALIDATION_SAMPLES = 40
GRID_COLUMNS = 6
MIN_KID_SAMPLES = 4


def make_task(args: argparse.Namespace, device: torch.device) -> TextToImageTask | Task:
    """The base of `--family` with its data.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend; on the data, before the base is loaded.
    """
    if args.family not in TASKS:
        return TextToImageTask(args, device)
    kind = TASKS[args.family]
    return kind.load(kind.task)(args, device, weight_dtype(args.mixed_precision))


def split_records(
    args: argparse.Namespace, notes: DataNotes | None = None
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out images; where the data has no `heldout` split, every fourth image is held out.

    Raises:
        ValueError: when there are too few images to hold any out.
    """
    records, heldout = read_data(args, notes)
    if heldout:
        return records, heldout
    unique = list(dict.fromkeys(records))  # a repeated image must not be on both sides
    if len(unique) < 4:
        raise ValueError(
            f"a comparison needs held-out images: the data has {len(unique)} images and no heldout folder beside "
            "train; add images, so that a quarter of them can be held out"
        )
    return [r for i, r in enumerate(unique) if i % 4 != 3] * args.repeats, unique[3::4]


class TextToImageTask:
    """One base, one dataset: batches and the validation loss.

    Latents are encoded once, and captions, too, unless the text encoders are trained.

    Attributes:
        primary_metric: name of what `validate` measures.
        family: what is adapted and trained: `family.adapted`, `family.loss`.
        targets: layers that get an adapter, by component.
    """

    primary_metric = "validation_loss"

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.records, self.heldout = split_records(args)
        self.family = load_family(args, device, weight_dtype(args.mixed_precision))
        if args.image_metrics != "none":
            check_drift_prompts(args, self.family)
        for label, text in captions_cut(self.family, [*self.records, *self.heldout]):
            print_once(f"{label}: {text}")
        resolution = args.resolution or self.family.resolution
        if resolution % self.family.resolution_multiple:
            raise ValueError(f"--resolution {resolution} is not a multiple of {self.family.resolution_multiple}")
        encode = self.family.caption_inputs if args.train_text_encoder else self.family.embed_captions
        self.train_set, self.validation_set = (
            CaptionedImages(some, caption_columns(some, encode), resolution, True, False)
            for some in (self.records, self.heldout)
        )
        if not args.train_text_encoder:
            self.family.release_text_encoders([])
        for images in (self.train_set, self.validation_set):
            images.cache_latents(self.family.encode_images, args.train_batch_size, progress=False)
        self.targets = lora_targets(args, self.family, self.family.DENOISER)

    def batches(self, seed: int, batch_size: int, numbers: range) -> Iterator[dict[str, Tensor]]:
        """The batches of these numbers that the family's training script trains on with this seed."""
        for keys in DataOrder(len(self.train_set), batch_size, seed, numbers):
            yield default_collate([self.train_set[key] for key in keys])

    def validate(self) -> dict[str, float]:
        """Loss on the held-out images; noise and timesteps are the same in every call."""
        repeats = -(-MIN_VALIDATION_SAMPLES // len(self.validation_set))
        batches = (b for _ in range(repeats) for b in fixed_batches(self.validation_set, self.args.train_batch_size))
        with evaluating(self.family.adapted.values()):
            loss = fixed_noise_loss(self.family, batches, repeats * len(self.validation_set))
        return {self.primary_metric: loss}


class ImageScorer:
    """Draws samples and scores them.

    The model is in float32 whatever it was trained in: the samples of an offset init at step 0 are then the base's.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.records, self.heldout = split_records(args)
        self.family = load_family(args, device, torch.float32)
        self.resolution = args.resolution or self.family.resolution
        self._features: dict[Any, Tensor] = {}
        self.encoders = [load_encoder(name, device) for name in encoder_names(args)]
        spread = self.heldout[:: max(1, len(self.heldout) // args.num_eval_prompts)]
        # with fewer held-out images than prompts a caption is drawn from several seeds
        self.truths = [spread[index % len(spread)] for index in range(args.num_eval_prompts)]
        self.everything = [*self.records, *self.heldout]
        self.prompts = [record.caption for record in self.truths]
        self.drift_prompts = drift_prompts(args)
        diverse = self.prompts[:NUM_DIVERSITY_PROMPTS]
        self.diversity_prompts = [prompt for prompt in diverse for _ in range(NUM_DIVERSITY_SAMPLES)]
        if not args.train_text_encoder:
            self.family.release_text_encoders([*self.prompts, *self.drift_prompts])

    @cached_property
    def grid_columns(self) -> list[str]:
        """Prompts of the columns of the picture grid: held-out prompts, and the first unrelated one."""
        return [*self.prompts[: GRID_COLUMNS - 1], self.drift_prompts[0]]

    def draw(self) -> tuple[dict[str, list[Image.Image]], list[Image.Image]]:
        """Samples by purpose with the weights as they are now, and the strip for the picture grid."""
        with evaluating(self.family.adapted.values()):
            drawn = {
                purpose: self._sample(prompts, purpose)
                for purpose, prompts in (
                    ("prompts", self.prompts),
                    ("diversity", self.diversity_prompts),
                    ("drift", self.drift_prompts),
                )
            }
        return drawn, [*drawn["prompts"][: GRID_COLUMNS - 1], drawn["drift"][0]]

    def draw_base(self) -> tuple[dict[str, list[Image.Image]], list[Image.Image]]:
        """As :meth:`draw`, for the base model."""
        with adapters.adapters_disabled(self.family.adapted):
            return self.draw()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapters."""
        adapters.load_adapter_state_dict(dict(self.family.adapted), state, use_rslora=self.args.use_rslora)

    def score(self, drawn: Mapping[str, list[Image.Image]], base: Mapping[str, list[Image.Image]]) -> dict[str, float]:
        """Every metric under the name `metric@encoder`."""
        scores: dict[str, float] = {}
        for encoder in self.encoders:
            features = encoder.encode_images(drawn["prompts"])
            truths, training = self._real(encoder, self.truths), self._real(encoder, self.records)
            values = {
                "image_similarity": metrics.image_similarity(features, training),
                "drift": metrics.drift(encoder.encode_images(drawn["drift"]), encoder.encode_images(base["drift"])),
                "perceptual_diversity": metrics.diversity(
                    encoder.patch_features(drawn["diversity"]), self.diversity_prompts
                ),
            }
            if len({record.caption for record in self.heldout}) == len(self.heldout):
                # a caption that several images share says of none which sample it is the truth of
                values = {"paired_similarity": metrics.paired_similarity(features, truths), **values}
            if len(self.prompts) >= MIN_KID_SAMPLES <= len(self.everything):
                lengths_kept = encoder.encode_images(drawn["prompts"], normalize=False)
                values["kid"] = metrics.kid(lengths_kept, self._real(encoder, self.everything, normalize=False)).full
            if isinstance(encoder, ImageTextEncoder):
                values["text_alignment"] = metrics.text_alignment(features, encoder.encode_texts(self.prompts))
            scores |= {f"{metric}@{encoder.name}": value for metric, value in values.items()}
        return scores

    def _real(self, encoder: ImageEncoder, records: Sequence[ImageRecord], normalize: bool = True) -> Tensor:
        key = (encoder.name, len(records), records[0].path.as_posix(), normalize)
        if key not in self._features:
            images = [load_image(record) for record in records]
            self._features[key] = encoder.encode_images(images, normalize=normalize)
        return self._features[key]

    def _sample(self, prompts: Sequence[str], purpose: str) -> list[Image.Image]:
        images: list[Image.Image] = []
        size = self.args.sample_batch_size
        for start in range(0, len(prompts), size):
            chunk = list(prompts[start : start + size])
            images += self.family.sample(
                chunk,
                [derive_seed("sample", purpose, start + column) for column in range(len(chunk))],
                resolution=self.resolution,
                num_inference_steps=self.args.validation_inference_steps,
                guidance_scale=self.args.validation_guidance_scale,
            )
        return images


def image_comparison_lines(args: argparse.Namespace, notes: DataNotes, *, captions: bool) -> tuple[list[Line], int]:
    """For the banner: what images and captions are compared on, and how many are trained on.

    Args:
        args: the options.
        notes: gets what reading left out.
        captions: load the base to see which captions it cuts; otherwise `TextToImageTask` says it.
    """
    records, heldout = split_records(args, notes)
    sizes = [size for part in notes.sizes.values() for size in part]
    lines = [
        count_line({"training": len(records), "held out": len(heldout)}, data_source(args)),
        caption_line([record.caption for record in records]),
        *size_lines(sizes, None if args.resolution is None else [(args.resolution, args.resolution)] * len(sizes)),
    ]
    if captions:
        family = load_family(args, torch.device("cpu"), weight_dtype(args.mixed_precision))
        lines += captions_cut(family, [*records, *heldout])
    return lines, len(records)


def captions_cut(family: TextToImageFamily, records: Sequence[ImageRecord]) -> list[Line]:
    """The captions that a base cannot take whole, for the banner."""
    names = {record.caption: record.path.name for record in records}
    return cut_lines(list(names.values()), family.caption_lengths(list(names)))


def is_bundled(args: argparse.Namespace) -> bool:
    """Whether the base is a bundled one."""
    return str(args.pretrained_model_name_or_path) in BUNDLED_BASES.values()


def drift_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts that have nothing to do with the data: the user's, or what suits the base."""
    if args.drift_prompts:
        return args.drift_prompts
    if is_bundled(args):
        return list(EMOJI_DRIFT_PROMPTS)
    return list(DRIFT_PROMPTS if family_class(args.family).TEXT_ENCODERS else DRIFT_CLASSES)


def check_drift_prompts(args: argparse.Namespace, family: TextToImageFamily) -> None:
    """See that the base takes these prompts, before hours of training.

    Raises:
        ValueError: for one that is no class of a base of classes.
    """
    try:
        family.caption_inputs(drift_prompts(args))
    except ValueError as error:
        raise ValueError(f"--drift_prompts: {error}") from error


def encoder_names(args: argparse.Namespace) -> list[str]:
    """The encoders that images are scored with: the bundled one for bundled bases, DINOv2 and CLIP otherwise."""
    return list(args.encoders or ([str(BUNDLED_ENCODER)] if is_bundled(args) else HUB_ENCODERS))


def load_family(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> TextToImageFamily:
    """The base in this precision, with the options of its family."""
    kind = family_class(args.family)
    family = kind.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        weight_dtype=dtype,
        device=device,
        train_text_encoder=args.train_text_encoder,
        caption_dropout=args.caption_dropout,
        **{name: getattr(args, name) for name in kind.OPTIONS},
    )
    if device.type == "cpu" and kind.DENOISER == "unet":
        # The backward pass of the fused attention is slow on processors: plain products are 1.2 times as fast.
        family.denoiser.set_attn_processor(AttnProcessor())
    return family
