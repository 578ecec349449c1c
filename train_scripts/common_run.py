"""What the LoRA training scripts share: the loop over the steps, data, pictures, log, weight average, checkpoints."""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from common import (
    average_gradients,
    clear_sample_rows,
    derive_seed,
    describe_run,
    evaluating,
    load_sample_rows,
    public_arguments,
    read_metrics,
    run_options,
    save_sample_row,
    seeded_generator,
)
from common_classes import generate_class_images, pair_batches
from common_data import (
    BucketOrder,
    CaptionedImages,
    DataOrder,
    ImageRecord,
    caption_columns,
    choose_prompts,
    fixed_batches,
    parse_buckets,
)
from common_options import layer_names, make_optimizer, scale_learning_rates
from common_output import begin_output, check_resumed_options
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lorainit_diffusers import adapters, checkpoints
from lorainit_diffusers.evaluation import fixed_noise_loss, sample_grid
from lorainit_diffusers.families.base import ModelFamily, loss_weight
from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.files import replacing, write_json, write_text
from lorainit_diffusers.initialize import initialize, make_method, needs_reference
from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.gradients import clip_gradients, gradient_error, weight_at_fault
from lorainit_diffusers.training.output_dir import wrote
from lorainit_diffusers.training.run_report import write_ranks
from lorainit_diffusers.training.weighting import micro_batch_shares

# --------------------------------------------------------------------------------------------------------------- start


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator of a run, with TF32 as asked for."""
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    project_dir = str(Path(args.output_dir) / args.logging_dir)
    return Accelerator(mixed_precision=args.mixed_precision, log_with=args.report_to, project_dir=project_dir)


def trains(args: argparse.Namespace) -> bool:
    """Whether the run goes on after the initialisation."""
    return not (args.init_only or args.dry_run)


def weight_dtype(mixed_precision: str | None) -> torch.dtype:
    """The precision that a frozen base is held in."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)


def family_options(
    args: argparse.Namespace, family_class: type[TextToImageFamily], accelerator: Accelerator
) -> dict[str, Any]:
    """How `from_pretrained` loads the base, with the options that its family has.

    The dtype is keyed on the accelerator: its precision may come from accelerate's configuration instead of the flag.
    """
    quantized = {}
    if getattr(args, "quantization", None) is not None:
        quantized = {"quantization_config": quantization_config(args, accelerator)}
    return {
        "revision": args.revision,
        "variant": args.variant,
        "vae_path": args.pretrained_vae_model_name_or_path,
        "cache_dir": args.cache_dir,
        "weight_dtype": weight_dtype(accelerator.mixed_precision),
        "device": accelerator.device,
        "train_text_encoder": args.train_text_encoder,
        "caption_dropout": args.caption_dropout,
        "prior_loss_weight": args.prior_loss_weight,
        "offload": args.offload,
        **{name: getattr(args, name) for name in family_class.OPTIONS},
        **quantized,
    }


def quantization_config(args: argparse.Namespace, accelerator: Accelerator) -> Any:
    """How diffusers holds the denoiser in 4 bits: QLoRA's normal-float (Dettmers et al. 2023, arXiv:2305.14314)."""
    return diffusers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=args.quantization,
        bnb_4bit_compute_dtype=weight_dtype(accelerator.mixed_precision),
    )


def settle_options(
    args: argparse.Namespace,
    family: TextToImageFamily,
    accelerator: Accelerator,
    state: checkpoints.TrainingState | None,
) -> None:
    """Fill in what depends on the base and the processes, then compare with the run that is resumed.

    Raises:
        ValueError: for a resolution that the base cannot have, or options that differ from the checkpoint's.
    """
    args.resolution = family.resolution if args.resolution is None else args.resolution
    if args.resolution % family.resolution_multiple:
        raise ValueError(f"--resolution {args.resolution} is not a multiple of {family.resolution_multiple}")
    scale_learning_rates(args, accelerator.num_processes)
    if state is not None:
        check_resumed_options(args, accelerator, state)
    if args.enable_xformers_memory_efficient_attention:
        family.denoiser.enable_xformers_memory_efficient_attention()


# ---------------------------------------------------------------------------------------------------------------- data


