"""Options in a file: what `--config` reads, and what a run writes so that it can be repeated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from lorainit_diffusers.training.options.fields import Options, concerns, values_of

# In a run's directory: the options that repeat it.
CONFIG_NAME = "run.yaml"
# Options of one run alone: its directory, and how it began.
_OF_ONE_RUN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class ConfigFile:
    """What a file of options says.

    Attributes:
        path: Of the file.
        values: By the names of the options, as the file has them.
    """

    path: Path
    values: dict[str, Any]


def read_config(path: str | Path) -> ConfigFile:
    """Read a YAML or JSON file of options by name.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is no mapping of names to values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--config {str(path)!r} is no file; give a YAML or JSON file of options by name")
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {str(path)!r} cannot be read ({' '.join(str(error).split())})") from None
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in cast(dict[Any, Any], content)):
        raise ValueError(f"--config {str(path)!r} must be a mapping of option names to values, such as `rank: 16`")
    values = {name.replace("-", "_"): value for name, value in cast(dict[str, Any], content).items()}
    return ConfigFile(path, values)


def write_run_config(directory: Path, options: Options, script: str) -> Path:
    """Write the options of a run, so that `--config` repeats it; its path.

    Args:
        directory: Of the run.
        options: As the command line and the base give them, before anything depends on processes or data.
        script: That takes them.
    """
    from lorainit_diffusers.files import write_text  # imports torch, which reading options must not

    values = values_of(options)
    lines = [f"# Repeat this run: {script} --config {CONFIG_NAME}"]
    for concern in concerns(type(options)):
        group = vars(concern)["_argument_group_name"]
        own = {name: values[name] for name in vars(concern)["__annotations__"] if name in values}
        kept = {name: value for name, value in own.items() if value is not None and name not in _OF_ONE_RUN}
        if kept:
            lines += ["", f"# {group}", yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).rstrip()]
    path = directory / CONFIG_NAME
    write_text(path, "\n".join(lines) + "\n")
    return path
