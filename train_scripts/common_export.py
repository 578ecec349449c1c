"""The files that a run leaves: the LoRA in the formats of its family, the model card, the upload."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from accelerate import Accelerator
from common import write_model_card
from common_output import own_directory
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from lorainit_diffusers import checkpoints, export
from lorainit_diffusers.checkpoints import TrainingState
from lorainit_diffusers.evaluation import METRICS, plot_loss
from lorainit_diffusers.evaluation.document import escape_cell
from lorainit_diffusers.evaluation.plots import VALIDATION_LABEL
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.files import write_json
from lorainit_diffusers.report import ranks_in_words
from lorainit_diffusers.training.best import BestFolder
from lorainit_diffusers.training.cost import command_line, peak_memory
from lorainit_diffusers.training.output_dir import written_names
from lorainit_diffusers.training.run_report import RunFacts, best_step, write_run_report

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
KOHYA_WEIGHT_NAME = "pytorch_lora_weights_kohya.safetensors"


def check_export(args: argparse.Namespace, family: ModelFamily) -> None:
    """See, before hours of training, that the result can be padded as asked for.

    Raises:
        ValueError: when `--pad_rank` is smaller than a layer's rank in the file.
    """
    if args.pad_rank is None:
        return
    exported = [export.exported_factors(module) for module in family.adapted.values()]
    ranks = [factors.lora_A.shape[0] for layers in exported for factors in layers.values()]
    largest = max(ranks) if args.export_rank is None else min(max(ranks), args.export_rank)
    if args.pad_rank < largest:
        raise ValueError(
            f"--pad_rank {args.pad_rank} is smaller than the largest rank in the file, {largest} (an init with an "
            "offset is saved with twice its rank); raise it, or compress with --export_rank"
        )


def save_result(
    args: argparse.Namespace,
    family: TextToImageFamily,
    config: dict[str, Any],
    init_report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    accelerator: Accelerator,
    *,
    tags: Sequence[str],
    best: str | None = None,
) -> None:
    """Write what a finished run leaves beside its pictures: the LoRA, the loss curve, `config.json`, the card.

    `best` is the sentence on the best step, where one was kept.
    """
    output_dir = Path(args.output_dir)
    ranks = ranks_in_words([int(layer["rank"]) for layer in init_report["layers"].values()])
    title = f"{args.init}, rank {ranks}, learning rate {args.learning_rate:g}"
    plot_loss(metrics, output_dir / "loss.png", title, VALIDATION_LABEL, best_step(metrics))
    save_lora(args, family, config, accelerator)
    write_json(output_dir / "config.json", config)
    write_card(args, family, init_report, metrics, tags, best)


def save_lora(
    args: argparse.Namespace, family: TextToImageFamily, config: dict[str, Any], accelerator: Accelerator
) -> None:
    """Write the family's formats, each right on the original base; `config` gets what a compression discards."""
    output_dir, modules = Path(args.output_dir), family.adapted
    report_discarded_energy(args, family, config, accelerator)
    write_lora(args, family, config, output_dir)
    if "kohya" in family.EXPORTS:
        ranks: dict[str, Any] = {"export_rank": args.export_rank, "pad_rank": args.pad_rank}
        export.save_kohya_lora(modules, output_dir / KOHYA_WEIGHT_NAME, **ranks)
    if args.export_merged:
        for component, module in modules.items():
            export.save_merged(module, output_dir / "merged" / component)


def write_lora(args: argparse.Namespace, family: TextToImageFamily, config: Mapping[str, Any], directory: Path) -> None:
    """Write the LoRA as it is now in the format that the base's own pipeline, or else PEFT, loads from the folder."""
    provenance = {"init": config["method"], "versions": config["versions"], "seeds": config["seeds"]}
    options: dict[str, Any] = {
        **{"export_rank": args.export_rank, "pad_rank": args.pad_rank},
        "provenance": provenance,
    }
    if "diffusers" in family.EXPORTS:
        export.save_diffusers_lora(family.adapted, directory, weight_name=WEIGHT_NAME, **options)
    if "peft" in family.EXPORTS:
        base = args.pretrained_model_name_or_path
        export.save_peft_lora(family.denoiser, directory, base_model=base, **options)


def open_best(
    args: argparse.Namespace, metric: str, write: Callable[[Path], None], state: TrainingState | None
) -> BestFolder | None:
    """The folder of the best validation, as the checkpoint that is resumed has it; `None` with `--no-keep_best`.

    Args:
        args: the options of a script.
        metric: that decides, one of `METRICS`.
        write: writes the LoRA as it is now into a folder.
        state: the checkpoint to continue from.
    """
    if not args.keep_best:
        return None
    best = BestFolder(Path(args.output_dir), metric, METRICS[metric].higher_is_better, write)
    if state is not None and state.directory is not None:
        best.restore(state.directory)
    return best


