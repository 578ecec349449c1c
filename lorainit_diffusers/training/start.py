"""The start of a run: its adapters, from the checkpoint, from an init file or from the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate.utils import broadcast

from lorainit_diffusers import adapters
from lorainit_diffusers.families.base import ModelFamily
from lorainit_diffusers.init_file import (
    INIT_FILE_NAME,
    InitFile,
    apply_init,
    check_init,
    init_of,
    load_init_file,
    save_init_file,
)
from lorainit_diffusers.initialize import initialize, make_method
from lorainit_diffusers.report import InitReport
from lorainit_diffusers.training import resume
from lorainit_diffusers.training.optimization import load_heads
from lorainit_diffusers.training.options.init_from import settings_of
from lorainit_diffusers.training.options.initialisation import LoraOptions
from lorainit_diffusers.training.run import Run

# Data that an initialisation depends on, as a run's identity calls them.
INIT_DATA = ("training data", "class images")
# Seconds in the report of an initialisation, which a run that starts from its file does not spend.
_SECONDS = ("forward_s", "statistics_s", "solve_s", "attach_s")


def start_adapters(
    run: Run[Any],
    family: ModelFamily,
    batches: Callable[[], Mapping[str, Any]],
    targets: Mapping[str, Sequence[str]],
    init: InitFile | None = None,
) -> dict[str, Any]:
    """Give the family its adapters, from checkpoint, init file or data; returns the report of the initialisation.

    Args:
        run: The run.
        family: The base.
        batches: Makes `batches`, and `reference_batches` where the method takes them, as `initialize` does; called only
            where there is a pass, since it starts the processes that read images.
        targets: Layers that get an adapter, by component.
        init: Of `read_init_file`.
    """
    options, state = run.options, run.state
    modules = dict(family.adapted)
    adapter_options = {"use_rslora": options.use_rslora, "lora_dropout": options.lora_dropout}
    if state is not None:
        adapters.load_adapter_state_dict(modules, state.tensors, **adapter_options)
        load_heads(family.heads, state.tensors)
        return state.extra["init_report"]
    if init is not None:
        apply_init(init, modules, **adapter_options)
        for head in family.heads.values():  # attaching froze them, too
            head.requires_grad_(True)
        run.accelerator.print(
            f"{init.method} from --init_from {options.init_from}: {len(init.ranks)} layers, nothing collected"
        )
        return init.report | {name: 0.0 for name in _SECONDS if name in init.report}
    # ranks that do not depend on the data can be told without a pass
    needs_pass = options.variable_rank or not options.dry_run
    report = initialize(
        family,
        run.method if needs_pass else make_method("kaiming"),
        **batches(),
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
    if options.init_only and run.is_main:
        _write_init_file(run, family, report)
    return report.to_json()


def read_init_file(run: Run[Any], family: ModelFamily, targets: Mapping[str, Sequence[str]]) -> InitFile | None:
    """The file that a run starts from, made for its base, its data and its layers; `None` where it starts otherwise.

    Args:
        run: The run.
        family: The base, without adapters.
        targets: Layers that the run would adapt, by component.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It was made for something else (says what differs).
    """
    path: str | None = run.options.init_from
    if path is None or run.state is not None:
        return None
    init, modules = load_init_file(path), dict(family.adapted)
    beyond = [component for component in init.components if component not in modules]
    if beyond:
        raise ValueError(
            f"the init file {path!r} is for {', '.join(init.components)}, and this run adapts {', '.join(modules)}: "
            "start from the base that it was made for, or make the file anew with --init_only"
        )
    check_init(init, modules)
    if run.options.lora_layers is not None:
        _check_targets(init, family, targets, path)
    for what in INIT_DATA:
        made, found = init.data.get(what), run.identity.get(what)
        if made is not None and found is not None and (different := resume.data_differences(found, made)):
            raise ValueError(
                f"the init file {path!r} was made from other {what} ({'; '.join(different)}): train on the data that "
                "it was made from, or make the file anew with --init_only"
            )
    return init


def _check_targets(init: InitFile, family: ModelFamily, targets: Mapping[str, Sequence[str]], path: str) -> None:
    """A file of another program's loop does not know how its layers were named, but which they are."""
    for component, module in family.adapted.items():
        here = {f"{component}.{name}" for name in adapters.target_layers(module, list(targets[component]))}
        made = {name for name in init.asked_ranks if name.startswith(f"{component}.")}
        if different := sorted(here ^ made):
            where = "adapted here, but not in it" if different[0] in here else "adapted in it, but not here"
            raise ValueError(
                f"the init file {path!r} was made for other target layers: {different[0]} is {where}; leave out "
                "--lora_layers, or make the file anew with --init_only"
            )


def _write_init_file(run: Run[Any], family: ModelFamily, report: InitReport) -> None:
    """Write what other runs start from, with what they are compared by; of the data no names, only digests."""
    init = init_of(
        dict(family.adapted),
        report,
        asked_ranks=dict.fromkeys(report.layers, int(run.options.rank)),
        settings=settings_of(run.options) | {"num_processes": run.accelerator.num_processes},
        data={
            what: {name: value for name, value in run.identity[what].items() if name != "samples"}
            for what in INIT_DATA
            if what in run.identity
        },
    )
    path = save_init_file(init, run.output_dir / INIT_FILE_NAME)
    run.accelerator.print(f"wrote the init file {path}: another run starts from it with --init_from")


def lora_targets(options: LoraOptions, family: ModelFamily, component: str) -> dict[str, list[str]]:
    """Layers that get an adapter: the family's own choice, or `--lora_layers` in this component."""
    targets = {name: family.default_targets(name) for name in family.adapted}
    if options.layer_names is not None:
        targets[component] = options.layer_names
    return targets
