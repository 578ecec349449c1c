"""The files of a text-to-image run: the LoRA in the formats of its family, the model card, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorainit_diffusers import export
from lorainit_diffusers.evaluation import plot_loss
from lorainit_diffusers.evaluation.plots import VALIDATION_LABEL
from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.report import ranks_in_words
from lorainit_diffusers.training import checkpoints
from lorainit_diffusers.training.cost import command_line, peak_memory
from lorainit_diffusers.training.model_card import CardFacts, write_model_card
from lorainit_diffusers.training.options.text_to_image import TextToImageOptions
from lorainit_diffusers.training.outputs import describe_training, export_options
from lorainit_diffusers.training.run import Run
from lorainit_diffusers.training.run_report import RunFacts, best_step, write_run_report

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHT_NAME = "pytorch_lora_weights_kohya.safetensors"


def write_lora_files(run: Run[TextToImageOptions], family: TextToImageFamily, config: Mapping[str, Any]) -> None:
    """Write the family's formats into the run's directory, each right on the original base."""
    options, output_dir = run.options, run.output_dir
    write_lora(options, family, config, output_dir)
    if "kohya" in family.EXPORTS:
        path = output_dir / KOHYA_WEIGHT_NAME
        export.save_kohya_lora(family.adapted, path, export_rank=options.export_rank, pad_rank=options.pad_rank)
    if options.export_merged:
        for component, module in family.adapted.items():
            export.save_merged(module, output_dir / "merged" / component)


def write_lora(
    options: TextToImageOptions, family: TextToImageFamily, config: Mapping[str, Any], directory: Path
) -> None:
    """Write the LoRA as it is now in the format that the base's own pipeline, or else PEFT, loads from the folder."""
    keywords = export_options(options, config)
    if "diffusers" in family.EXPORTS:
        export.save_diffusers_lora(family.adapted, directory, weight_name=WEIGHT_NAME, **keywords)
    if "peft" in family.EXPORTS:
        base = options.pretrained_model_name_or_path
        export.save_peft_lora(family.denoiser, directory, base_model=base, **keywords)


def write_image_card(
    run: Run[TextToImageOptions],
    family: TextToImageFamily,
    init_report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    tag: str,
    best: str | None,
) -> None:
    """Write the model card: what it is, how it was made and how to use it.

    Args:
        run: The run.
        family: The base.
        init_report: Of the initialisation.
        metrics: Lines of `metrics.jsonl`.
        tag: Of the base's kind.
        best: Says which step was the best.
    """
    options = run.options
    losses = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    outcome = f"Validation loss (held-out images, fixed noise): {losses[0]:.4f} -> {losses[-1]:.4f}." if losses else ""
    drawn = (run.output_dir / "samples.png").is_file()  # not with --init_only
    rows = describe_training(options, init_report)
    if best is not None:
        rows["best validation"] = best
    rows["data"] = f"`{options.data_source}`"
    if options.with_prior_preservation:
        weight = f"weight {options.prior_loss_weight:g}"
        rows["prior preservation"] = f"{options.num_class_images} images of `{options.class_prompt}`, {weight}"
    notes = ["The licences of the base model and of the training images apply."]
    if "kohya" in family.EXPORTS:
        notes.insert(0, f"`{KOHYA_WEIGHT_NAME}` holds the same LoRA for ComfyUI, A1111 and sd-scripts.")
    if options.export_merged:
        notes.insert(0, f"`merged/{family.DENOISER}` is the whole {family.DENOISER} with the LoRA in its weights.")
    facts = CardFacts(
        title=f"{options.init} LoRA",
        base_model=options.pretrained_model_name_or_path,
        init=options.init,
        step_zero=init_report["step_zero"],
        tags=[tag, "text-to-image", "lora", "diffusers", "lorainit-diffusers"],
        rows=rows,
        usage=usage(options, family),
        notes=notes,
        prompt=options.instance_prompt,
        picture="![base, step 0 and end](samples.png)" if drawn else "Initialised, not trained (`--init_only`).",
        outcome=outcome,
    )
    write_model_card(run.output_dir / "README.md", facts)


