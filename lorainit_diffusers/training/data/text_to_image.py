"""The data of a text-to-image run: reading them, class images, and the batches of collection, training, validation."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from lorainit_diffusers.evaluation import fixed_noise_loss
from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.initialize import needs_reference
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.data.buckets import parse_buckets
from lorainit_diffusers.training.data.captioned_images import CaptionedImages, caption_columns, fixed_batches
from lorainit_diffusers.training.data.captions import is_metadata
from lorainit_diffusers.training.data.embeddings_cache import EmbeddingsCache
from lorainit_diffusers.training.data.files import list_folder
from lorainit_diffusers.training.data.folders import read_image_folder
from lorainit_diffusers.training.data.grouping import hold_out_pictures
from lorainit_diffusers.training.data.images import ImageRecord, decoded_sizes, limited, load_image, shared_files
from lorainit_diffusers.training.data.masks import check_beside
from lorainit_diffusers.training.data.named_datasets import read_dataset
from lorainit_diffusers.training.data.notes import DataNotes, some
from lorainit_diffusers.training.data.order import BucketOrder, DataOrder
from lorainit_diffusers.training.data.prior_preservation import generate_class_images, pair_batches
from lorainit_diffusers.training.data.splits import find_image_splits
from lorainit_diffusers.training.options.data import DatasetOptions
from lorainit_diffusers.training.options.text_to_image import ImageTaskOptions, TextToImageOptions
from lorainit_diffusers.training.resume import base_identity
from lorainit_diffusers.training.run import Run
from lorainit_diffusers.training.samples import sample
from lorainit_diffusers.training.seeds import derive_seed
from lorainit_diffusers.training.signals import leave_to_main


def read_data(options: ImageTaskOptions, notes: DataNotes | None = None) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training and held-out images of the options' folder or dataset; the latter only where it has such a split.

    Every image has been decoded once. `--max_train_samples` keeps the first training images, of which each then counts
    `--repeats` times. `--validation_fraction` holds some of these out, copies of one picture together.

    Args:
        options: Of the script.
        notes: Gets what was left out, what looks odd, and the images' sizes.

    Raises:
        FileNotFoundError: When a folder or file does not exist.
        ValueError: When something else is missing or unreadable; see `read_image_folder` and `read_dataset`.
    """
    notes = DataNotes() if notes is None else notes
    names = ("image_column", "caption_column", "mask_column", "conditioning_image_column")
    columns: dict[str, str] = {name: column for name in names if (column := getattr(options, name)) is not None}
    if options.dataset_name is not None:
        records, heldout = read_dataset(
            options.dataset_name,
            config_name=options.dataset_config_name,
            cache_dir=options.cache_dir,
            prompt=options.instance_prompt,
            max_train_samples=options.max_train_samples,
            notes=notes,
            **columns,
        )
    else:
        flag = "--train_data_dir" if options.instance_data_dir is None else "--instance_data_dir"
        directory = Path(options.data_source)
        if not directory.is_dir():
            raise FileNotFoundError(f"{flag} {str(directory)!r} is not a directory; give a folder of images")
        check_class_folder_apart(directory, flag, options)
        splits = find_image_splits(directory, f"{flag} {str(directory)!r}", notes)
        read = partial(
            read_image_folder, flag=flag, prompt=options.instance_prompt, notes=notes, root=splits.root, **columns
        )
        parts = [splits.train, *([] if splits.heldout is None else [splits.heldout])]
        if directory not in parts:
            around = list_folder(directory, skip=[*parts, *splits.skip])
            around.report(directory, notes, used=[path for path in around.others if is_metadata(path)])
        records = read(splits.train, skip=splits.skip)[: options.max_train_samples]
        heldout = [] if splits.heldout is None else read(splits.heldout)
    records, heldout = (limited(part, options.max_image_pixels) for part in (records, heldout))
    fraction = getattr(options, "validation_fraction", None)  # a comparison holds images out in its own way
    if fraction is not None:
        flag = f"--validation_fraction {fraction}"
        if heldout:
            raise ValueError(f"{flag}: the data have a held-out part of their own; leave it out")
        records, heldout = hold_out_pictures(records, fraction, load_image, flag)
    warn_of_shared_files(records, heldout, "held-out images are also trained on, so that their loss says little", notes)
    sizes = decoded_sizes([*records, *heldout])
    for part, shown in ((records, sizes[: len(records)]), (heldout, sizes[len(records) :])):
        check_beside(part, shown, notes)
    notes.sizes |= {"training": sizes[: len(records)], "held out": sizes[len(records) :]}
    return records * options.repeats, heldout


