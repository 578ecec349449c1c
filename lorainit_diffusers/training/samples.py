"""The samples of a run: rows of pictures, the same prompts and seeds with the base, at step 0 and later."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from lorainit_diffusers.evaluation import sample_grid
from lorainit_diffusers.families.base import evaluating
from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.files import replacing
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.data.images import ImageRecord
from lorainit_diffusers.training.options.text_to_image import TextToImageOptions
from lorainit_diffusers.training.output_dir import wrote
from lorainit_diffusers.training.run import Run
from lorainit_diffusers.training.seeds import derive_seed

_SAMPLE_ROW = re.compile(r"base\.png|step-\d+\.png")


def sample(
    options: TextToImageOptions, family: TextToImageFamily, prompts: Sequence[str], seeds: Sequence[int]
) -> list[Image.Image]:
    """One image a prompt, each from its own seed, drawn as the validation options say."""
    return family.sample(
        prompts,
        seeds,
        resolution=options.resolution,
        num_inference_steps=options.validation_inference_steps,
        guidance_scale=options.validation_guidance_scale,
    )


def draw_samples(options: TextToImageOptions, family: TextToImageFamily, prompts: Sequence[str]) -> list[Image.Image]:
    """One image a prompt with the weights as they are now; column k has the same seed in every call."""
    images: list[Image.Image] = []
    starts = range(0, len(prompts), options.sample_batch_size)
    for start in progress_bar(starts, desc="sampling", leave=False):
        chunk = prompts[start : start + options.sample_batch_size]
        seeds = [derive_seed(options.seed, "sample", start + column) for column in range(len(chunk))]
        images += sample(options, family, chunk, seeds)
    return images


class Pictures:
    """Rows of samples: the same prompts and seeds with the base, at step 0 and later. Only the main process draws."""

    def __init__(
        self,
        run: Run[TextToImageOptions],
        family: TextToImageFamily,
        records: Sequence[ImageRecord],
        heldout: Sequence[ImageRecord],
    ) -> None:
        self.options, self.family, self.accelerator = run.options, family, run.accelerator
        self.prompts = choose_prompts(run.options, records, heldout)
        self.directory = run.output_dir / "samples"
        self.draws = run.is_main and run.trains
        self._keep_to_step = run.state.step if run.state is not None else None
        self._is_clear = False  # nothing is touched before the first row: until then the run may be refused

    def add(self, name: str, step: int = 0) -> None:
        """Draw a row and keep it as a file, so that a resumed run still has it; trackers get it, too."""
        path = self.directory / f"{name}.png"
        if self.draws and not self._is_clear:
            clear_sample_rows(self.directory, self._keep_to_step)
            self._is_clear = True
        if not self.draws or (path.exists() and wrote(path)):
            return
        with evaluating(self.family):
            images = draw_samples(self.options, self.family, list(self.prompts.values()))
        save_sample_row(self.directory, name, images)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.stack([np.asarray(image) for image in images])
                cast(Any, tracker).writer.add_images("samples", pixels, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                cast(Any, tracker).log_images({"samples": [np.asarray(image) for image in images]}, step=step)

    def save_grid(self, path: Path) -> None:
        """All rows, labelled, in one picture."""
        rows = load_sample_rows(self.directory)
        labels = [f"{row} (end)" if row == f"step {self.options.max_train_steps}" else row for row in rows]
        with replacing(path) as scratch:
            sample_grid(dict(zip(labels, rows.values(), strict=True)), list(self.prompts)).save(scratch, format="PNG")


def save_sample_row(directory: Path, name: str, images: Sequence[Image.Image]) -> None:
    """Write square images side by side to `directory/name.png`, so that a resumed run still has its earlier rows."""
    side = images[0].height
    strip = Image.new("RGB", (side * len(images), side))
    for column, image in enumerate(images):
        strip.paste(image, (column * side, 0))
    with replacing(directory / f"{name}.png") as scratch:
        strip.save(scratch, format="PNG")


def load_sample_rows(directory: Path) -> dict[str, list[Image.Image]]:
    """The rows that `save_sample_row` wrote, the base first and then by step."""
    rows: dict[str, list[Image.Image]] = {}
    for path in sorted(path for path in directory.glob("*.png") if _SAMPLE_ROW.fullmatch(path.name) and wrote(path)):
        with Image.open(path) as strip:
            side = strip.height
            images = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
        kind, _, number = path.stem.partition("-")
        rows[f"{kind} {int(number)}" if number else kind] = images
    return rows


def clear_sample_rows(directory: Path, keep_to_step: int | None) -> None:
    """Delete the sample rows of this run: when resuming, those after the step resumed from; otherwise all."""
    directory.mkdir(exist_ok=True)
    for path in directory.glob("*.png"):
        number = path.stem.removeprefix("step-")
        later = keep_to_step is None or (number.isdigit() and int(number) > keep_to_step)
        if later and _SAMPLE_ROW.fullmatch(path.name) and wrote(path):
            path.unlink()


def choose_prompts(
    options: TextToImageOptions, records: Sequence[ImageRecord], heldout: Sequence[ImageRecord]
) -> dict[str, str]:
    """Column label -> prompt: the user's, or three of the training and three of the held-out captions."""
    prompts: dict[str, str] = {}
    if options.validation_prompt:
        prompts = {prompt: prompt for prompt in options.validation_prompt}
    elif options.instance_prompt is not None:
        prompts = {options.instance_prompt: options.instance_prompt}
    else:
        for kind, some in (("trained", records), ("held out", heldout)):
            captions = list(dict.fromkeys(record.caption for record in some))
            for caption in captions[:: max(1, -(-len(captions) // 3))]:
                prompts[f"{kind}: {caption}"] = caption
    if options.num_validation_images == 1:
        return prompts
    copies = range(1, options.num_validation_images + 1)
    return {f"{label} ({copy})": prompt for label, prompt in prompts.items() for copy in copies}
