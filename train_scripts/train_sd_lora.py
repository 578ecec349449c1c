"""Train a LoRA on Stable Diffusion 1.x/2.x with a choice of initialisation.

    accelerate launch train_scripts/train_sd_lora.py --init cntlora

trains on the bundled base and a bundled style set. With your own:

    accelerate launch train_scripts/train_sd_lora.py --init cntlora --mixed_precision fp16 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --train_data_dir my_images

It reads from top to bottom: load, collect and initialise, train, evaluate, save.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from common import (
    ROOT,
    add_data_arguments,
    add_init_arguments,
    add_lora_arguments,
    add_run_arguments,
    add_training_arguments,
    average_gradients,
    build_method,
    check_resumed_arguments,
    clear_sample_rows,
    derive_seed,
    describe_run,
    evaluating,
    layer_names,
    load_sample_rows,
    make_optimizer,
    prepare_output_dir,
    read_metrics,
    require_package,
    resolve_defaults,
    run_script,
    save_sample_row,
    seeded_generator,
    validate_arguments,
    write_json,
    write_model_card,
)
from common_data import CaptionedImages, DataOrder, ImageRecord, choose_prompts, fixed_batches, read_data
from diffusers.optimization import get_scheduler
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lorainit_diffusers import adapters, checkpoints
from lorainit_diffusers.evaluation import fixed_noise_loss, plot_loss, sample_grid
from lorainit_diffusers.families.sd import StableDiffusionFamily, check_base
from lorainit_diffusers.initialize import initialize


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; option names follow diffusers' examples.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_init_arguments(parser)
    add = parser.add_argument_group("model").add_argument
    default_base = str(ROOT / "assets" / "models" / "tiny-sd")
    add("--pretrained_model_name_or_path", default=default_base, help="folder or hub name (default: the bundled base)")
    add("--revision", help="hub revision")
    add("--variant", help="weight variant, such as fp16")
    add("--enable_xformers_memory_efficient_attention", action="store_true")
    add_lora_arguments(parser)
    add_data_arguments(parser)
    add = parser.add_argument_group("loss").add_argument
    add("--snr_gamma", type=float, help="min-SNR weighting (5.0 is usual; default: off)")
    add("--noise_offset", type=float, default=0.0)
    add("--caption_dropout", type=float, default=0.0, help="share of samples that train on the empty caption")
    add_training_arguments(parser)
    add_run_arguments(parser)
    args = parser.parse_args(argv)
    resolve_defaults(args, "sd-lora", ROOT / "assets" / "data" / "high-contrast")
    validate_arguments(args)
    if args.enable_xformers_memory_efficient_attention:
        flag = "--enable_xformers_memory_efficient_attention"
        require_package("xformers", flag, 'pip install "lorainit-diffusers[xformers]" or leave the flag out')
        if not torch.cuda.is_available():
            raise ValueError(f"{flag} needs a CUDA device; leave it out")
    return args


def main(argv: Sequence[str] | None = None) -> Path:
    """Train one LoRA and return the directory that it was written to."""
    started = time.perf_counter()
    args = parse_args(argv)
    method = build_method(args.init, args.init_option)
    check_base(args.pretrained_model_name_or_path)
    output_dir = prepare_output_dir(args.output_dir)
    state = None
    if args.resume_from_checkpoint is not None:
        checkpoint = checkpoints.find_checkpoint(output_dir, args.resume_from_checkpoint)
        state = checkpoints.load_training_state(checkpoint)
    elif (known := checkpoints.list_checkpoints(output_dir)) and not args.init_only:
        raise ValueError(
            f"--output_dir {str(output_dir)!r} holds {known[-1].name} of an earlier run; continue it with "
            "--resume_from_checkpoint latest, choose another directory, or delete its checkpoints"
        )
    records, heldout = read_data(args)

    # ---- load
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=str(output_dir / args.logging_dir),
    )
    is_main, process, num_processes = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    # keyed on the accelerator: its precision may come from accelerate's configuration instead of the flag
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    family = StableDiffusionFamily.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        weight_dtype=weight_dtype,
        device=accelerator.device,
        train_text_encoder=args.train_text_encoder,
        snr_gamma=args.snr_gamma,
        noise_offset=args.noise_offset,
        caption_dropout=args.caption_dropout,
    )
    modules: dict[str, Any] = dict(family.adapted)
    args.resolution = family.resolution if args.resolution is None else args.resolution
    if args.resolution % family.resolution_multiple:
        raise ValueError(f"--resolution {args.resolution} is not a multiple of {family.resolution_multiple}")
    if state is not None:
        check_resumed_arguments(args, state.extra["arguments"])
    if args.enable_xformers_memory_efficient_attention:
        family.unet.enable_xformers_memory_efficient_attention()

    def load_set(chosen: Sequence[ImageRecord], center_crop: bool, random_flip: bool) -> CaptionedImages:
        input_ids = family.tokenize([record.caption for record in chosen])
        return CaptionedImages(chosen, input_ids, args.resolution, center_crop, random_flip)

    train_set = load_set(records, args.center_crop, args.random_flip)
    if args.cache_latents:
        train_set.cache_latents(family.encode_images, args.train_batch_size, progress=is_main)
    heldout_set = None
    if heldout:
        heldout_set = load_set(heldout, center_crop=True, random_flip=False)
        heldout_set.cache_latents(family.encode_images, args.train_batch_size, progress=False)

    first_step = state.step if state is not None else 0
    prompts = choose_prompts(args, records, heldout)
    rows_dir = output_dir / "samples"
    if is_main and not args.init_only:
        clear_sample_rows(rows_dir, state.step if state is not None else None)

    def add_sample_row(name: str) -> None:
        """Draw every prompt with the weights as they are now; the seeds are the same each time."""
        if is_main and not (rows_dir / f"{name}.png").exists():
            with evaluating(modules.values()):
                save_sample_row(rows_dir, name, draw_samples(family, list(prompts.values()), args))

    if not args.init_only:
        add_sample_row("base")

    # ---- collect and initialise
    if state is not None:
        adapters.load_adapter_state_dict(
            modules, state.tensors, use_rslora=args.use_rslora, lora_dropout=args.lora_dropout
        )
        init_report = state.extra["init_report"]
    else:
        targets = {name: family.default_targets(name) for name in modules}
        if args.lora_layers is not None:
            targets["unet"] = layer_names(args.lora_layers)
        init_order = DataOrder(
            len(train_set),
            args.init_batch_size,
            args.init_seed,
            range(process, args.init_num_batches * num_processes, num_processes),
        )
        report = initialize(
            family,
            method,
            DataLoader(train_set, batch_sampler=init_order, num_workers=args.dataloader_num_workers),
            rank=args.rank,
            alpha=args.lora_alpha,
            target_modules=targets,
            num_batches=args.init_num_batches,
            variable_rank=args.variable_rank,
            rank_budget=args.rank_budget,
            max_rank=args.max_rank,
            seed=args.init_seed,
            use_rslora=args.use_rslora,
            lora_dropout=args.lora_dropout,
            progress=is_main,
        )
        init_report = report.to_json()
        accelerator.print(report.summary())
    learning_rates = {"unet": args.learning_rate, "text_encoder": args.text_encoder_lr}
    groups = [
        {"params": adapters.trainable_parameters(module), "lr": learning_rates[name]}
        for name, module in modules.items()
    ]
    parameters: list[nn.Parameter] = [parameter for group in groups for parameter in group["params"]]
    if num_processes > 1:
        for parameter in parameters:
            parameter.data.copy_(broadcast(parameter.data))
    config = describe_run(args, method, accelerator)
    config["num_images"], config["num_heldout_images"] = len(records), len(heldout)
    config["num_trainable_parameters"] = sum(parameter.numel() for parameter in parameters)
    if is_main:
        write_json(output_dir / "init_report.json", init_report)
        write_json(output_dir / "config.json", config)
    if args.init_only:
        if is_main:
            save_lora(output_dir, modules, config)
            accelerator.print(f"wrote the initialised LoRA to {output_dir}")
        accelerator.wait_for_everyone()
        return output_dir

    # ---- train
    optimizer: Any = accelerator.prepare_optimizer(make_optimizer(args, groups))
    # stepped once an optimiser step, so it needs no correction for processes and accumulation
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer.optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    if state is not None:
        state.restore(optimizer.optimizer, lr_scheduler)
        if accelerator.scaler is not None and state.extra["scaler"] is not None:
            accelerator.scaler.load_state_dict(state.extra["scaler"])
    if args.gradient_checkpointing:  # only now: recomputation would count the activations of the collection twice
        family.unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            family.text_encoder.gradient_checkpointing_enable()
    if args.report_to:
        plain = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("train_sd_lora", config=plain)

    metrics_path = output_dir / "metrics.jsonl"
    metrics = read_metrics(metrics_path, first_step) if state is not None else []
    if is_main:
        metrics_path.write_text("".join(json.dumps(line) + "\n" for line in metrics), encoding="utf-8")

    def log(line: dict[str, float]) -> None:
        metrics.append(line)
        accelerator.log({name: value for name, value in line.items() if name != "step"}, step=int(line["step"]))
        if is_main:
            with metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def validate(step: int) -> None:
        if heldout_set is not None:
            with evaluating(modules.values()):
                loss = fixed_noise_loss(family, fixed_batches(heldout_set), len(heldout_set))
                log({"step": step, "validation_loss": loss})
        add_sample_row(f"step-{step:06d}")

    if state is None:
        validate(0)
    for module in modules.values():
        module.train()
    accumulation = args.gradient_accumulation_steps
    order = DataOrder(
        len(train_set),
        args.train_batch_size,
        args.seed,
        range(
            first_step * accumulation * num_processes + process,
            args.max_train_steps * accumulation * num_processes,
            num_processes,
        ),
    )
    batches = iter(DataLoader(train_set, batch_sampler=order, num_workers=args.dataloader_num_workers))
    progress = tqdm(desc="training", initial=first_step, total=args.max_train_steps, disable=not is_main)
    for step in range(first_step + 1, args.max_train_steps + 1):
        step_started = time.perf_counter()
        total = torch.zeros((), device=accelerator.device)
        for micro in range(accumulation):
            parts = (args.seed, "step", step, micro, process)
            torch.manual_seed(derive_seed(*parts))  # for the dropout of the adapters
            loss = family.loss(next(batches), seeded_generator(*parts)) / accumulation
            accelerator.backward(loss)
            total += loss.detach()
        mean_loss = float(accelerator.reduce(total, "mean"))  # pyright: ignore[reportArgumentType]
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss is {mean_loss} at step {step}; lower --learning_rate {args.learning_rate}")
        average_gradients(accelerator, parameters)
        grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        line: dict[str, float] = {"step": step, "loss": mean_loss, "lr": float(lr_scheduler.get_last_lr()[0])}
        optimizer.step()
        if not optimizer.step_was_skipped:
            lr_scheduler.step()
        optimizer.zero_grad()
        log({**line, "grad_norm": float(grad_norm or 0.0), "step_s": round(time.perf_counter() - step_started, 4)})
        progress.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)
        progress.update()
        if step % args.validation_steps == 0 or step == args.max_train_steps:
            validate(step)
        if step % args.checkpointing_steps == 0 and is_main:
            if args.checkpoints_total_limit is not None:
                checkpoints.prune_checkpoints(output_dir, args.checkpoints_total_limit - 1)
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            checkpoints.save_training_state(
                output_dir / f"checkpoint-{step}",
                tensors=adapters.adapter_state_dict(modules),
                optimizer=optimizer.optimizer,
                lr_scheduler=lr_scheduler,
                step=step,
                extra={"arguments": vars(args), "init_report": init_report, "scaler": scaler},
            )
    progress.close()

    # ---- evaluate and save
    accelerator.wait_for_everyone()
    if is_main:
        title = f"{args.init}, rank {args.rank}, learning rate {args.learning_rate:g}"
        plot_loss(metrics, output_dir / "loss.png", title)
        rows = load_sample_rows(rows_dir)
        labels = [f"{label} (end)" if label == f"step {args.max_train_steps}" else label for label in rows]
        sample_grid(dict(zip(labels, rows.values(), strict=True)), list(prompts)).save(output_dir / "samples.png")
        config["total_s"] = round(time.perf_counter() - started, 1)
        write_json(output_dir / "config.json", config)
        save_lora(output_dir, modules, config)
        write_card(output_dir, args, init_report, metrics)
        accelerator.print(f"done in {config['total_s']} s: {output_dir}")
    accelerator.end_training()
    return output_dir


def draw_samples(family: StableDiffusionFamily, prompts: Sequence[str], args: argparse.Namespace) -> list[Any]:
    """One image a prompt; column k has the same seed in every call."""
    images: list[Any] = []
    for start in range(0, len(prompts), args.train_batch_size):
        chunk = list(prompts[start : start + args.train_batch_size])
        images += family.sample(
            chunk,
            [derive_seed(args.seed, "sample", start + column) for column in range(len(chunk))],
            resolution=args.resolution,
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
        )
    return images


def save_lora(output_dir: Path, modules: dict[str, Any], config: dict[str, Any]) -> None:
    """Write both formats; each is right on the original base."""
    provenance = {"init": config["method"], "versions": config["versions"], "seeds": config["seeds"]}
    adapters.save_diffusers_lora(modules, output_dir, provenance=provenance)
    adapters.save_kohya_lora(modules, output_dir / "pytorch_lora_weights_kohya.safetensors")


def write_card(
    output_dir: Path, args: argparse.Namespace, init_report: dict[str, Any], metrics: Sequence[dict[str, Any]]
) -> None:
    """Write the model card: what it is, how it was made and how to use it."""
    losses = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    outcome = f"Validation loss (held-out images, fixed noise): {losses[0]:.4f} -> {losses[-1]:.4f}." if losses else ""
    base, totals = args.pretrained_model_name_or_path, init_report["totals"]
    prompt = args.instance_prompt or "a prompt in the style of the captions"
    body = f"""