def report_discarded_energy(
    args: argparse.Namespace, family: ModelFamily, config: dict[str, Any], accelerator: Accelerator
) -> None:
    """Say what `--export_rank` loses, and note it in `config`, layer by layer."""
    if args.export_rank is None:
        return
    energy = export.discarded_energy(family.adapted, args.export_rank)
    worst = max(energy, key=lambda name: energy[name])
    config["discarded_energy"] = energy
    accelerator.print(
        f"--export_rank {args.export_rank} discards {sum(energy.values()) / len(energy):.2%} of the energy of the "
        f"change on average, at most {energy[worst]:.2%} ({worst})"
    )


def describe_training(args: argparse.Namespace, init_report: Mapping[str, Any]) -> dict[str, str]:
    """What every model card says of a run, by name."""
    totals = init_report["totals"]
    batch = f"batch {args.train_batch_size} x {args.gradient_accumulation_steps}"
    average = ", moving average" if args.use_ema else ""
    return {
        "initialisation": f"{args.init}, {totals['num_layers']} layers, sum of ranks {totals['sum_of_ranks']}",
        "collection": f"{init_report['num_passes']} batches of {args.init_batch_size}, seed {args.init_seed}",
        "rank, alpha": f"{describe_ranks(args, init_report)}{' (DoRA)' if args.use_dora else ''}",
        "training": f"{args.max_train_steps} steps, {batch}, {args.optimizer}, learning rate {args.learning_rate:g}, "
        f"seed {args.seed}{average}",
    }


def describe_ranks(args: argparse.Namespace, init_report: Mapping[str, Any]) -> str:
    """Rank and alpha: one of each, or what the ranks go from and to and what alpha follows them with."""
    ranks = [int(layer["rank"]) for layer in init_report["layers"].values()]
    if len(set(ranks)) < 2:
        return f"{args.rank}, {args.lora_alpha:g}"
    root = args.use_rslora
    scale = args.lora_alpha / (args.rank**0.5 if root else args.rank)
    return f"{ranks_in_words(ranks)}, alpha {scale:g} x {'the root of ' if root else ''}each layer's rank"


def markdown_rows(rows: Mapping[str, str]) -> str:
    """A table of two columns without a heading."""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {escape_cell(text)} |" for name, text in rows.items())])


def write_card(
    args: argparse.Namespace,
    family: TextToImageFamily,
    init_report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    tags: Sequence[str],
    best: str | None = None,
) -> None:
    """Write the model card: what it is, how it was made and how to use it; `best` says which step was the best."""
    losses = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    outcome = f"Validation loss (held-out images, fixed noise): {losses[0]:.4f} -> {losses[-1]:.4f}." if losses else ""
    base = args.pretrained_model_name_or_path
    drawn = (Path(args.output_dir) / "samples.png").is_file()  # not with --init_only
    picture = "![base, step 0 and end](samples.png)" if drawn else "Initialised, not trained (`--init_only`)."
    rows = describe_training(args, init_report)
    if best is not None:
        rows["best validation"] = best
    rows["data"] = f"`{args.instance_data_dir or args.train_data_dir or args.dataset_name}`"
    if args.with_prior_preservation:
        weight = f"weight {args.prior_loss_weight:g}"
        rows["prior preservation"] = f"{args.num_class_images} images of `{args.class_prompt}`, {weight}"
    notes = ["The licences of the base model and of the training images apply."]
    if "kohya" in family.EXPORTS:
        notes.insert(0, f"`{KOHYA_WEIGHT_NAME}` holds the same LoRA for ComfyUI, A1111 and sd-scripts.")
    if args.export_merged:
        notes.insert(0, f"`merged/{family.DENOISER}` is the whole {family.DENOISER} with the LoRA in its weights.")
    body = f"""
LoRA for `{base}`, initialised with **{args.init}** (step 0: {init_report["step_zero"]}).

{picture}

{markdown_rows(rows)}

{outcome}

```python
{_usage(args, family)}
```

{" ".join(notes)}
"""
    write_model_card(
        Path(args.output_dir) / "README.md",
        title=f"{args.init} LoRA",
        base_model=base,
        prompt=args.instance_prompt,
        tags=[*tags, "text-to-image", "lora", "diffusers", "lorainit-diffusers"],
        body=body,
    )


