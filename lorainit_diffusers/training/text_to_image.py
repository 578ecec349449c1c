"""A text-to-image base with its images, within a run: what `train` needs of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from accelerate import Accelerator

from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.training.cost import Stopwatch
from lorainit_diffusers.training.data.images import ImageRecord
from lorainit_diffusers.training.data.notes import DataNotes
from lorainit_diffusers.training.data.text_to_image import (
    TrainingData,
    class_images,
    read_data,
    warn_of_shared_files,
)
from lorainit_diffusers.training.image_outputs import write_image_card, write_image_report, write_lora, write_lora_files
from lorainit_diffusers.training.log import RunLog
from lorainit_diffusers.training.options.checks import check_family_options
from lorainit_diffusers.training.options.fields import given
from lorainit_diffusers.training.options.optimisation import scaled_rates, steps_of_epochs
from lorainit_diffusers.training.options.text_to_image import TextToImageOptions, TransformerOptions
from lorainit_diffusers.training.run import IMAGE_SETS, Run, check_resumed_options, identify, weight_dtype
from lorainit_diffusers.training.run_banner import image_banner, run_schedule
from lorainit_diffusers.training.samples import Pictures
from lorainit_diffusers.training.start import lora_targets
from lorainit_diffusers.training.train import train


def train_lora(options: TextToImageOptions, family_class: type[TextToImageFamily], *, name: str, tag: str) -> Path:
    """Train one LoRA and return the directory that it was written to.

    Args:
        options: The checked options of a script.
        family_class: What the base is.
        name: Of the script, for trackers.
        tag: Of the base's kind, for the model card.

    Raises:
        ValueError, FileNotFoundError: For what the user can mend, in one line.
    """
    check_family_options(options, family_class)
    family_class.check_base(options.pretrained_model_name_or_path)
    read = partial(read_images, family_class=family_class, tag=tag)
    return train(
        options, read, script=name, output_name=options.output_name, class_images=options.with_prior_preservation
    )


def read_images(
    options: TextToImageOptions, *, family_class: type[TextToImageFamily], tag: str
) -> Callable[[Run[TextToImageOptions]], TextToImageTraining]:
    """Read and check the images and captions; returns what loads the base and goes on with both."""
    notes = DataNotes()
    records, heldout = read_data(options, notes)

    def load(run: Run[TextToImageOptions]) -> TextToImageTraining:
        run = identify(run, dict(zip(IMAGE_SETS, (records, heldout), strict=True)))
        place = run.options.pretrained_model_name_or_path
        family = family_class.from_pretrained(place, **family_options(run.options, family_class, run.accelerator))
        run = settle_options(run, family)
        classes = class_images(run, family)
        warn_of_shared_files(records, classes, "images of the class are also images of the subject", notes)
        run = identify(run, {"class images": classes})
        data = TrainingData(run, family, records, heldout, classes)
        run = run.with_options(**steps_of_epochs(run.options, data.batches_per_epoch, run.accelerator.num_processes))
        return TextToImageTraining(run, family, data, notes, tag)

    return load


class TextToImageTraining:
    """A text-to-image base with its images; implements `train.Training`."""

    primary_metric = "validation_loss"
    private_files: Sequence[str] = ()

    def __init__(
        self,
        run: Run[TextToImageOptions],
        family: TextToImageFamily,
        data: TrainingData,
        notes: DataNotes,
        tag: str,
    ) -> None:
        self.run, self.family, self.data, self.notes, self.tag = run, family, data, notes, tag
        self.targets: Mapping[str, Sequence[str]] = lora_targets(run.options, family, family.DENOISER)
        records: Sequence[ImageRecord] = data.train.records
        heldout: Sequence[ImageRecord] = data.heldout.records if data.heldout is not None else []
        self.counts: Mapping[str, int] = {"num_images": len(records), "num_heldout_images": len(heldout)}
        self.watch = Stopwatch("validation", "samples")
        self.pictures = Pictures(run, family, records, heldout)

    def banner(self) -> str:
        """What is going to be trained on what."""
        data = self.data
        parts = {"training": data.train, "held out": data.heldout, "of the class": data.classes}
        prompts = list(self.pictures.prompts.values())
        schedule = run_schedule(self.run, self.counts["num_images"])
        return image_banner(self.run, self.family, parts, self.notes, prompts, schedule)

    def prepare(self, log: RunLog) -> None:
        """Give the encoders of captions back that are all encoded, and draw a row of pictures with the base."""
        if self.run.options.pre_compute_text_embeddings:
            self.family.release_text_encoders(self.pictures.prompts.values())
        with self.watch.part("samples"):
            self.pictures.add("base")

    def evaluate(self, stage: str, log: RunLog) -> None:
        """The grid of all rows of pictures, at the end."""
        if stage == "end" and self.run.is_main:
            self.pictures.save_grid(self.run.output_dir / "samples.png")

    def validate(self, step: int, log: RunLog) -> None:
        """The loss on held-out images, where there are any, and a row of pictures."""
        with self.watch.part("validation"):
            loss = self.data.validation_loss()
        if loss is not None:
            log.write({"step": step, "validation_loss": loss})
        with self.watch.part("samples"):
            self.pictures.add(f"step-{step:06d}", step)

    def init_batches(self) -> Mapping[str, Any]:
        """The batches that `initialize` takes, by its keywords."""
        return self.data.for_initialization()

    def training_batches(self, first_step: int, last_step: int) -> Iterator[Any]:
        """This process's batches of the micro-steps after the first step, up to those of the last."""
        return self.data.training_batches(first_step, last_step)

    def plan_sample(self) -> tuple[Any, int]:
        """A batch of one sample, and how many samples a batch has."""
        options = self.run.options
        batch = next(self.data.training_batches(0, options.max_train_steps))
        num_samples = options.train_batch_size * (2 if options.with_prior_preservation else 1)
        return {name: value[:1] for name, value in batch.items()}, num_samples

    def write_adapter(self, directory: Path, config: Mapping[str, Any]) -> None:
        """Write the LoRA in the format that the base's own pipeline, or else PEFT, loads."""
        write_lora(self.run.options, self.family, config, directory)

    def write_files(self, config: Mapping[str, Any]) -> None:
        """Write the family's formats, each right on the original base."""
        write_lora_files(self.run, self.family, config)

    def write_card(self, log: RunLog, init_report: Mapping[str, Any], best: str | None) -> None:
        """Write the model card."""
        write_image_card(self.run, self.family, init_report, log.lines, self.tag, best)

    def write_reports(self, config: Mapping[str, Any], log: RunLog, init_report: Mapping[str, Any]) -> None:
        """Write the loss curve and `report.html`."""
        write_image_report(self.run, self.family, config, init_report, log.lines, self.watch.seconds)

    def summary(self, log: RunLog) -> str | None:
        """Nothing: the curve and the pictures say it."""
        return None


