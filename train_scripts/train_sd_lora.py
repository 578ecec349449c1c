"""Train a LoRA on Stable Diffusion 1.x/2.x with a choice of initialisation: text-to-image or DreamBooth.

    accelerate launch train_scripts/train_sd_lora.py --init cntlora

trains on the bundled base and a bundled style set. With your own:

    accelerate launch train_scripts/train_sd_lora.py --init cntlora --mixed_precision fp16 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir my_images

It reads from top to bottom: load, collect and initialise, train, evaluate, save.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from common import ROOT, describe_run, prepare_output_dir, run_script, write_json
from common_data import read_data
from common_export import check_export, open_hub_repository, save_lora, save_result, upload
from common_options import (
    add_data_arguments,
    add_dreambooth_arguments,
    add_init_arguments,
    add_lora_arguments,
    add_loss_arguments,
    add_model_arguments,
    add_run_arguments,
    add_training_arguments,
    build_method,
    check_method,
    resolve_defaults,
    resolve_epochs,
    validate_arguments,
)
from common_plan import print_plan
from common_run import (
    Optimization,
    Pictures,
    RunLog,
    TrainingData,
    backward_step,
    class_images,
    enable_gradient_checkpointing,
    family_options,
    find_state,
    initialise,
    settle_options,
    start_accelerator,
)
from tqdm.auto import tqdm

from lorainit_diffusers.families.sd import StableDiffusionFamily, check_base

DEFAULT_BASE = ROOT / "assets" / "models" / "tiny-sd"
DEFAULT_DATA = ROOT / "assets" / "data" / "high-contrast"


def make_parser() -> argparse.ArgumentParser:
    """The command line; option names follow diffusers' examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_init_arguments(parser)
    add_model_arguments(parser, default_base=str(DEFAULT_BASE))
    add_lora_arguments(parser)
    add_data_arguments(parser)
    add_dreambooth_arguments(parser)
    add_loss_arguments(parser)
    add_training_arguments(parser)
    add_run_arguments(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked as far as that needs no model.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    args = make_parser().parse_args(argv)
    resolve_defaults(args, "sd-lora", DEFAULT_DATA)
    validate_arguments(args)
    return args


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    started = time.perf_counter()
    args = parse_args(argv)
    method = build_method(args.init, args.init_option)
    check_method(args, method)
    check_base(args.pretrained_model_name_or_path)
    output_dir = Path(args.output_dir) if args.dry_run else prepare_output_dir(args.output_dir)
    state = find_state(args, output_dir)
    records, heldout = read_data(args)
    repository = open_hub_repository(args)

    # ---- load
    accelerator = start_accelerator(args)
    is_main = accelerator.is_main_process
    family = StableDiffusionFamily.from_pretrained(
        args.pretrained_model_name_or_path, **family_options(args, accelerator)
    )
    settle_options(args, family, accelerator, state)
    classes = class_images(args, family, accelerator)
    data = TrainingData(args, family, records, heldout, classes, progress=is_main)
    resolve_epochs(args, data.batches_per_epoch, accelerator.num_processes)
    first_step = state.step if state is not None else 0
    log = RunLog(args, accelerator, "train_sd_lora", state)
    pictures = Pictures(args, family, records, heldout, accelerator, state)
    pictures.add("base")

    # ---- collect and initialise
    init_report = initialise(args, family, method, data, accelerator, state)
    if args.dry_run:
        if is_main:
            print_plan(args, family, method, next(data.training_batches(accelerator, 0)))
        return output_dir
    check_export(args, family.adapted)
    optimization = Optimization(args, family.adapted, accelerator, state)
    config = describe_run(args, method, accelerator)
    config["num_images"], config["num_heldout_images"] = len(records), len(heldout)
    config["num_trainable_parameters"] = sum(parameter.numel() for parameter in optimization.parameters)
    if is_main:
        write_json(output_dir / "init_report.json", init_report)
        write_json(output_dir / "config.json", config)
    if args.init_only:
        if is_main:
            save_lora(args, family.adapted, config, accelerator)
            accelerator.print(f"wrote the initialised LoRA to {output_dir}")
        accelerator.wait_for_everyone()
        return output_dir

    # ---- train
    if args.gradient_checkpointing:  # only now: recomputation would count the activations of the collection twice
        enable_gradient_checkpointing(family)

    def validate(step: int) -> None:
        with optimization.average.applied():
            loss = data.validation_loss()
            if loss is not None:
                log.write({"step": step, "validation_loss": loss})
            pictures.add(f"step-{step:06d}", step)

    if state is None:
        validate(0)
    for module in family.adapted.values():
        module.train()
    batches = data.training_batches(accelerator, first_step)
    progress = tqdm(desc="training", initial=first_step, total=args.max_train_steps, disable=not is_main)
    for step in range(first_step + 1, args.max_train_steps + 1):
        step_started = time.perf_counter()
        loss, grad_norm = backward_step(args, family, batches, accelerator, optimization.parameters, step)
        learning_rate = float(optimization.lr_scheduler.get_last_lr()[0])
        optimization.step()
        step_s = round(time.perf_counter() - step_started, 4)
        log.write({"step": step, "loss": loss, "lr": learning_rate, "grad_norm": grad_norm, "step_s": step_s})
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        progress.update()
        if step % args.validation_steps == 0 or step == args.max_train_steps:
            validate(step)
        if step % args.checkpointing_steps == 0 and is_main:
            optimization.save(step, init_report)
    progress.close()

    # ---- evaluate and save
    accelerator.wait_for_everyone()
    if is_main:
        pictures.save_grid(output_dir / "samples.png")
        config["total_s"] = round(time.perf_counter() - started, 1)
        with optimization.average.applied():
            save_result(
                *(args, family.adapted, config, init_report, log.lines, accelerator),
                pipeline_class="StableDiffusionPipeline",
                tags=["stable-diffusion"],
            )
        if repository is not None:
            upload(args, repository)
        accelerator.print(f"done in {config['total_s']} s: {output_dir}")
    accelerator.end_training()
    return output_dir


if __name__ == "__main__":
    run_script(main)