def class_images(args: argparse.Namespace, family: TextToImageFamily, accelerator: Accelerator) -> list[ImageRecord]:
    """The images of the class under prior preservation; what is missing is drawn by the base model and kept."""
    if not args.with_prior_preservation or (args.dry_run and not args.variable_rank):
        return []
    settings = {
        "base_model": args.pretrained_model_name_or_path,
        "revision": args.revision,
        "variant": args.variant,
        "resolution": args.resolution,
        "num_inference_steps": args.validation_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
    }

    records = generate_class_images(
        args.class_data_dir,
        prompt=args.class_prompt,
        count=args.num_class_images,
        draw=lambda prompts, seeds: sample(args, family, prompts, seeds),
        batch_size=args.sample_batch_size,
        settings=settings,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
        progress=accelerator.is_main_process,
        scratch=_dry_run_folder() if args.dry_run else None,
    )
    accelerator.wait_for_everyone()  # each draws its share
    return records


@functools.cache
def _dry_run_folder() -> Path:
    """A folder for images that a dry run needs and leaves nowhere; it goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="lorainit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class TrainingData:
    """The image sets of a run, encoded as far as the options say, and its batches.

    Attributes:
        train: training images.
        classes: images of the class under prior preservation.
        heldout: held-out images, where there are any.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        family: TextToImageFamily,
        records: Sequence[ImageRecord],
        heldout: Sequence[ImageRecord],
        classes: Sequence[ImageRecord],
        progress: bool,
    ) -> None:
        self.args, self.family, self.progress = args, family, progress
        buckets = None
        if args.aspect_ratio_buckets is not None:
            buckets = parse_buckets(args.aspect_ratio_buckets, args.resolution, family.resolution_multiple)

        def load(
            chosen: Sequence[ImageRecord],
            *,
            cache: bool = args.cache_latents,
            center_crop: bool = args.center_crop,
            random_flip: bool = args.random_flip,
            sizes: Sequence[tuple[int, int]] | None = None,
        ) -> CaptionedImages:
            encode = family.embed_captions if args.pre_compute_text_embeddings else family.caption_inputs
            images = CaptionedImages(
                chosen,
                caption_columns(chosen, encode),
                args.resolution,
                center_crop,
                random_flip,
                interpolation=args.image_interpolation_mode,
                buckets=sizes,
            )
            if cache:
                images.cache_latents(family.encode_images, args.train_batch_size, progress=progress)
            return images

        self.train = load(records, sizes=buckets)
        self.classes = load(classes) if classes else None
        self.heldout = load(heldout, cache=True, center_crop=True, random_flip=False) if heldout else None

    @property
    def batches_per_epoch(self) -> int:
        """Training batches that see every image."""
        batch_size = self.args.train_batch_size
        if len(self.train.buckets) == 1:
            return -(-len(self.train) // batch_size)
        return BucketOrder(self.train.bucket_of_image, batch_size, self.args.seed, range(0)).batches_per_epoch

    def batches(self, seed: int, batch_size: int, numbers: range) -> Iterator[dict[str, Tensor]]:
        """The training batches of these numbers; under prior preservation as many class images follow in each."""
        instances = self.batches_of(self.train, seed, batch_size, numbers)
        if self.classes is None:
            return instances
        return pair_batches(instances, self.batches_of(self.classes, derive_seed(seed, "class"), batch_size, numbers))

    def training_batches(self, accelerator: Accelerator, first_step: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches of every micro-step after `first_step`."""
        args, count = self.args, accelerator.num_processes
        micro_steps = args.gradient_accumulation_steps * count
        first, last = first_step * micro_steps + accelerator.process_index, args.max_train_steps * micro_steps
        return self.batches(args.seed, args.train_batch_size, range(first, last, count))

    def batches_of(
        self, images: CaptionedImages, seed: int, batch_size: int, numbers: range
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of one set; batch k is a function of (seed, k) alone."""
        if len(images.buckets) == 1:
            order: Any = DataOrder(len(images), batch_size, seed, numbers)
        else:
            order = BucketOrder(images.bucket_of_image, batch_size, seed, numbers)
        return iter(DataLoader(images, batch_sampler=order, num_workers=self.args.dataloader_num_workers))

    def for_initialisation(self, method: Initializer, accelerator: Accelerator) -> dict[str, Any]:
        """The batches that `initialize` takes: those of training, or instance and class images apart.

        They are apart where the class images stand for the pre-training data (CNTLoRA's measured constraint).
        """
        args, count = self.args, accelerator.num_processes
        numbers = range(accelerator.process_index, args.init_num_batches * count, count)
        if self.classes is None or not needs_reference(method):
            return {"batches": self.batches(args.init_seed, args.init_batch_size, numbers)}
        return {
            "batches": self.batches_of(self.train, args.init_seed, args.init_batch_size, numbers),
            "reference_batches": self.batches_of(self.classes, args.init_seed, args.init_batch_size, numbers),
        }

    def validation_loss(self) -> float | None:
        """Loss on the held-out images under fixed noise; `None` where there are none."""
        if self.heldout is None:
            return None
        with evaluating(self.family.adapted.values()):
            bar = progress_bar(total=len(self.heldout), desc="validating", leave=False, shown=self.progress)
            with bar:
                batches = _counted(fixed_batches(self.heldout), bar)
                return fixed_noise_loss(self.family, batches, len(self.heldout))


def _counted(batches: Iterable[dict[str, Tensor]], bar: Any) -> Iterator[dict[str, Tensor]]:
    """The batches, with the bar at their samples once they have been used."""
    for batch in batches:
        yield batch
        bar.update(len(next(iter(batch.values()))))


# ------------------------------------------------------------------------------------------------------ initialisation


def initialise(
    args: argparse.Namespace,
    family: ModelFamily,
    method: Initializer,
    batches: Mapping[str, Any],
    targets: Mapping[str, Sequence[str]],
    accelerator: Accelerator,
    state: checkpoints.TrainingState | None,
) -> dict[str, Any]:
    """Give the family its adapters, from the checkpoint or from the data; returns the report of the initialisation.

    Args:
        args: the options of a script.
        family: the base.
        method: the initialisation.
        batches: `batches`, and `reference_batches` where the method takes them, as `initialize` does.
        targets: layers that get an adapter, by component.
        accelerator: of the run.
        state: the checkpoint to continue from.
    """
    modules = dict(family.adapted)
    adapter_options = {"use_rslora": args.use_rslora, "lora_dropout": args.lora_dropout}
    if state is not None:
        adapters.load_adapter_state_dict(modules, state.tensors, **adapter_options)
        load_heads(family.heads, state.tensors)
        return state.extra["init_report"]
    needs_pass = args.variable_rank or not args.dry_run  # ranks that do not depend on the data can be told without
    report = initialize(
        family,
        method if needs_pass else make_method("kaiming"),
        **batches,
        rank=args.rank,
        alpha=args.lora_alpha,
        target_modules=targets,
        num_batches=args.init_num_batches,
        variable_rank=args.variable_rank,
        rank_budget=args.rank_budget,
        max_rank=args.max_rank,
        seed=args.init_seed,
        mask_padding=args.init_mask_padding,
        use_dora=args.use_dora,
        memory_budget_gb=args.init_memory_budget_gb,
        statistics_device=args.init_statistics_device,
        **adapter_options,
        progress=accelerator.is_main_process,
    )
    if needs_pass:
        accelerator.print(report.summary())
    if accelerator.num_processes > 1:  # the same to the last digit everywhere
        for module in modules.values():
            for parameter in adapters.trainable_parameters(module):
                parameter.data.copy_(broadcast(parameter.data))
    return report.to_json()


def lora_targets(args: argparse.Namespace, family: ModelFamily, component: str) -> dict[str, list[str]]:
    """Layers that get an adapter: the family's own choice, or `--lora_layers` in this component."""
    targets = {name: family.default_targets(name) for name in family.adapted}
    if args.lora_layers is not None:
        targets[component] = layer_names(args.lora_layers)
    return targets


def head_state_dict(heads: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The modules that are trained in full, for a checkpoint: `head.{component}.{name}.{parameter}`, on the CPU."""
    return {
        f"head.{name}.{key}": value.detach().cpu().clone()
        for name, head in heads.items()
        for key, value in head.state_dict().items()
    }


def load_heads(heads: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> None:
    """Inverse of `head_state_dict`; the heads are trainable afterwards."""
    for name, head in heads.items():
        prefix = f"head.{name}."
        head.load_state_dict({key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)})
        head.requires_grad_(True)


# ----------------------------------------------------------------------------------------------------- pictures and log


def sample(
    args: argparse.Namespace, family: TextToImageFamily, prompts: Sequence[str], seeds: Sequence[int]
) -> list[Image.Image]:
    """One image a prompt, each from its own seed, drawn as the validation options say."""
    return family.sample(
        prompts,
        seeds,
        resolution=args.resolution,
        num_inference_steps=args.validation_inference_steps,
        guidance_scale=args.validation_guidance_scale,
    )


def draw_samples(args: argparse.Namespace, family: TextToImageFamily, prompts: Sequence[str]) -> list[Image.Image]:
    """One image a prompt with the weights as they are now; column k has the same seed in every call."""
    images: list[Image.Image] = []
    starts = range(0, len(prompts), args.sample_batch_size)
    for start in progress_bar(starts, desc="sampling", leave=False):
        chunk = prompts[start : start + args.sample_batch_size]
        seeds = [derive_seed(args.seed, "sample", start + column) for column in range(len(chunk))]
        images += sample(args, family, chunk, seeds)
    return images


class Pictures:
    """Rows of samples: the same prompts and seeds with the base, at step 0 and later. Only the main process draws."""

    def __init__(
        self,
        args: argparse.Namespace,
        family: TextToImageFamily,
        records: Sequence[ImageRecord],
        heldout: Sequence[ImageRecord],
        accelerator: Accelerator,
        state: checkpoints.TrainingState | None,
    ) -> None:
        self.args, self.family, self.trackers = args, family, accelerator.trackers
        self.prompts = choose_prompts(args, records, heldout)
        self.directory = Path(args.output_dir) / "samples"
        self.draws = accelerator.is_main_process and trains(args)
        if self.draws:
            clear_sample_rows(self.directory, state.step if state is not None else None)

    def add(self, name: str, step: int = 0) -> None:
        """Draw a row and keep it as a file, so that a resumed run still has it; trackers get it, too."""
        path = self.directory / f"{name}.png"
        if not self.draws or (path.exists() and wrote(path)):
            return
        with evaluating(self.family.adapted.values()):
            images = draw_samples(self.args, self.family, list(self.prompts.values()))
        save_sample_row(self.directory, name, images)
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                pixels = np.stack([np.asarray(image) for image in images])
                cast(Any, tracker).writer.add_images("samples", pixels, step, dataformats="NHWC")
            elif tracker.name == "wandb":
                cast(Any, tracker).log_images({"samples": [np.asarray(image) for image in images]}, step=step)

    def save_grid(self, path: Path) -> None:
        """All rows, labelled, in one picture."""
        rows = load_sample_rows(self.directory)
        labels = [f"{row} (end)" if row == f"step {self.args.max_train_steps}" else row for row in rows]
        with replacing(path) as scratch:
            sample_grid(dict(zip(labels, rows.values(), strict=True)), list(self.prompts)).save(scratch, format="PNG")


class RunLog:
    """`metrics.jsonl`, one line a step or validation, and the trackers.

    Attributes:
        lines: all lines, those of the run that is resumed included.
    """

    def __init__(
        self, args: argparse.Namespace, accelerator: Accelerator, name: str, state: checkpoints.TrainingState | None
    ) -> None:
        self.path, self.accelerator = Path(args.output_dir) / "metrics.jsonl", accelerator
        self.lines = read_metrics(self.path, state.step) if state is not None else []
        if not args.dry_run:
            begin_output(args, state)
        if not trains(args):
            return
        if args.report_to:
            options = public_arguments(args).items()
            logging_dir = self.path.parent / args.logging_dir
            logging_dir.mkdir(exist_ok=True)
            accelerator.init_trackers(
                name,
                config={k: v for k, v in options if isinstance(v, (int, float, str))},
                init_kwargs={"wandb": {"dir": str(logging_dir)}},
            )
        if accelerator.is_main_process:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def write(self, line: dict[str, Any]) -> None:
        """Add a line; its `step` is the trackers' step, and its `stage`, where it has one, comes before their names."""
        self.lines.append(line)
        stage = f"{line['stage']}/" if "stage" in line else ""
        values = {f"{stage}{name}": value for name, value in line.items() if name not in ("step", "stage")}
        self.accelerator.log(values, step=int(line["step"]))
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


# ------------------------------------------------------------------------------------------------------------ the loop


def backward_step(
    args: argparse.Namespace,
    family: ModelFamily,
    batches: Iterator[Any],
    accelerator: Accelerator,
    parameters: Sequence[nn.Parameter],
    step: int,
) -> tuple[float, float]:
    """The gradients of one optimiser step, clipped: (mean loss, gradient norm).

    Loss and gradients are those of all micro-batches of all processes in one batch: each counts as much as its own loss
    is a mean over. Every random draw comes from (seed, step, micro-step, process), so a resumed run needs the step
    number only.

    Returns:
        The mean loss, and the norm of the gradients before they are clipped. It is not finite only where a scaler of
        gradients (float16) will skip the step.

    Raises:
        ValueError: when the loss or a gradient is no longer finite; nothing has been changed then.
    """
    micro_batches = [next(batches) for _ in range(args.gradient_accumulation_steps)]
    shares = micro_batch_shares([loss_weight(family, batch) for batch in micro_batches], accelerator)
    total = torch.zeros((), device=accelerator.device)
    for micro, batch in enumerate(micro_batches):
        parts = (args.seed, "step", step, micro, accelerator.process_index)
        torch.manual_seed(derive_seed(*parts))  # for the dropout of the adapters
        loss = family.loss(batch, seeded_generator(*parts))
        loss = loss / len(micro_batches) if shares is None else loss * shares[micro]
        accelerator.backward(loss)
        total += loss.detach()
    mean_loss = float(cast(Tensor, accelerator.reduce(total, "mean")))
    if not np.isfinite(mean_loss):
        raise ValueError(f"the loss is {mean_loss} at step {step}; lower --learning_rate {args.learning_rate}")
    average_gradients(accelerator, parameters)
    accelerator.unscale_gradients()
    norm = clip_gradients(parameters, args.max_grad_norm)
    error = gradient_error(
        family.adapted,
        parameters,
        norm,
        step=step,
        loss=mean_loss,
        remedy=f"lower --learning_rate {args.learning_rate}",
        scale=accelerator.scaler.get_scale() if accelerator.scaler is not None else None,
    )
    if error is not None:
        raise error
    return mean_loss, norm


class WeightAverage:
    """An exponential moving average of the trained weights (`--use_ema`), or nothing at all."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | None) -> None:
        self.parameters = parameters
        self.average = EMAModel(parameters, decay=decay) if decay is not None else None

    def update(self) -> None:
        """Follow one optimiser step."""
        if self.average is not None:
            self.average.step(self.parameters)

    @contextmanager
    def applied(self) -> Generator[None, None, None]:
        """The model has the averaged weights inside the block."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        if self.average is None:
            return {}
        return {f"ema.{index}": value for index, value in enumerate(self.average.shadow_params)}

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Inverse of `state`, after `step` updates: as many as the schedule has steps."""
        if self.average is not None:
            for index, value in enumerate(self.average.shadow_params):
                value.copy_(tensors[f"ema.{index}"])
            self.average.optimization_step = step


class Optimization:
    """What moves the trained weights, and what a checkpoint keeps of a run.

    Attributes:
        parameters: the trained weights.
        optimizer: prepared by the accelerator.
        lr_scheduler: stepped once an optimiser step, so it needs no correction for processes and accumulation.
        average: the moving average of the weights.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        family: ModelFamily,
        accelerator: Accelerator,
        state: checkpoints.TrainingState | None,
    ) -> None:
        self.args, self.family, self.accelerator = args, family, accelerator
        groups = [
            {
                "params": adapters.trainable_parameters(module),
                "lr": args.text_encoder_lr if name.startswith("text_encoder") else args.learning_rate,
            }
            for name, module in family.adapted.items()
        ]
        if family.heads:
            heads = [parameter for head in family.heads.values() for parameter in head.parameters()]
            groups.append({"params": heads, "lr": args.head_lr})
        self.parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
        self.optimizer: Any = accelerator.prepare_optimizer(make_optimizer(args, groups))
        self.lr_scheduler = get_scheduler(
            args.lr_scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        self.average = WeightAverage(self.parameters, args.ema_decay if args.use_ema else None)
        if state is not None:
            state.restore(self.optimizer.optimizer, self.lr_scheduler)
            # a step that the scaler skipped moved neither
            self.average.load(state.tensors, int(self.lr_scheduler.last_epoch))
            if accelerator.scaler is not None and state.extra["scaler"] is not None:
                accelerator.scaler.load_state_dict(state.extra["scaler"])

    def step(self) -> bool:
        """Use the gradients, and clear them; whether the scaler let them be used: or else nothing moves.

        Raises:
            ValueError: when a weight is not finite afterwards; names it.
        """
        self.optimizer.step()
        used = not self.optimizer.step_was_skipped
        self.optimizer.zero_grad()
        if not used:
            return False
        name = weight_at_fault(self.family.adapted, self.parameters)
        if name is not None:
            rates = ", ".join(f"{group['lr']:g}" for group in self.optimizer.param_groups)
            raise ValueError(f"the weight {name} is not finite after a step with the learning rate {rates}; lower it")
        self.lr_scheduler.step()
        self.average.update()
        return True

    def save(self, step: int, init_report: Mapping[str, Any], write_more: Callable[[Path], None] | None = None) -> None:
        """Write a checkpoint, the oldest making room before it; one always stays, whenever the run is killed.

        `write_more` writes further files into the checkpoint's folder, with the averaged weights in the model where
        there are any.

        Raises:
            ValueError: when something is not finite; the last checkpoint is then as it was.
        """

        def write_averaged(folder: Path) -> None:
            if write_more is not None:
                with self.average.applied():
                    write_more(folder)

        output_dir, limit = Path(self.args.output_dir), self.args.checkpoints_total_limit
        if limit is not None:
            checkpoints.prune_checkpoints(output_dir, max(limit - 1, 1))
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None
        checkpoints.save_training_state(
            output_dir / f"checkpoint-{step}",
            tensors={
                **adapters.adapter_state_dict(self.family.adapted),
                **head_state_dict(self.family.heads),
                **self.average.state(),
            },
            optimizer=self.optimizer.optimizer,
            lr_scheduler=self.lr_scheduler,
            step=step,
            extra={
                **{"arguments": run_options(self.args), "identity": getattr(self.args, "identity", {})},
                **{"init_report": dict(init_report), "scaler": scaler},
            },
            write_more=write_averaged,
        )
        if limit is not None:
            checkpoints.prune_checkpoints(output_dir, limit)


def write_start(
    args: argparse.Namespace,
    method: Initializer,
    accelerator: Accelerator,
    optimization: Optimization,
    init_report: Mapping[str, Any],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """Write `init_report.json` and `config.json` before the first step, so that a killed run has them; the latter.

    `counts` says by name how many samples there are.
    """
    config = describe_run(args, method, accelerator) | dict(counts)
    config["num_trainable_parameters"] = sum(parameter.numel() for parameter in optimization.parameters)
    if accelerator.is_main_process:
        write_json(Path(args.output_dir) / "init_report.json", init_report)
        write_ranks(Path(args.output_dir), init_report)
        write_json(Path(args.output_dir) / "config.json", config)
    return config


@contextmanager
def last_good_named(output_dir: str) -> Generator[None, None, None]:
    """Add to an error inside the block which checkpoint the run can go on from.

    Raises:
        ValueError: the one from inside.
    """
    try:
        yield
    except ValueError as error:
        known = checkpoints.list_checkpoints(output_dir)
        if not known:
            raise
        last = f"the last good state is {known[-1].name} (--resume_from_checkpoint latest)"
        raise ValueError(f"{error}; {last}") from error


def train_steps(
    args: argparse.Namespace,
    family: ModelFamily,
    batches: Iterator[Any],
    accelerator: Accelerator,
    optimization: Optimization,
    log: RunLog,
    init_report: Mapping[str, Any],
    validate: Callable[[int], None],
    first_step: int,
    write_more: Callable[[Path], None] | None = None,
) -> None:
    """The training loop: every step after `first_step`, with its line in the log, validations and checkpoints.

    `validate` is called with the number of the step, with the averaged weights in the model where there are any, and
    so is `write_more` with the folder of a checkpoint, for what it holds beside the state.
    """
    is_main = accelerator.is_main_process
    for module in family.adapted.values():
        module.train()
    progress = progress_bar(desc="training", initial=first_step, total=args.max_train_steps, shown=is_main)
    for step in range(first_step + 1, args.max_train_steps + 1):
        step_started = time.perf_counter()
        with last_good_named(args.output_dir):
            loss, grad_norm = backward_step(args, family, batches, accelerator, optimization.parameters, step)
            learning_rate = float(optimization.lr_scheduler.get_last_lr()[0])
            used = optimization.step()
        step_s = round(time.perf_counter() - step_started, 4)
        # a norm that is not finite is no number of JSON
        of_gradients = {"grad_norm": grad_norm} if used else {"skipped": True}
        log.write({"step": step, "loss": loss, "lr": learning_rate, **of_gradients, "step_s": step_s})
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        progress.update()
        if step % args.validation_steps == 0 or step == args.max_train_steps:
            with optimization.average.applied():
                validate(step)
        if step % args.checkpointing_steps == 0 and is_main:
            optimization.save(step, init_report, write_more)
    progress.close()
    accelerator.wait_for_everyone()


def enable_gradient_checkpointing(family: ModelFamily) -> None:
    """Recompute activations in the backward pass, in every module that is trained."""
    for module in family.adapted.values():
        if hasattr(module, "enable_gradient_checkpointing"):  # diffusers' models
            cast(Any, module).enable_gradient_checkpointing()
        else:
            # the reentrant kind, transformers 4's default, needs inputs that require gradients: embeddings are frozen
            cast(Any, module).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
