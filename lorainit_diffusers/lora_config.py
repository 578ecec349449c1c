"""Which LoRA configurations mean what this library computes with, field by field of PEFT's `LoraConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields that say where the adapter is, that are honoured, or that act in training or on the choice of layers only.
HONOURED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "lora_bias"),
    *("bias", "modules_to_save", "trainable_token_indices", "init_lora_weights", "ensure_weight_tying"),
    # the orientation of a base weight; linear layers have only one
    "fan_in_fan_out",
    # options of initialisations and of features that other fields turn on
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "megatron_core"),
    "qalora_group_size",
}
# Initialisations of PEFT's that leave the base weights alone.
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false", "none")


def check_config(config: Mapping[str, Any], defaults: Mapping[str, Any], where: str, remedy: str) -> None:
    """See that factors under this configuration are a plain LoRA (or DoRA) of linear layers on the original base.

    Args:
        config: As `adapter_config.json` holds it.
        defaults: Of the installed PEFT, by field.
        where: What the configuration is, for the message (`"'x/adapter_config.json'"`).
        remedy: What to do instead, to end the message with.

    Raises:
        ValueError: Naming the field and its value.
    """
    kind = str(getattr(config.get("peft_type", "LORA"), "value", config.get("peft_type", "LORA")))
    if kind.upper() != "LORA":
        raise ValueError(f"{where} has peft_type {kind!r}; only LORA is supported: {remedy}")
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in HARMLESS_INITS:
        raise ValueError(
            f"{where} has init_lora_weights={init!r}, which changes the weights of the base model, so that its factors "
            f"are wrong on the original one; {remedy}"
        )
    for field, value in config.items():
        if field in HONOURED or value == defaults.get(field) or not value:
            continue
        raise ValueError(f"{where} has {field}={value!r}, which this library does not know how to honour; {remedy}")
