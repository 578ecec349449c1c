"""What all scripts share: seeds, small pieces of a loop, and the files beside a result."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorainit_diffusers.methods import Initializer
from lorainit_diffusers.training.bundled import (
    BUNDLED_BASES,
    BUNDLED_CLASSES,
    BUNDLED_DATA,
    BUNDLED_QUESTIONS,
    ROOT,
)
from lorainit_diffusers.training.cli_parser import run_script

# what other files take from here
__all__ = ["BUNDLED_BASES", "BUNDLED_CLASSES", "BUNDLED_DATA", "BUNDLED_QUESTIONS", "ROOT", "run_script"]

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
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, scratch, {"state": json.dumps(state)})
    os.replace(scratch, path)


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
    scratch = directory / f".{name}.tmp"
    strip.save(scratch, format="PNG")
    os.replace(scratch, directory / f"{name}.png")  # a killed run leaves no half picture


def load_sample_rows(directory: Path) -> dict[str, list[Image.Image]]:
    """The rows that `save_sample_row` wrote, the base first and then by step."""
    rows: dict[str, list[Image.Image]] = {}
    for path in sorted(directory.glob("*.png")):
        with Image.open(path) as strip:
            side = strip.height
            images = [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]
        kind, _, number = path.stem.partition("-")
        rows[f"{kind} {int(number)}" if number else kind] = images
    return rows


def clear_sample_rows(directory: Path, keep_to_step: int | None) -> None:
    """Delete the sample rows of an earlier run; when resuming, only those after the step resumed from."""
    directory.mkdir(exist_ok=True)
    for path in directory.glob(".*.tmp"):
        path.unlink()
    for path in directory.glob("*.png"):
        number = path.stem.removeprefix("step-")
        if keep_to_step is None or (number.isdigit() and int(number) > keep_to_step):
            path.unlink()


def prepare_output_dir(directory: str | os.PathLike[str]) -> Path:
    """Make the output directory and see that it can be written.

    Raises:
        ValueError: when it cannot.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output_dir {str(directory)!r} cannot be written ({error}); choose another") from error
    return path


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


def public_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a run without the access token: what may be written beside a result."""
    return {name: value for name, value in vars(args).items() if name != "hub_token"}


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


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON; paths and dtypes become text."""
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


def read_metrics(path: Path, before_step: int) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` up to and including `before_step`; none if there is no file."""
    if not path.is_file():
        return []
    whole = [text for text in path.read_text(encoding="utf-8").splitlines() if text.endswith("}")]
    lines = [json.loads(text) for text in whole]  # a killed run may have left half a line at the end
    return [line for line in lines if line["step"] <= before_step]


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
    path.write_text("\n".join(header) + "\n" + body.strip() + "\n", encoding="utf-8")


def print_once(text: str) -> None:
    """Print in the main process alone."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0):
        print(text)
