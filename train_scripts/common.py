"""What the training scripts share: options, seeds, small pieces of the loop, and the files beside a result."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import types
import typing
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import Accelerator
from diffusers.optimization import SchedulerType
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lorainit_diffusers.initialize import make_method
from lorainit_diffusers.methods import METHODS, Initializer

ROOT = Path(__file__).resolve().parent.parent

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


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """How the LoRA starts."""
    add = parser.add_argument_group("initialisation").add_argument
    add("--init", default="cntlora", help=f"one of {', '.join(METHODS)} (default cntlora)")
    add("--init_num_batches", type=int, default=64, help="batches that the collection pass sees (default 64)")
    add("--init_batch_size", type=int, help="their size (default: train_batch_size)")
    add("--init_seed", type=int, help="seed of the collection pass and of random initialisations (default: seed)")
    add("--init_option", action="append", default=[], metavar="KEY=VALUE", help="hyper-parameter of the method")
    add("--init_only", action="store_true", help="write the initialised LoRA and its report, and stop")
    add("--variable_rank", action="store_true", help="give each layer a rank by its scores, under the budget")
    add("--rank_budget", type=int, help="sum of the ranks with --variable_rank (default: rank x layers)")
    add("--max_rank", type=int, help="largest rank of a layer with --variable_rank (default: twice the rank)")


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    """The adapters."""
    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=int, default=8, help="rank of every layer, or on average with --variable_rank (default 8)")
    add("--lora_alpha", type=float, help="default: the rank, so that the scale is 1")
    add("--lora_dropout", type=float, default=0.0)
    add("--use_rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    add("--lora_layers", help="comma-separated names or name endings of the denoiser's layers (default: attention)")
    add("--train_text_encoder", action="store_true", help="LoRA on the text encoder's attention, too")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Images and captions, and what is done to the images."""
    add = add_dataset_arguments(parser)
    add("--center_crop", action="store_true", help="crop the centre instead of a random square")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--cache_latents", action="store_true", help="encode the images once; implies --center_crop")
    add("--dataloader_num_workers", type=int, default=0)


def add_dataset_arguments(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    """Where images and captions are; returns the group's `add_argument`."""
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="captioned images: metadata.jsonl, or a .txt beside each (default: a bundled style)")
    add("--instance_data_dir", help="DreamBooth: images of one subject")
    add("--instance_prompt", help="DreamBooth: the prompt for all of them, with a rare token")
    add("--image_column", default="file_name", help="column of the file name in the metadata (default file_name)")
    add("--caption_column", default="text", help="column of the caption in the metadata (default text)")
    add("--resolution", type=int, help="side of the square crops in pixels (default: the base's)")
    return add


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Learning rates, optimiser and precision."""
    add = parser.add_argument_group("training").add_argument
    add("--learning_rate", type=float, default=1e-3)
    add("--text_encoder_lr", type=float, help="default: learning_rate")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true")
    add_optimizer_arguments(parser, max_train_steps=200)


def add_optimizer_arguments(parser: argparse.ArgumentParser, max_train_steps: int) -> None:
    """Optimiser, schedule, length and precision: what one run and a comparison of runs have in common."""
    add = parser.add_argument_group("optimiser").add_argument
    add("--optimizer", default="adamw", choices=("adamw", "sgd", "prodigy"))
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    schedulers = [name.value for name in SchedulerType if name is not SchedulerType.PIECEWISE_CONSTANT]
    add("--lr_scheduler", default="constant", choices=schedulers)
    add("--lr_warmup_steps", type=int, default=0)
    add("--max_train_steps", type=int, default=max_train_steps, help=f"optimiser steps (default {max_train_steps})")
    add("--train_batch_size", type=int, default=8, help="images a process and micro-step (default 8)")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is configured for")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Seeds, validation, checkpoints and outputs."""
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", help="default: outputs/<script>-<init>")
    add("--seed", type=int, default=0)
    add("--validation_prompt", nargs="+", help="prompts for samples (default: some training and held-out captions)")
    add("--num_validation_images", type=int, default=1, help="samples a prompt (default 1)")
    add("--validation_steps", type=int, default=50, help="steps between validation losses and sample rows (default 50)")
    add("--validation_inference_steps", type=int, default=25)
    add("--validation_guidance_scale", type=float, default=5.0)
    add("--checkpointing_steps", type=int, default=500, help="steps between checkpoints (default 500)")
    add("--checkpoints_total_limit", type=int, help="the oldest are deleted first")
    add("--resume_from_checkpoint", help="latest, a checkpoint's name in output_dir, or its path")
    add("--report_to", choices=("tensorboard",))
    add("--logging_dir", default="logs", help="inside output_dir (default logs)")


def resolve_defaults(args: argparse.Namespace, script: str, default_data: Path) -> None:
    """Fill in the options whose default depends on others."""
    args.init_batch_size = args.train_batch_size if args.init_batch_size is None else args.init_batch_size
    args.init_seed = args.seed if args.init_seed is None else args.init_seed
    args.lora_alpha = float(args.rank) if args.lora_alpha is None else args.lora_alpha
    args.text_encoder_lr = args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr
    args.center_crop = args.center_crop or args.cache_latents
    args.output_dir = f"outputs/{script}-{args.init}" if args.output_dir is None else args.output_dir
    if args.train_data_dir is None and args.instance_data_dir is None:
        args.train_data_dir = str(default_data)


