"""Images and captions, and what is done to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from lorainit_diffusers.ranges import COUNT, NOT_NEGATIVE, Range
from lorainit_diffusers.training.choices import INTERPOLATIONS
from lorainit_diffusers.training.options.fields import MayChange, Options, Place, option
from lorainit_diffusers.training.ranges import FRACTION, SIDE


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(Options):
    """Where images and captions are."""

    _argument_group_name = "data"

    train_data_dir: Annotated[str | None, Place("training data")] = option(
        None, "captioned images: metadata.jsonl or .csv, or a .txt beside each"
    )
    instance_data_dir: Annotated[str | None, Place("training data")] = option(None, "DreamBooth: images of one subject")
    instance_prompt: str | None = option(None, "DreamBooth: the prompt for all of them, with a rare token")
    dataset_name: Annotated[str | None, Place("training data")] = option(
        None, "hub name or folder of a dataset with an image and a caption column"
    )
    dataset_config_name: str | None = option(None, "configuration of that dataset")
    image_column: str | None = option(
        None, "column of the images (default: file_name in a folder's metadata, image in a dataset)"
    )
    caption_column: str | None = option(None, "column of the captions (default: text)")
    mask_column: str | None = option(
        None, "column of masks: white counts, black does not (default: NAME-masklabel.png beside NAME)"
    )
    conditioning_image_column: str | None = option(
        None, "column of the images that the model sees beside the noise (FLUX.1 Kontext, FLUX.2)"
    )
    max_image_pixels: Annotated[int, COUNT, MayChange("a larger image is refused, not changed")] = option(
        2**28, "an image of more pixels, decoded or resized, is an error (default 2^28: 268 megapixels)"
    )
    max_train_samples: Annotated[int | None, COUNT] = option(None, "use the first images only")
    repeats: Annotated[int, COUNT] = option(1, "how often each image counts in an epoch (default 1)")
    resolution: Annotated[int, SIDE] = option(
        None, "side of the square crops in pixels (default: the base's, once it is loaded)"
    )

    @property
    def data_source(self) -> str:
        """The folder or dataset that is trained on."""
        return str(self.instance_data_dir or self.train_data_dir or self.dataset_name)


@dataclass(frozen=True, kw_only=True)
class ImageDataOptions(Options):
    """What is held out, and what is done to the images."""

    _argument_group_name = "images"

    validation_fraction: Annotated[float | None, replace(FRACTION, remedy="such as 0.2")] = option(
        None, "share of the images to hold out, by their content, where the data hold out none (default: none)"
    )
    center_crop: bool = option(False, "crop the centre instead of a random place")
    random_flip: bool = option(False, "mirror half of the images")
    image_interpolation_mode: str = option(
        "lanczos", "how images are resized (default lanczos)", choices=INTERPOLATIONS
    )
    aspect_ratio_buckets: str | None = option(
        None, 'sizes such as "1024,1024;768,1344" (height,width), or auto (default: squares)'
    )
    cache_latents: bool = option(False, "encode the images once; implies --center_crop")
    pre_compute_text_embeddings: bool = option(False, "encode the captions once")
    embeddings_cache_dir: Annotated[str | None, MayChange("embeddings are those of the captions either way")] = option(
        None, "with pre_compute_text_embeddings: keep the embeddings in this folder, for later runs"
    )
    dataloader_num_workers: Annotated[
        int, Range(0, 1024, integer=True), MayChange("batch k is a function of the seed and k")
    ] = option(0, "processes that decode images (default 0: the main one)")


@dataclass(frozen=True, kw_only=True)
class PriorOptions(Options):
    """Prior preservation: images of the class keep the model from forgetting it."""

    _argument_group_name = "prior preservation"

    with_prior_preservation: bool = option(False, "train on images of the class, too")
    class_prompt: str | None = option(None, "prompt of the class, such as 'a photo of a dog'")
    class_data_dir: Annotated[str | None, Place("class images")] = option(
        None, "images of the class; missing ones are generated (default: in output_dir)"
    )
    num_class_images: Annotated[int, COUNT] = option(100, "images of the class (default 100)")
    prior_loss_weight: Annotated[float, NOT_NEGATIVE] = option(
        1.0, "weight of their loss beside that of the subject (default 1)"
    )
