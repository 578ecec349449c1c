"""One LoRA training, from the options to the files: what the text-to-image scripts run.

It reads from top to bottom: load, collect and initialise, train, evaluate, save. The families differ in what one
training step is, which is theirs (`family.loss`), and in nothing here.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

from common_banner import image_banner, run_schedule
from common_data import DataNotes, read_data, warn_of_shared_files
from common_export import (
    check_export,
    open_best,
    open_hub_repository,
    save_lora,
    save_result,
    upload,
    write_card,
    write_lora,
    write_report,
)
from common_options import build_method, check_family_options, check_method, resolve_epochs
from common_output import (
    IMAGE_SETS,
    announce_resume,
    check_resumed_steps,
    claim_output_dir,
    find_state,
    identify,
)
from common_plan import print_plan
from common_run import (
    Optimization,
    Pictures,
    RunLog,
    TrainingData,
    class_images,
    enable_gradient_checkpointing,
    family_options,
    initialise,
    lora_targets,
    settle_options,
    start_accelerator,
    train_steps,
    write_start,
)

from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.training.cost import timing
from lorainit_diffusers.training.output_dir import owning


@owning
def train_lora(args: argparse.Namespace, family_class: type[TextToImageFamily], *, name: str, tag: str) -> Path:
    """Train one LoRA and return the directory that it was written to.

    Args:
        args: the checked options of a script.
        family_class: what the base is.
        name: of the script, for trackers.
        tag: of the base's kind, for the model card.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, in one line.
    """
    started = time.perf_counter()
    seconds = {"validation": 0.0, "samples": 0.0}
    method = build_method(args.init, args.init_option)
    check_method(args, method)
    check_family_options(args, family_class)
    family_class.check_base(args.pretrained_model_name_or_path)
    output_dir = claim_output_dir(args, name)
    state = find_state(args, output_dir)
    notes = DataNotes()
    records, heldout = read_data(args, notes)
    repository = open_hub_repository(args)

    # ---- load
    accelerator = start_accelerator(args)
    is_main = accelerator.is_main_process
    identify(args, accelerator, state, dict(zip(IMAGE_SETS, (records, heldout), strict=True)))
    family = family_class.from_pretrained(
        args.pretrained_model_name_or_path, **family_options(args, family_class, accelerator)
    )
    settle_options(args, family, accelerator, state)
    classes = class_images(args, family, accelerator)
    warn_of_shared_files(records, classes, "images of the class are also images of the subject", notes)
    identify(args, accelerator, state, {"class images": classes})
    data = TrainingData(args, family, records, heldout, classes, progress=is_main)
    resolve_epochs(args, data.batches_per_epoch, accelerator.num_processes)
    if state is not None:
        check_resumed_steps(args, state)
        announce_resume(args, accelerator, state)
    first_step = state.step if state is not None else 0
    log = RunLog(args, accelerator, name, state)
    pictures = Pictures(args, family, records, heldout, accelerator, state)
    if is_main:
        parts = {"training": data.train, "held out": data.heldout, "of the class": data.classes}
        length = run_schedule(args, accelerator.num_processes, len(records), first_step)
        print(image_banner(args, method, family, parts, notes, list(pictures.prompts.values()), length), flush=True)
    if args.pre_compute_text_embeddings:
        family.release_text_encoders(pictures.prompts.values())
    with timing(seconds, "samples"):
        pictures.add("base")

    # ---- collect and initialise
    targets = lora_targets(args, family, family.DENOISER)
    batches = data.for_initialisation(method, accelerator)
    init_report = initialise(args, family, method, batches, targets, accelerator, state)
    if args.dry_run:
        if is_main:
            batch = next(data.training_batches(accelerator, 0))
            one = {name: value[:1] for name, value in batch.items()}
            num_samples = args.train_batch_size * (2 if args.with_prior_preservation else 1)
            print_plan(args, family, family.modules, method, one, num_samples)
        return output_dir
    check_export(args, family)
    optimization = Optimization(args, family, accelerator, state)
    counts = {"num_images": len(records), "num_heldout_images": len(heldout)}
    config = write_start(args, method, accelerator, optimization, init_report, counts)
    if args.init_only:
        if is_main:
            save_lora(args, family, config, accelerator)
            write_card(args, family, init_report, log.lines, [tag])
            if repository is not None:
                upload(args, repository)
            accelerator.print(f"wrote the initialised LoRA to {output_dir}")
        accelerator.wait_for_everyone()
        return output_dir

    # ---- train
    if args.gradient_checkpointing:  # only now: recomputation would count the activations of the collection twice
        enable_gradient_checkpointing(family)

    best = open_best(args, "validation_loss", partial(write_lora, args, family, config), state) if is_main else None

    def validate(step: int) -> None:
        with timing(seconds, "validation"):
            loss = data.validation_loss()
        if loss is not None:
            log.write({"step": step, "validation_loss": loss})
            if best is not None:
                best.update(log.lines)
        with timing(seconds, "samples"):
            pictures.add(f"step-{step:06d}", step)

    if state is None:
        validate(0)
    training_batches = data.training_batches(accelerator, first_step)

    def write_more(checkpoint: Path) -> None:
        write_lora(args, family, config, checkpoint)
        if best is not None:
            best.copy_into(checkpoint)

    loop = (optimization, log, init_report, validate, first_step, write_more)
    train_steps(args, family, training_batches, accelerator, *loop)

    # ---- evaluate and save
    if is_main:
        pictures.save_grid(output_dir / "samples.png")
        config["total_s"] = round(time.perf_counter() - started, 1)
        config["best"] = best.summary(log.lines) if best is not None else None
        sentence = best.sentence(log.lines) if best is not None else None
        with optimization.average.applied():
            save_result(args, family, config, init_report, log.lines, accelerator, tags=[tag], best=sentence)
        write_report(args, family, config, init_report, log.lines, seconds, name=name, resumed_at=first_step)
        if repository is not None:
            upload(args, repository)
        accelerator.print(f"done in {config['total_s']} s: {output_dir}")
        if sentence is not None:
            accelerator.print(sentence)
    accelerator.end_training()
    return output_dir
