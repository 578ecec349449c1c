"""Seeds, samples, validation, checkpoints and outputs of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from lorainit_diffusers.ranges import COUNT, NOT_NEGATIVE, SEED
from lorainit_diffusers.training.options.fields import MayChange, Options, Secret, option
from lorainit_diffusers.training.ranges import RANK

_STEPS_BETWEEN = replace(COUNT, remedy="more than the steps of the run is never")
_AT_THE_END = "of the files written at the end"


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Options):
    """The pictures that a run draws as it goes."""

    _argument_group_name = "samples"

    validation_prompt: list[str] | None = option(
        None, "prompts for samples (default: some training and held-out captions)"
    )
    num_validation_images: Annotated[int, COUNT] = option(1, "samples of each prompt (default 1)")
    validation_inference_steps: Annotated[int, COUNT] = option(25, "denoising steps of a sample (default 25)")
    validation_guidance_scale: Annotated[float, NOT_NEGATIVE] = option(
        5.0, "classifier-free guidance of a sample (default 5)"
    )
    sample_batch_size: Annotated[int, COUNT, MayChange("every image has its own seed")] = option(
        4, "images that are drawn at once (default 4)"
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Where a run writes."""

    _argument_group_name = "output"

    output_dir: Annotated[str, MayChange("a run's directory may be moved or copied")] = option(
        None, "a directory of its own (default: outputs/<script>-<init>, with a number if it is taken)"
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Seeds, validation and checkpoints."""

    _argument_group_name = "run"

    overwrite_output_dir: Annotated[bool, MayChange("says what may happen to another run's files")] = option(
        False, "replace the run in output_dir, and what it wrote alone"
    )
    seed: Annotated[int, SEED] = option(0, "seed of every random draw (default 0)")
    validation_steps: Annotated[
        int, _STEPS_BETWEEN, MayChange("a validation draws its numbers apart from the training")
    ] = option(250, "steps between validations")
    checkpointing_steps: Annotated[int, _STEPS_BETWEEN, MayChange("a checkpoint changes nothing in the run")] = option(
        250, "steps between checkpoints"
    )
    checkpoints_total_limit: Annotated[int | None, COUNT, MayChange("says which checkpoints stay")] = option(
        None, "keep so many checkpoints; the oldest are deleted first"
    )
    keep_best: Annotated[bool, MayChange("says which weights stay beside the last")] = option(
        True, "keep the LoRA of the best validation in best/ (default: on)"
    )
    resume_from_checkpoint: Annotated[str | None, MayChange("says where to go on")] = option(
        None, "latest, a checkpoint's name in output_dir, or its path"
    )
    report_to: Annotated[str | None, MayChange("only looks on")] = option(
        None, "tracker that gets the metrics, too", choices=("tensorboard", "wandb")
    )
    logging_dir: Annotated[str, MayChange("only looks on")] = option("logs", "inside output_dir (default logs)")


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """The files at the end, and their upload."""

    _argument_group_name = "files and upload"

    export_rank: Annotated[int | None, RANK, MayChange(f"{_AT_THE_END}, which say it")] = option(
        None, "compress every layer of the saved LoRA to this rank; says what that discards"
    )
    pad_rank: Annotated[int | None, RANK, MayChange(f"{_AT_THE_END}, which say it")] = option(
        None, "zero-pad every layer of the saved LoRA to this rank, for old loaders"
    )
    export_merged: Annotated[bool, MayChange(_AT_THE_END)] = option(
        False, "write the models with the LoRA in their weights, too"
    )
    push_to_hub: Annotated[bool, MayChange(_AT_THE_END)] = option(False, "upload the result")
    hub_private: Annotated[bool, MayChange(_AT_THE_END)] = option(False, "make the repository a private one")
    hub_model_id: Annotated[str | None, MayChange(_AT_THE_END)] = option(
        None, "repository to upload to (default: the name of output_dir)"
    )
    hub_token: Annotated[str | None, MayChange("kept nowhere"), Secret()] = option(
        None, "access token of the hub (default: the token of `hf auth login`)"
    )