def validate_arguments(args: argparse.Namespace) -> None:
    """Find what cannot work before anything is loaded.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    check_positive(
        args,
        *("init_num_batches", "train_batch_size", "init_batch_size", "gradient_accumulation_steps", "max_train_steps"),
        *("rank", "rank_budget", "max_rank", "resolution", "checkpointing_steps", "checkpoints_total_limit"),
        *("validation_steps", "num_validation_images", "validation_inference_steps"),
    )
    if not args.variable_rank and (args.rank_budget is not None or args.max_rank is not None):
        raise ValueError("--rank_budget and --max_rank need --variable_rank")
    if args.cache_latents and args.random_flip:
        raise ValueError("--cache_latents keeps one encoding of each image: leave out --random_flip")
    validate_shared_arguments(args)
    if args.report_to == "tensorboard":
        require_package("tensorboard", "--report_to tensorboard", 'pip install "lorainit-diffusers[tracking]"')


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """See that each of these options is at least 1 where it is given.

    Raises:
        ValueError: naming the option and its value.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be at least 1")


def validate_shared_arguments(args: argparse.Namespace) -> None:
    """The options on data, adapters and optimiser that all scripts have.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    if args.train_data_dir is not None and args.instance_data_dir is not None:
        raise ValueError("--train_data_dir and --instance_data_dir exclude each other: give one of them")
    if (args.instance_data_dir is None) != (args.instance_prompt is None):
        raise ValueError("--instance_data_dir and --instance_prompt go together: give both or neither")
    if args.lora_layers is not None and not layer_names(args.lora_layers):
        raise ValueError("--lora_layers is empty; name layers such as to_q,to_k")
    if args.optimizer == "prodigy":
        require_package("prodigyopt", "--optimizer prodigy", "pip install prodigyopt")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--mixed_precision fp16 needs a CUDA device; use bf16 or no")


def layer_names(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return text.replace(",", " ").split()


def check_resumed_arguments(args: argparse.Namespace, saved: Mapping[str, Any]) -> None:
    """See that a resumed run is the one that wrote the checkpoint, in what decides its steps.

    Raises:
        ValueError: naming the first option that differs.
    """
    for name in (
        *("init", "seed", "train_batch_size", "gradient_accumulation_steps", "train_text_encoder", "optimizer"),
        *("resolution", "snr_gamma", "noise_offset", "caption_dropout", "lora_dropout", "use_rslora", "cache_latents"),
    ):
        if getattr(args, name) != saved.get(name):
            raise ValueError(
                f"--{name} is {getattr(args, name)!r}, but the checkpoint was written with {saved.get(name)!r}; "
                "resume with the same, or leave out --resume_from_checkpoint"
            )


def make_optimizer(args: argparse.Namespace, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser that `--optimizer` names, over parameter groups that carry their learning rates."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups)
    betas = (args.adam_beta1, args.adam_beta2)
    if args.optimizer == "prodigy":
        prodigy = importlib.import_module("prodigyopt").Prodigy
        return prodigy(groups, betas=betas, weight_decay=args.adam_weight_decay)
    return torch.optim.AdamW(groups, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)


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
    strip.save(directory / f"{name}.png")


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


def build_method(name: str, options: Sequence[str]) -> Initializer:
    """The initialisation `name` with its hyper-parameters set from `key=value` texts.

    Raises:
        ValueError: for an unknown name or key, or a value that the key's type does not take.
    """
    make_method(name)
    method: Any = METHODS[name]
    hints = typing.get_type_hints(method)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(method) if field.init}
    values: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key not in fields:
            known = ", ".join(fields) or "none"
            raise ValueError(f"--init_option {option!r}: give key=value with a key of {name} (known: {known})")
        values[key] = _parse_option(option, text, fields[key])
    return make_method(name, values)


def _parse_option(option: str, text: str, hint: Any) -> Any:
    accepted = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind in accepted:
        if kind is type(None) and text.lower() == "none":
            return None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(kind) is typing.Literal and text in typing.get_args(kind):
            return text
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    wanted = " or ".join(
        " | ".join(map(str, typing.get_args(kind))) if typing.get_origin(kind) is typing.Literal else str(kind.__name__)
        for kind in accepted
    )
    raise ValueError(f"--init_option {option!r}: {text!r} is not {wanted}")


def clear_sample_rows(directory: Path, keep_to_step: int | None) -> None:
    """Delete the sample rows of an earlier run; when resuming, only those after the step resumed from."""
    directory.mkdir(exist_ok=True)
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


def require_package(name: str, flag: str, remedy: str) -> None:
    """Check that an optional package is installed.

    Raises:
        ValueError: when it is not.
    """
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"{flag} needs the package {name}, which is not installed; {remedy}")


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


def describe_run(args: argparse.Namespace, method: Initializer, accelerator: Accelerator) -> dict[str, Any]:
    """What `config.json` says: the resolved options, the method's hyper-parameters, seeds, versions and hardware."""
    return {
        "arguments": vars(args),
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
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line for line in lines if line["step"] <= before_step]


def write_model_card(
    path: Path, *, title: str, base_model: str, prompt: str | None, tags: Sequence[str], body: str
) -> None:
    """Write a model card with the YAML header that model hubs read."""
    header = ["---", f"base_model: {json.dumps(base_model)}", "library_name: diffusers"]
    header += ["tags:", *(f"- {tag}" for tag in tags)]
    if prompt is not None:
        header.append(f"instance_prompt: {json.dumps(prompt)}")
    header += ["---", "", f"# {title}", ""]
    path.write_text("\n".join(header) + "\n" + body.strip() + "\n", encoding="utf-8")


def run_script(main: Callable[[], object]) -> None:
    """Run a script's main; a user's mistake ends it with one line `error: ...` and exit code 2.

    Set the environment variable `LORAINIT_TRACEBACK=1` to see where the error came from.
    """
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("LORAINIT_TRACEBACK") == "1":
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