def write_image_report(
    run: Run[TextToImageOptions],
    family: TextToImageFamily,
    config: Mapping[str, Any],
    init_report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> None:
    """Write `loss.png`, and `report.html` from what the run has left.

    Args:
        run: The run.
        family: The base.
        config: As `config.json` has it, with `total_s`.
        init_report: Of the initialisation.
        metrics: Lines of `metrics.jsonl`.
        seconds: Of validation and samples.
    """
    options, output_dir = run.options, run.output_dir
    ranks = ranks_in_words([int(layer["rank"]) for layer in init_report["layers"].values()])
    title = f"{options.init}, rank {ranks}, learning rate {options.learning_rate:g}"
    plot_loss(metrics, output_dir / "loss.png", title, VALIDATION_LABEL, best_step(metrics))
    best = output_dir / "best"
    facts = RunFacts(
        init=options.init,
        base=Path(options.pretrained_model_name_or_path).name,
        data=f"{config['num_images']} images of {Path(options.data_source).name or options.data_source}",
        lines=metrics,
        init_report=init_report,
        settings=_settings(options, config, init_report),
        seconds=_seconds(config, init_report, metrics, seconds),
        memory=peak_memory(config["device"]),
        usage=usage(options, family),
        files=_files(options, family),
        command=command_line(run.script),
        resumed_at=run.first_step,
        best_dir=best.name if best.is_dir() else None,
        checkpoints=[path.name for path in checkpoints.list_checkpoints(output_dir)],
        averaged=options.use_ema,
    )
    write_run_report(output_dir, facts)


def _settings(options: TextToImageOptions, config: Mapping[str, Any], init_report: Mapping[str, Any]) -> dict[str, str]:
    """What the run was, by name."""
    return {
        **{"base": options.pretrained_model_name_or_path, "data": options.data_source},
        **describe_training(options, init_report),
        "images": f"{config['num_images']} to train on, {config['num_heldout_images']} held out",
        "resolution": f"{options.resolution} pixels",
        "precision": "float32" if config["mixed_precision"] == "no" else f"{config['mixed_precision']} (mixed)",
        "trained parameters": f"{config['num_trainable_parameters']:,}",
        "device": f"{config['device']}, {config['num_processes']} process{'es' * (config['num_processes'] > 1)}",
        "versions": ", ".join(f"{package} {version}" for package, version in config["versions"].items()),
    }


def _seconds(
    config: Mapping[str, Any],
    init_report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> dict[str, float]:
    """Where the time went, by part."""
    passes = {"in the model": init_report["forward_s"], "in the statistics": init_report["statistics_s"]}
    parts = {f"collection, {where}": spent for where, spent in passes.items() if init_report["num_passes"]}
    parts |= {"initial factors": init_report["solve_s"]}
    parts["training steps"] = sum(line.get("step_s", 0.0) for line in metrics)
    return {**parts, **seconds, "in all": config["total_s"]}


def _files(options: TextToImageOptions, family: TextToImageFamily) -> dict[str, str]:
    """The files of weights, and what each is for."""
    files: dict[str, str] = {}
    if "diffusers" in family.EXPORTS:
        files[WEIGHT_NAME] = "the LoRA, for diffusers"
    if "kohya" in family.EXPORTS:
        files[KOHYA_WEIGHT_NAME] = "the same for ComfyUI (in models/loras), A1111 and sd-scripts"
    if options.export_merged:
        files[f"merged/{family.DENOISER}"] = f"the whole {family.DENOISER} with the LoRA in its weights"
    return files


def usage(options: TextToImageOptions, family: TextToImageFamily) -> str:
    """Python that loads the LoRA and draws with it."""
    pipeline, base = type(family.pipeline()).__name__, options.pretrained_model_name_or_path
    place = options.hub_model_id or str(options.output_dir)
    lines = [f"from diffusers import {pipeline}"]
    if "diffusers" not in family.EXPORTS:
        lines.append("from lorainit_diffusers import load_lora")
    lines += ["", f"pipeline = {pipeline}.from_pretrained({base!r})"]
    if "diffusers" in family.EXPORTS:
        lines.append(f'pipeline.load_lora_weights({place!r}, weight_name="{WEIGHT_NAME}")')
    else:  # its pipeline has no `load_lora_weights`
        lines.append(f"load_lora(pipeline.{family.DENOISER}, {str(options.output_dir)!r})")
    lines.append(f"image = pipeline({family.example_prompt(options.instance_prompt)}).images[0]")
    return "\n".join(lines)