def family_options(
    options: TextToImageOptions, family_class: type[TextToImageFamily], accelerator: Accelerator
) -> dict[str, Any]:
    """How `from_pretrained` loads the base, with the options that its family has.

    The dtype is keyed on the accelerator: its precision may come from accelerate's configuration instead of the flag.
    """
    quantized: dict[str, Any] = {}
    if isinstance(options, TransformerOptions) and options.quantization is not None:
        quantized = {"quantization_config": quantization_config(options, accelerator)}
    return {
        "revision": options.revision,
        "variant": options.variant,
        "vae_path": options.pretrained_vae_model_name_or_path,
        "cache_dir": options.cache_dir,
        "weight_dtype": weight_dtype(accelerator.mixed_precision),
        "device": accelerator.device,
        "train_text_encoder": options.train_text_encoder,
        "caption_dropout": options.caption_dropout,
        "prior_loss_weight": options.prior_loss_weight,
        "offload": options.offload,
        # what is not given is as the family has it
        **{name: value for name in family_class.OPTIONS if (value := getattr(options, name)) is not None},
        **quantized,
    }


def quantization_config(options: TransformerOptions, accelerator: Accelerator) -> Any:
    """How diffusers holds the denoiser in 4 bits: QLoRA's normal-float (Dettmers et al. 2023, arXiv:2305.14314)."""
    return diffusers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantization or "nf4",
        bnb_4bit_compute_dtype=weight_dtype(accelerator.mixed_precision),
    )


def settle_options(run: Run[TextToImageOptions], family: TextToImageFamily) -> Run[TextToImageOptions]:
    """The run with what depends on the base and the processes, which a checkpoint must have, too.

    Raises:
        ValueError: For a resolution that the base cannot have, or options that differ from the checkpoint's.
    """
    wanted = given(run.options.resolution)
    resolution = family.resolution if wanted is None else wanted
    if resolution % family.resolution_multiple:
        raise ValueError(f"--resolution {resolution} is not a multiple of {family.resolution_multiple}")
    run = run.with_options(resolution=resolution, **scaled_rates(run.options, run.accelerator.num_processes))
    check_resumed_options(run)
    if run.options.enable_xformers_memory_efficient_attention:
        family.denoiser.enable_xformers_memory_efficient_attention()
    return run