LoRA for `{base}`, initialised with **{args.init}** (step 0: {init_report["step_zero"]}).

![base, step 0 and end](samples.png)

| | |
|---|---|
| initialisation | {args.init}, {totals["num_layers"]} layers, sum of ranks {totals["sum_of_ranks"]} |
| collection | {init_report["num_passes"]} batches of {args.init_batch_size}, seed {args.init_seed} |
| rank, alpha | {args.rank}, {args.lora_alpha:g} |
| training | {args.max_train_steps} steps, batch {args.train_batch_size} x {args.gradient_accumulation_steps}, \
{args.optimizer}, learning rate {args.learning_rate:g}, seed {args.seed} |
| data | `{args.instance_data_dir or args.train_data_dir}` |

{outcome}

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained({base!r})
pipeline.load_lora_weights({str(output_dir)!r}, weight_name="pytorch_lora_weights.safetensors")
image = pipeline({prompt!r}).images[0]
```

`pytorch_lora_weights_kohya.safetensors` holds the same LoRA for ComfyUI, A1111 and sd-scripts. The licences of the base
model and of the training images apply.
"""
    tags = ["stable-diffusion", "text-to-image", "lora", "diffusers", "lorainit-diffusers"]
    title = f"{args.init} LoRA"
    write_model_card(
        output_dir / "README.md", title=title, base_model=base, prompt=args.instance_prompt, tags=tags, body=body
    )


if __name__ == "__main__":
    run_script(main)
