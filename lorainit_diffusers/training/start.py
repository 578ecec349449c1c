"""The start of a run: its adapters, from the checkpoint or from the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate.utils import broadcast

from lorainit_diffusers import adapters
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.initialize import initialize, make_method
from lorainit_diffusers.training.optimization import load_heads
from lorainit_diffusers.training.options.initialisation import LoraOptions
from lorainit_diffusers.training.run import Run


def start_adapters(
    run: Run[Any], family: ModelFamily, batches: Mapping[str, Any], targets: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Give the family its adapters, from the checkpoint or from the data; returns the report of the initialisation.

    Args:
        run: The run.
        family: The base.
        batches: `batches`, and `reference_batches` where the method takes them, as `initialize` does.
        targets: Layers that get an adapter, by component.
    """
    options, state = run.options, run.state
    modules = dict(family.adapted)
    adapter_options = {"use_rslora": options.use_rslora, "lora_dropout": options.lora_dropout}
    if state is not None:
        adapters.load_adapter_state_dict(modules, state.tensors, **adapter_options)
        load_heads(family.heads, state.tensors)
        return state.extra["init_report"]
    # ranks that do not depend on the data can be told without a pass
    needs_pass = options.variable_rank or not options.dry_run
    report = initialize(
        family,
        run.method if needs_pass else make_method("kaiming"),
        **batches,
        rank=options.rank,
        alpha=options.lora_alpha,
        target_modules=targets,
        num_batches=options.init_num_batches,
        variable_rank=options.variable_rank,
        rank_budget=options.rank_budget,
        max_rank=options.max_rank,
        seed=options.init_seed,
        mask_padding=options.init_mask_padding,
        use_dora=options.use_dora,
        memory_budget_gb=options.init_memory_budget_gb,
        statistics_device=options.init_statistics_device,
        **adapter_options,
        progress=run.is_main,
    )
    if needs_pass:
        run.accelerator.print(report.summary())
    if run.accelerator.num_processes > 1:  # the same to the last digit everywhere
        for module in modules.values():
            for parameter in adapters.trainable_parameters(module):
                parameter.data.copy_(broadcast(parameter.data))
    return report.to_json()


def lora_targets(options: LoraOptions, family: ModelFamily, component: str) -> dict[str, list[str]]:
    """Layers that get an adapter: the family's own choice, or `--lora_layers` in this component."""
    targets = {name: family.default_targets(name) for name in family.adapted}
    if options.layer_names is not None:
        targets[component] = options.layer_names
    return targets
