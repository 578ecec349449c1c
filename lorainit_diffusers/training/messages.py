"""What a mistake is called on the command line: the library's parameters become the flags that set them.

The library names no flag: its errors name the parameters to change as Python spells them, `variable_rank=True`. A name
without an underscore, which might be a word of the sentence, stands in backticks: `` `rank` `, ` `head='new'` ``. The
last step before an error is printed puts the flags of the script in their place: `--variable_rank`, `--head new`. What
is loaded by a name (`base model 'x'`) is followed by the flag that names it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping

# Parameters of the library that are set by flags of other names.
_OTHER_FLAGS = {
    "target_modules": "lora_layers",
    "num_batches": "init_num_batches",
    "memory_budget_gb": "init_memory_budget_gb",
    "statistics_device": "init_statistics_device",
    "mask_padding": "init_mask_padding",
    "reference_batches": "with_prior_preservation",
    "vae_path": "pretrained_vae_model_name_or_path",
    "quantization_config": "quantization",
    "weight_dtype": "mixed_precision",
}
# What the library loads by a name, and the flag that gives the name.
_LOADED = {
    "base model": "pretrained_model_name_or_path",
    "VAE": "pretrained_vae_model_name_or_path",
    "encoder": "encoders",
    "dataset": "dataset_name",
}
# The commands of the families that have one of their own.
_COMMANDS = {"sd": "train_sd_lora.py", "sdxl": "train_sdxl_lora.py"}
_NAMED = re.compile(rf"\b(?P<what>{'|'.join(_LOADED)})(?: folder)? (?:'[^']*'|\"[^\"]*\")(?!\s*\(--)")
_VALUE = r"(?:=(?P<{0}>True|False|None|'[^']*'|\"[^\"]*\"|[\w.]+))?"
_FAMILY = re.compile(r"`family_class\('(\w+)'\)`")
# In backticks; or with an underscore, and neither quoted nor part of a path, a flag, an attribute or a call.
_PARAMETER = re.compile(
    rf"`(?P<marked>\w+){_VALUE.format('marked_value')}`"
    rf"|(?<![\w./\\'\"`=-])(?P<plain>[a-z]+_\w+)(?![\w/\\'\"(\[]|\.\w){_VALUE.format('value')}"
)
# The flags of the command line that was read last, by name, with the values that they can have where these are listed.
_flags: dict[str, Collection[str]] = {}


def remember_flags(parser: argparse.ArgumentParser) -> None:
    """Keep the flags of the command line that is being read: errors from now on are worded in them."""
    _flags.clear()
    for action in parser._actions:
        for text in action.option_strings:
            if text.startswith("--"):
                _flags[text.removeprefix("--")] = [str(choice) for choice in action.choices or ()]


def in_flags(message: str, flags: Mapping[str, Collection[str]] | None = None) -> str:
    """A message of the library with flags in the place of the parameters that they set.

    Args:
        message: Of an error.
        flags: Of the script, by name without dashes, with their choices where these are listed; those of the command
            line that was read last when left out.
    """
    known = _flags if flags is None else flags
    if not known:
        return message
    message = _FAMILY.sub(lambda match: _command(match[1], known), message)
    message = _NAMED.sub(lambda match: match[0] + _giver(match["what"], known), message, count=1)
    return _PARAMETER.sub(lambda match: _flag(match, known), message)


def _giver(what: str, known: Mapping[str, Collection[str]]) -> str:
    """The flag that gives the name of what is loaded, in brackets, where the script has it."""
    return f" (--{_LOADED[what]})" if _LOADED[what] in known else ""


def _command(family: str, known: Mapping[str, Collection[str]]) -> str:
    """What a base of this family is trained by: an option of this script, or another script."""
    if family in known.get("family", ()):
        return f"--family {family}"
    return _COMMANDS.get(family, f"train_dit_lora.py --family {family}")


def _flag(match: re.Match[str], known: Mapping[str, Collection[str]]) -> str:
    name = match["marked"] or match["plain"]
    value = match["marked_value"] or match["value"]
    flag = name if name in known else _OTHER_FLAGS.get(name, name)
    if flag not in known:
        return match[0]
    if value in (None, "True"):
        return f"--{flag}"
    if value in ("False", "None"):
        negated = next((opposite for opposite in (f"no_{flag}", f"no-{flag}") if opposite in known), None)
        return f"--{negated}" if negated and value == "False" else f"no --{flag}"
    return f"--{flag} {value.strip(chr(39) + chr(34))}"