def write_report(
    args: argparse.Namespace,
    family: TextToImageFamily,
    config: Mapping[str, Any],
    init_report: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
    *,
    name: str,
    resumed_at: int,
) -> None:
    """Write `report.html` from what the run has left.

    Args:
        args: the options of the script.
        family: the base.
        config: as `config.json` has it, with `total_s`.
        init_report: of the initialisation.
        metrics: lines of `metrics.jsonl`.
        seconds: of validation and samples.
        name: of the script.
        resumed_at: step that the run went on from, 0 for one in one piece.
    """
    output_dir = Path(args.output_dir)
    data = args.instance_data_dir or args.train_data_dir or args.dataset_name
    settings = {"base": args.pretrained_model_name_or_path, "data": str(data), **describe_training(args, init_report)}
    settings |= {
        "images": f"{config['num_images']} to train on, {config['num_heldout_images']} held out",
        "resolution": f"{args.resolution} pixels",
        "precision": "float32" if config["mixed_precision"] == "no" else f"{config['mixed_precision']} (mixed)",
        "trained parameters": f"{config['num_trainable_parameters']:,}",
        "device": f"{config['device']}, {config['num_processes']} process{'es' * (config['num_processes'] > 1)}",
        "versions": ", ".join(f"{package} {version}" for package, version in config["versions"].items()),
    }
    passes = {"in the model": init_report["forward_s"], "in the statistics": init_report["statistics_s"]}
    parts = {f"collection, {where}": spent for where, spent in passes.items() if init_report["num_passes"]}
    parts |= {"initial factors": init_report["solve_s"]}
    parts["training steps"] = sum(line.get("step_s", 0.0) for line in metrics)
    parts |= {**seconds, "in all": config["total_s"]}
    files: dict[str, str] = {}
    if "diffusers" in family.EXPORTS:
        files[WEIGHT_NAME] = "the LoRA, for diffusers"
    if "kohya" in family.EXPORTS:
        files[KOHYA_WEIGHT_NAME] = "the same for ComfyUI (in models/loras), A1111 and sd-scripts"
    if args.export_merged:
        files[f"merged/{family.DENOISER}"] = f"the whole {family.DENOISER} with the LoRA in its weights"
    best = output_dir / "best"
    facts = RunFacts(
        init=args.init,
        base=Path(args.pretrained_model_name_or_path).name,
        data=f"{config['num_images']} images of {Path(str(data)).name or data}",
        lines=metrics,
        init_report=init_report,
        settings=settings,
        seconds=parts,
        memory=peak_memory(config["device"]),
        usage=_usage(args, family),
        files=files,
        command=command_line(name),
        resumed_at=resumed_at,
        best_dir=best.name if best.is_dir() else None,
        checkpoints=[path.name for path in checkpoints.list_checkpoints(output_dir)],
        averaged=args.use_ema,
    )
    write_run_report(output_dir, facts)


def _usage(args: argparse.Namespace, family: TextToImageFamily) -> str:
    """Python that loads the LoRA and draws with it."""
    pipeline, base = type(family.pipeline()).__name__, args.pretrained_model_name_or_path
    place = args.hub_model_id or str(args.output_dir)
    lines = [f"from diffusers import {pipeline}"]
    if "diffusers" not in family.EXPORTS:
        lines.append("from lorainit_diffusers import load_lora")
    lines += ["", f"pipeline = {pipeline}.from_pretrained({base!r})"]
    if "diffusers" in family.EXPORTS:
        lines.append(f'pipeline.load_lora_weights({place!r}, weight_name="{WEIGHT_NAME}")')
    else:  # its pipeline has no `load_lora_weights`
        lines.append(f"load_lora(pipeline.{family.DENOISER}, {str(args.output_dir)!r})")
    lines.append(f"image = pipeline({family.example_prompt(args.instance_prompt)}).images[0]")
    return "\n".join(lines)


def open_hub_repository(args: argparse.Namespace) -> str | None:
    """Make the repository that `--push_to_hub` uploads to, before anything is trained; its full name.

    Raises:
        ValueError: when the hub refuses, or nobody is logged in.
    """
    if not args.push_to_hub or args.dry_run:
        return None
    name = args.hub_model_id or Path(args.output_dir).name
    private: dict[str, Any] = {"private": True} if args.hub_private else {}
    try:
        repository = huggingface_hub.create_repo(name, exist_ok=True, token=args.hub_token, **private).repo_id
        public = args.hub_private and _is_public(repository, args.hub_token)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--push_to_hub cannot make the repository {name!r} ({reason}); log in with `hf auth login`, "
            "set --hub_model_id owner/name, or leave it out"
        ) from error
    if public:
        raise ValueError(
            f"--hub_private: the repository {repository!r} exists and is public; make it private on the hub, or give "
            "another --hub_model_id"
        )
    return repository


def _is_public(repository: str, token: str | None) -> bool:
    """Whether a repository is known to be public: one that existed before keeps what it was."""
    try:
        return huggingface_hub.repo_info(repository, token=token).private is False
    except (HfHubHTTPError, OSError):
        return False


def upload(args: argparse.Namespace, repository: str, *, private_files: Sequence[str] = ()) -> None:
    """Upload the result: the files that this run wrote, without checkpoints, logs, class images and sample rows.

    Args:
        args: the options of a script.
        repository: full name.
        private_files: patterns of files that hold images or texts of the user's data.

    Raises:
        ValueError: when the hub refuses; the result is in the output directory all the same.
    """
    if (directory := own_directory(args)) is not None:
        directory.finish()
    hidden = [
        *("checkpoint-*/**", ".checkpoint-*/**", f"{args.logging_dir}/**", "class_images/**", "samples/**"),
        *private_files,
    ]
    names = filter_repo_objects(written_names(args.output_dir), ignore_patterns=hidden)
    try:
        huggingface_hub.upload_folder(
            repo_id=repository,
            folder_path=args.output_dir,
            token=args.hub_token,
            commit_message="LoRA and how it was made",
            allow_patterns=[glob.escape(name) for name in names],
            ignore_patterns=hidden,
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--push_to_hub cannot upload to {repository!r} ({reason}); the result is in {args.output_dir!r}, from "
            "where `hf upload` sends what you choose"
        ) from error
