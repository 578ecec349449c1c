"""What the files of every run have in common: checks before the training, the best step, what a card says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorainit_diffusers import export
from lorainit_diffusers.evaluation import METRICS
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.report import ranks_in_words
from lorainit_diffusers.training.best import BestFolder
from lorainit_diffusers.training.options.checks import TrainOptions
from lorainit_diffusers.training.options.run import ExportOptions
from lorainit_diffusers.training.run import Run


def check_export(options: ExportOptions, family: ModelFamily) -> None:
    """See, before hours of training, that the result can be padded as asked for.

    Raises:
        ValueError: When `--pad_rank` is smaller than a layer's rank in the file.
    """
    if options.pad_rank is None:
        return
    exported = [export.exported_factors(module) for module in family.adapted.values()]
    ranks = [factors.lora_A.shape[0] for layers in exported for factors in layers.values()]
    largest = max(ranks) if options.export_rank is None else min(max(ranks), options.export_rank)
    if options.pad_rank < largest:
        raise ValueError(
            f"--pad_rank {options.pad_rank} is smaller than the largest rank in the file, {largest} (an init with an "
            "offset is saved with twice its rank); raise it, or compress with --export_rank"
        )


def open_best(run: Run[Any], metric: str, write: Callable[[Path], None]) -> BestFolder | None:
    """The folder of the best validation, as the checkpoint that is resumed has it; `None` with `--no-keep_best`.

    Args:
        run: The run.
        metric: That decides, one of `METRICS`.
        write: Writes the LoRA as it is now into a folder.
    """
    if not run.options.keep_best:
        return None
    best = BestFolder(run.output_dir, metric, METRICS[metric].higher_is_better, write)
    if run.state is not None and run.state.directory is not None:
        best.restore(run.state.directory)
    return best


def report_discarded_energy(run: Run[Any], family: ModelFamily) -> dict[str, Any]:
    """Say what `--export_rank` loses; for `config.json`, the same layer by layer, or nothing."""
    rank: int | None = run.options.export_rank
    if rank is None:
        return {}
    energy = export.discarded_energy(family.adapted, rank)
    worst = max(energy, key=lambda name: energy[name])
    run.accelerator.print(
        f"--export_rank {rank} discards {sum(energy.values()) / len(energy):.2%} of the energy of the "
        f"change on average, at most {energy[worst]:.2%} ({worst})"
    )
    return {"discarded_energy": energy}


def export_options(options: ExportOptions, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of the functions that write a LoRA: its ranks, and how it was made."""
    provenance = {name: config[name] for name in ("step_zero", "versions", "seeds")} | {"init": config["method"]}
    return {"export_rank": options.export_rank, "pad_rank": options.pad_rank, "provenance": provenance}


def describe_training(options: TrainOptions, init_report: Mapping[str, Any]) -> dict[str, str]:
    """What every model card says of a run, by name."""
    totals = init_report["totals"]
    batch = f"batch {options.train_batch_size} x {options.gradient_accumulation_steps}"
    average = ", moving average" if options.use_ema else ""
    optimizer = f"{options.optimizer}, learning rate {options.learning_rate:g}"
    return {
        "initialisation": f"{options.init}, {totals['num_layers']} layers, sum of ranks {totals['sum_of_ranks']}",
        "collection": f"{init_report['num_passes']} batches of {options.init_batch_size}, seed {options.init_seed}",
        "rank, alpha": f"{describe_ranks(options, init_report)}{' (DoRA)' if options.use_dora else ''}",
        "training": f"{options.max_train_steps} steps, {batch}, {optimizer}, seed {options.seed}{average}",
    }


def describe_ranks(options: TrainOptions, init_report: Mapping[str, Any]) -> str:
    """Rank and alpha: one of each, or what the ranks go from and to and what alpha follows them with."""
    ranks = [int(layer["rank"]) for layer in init_report["layers"].values()]
    if len(set(ranks)) < 2:
        return f"{options.rank}, {options.lora_alpha:g}"
    root = options.use_rslora
    scale = options.lora_alpha / (options.rank**0.5 if root else options.rank)
    return f"{ranks_in_words(ranks)}, alpha {scale:g} x {'the root of ' if root else ''}each layer's rank"