def warn_of_shared_files(
    first: Sequence[ImageRecord], second: Sequence[ImageRecord], what: str, notes: DataNotes
) -> None:
    """Note images of the second that are the same files as some of the first; `what` says what is wrong with it."""
    shared = shared_files(first, second)
    if shared:
        notes.warn(f"{len(shared):,d} {what}: {some([str(record.path) for record in shared])}")


def check_class_folder_apart(directory: Path, flag: str, options: DatasetOptions) -> None:
    """See that the images of the class are not in the folder of the subject, nor the other way round.

    Raises:
        ValueError: When they are: class images would be trained on as the subject.
    """
    class_dir = getattr(options, "class_data_dir", None)
    if class_dir is None:
        return
    subject, of_class = directory.resolve(), Path(class_dir).resolve()
    if subject.is_relative_to(of_class) or of_class.is_relative_to(subject):
        raise ValueError(
            f"--class_data_dir {class_dir!r} and {flag} {str(directory)!r} lie within each other, so that images would "
            "be of both; give two folders that do not"
        )


def class_images(run: Run[TextToImageOptions], family: TextToImageFamily) -> list[ImageRecord]:
    """The images of the class under prior preservation; what is missing is drawn by the base model and kept."""
    options, accelerator = run.options, run.accelerator
    if not options.with_prior_preservation or (options.dry_run and not options.variable_rank):
        return []
    if options.class_data_dir is None or options.class_prompt is None:
        raise ValueError("--with_prior_preservation needs --class_prompt and a place for the class images")
    settings = {
        "base_model": options.pretrained_model_name_or_path,
        "revision": options.revision,
        "variant": options.variant,
        "resolution": options.resolution,
        "num_inference_steps": options.validation_inference_steps,
        "guidance_scale": options.validation_guidance_scale,
    }

    records = generate_class_images(
        options.class_data_dir,
        prompt=options.class_prompt,
        count=options.num_class_images,
        draw=lambda prompts, seeds: sample(options, family, prompts, seeds),
        batch_size=options.sample_batch_size,
        settings=settings,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
        progress=accelerator.is_main_process,
        scratch=_dry_run_folder() if options.dry_run else None,
    )
    accelerator.wait_for_everyone()  # each draws its share
    return limited(records, options.max_image_pixels)


@functools.cache
def _dry_run_folder() -> Path:
    """A folder for images that a dry run needs and leaves nowhere; it goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="lorainit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _encoding(options: TextToImageOptions, family: TextToImageFamily) -> Callable[[list[str]], Mapping[str, Tensor]]:
    """What makes a batch's columns of captions: token ids, or embeddings where they are made once."""
    if not options.pre_compute_text_embeddings:
        return family.caption_inputs
    if options.embeddings_cache_dir is None:
        return family.embed_captions
    base = base_identity(
        str(options.pretrained_model_name_or_path), revision=options.revision, cache_dir=options.cache_dir
    )
    return EmbeddingsCache(options.embeddings_cache_dir, family, base)


