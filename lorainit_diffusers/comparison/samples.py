"""The samples of the runs of a comparison, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lorainit_diffusers import adapters
from lorainit_diffusers.comparison.analysis import Comparison
from lorainit_diffusers.comparison.grid import SCORES_NAME, Grid, Part, PlannedRun
from lorainit_diffusers.comparison.options import ImageComparisonOptions
from lorainit_diffusers.comparison.tasks import drift_prompts, is_bundled, load_family, resolution_of, split_records
from lorainit_diffusers.evaluation import metrics
from lorainit_diffusers.evaluation.encoders import ImageEncoder, ImageTextEncoder, load_encoder
from lorainit_diffusers.families.base import evaluating
from lorainit_diffusers.files import write_json
from lorainit_diffusers.progress import GridProgress
from lorainit_diffusers.training.bundled import ROOT
from lorainit_diffusers.training.data.images import ImageRecord, load_image
from lorainit_diffusers.training.samples import save_sample_row
from lorainit_diffusers.training.seeds import derive_seed

BUNDLED_ENCODER = ROOT / "assets" / "models" / "tiny-clip"
HUB_ENCODERS = ("facebook/dinov2-small", "openai/clip-vit-base-patch32")
# Samples of one prompt, for the diversity among them.
NUM_DIVERSITY_PROMPTS = 2
NUM_DIVERSITY_SAMPLES = 4
GRID_COLUMNS = 6
MIN_KID_SAMPLES = 4


def encoder_names(options: ImageComparisonOptions) -> list[str]:
    """The encoders that images are scored with: the bundled one for bundled bases, DINOv2 and CLIP otherwise."""
    return list(options.encoders or ([str(BUNDLED_ENCODER)] if is_bundled(options) else HUB_ENCODERS))


def runs_to_score(grid: Grid) -> list[PlannedRun]:
    """The runs that samples are drawn from: none, all, or those at the best learning rate of each init."""
    options = grid.options
    if not isinstance(options, ImageComparisonOptions) or not options.draws_images:
        return []
    if options.image_metrics == "all":
        return list(grid.runs)
    best = Comparison.load(grid.directory).best_learning_rates()
    return [run for run in grid.runs if best.get(run.init.label) == run.learning_rate]


def score_runs(grid: Grid, device: torch.device, part: Part, bar: GridProgress) -> None:
    """Draw samples from this process's part of the runs at the image steps and score them."""
    options = grid.options
    if not isinstance(options, ImageComparisonOptions):
        return
    scorer: ImageScorer | None = None
    base, base_strip = {}, []
    for run in runs_to_score(grid)[part.places]:
        directory = grid.folder(run)
        if (directory / SCORES_NAME).exists():
            bar.skip(len(options.image_steps))
            continue
        (directory / "samples").mkdir(exist_ok=True)
        scored: dict[int, dict[str, float]] = {}
        for step in options.image_steps:
            snapshot = directory / "snapshots" / f"step-{step:06d}.safetensors"
            if snapshot.exists():  # a run that diverged has none
                scorer = scorer or ImageScorer(options, device)
                state = load_file(snapshot)
                scorer.load(state)
                if not base:
                    base, base_strip = scorer.draw_base()
                    if part.index == 0:
                        save_sample_row(grid.directory, "base", base_strip)
                        write_json(grid.directory / "prompts.json", {"prompts": scorer.grid_columns})
                adds_nothing = not any(value.any() for name, value in state.items() if name.endswith("lora_B"))
                drawn, strip = (base, base_strip) if adds_nothing else scorer.draw()
                save_sample_row(directory / "samples", f"step-{step:06d}", strip)
                scored[step] = scorer.score(drawn, base)
            bar.update()
        write_json(directory / SCORES_NAME, scored)


class ImageScorer:
    """Draws samples and scores them.

    The model is in float32 whatever it was trained in: the samples of an offset init at step 0 are then the base's.
    """

    def __init__(self, options: ImageComparisonOptions, device: torch.device) -> None:
        self.options = options
        self.records, self.heldout = split_records(options)
        self.family = load_family(options, device, torch.float32)
        self.resolution = resolution_of(options, self.family)
        self._features: dict[Any, Tensor] = {}
        self.encoders = [load_encoder(name, device) for name in encoder_names(options)]
        spread = self.heldout[:: max(1, len(self.heldout) // options.num_eval_prompts)]
        # with fewer held-out images than prompts a caption is drawn from several seeds
        self.truths = [spread[index % len(spread)] for index in range(options.num_eval_prompts)]
        self.everything = [*self.records, *self.heldout]
        self.prompts = [record.caption for record in self.truths]
        self.drift_prompts = drift_prompts(options)
        diverse = self.prompts[:NUM_DIVERSITY_PROMPTS]
        self.diversity_prompts = [prompt for prompt in diverse for _ in range(NUM_DIVERSITY_SAMPLES)]
        if not options.train_text_encoder:
            self.family.release_text_encoders([*self.prompts, *self.drift_prompts])

    @cached_property
    def grid_columns(self) -> list[str]:
        """Prompts of the columns of the picture grid: held-out prompts, and the first unrelated one."""
        return [*self.prompts[: GRID_COLUMNS - 1], self.drift_prompts[0]]

    def draw(self) -> tuple[dict[str, list[Image.Image]], list[Image.Image]]:
        """Samples by purpose with the weights as they are now, and the strip for the picture grid."""
        with evaluating(self.family):
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
        """As `draw`, for the base model."""
        with adapters.adapters_disabled(self.family.adapted):
            return self.draw()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapters."""
        adapters.load_adapter_state_dict(dict(self.family.adapted), state, use_rslora=self.options.use_rslora)

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
        size = self.options.sample_batch_size
        for start in range(0, len(prompts), size):
            chunk = list(prompts[start : start + size])
            images += self.family.sample(
                chunk,
                [derive_seed("sample", purpose, start + column) for column in range(len(chunk))],
                resolution=self.resolution,
                num_inference_steps=self.options.validation_inference_steps,
                guidance_scale=self.options.validation_guidance_scale,
            )
        return images
