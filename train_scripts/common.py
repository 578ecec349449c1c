"""What all scripts share: seeds, small pieces of a loop, and the files beside a result."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from lorainit_diffusers.files import replacing, save_tensors, write_json, write_text
from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.training.bundled import (
    BUNDLED_BASES,
    BUNDLED_CLASSES,
    BUNDLED_DATA,
    BUNDLED_QUESTIONS,
    ROOT,
)
from lorainit_diffusers.training.cli_parser import run_script
from lorainit_diffusers.training.option_defaults import OptionDefaults
from lorainit_diffusers.training.output_dir import wrote

# what other files take from here
__all__ = ["BUNDLED_BASES", "BUNDLED_CLASSES", "BUNDLED_DATA", "BUNDLED_QUESTIONS", "ROOT", "run_script", "write_json"]

_SAMPLE_ROW = re.compile(r"base\.png|step-\d+\.png")

# transformers says at every start that torchvision is missing; nothing here needs it
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of all its parts, for example `derive_seed(seed, "noise", step, process)`.

    Every random draw of a run gets its generator from such a seed, so a resumed run needs the step number only.
    """
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients over the processes, in one flat all-reduce.

    A LoRA's gradients are small, so this takes the place of wrapping the modules: collection, training and sampling
    then run on the same plain modules.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, gradient in zip(parameters, cast(Tensor, flat).split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter).clone()


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Evaluation mode without gradients inside the block; afterwards the modules' modes are what they were."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.train(training)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, float]) -> None:
    """Write tensors and counters in one file, so that a kill leaves the old checkpoint or the new one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(tensors, path, {"state": json.dumps(state)})


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read what `save_checkpoint` wrote."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["state"])  # noqa: SIM118


def save_sample_row(directory: Path, name: str, images: Sequence[Image.Image]) -> None:
    """Write square images side by side to `directory/name.png`, so that a resumed run still has its earlier rows."""
    side = images[0].height
    strip = Image.new("RGB", (side * len(images), side))
    for column, image in enumerate(images):
        strip.paste(image, (column * side, 0))
    with replacing(directory / f"{name}.png") as scratch:
        strip.save(scratch, format="PNG")


def load_sample_rows(directory: Path) -> dict[str, list[Image.Image]]:
    """The rows that `save_sample_row` wrote, the base first and then by step."""
    rows: dict[str, list[Image.Image]] = {}
    for path in sorted(path for path in directory.glob("*.png") if _SAMPLE_ROW.fullmatch(path.name) and wrote(path)):
        with Image.open(path) as strip:
            side = strip.height
            images = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
        kind, _, number = path.stem.partition("-")
        rows[f"{kind} {int(number)}" if number else kind] = images
    return rows


def clear_sample_rows(directory: Path, keep_to_step: int | None) -> None:
    """Delete the sample rows of this run: when resuming, those after the step resumed from; otherwise all."""
    directory.mkdir(exist_ok=True)
    for path in directory.glob("*.png"):
        number = path.stem.removeprefix("step-")
        later = keep_to_step is None or (number.isdigit() and int(number) > keep_to_step)
        if later and _SAMPLE_ROW.fullmatch(path.name) and wrote(path):
            path.unlink()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    packages = (
        "lorainit-diffusers",
        "torch",
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "safetensors",
        "numpy",
    )
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


# What a script keeps in its namespace beside options, and the access token.
_NOT_PUBLIC = ("hub_token", "defaults_of", "option_defaults", "default_output_dir", "identity")


def public_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a run without the access token: what may be written beside a result."""
    return {name: value for name, value in vars(args).items() if name not in _NOT_PUBLIC}


def run_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a run as a checkpoint keeps them: those of the command line, and nothing else."""
    defaults: OptionDefaults | None = getattr(args, "option_defaults", None)
    return {name: value for name, value in public_arguments(args).items() if defaults is None or name in defaults}


def describe_run(args: argparse.Namespace, method: Initializer, accelerator: Accelerator) -> dict[str, Any]:
    """What `config.json` says: the resolved options, the method's hyper-parameters, seeds, versions and hardware."""
    return {
        "arguments": public_arguments(args),
        "method": {"name": args.init, **dataclasses.asdict(cast(Any, method))},
        "seeds": {"seed": args.seed, "init_seed": args.init_seed},
        "versions": versions(),
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def read_metrics(path: Path, before_step: int) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` up to and including `before_step`, but that of the end; none without a file."""
    if not path.is_file():
        return []
    whole = [text for text in path.read_text(encoding="utf-8").splitlines() if text.endswith("}")]
    lines = [json.loads(text) for text in whole]  # a killed run may have left half a line at the end
    # the end is evaluated again when the run gets there
    return [line for line in lines if line["step"] <= before_step and line.get("stage") != "end"]


def write_model_card(
    path: Path,
    *,
    title: str,
    base_model: str,
    library: str = "diffusers",
    prompt: str | None,
    tags: Sequence[str],
    body: str,
) -> None:
    """Write a model card with the YAML header that model hubs read."""
    header = ["---", f"base_model: {json.dumps(base_model)}", f"library_name: {library}"]
    header += ["tags:", *(f"- {tag}" for tag in tags)]
    if prompt is not None:
        header.append(f"instance_prompt: {json.dumps(prompt)}")
    header += ["---", "", f"# {title}", ""]
    write_text(path, "\n".join(header) + "\n" + body.strip() + "\n")


def print_once(text: str) -> None:
    """Print in the main process alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0):
        print(text)