class TrainingData:
    """The image sets of a run, encoded as far as the options say, and its batches.

    Attributes:
        train: Training images.
        classes: Images of the class under prior preservation.
        heldout: Held-out images, where there are any.
    """

    def __init__(
        self,
        run: Run[TextToImageOptions],
        family: TextToImageFamily,
        records: Sequence[ImageRecord],
        heldout: Sequence[ImageRecord],
        classes: Sequence[ImageRecord],
    ) -> None:
        options, progress = run.options, run.is_main
        self.run, self.options, self.family, self.progress = run, run.options, family, progress
        buckets = None
        if options.aspect_ratio_buckets is not None:
            buckets = parse_buckets(options.aspect_ratio_buckets, options.resolution, family.resolution_multiple)

        def load(
            chosen: Sequence[ImageRecord],
            *,
            cache: bool = options.cache_latents,
            center_crop: bool = options.center_crop,
            random_flip: bool = options.random_flip,
            sizes: Sequence[tuple[int, int]] | None = None,
            masked: bool | None = None,
        ) -> CaptionedImages:
            images = CaptionedImages(
                chosen,
                caption_columns(chosen, _encoding(options, family)),
                options.resolution,
                center_crop,
                random_flip,
                interpolation=options.image_interpolation_mode,
                buckets=sizes,
                masked=masked,
            )
            if cache:
                images.cache_latents(family.encode_images, options.train_batch_size, progress=progress)
            return images

        self.train = load(records, sizes=buckets)
        # a batch of both kinds has masks for both: all of a class image counts
        self.classes = load(classes, masked=self.train.masked) if classes else None
        self.heldout = load(heldout, cache=True, center_crop=True, random_flip=False) if heldout else None

    @property
    def batches_per_epoch(self) -> int:
        """Training batches that see every image."""
        batch_size = self.options.train_batch_size
        if len(self.train.buckets) == 1:
            return -(-len(self.train) // batch_size)
        return BucketOrder(self.train.bucket_of_image, batch_size, self.options.seed, range(0)).batches_per_epoch

    def batches(self, seed: int, batch_size: int, numbers: range) -> Iterator[dict[str, Tensor]]:
        """The training batches of these numbers; under prior preservation as many class images follow in each."""
        instances = self.batches_of(self.train, seed, batch_size, numbers)
        if self.classes is None:
            return instances
        return pair_batches(instances, self.batches_of(self.classes, derive_seed(seed, "class"), batch_size, numbers))

    def training_batches(self, first_step: int, last_step: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches of every micro-step after `first_step`, up to that of `last_step`."""
        options, accelerator = self.options, self.run.accelerator
        count = accelerator.num_processes
        micro_steps = options.gradient_accumulation_steps * count
        first, last = first_step * micro_steps + accelerator.process_index, last_step * micro_steps
        return self.batches(options.seed, options.train_batch_size, range(first, last, count))

    def batches_of(
        self, images: CaptionedImages, seed: int, batch_size: int, numbers: range
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of one set; batch k is a function of (seed, k) alone."""
        if len(images.buckets) == 1:
            order: Any = DataOrder(len(images), batch_size, seed, numbers)
        else:
            order = BucketOrder(images.bucket_of_image, batch_size, seed, numbers)
        workers = self.options.dataloader_num_workers
        return iter(DataLoader(images, batch_sampler=order, num_workers=workers, worker_init_fn=leave_to_main))

    def for_initialization(self) -> dict[str, Any]:
        """The batches that `initialize` takes: those of training, or instance and class images apart.

        They are apart where the class images stand for the pre-training data (CNTLoRA's measured constraint).
        """
        options, accelerator = self.options, self.run.accelerator
        count = accelerator.num_processes
        numbers = range(accelerator.process_index, options.init_num_batches * count, count)
        if self.classes is None or not needs_reference(self.run.method):
            return {"batches": self.batches(options.init_seed, options.init_batch_size, numbers)}
        return {
            "batches": self.batches_of(self.train, options.init_seed, options.init_batch_size, numbers),
            "reference_batches": self.batches_of(self.classes, options.init_seed, options.init_batch_size, numbers),
        }

    def validation_loss(self) -> float | None:
        """Loss on the held-out images under fixed noise; `None` where there are none."""
        if self.heldout is None:
            return None
        with progress_bar(total=len(self.heldout), desc="validating", leave=False, shown=self.progress) as bar:
            return fixed_noise_loss(self.family, _counted(fixed_batches(self.heldout), bar), len(self.heldout))


def _counted(batches: Iterable[dict[str, Tensor]], bar: Any) -> Iterator[dict[str, Tensor]]:
    """The batches, with the bar at their samples once they have been used."""
    for batch in batches:
        yield batch
        bar.update(len(next(iter(batch.values()))))
