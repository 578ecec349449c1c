"""What an init file (`--init_from`) decides: these options are as the run that wrote it had them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from lorainit_diffusers.training.options.fields import Options

if TYPE_CHECKING:
    from lorainit_diffusers.init_file import InitFile

# Options that the initialisation depends on, of all scripts: a run that writes an init file keeps them in it.
DECIDED = (
    *("init", "init_option", "init_num_batches", "init_batch_size", "init_seed", "init_mask_padding"),
    *("init_memory_budget_gb", "init_statistics_device", "variable_rank", "rank_budget", "max_rank"),
    *("rank", "lora_alpha", "use_rslora", "use_dora", "lora_layers", "train_text_encoder", "adapt"),
)
# What files that were written inside other programs' loops call them.
_OTHER_NAMES = {"init_batches": "init_num_batches", "seed": "init_seed", "memory_budget_gb": "init_memory_budget_gb"}


def settings_of(options: Options) -> dict[str, Any]:
    """What an init file keeps of a run's options."""
    return {name: getattr(options, name) for name in DECIDED if hasattr(options, name)}


def decided_options(path: str, known: Collection[str]) -> dict[str, Any]:
    """The options that an init file decides, by name.

    Args:
        path: Of the file.
        known: Options of the script; no others are returned.

    Raises:
        FileNotFoundError, ValueError: There is no such file, or it is none.
    """
    from lorainit_diffusers.init_file import load_init_file

    init = load_init_file(path)
    values: dict[str, Any] = {}
    if "rank" not in init.settings:  # written inside another program's loop
        values |= {_OTHER_NAMES[name]: value for name, value in init.settings.items() if name in _OTHER_NAMES}
        values |= _adapter_values(init)
    values |= {name: value for name, value in init.settings.items() if name in DECIDED} | {"init": init.method}
    values["init_option"] = init.settings.get("init_option", _method_texts(init))
    values["use_dora"] = any(key.endswith(".magnitude") for key in init.state)
    values["train_text_encoder"] = any(name.startswith("text_encoder") for name in init.components)
    return {name: value for name, value in values.items() if name in known}


def check_given(options: Options, decided: Mapping[str, Any], path: str) -> None:
    """See that no option was given otherwise than the init file decides.

    Args:
        options: As they were given, the file's in the place of those that were not.
        decided: By the file.
        path: Of the file.

    Raises:
        ValueError: Naming each, with both values.
    """
    from lorainit_diffusers.training.resume import describe_differences

    now = {name: getattr(options, name) for name in decided}
    found = {name: (now[name], decided[name]) for name in decided if not _same(name, now, decided)}
    if found:
        flags = ", ".join(f"--{name}" for name in found)
        clauses = describe_differences(found, f"the init file {path!r} was made with")
        raise ValueError(f"{'; '.join(clauses)}; leave out {flags}, or make the file anew with --init_only")


def _same(name: str, now: Mapping[str, Any], decided: Mapping[str, Any]) -> bool:
    if name == "init_option" and now["init"] == decided["init"]:  # spelt otherwise, it may be the same
        return _method_options(now["init"], now[name]) == _method_options(now["init"], decided[name])
    return now[name] == decided[name] or name == "init_option"


def _adapter_values(init: InitFile) -> dict[str, Any]:
    """Rank and alpha as the adapters themselves have them."""
    rank = max(init.asked_ranks.values())
    scaling = next((float(value) for key, value in init.state.items() if key.endswith(".scaling")), 1.0)
    return {"rank": rank, "lora_alpha": scaling * rank}


def _method_texts(init: InitFile) -> list[str]:
    """The options of the method that are not its defaults, as they are given."""
    usual = _method_options(init.method, [])
    return [f"{key}={value}" for key, value in init.options.items() if usual.get(key) != value]


def _method_options(name: str, texts: list[str]) -> dict[str, Any]:
    from lorainit_diffusers.training.options.checks import build_method

    return json.loads(json.dumps(dataclasses.asdict(cast(Any, build_method(name, texts))), default=str))
