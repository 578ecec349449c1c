"""The LoRA scripts of diffusers under the launcher, unmodified: where do they start, what do they save, do they resume?

    python benchmarks/stock_scripts.py --diffusers ~/diffusers --work_dir /tmp/stock       # all, some minutes on a CPU
    python benchmarks/stock_scripts.py --diffusers ~/diffusers --work_dir /tmp/stock --only sdxl flux --inits cntlora

Needs a checkout of diffusers (0.40 or newer) and what its example scripts import (torchvision, tensorboard, datasets);
nothing is downloaded. Every script is run first without this library, so that a failure of its own is told from one of
ours; then with each initialisation, two epochs of four images; and once more from the checkpoint between them. The
table says

- step 0: the largest difference between the trained model and its base in the first step after the pass;
- reload: that between the model at the end and a stock pipeline on the original base with the file that was saved;
- moved: how far training has moved the outputs, without which the other two would show nothing;
- resume: the largest difference between the files of the uninterrupted run and of the resumed one; where the script by
  itself does not resume exactly, its own difference, too.

All outputs are of the denoiser, on what the script gave it in its first step. Prints a table, writes it and
`results.json` into the work directory, and exits with 1 where a number is too large.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
INITS = ("cntlora", "eva", "lora_ga")
BATCHES = 4
STEP_0, RELOAD, MOVED = 1e-5, 1e-4, 1e-3


@dataclass(frozen=True)
class Case:
    """One script on one base.

    Attributes:
        script: Below `examples/`.
        base: Of `stock_bases.WRITERS`.
        pipeline: That loads the result.
        arguments: Of the script, beyond the common ones.
        denoiser: The pipeline's name for it.
    """

    script: str
    base: str
    pipeline: str
    arguments: tuple[str, ...] = ()
    denoiser: str = "transformer"

    @property
    def half(self) -> int:
        """The step of the checkpoint, where the first epoch of four images ends: scripts go on at an epoch's start."""
        return 4 if SINGLE[0] in self.arguments else 2


DREAMBOOTH = ("--instance_prompt", "a photo of sks cat")
CHECKPOINTING = ("--gradient_checkpointing",)
TEXT = ("--max_sequence_length", "48")
SINGLE = ("--train_batch_size", "1")  # the script repeats no embeddings over a batch
CASES: dict[str, Case] = {
    "text_to_image": Case(
        "text_to_image/train_text_to_image_lora.py", "sd", "StableDiffusionPipeline", ("--rank", "4"), "unet"
    ),
    "text_to_image_sdxl": Case(
        "text_to_image/train_text_to_image_lora_sdxl.py",
        "sdxl",
        "StableDiffusionXLPipeline",
        ("--rank", "4", "--train_text_encoder"),
        "unet",
    ),
    "sd": Case("dreambooth/train_dreambooth_lora.py", "sd", "StableDiffusionPipeline", DREAMBOOTH, "unet"),
    "sd_text_encoder": Case(
        "dreambooth/train_dreambooth_lora.py",
        "sd",
        "StableDiffusionPipeline",
        (*DREAMBOOTH, "--train_text_encoder", "--gradient_accumulation_steps", "2"),
        "unet",
    ),
    "sd_precomputed": Case(
        "dreambooth/train_dreambooth_lora.py",
        "sd",
        "StableDiffusionPipeline",
        (*DREAMBOOTH, "--pre_compute_text_embeddings", *CHECKPOINTING),
        "unet",
    ),
    "sdxl": Case("dreambooth/train_dreambooth_lora_sdxl.py", "sdxl", "StableDiffusionXLPipeline", DREAMBOOTH, "unet"),
    "sdxl_text_encoder": Case(
        "dreambooth/train_dreambooth_lora_sdxl.py",
        "sdxl",
        "StableDiffusionXLPipeline",
        (*DREAMBOOTH, "--train_text_encoder"),
        "unet",
    ),
    "sd3": Case("dreambooth/train_dreambooth_lora_sd3.py", "sd3", "StableDiffusion3Pipeline", (*DREAMBOOTH, *TEXT)),
    "sd3_text_encoder": Case(
        "dreambooth/train_dreambooth_lora_sd3.py",
        "sd3",
        "StableDiffusion3Pipeline",
        (*DREAMBOOTH, *TEXT, "--train_text_encoder"),
    ),
    "flux": Case(
        "dreambooth/train_dreambooth_lora_flux.py", "flux", "FluxPipeline", (*DREAMBOOTH, *TEXT, *CHECKPOINTING)
    ),
    "flux_text_encoder": Case(
        "dreambooth/train_dreambooth_lora_flux.py",
        "flux",
        "FluxPipeline",
        (*DREAMBOOTH, *TEXT, *SINGLE, "--train_text_encoder"),
    ),
    "flux2_klein": Case(
        "dreambooth/train_dreambooth_lora_flux2_klein.py", "flux2-klein", "Flux2KleinPipeline", (*DREAMBOOTH, *TEXT)
    ),
    "qwen_image": Case(
        "dreambooth/train_dreambooth_lora_qwen_image.py", "qwen-image", "QwenImagePipeline", (*DREAMBOOTH, *TEXT)
    ),
    "z_image": Case("dreambooth/train_dreambooth_lora_z_image.py", "z-image", "ZImagePipeline", (*DREAMBOOTH, *TEXT)),
    "sana": Case(
        "dreambooth/train_dreambooth_lora_sana.py",
        "sana",
        "SanaPipeline",
        (*DREAMBOOTH, *TEXT, *SINGLE),
    ),
    "lumina2": Case("dreambooth/train_dreambooth_lora_lumina2.py", "lumina2", "Lumina2Pipeline", (*DREAMBOOTH, *TEXT)),
    "hidream": Case(
        "dreambooth/train_dreambooth_lora_hidream.py",
        "hidream",
        "HiDreamImagePipeline",
        (*DREAMBOOTH, *TEXT, *SINGLE),
    ),
}


# ------------------------------------------------------------------------------------- one script, in its own process


class Watched:
    """The denoiser of a script's run: what it got and gave in the first step after the pass."""

    def __init__(self, denoiser: str) -> None:
        self.name = denoiser
        self.attached: Any = None
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.base: Any = None
        self.step_0 = float("nan")

    def attach(self, attach: Any) -> Any:
        """Attach, and watch the denoiser that is prepared."""

        def attach_and_watch(accelerator: Any, *args: Any, **kwargs: Any) -> Any:
            self.attached = attach(accelerator, *args, **kwargs)
            prepare_model = accelerator.prepare_model

            def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
                prepared = prepare_model(model, *args, **kwargs)
                if self.attached.modules.get(self.name) is model:
                    model.register_forward_pre_hook(self.first_step, with_kwargs=True)
                return prepared

            accelerator.prepare_model = prepare
            return self.attached

        return attach_and_watch

    def first_step(self, model: Any, args: Any, kwargs: Any) -> None:
        """Note the first step's inputs, and what the adapter changes in them."""
        if self.inputs is not None or not self.attached.over:
            return
        from lorainit_diffusers import adapters_disabled

        self.inputs = _detached(args), {key: _detached(value) for key, value in kwargs.items()}
        live = self.output(model)
        with adapters_disabled({self.name: model}):
            self.base = self.output(model)
        self.step_0 = _difference(live, self.base)

    def output(self, model: Any) -> Any:
        """What a denoiser makes of the noted inputs."""
        import torch

        assert self.inputs is not None
        training = model.training
        model.eval()
        with torch.no_grad():
            output = model(*self.inputs[0], **self.inputs[1])
        model.train(training)
        sample = output[0] if isinstance(output, (tuple, list)) else output.sample
        return torch.stack(list(sample)) if isinstance(sample, (tuple, list)) else sample

    @property
    def model(self) -> Any:
        """The denoiser itself."""
        return self.attached.modules[self.name]


def _detached(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(item) for item in value)
    return value


def _difference(one: Any, other: Any) -> float:
    return float((one.float() - other.float()).abs().max())


def _fresh() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


def run_case(name: str, script: Path, base: Path, data: Path, work: Path, inits: Sequence[str]) -> dict[str, Any]:
    """One script: by itself, then with each initialisation."""
    case = CASES[name]
    folder = "--train_data_dir" if case.script.startswith("text_to_image") else "--instance_data_dir"
    images = data if folder == "--train_data_dir" else data / "images"
    common = ["--pretrained_model_name_or_path", base, folder, images, "--resolution", 32, "--train_batch_size", 2]
    common += [
        "--max_train_steps",
        2 * case.half,
        "--checkpointing_steps",
        case.half,
        "--learning_rate",
        1e-2,
        "--seed",
        0,
    ]
    common += ["--dataloader_num_workers", 0, *case.arguments]
    if name == "hidream":
        common += ["--pretrained_tokenizer_4_name_or_path", base / "tokenizer_4"]
        common += ["--pretrained_text_encoder_4_name_or_path", base / "text_encoder_4"]
    arguments = [str(item) for item in common]
    results: dict[str, Any] = {"stock": "runs"}
    whole, again = work / "stock", work / "stock-resumed"
    try:
        _fresh()
        _alone(script, [*arguments, "--output_dir", str(whole)])
    except (Exception, SystemExit) as error:
        return {"stock": _short(error), "traceback": traceback.format_exc()[-3000:]}
    try:
        shutil.copytree(whole / f"checkpoint-{case.half}", again / f"checkpoint-{case.half}")
        _fresh()
        _alone(script, [*arguments, "--output_dir", str(again), "--resume_from_checkpoint", f"checkpoint-{case.half}"])
        results["stock_resume"] = _file_difference(whole, again)
    except (Exception, SystemExit) as error:
        results["stock_resume"] = _short(error)
    for init in inits:
        try:
            results[init] = {"stock_resume": results["stock_resume"]}
            results[init] |= _with_init(case, init, script, arguments, base, work)
            if not isinstance(results["stock_resume"], str):  # or else no run of it can be resumed
                results[init] |= _resumed(case, init, script, arguments, work)
        except (Exception, SystemExit) as error:
            results[init] = {"error": _short(error), "traceback": traceback.format_exc()[-3000:]}
    return results


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"[:300]


def _alone(script: Path, arguments: list[str]) -> None:
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


def _launch(case: Case, init: str, script: Path, arguments: list[str], output: Path, *more: str) -> Watched:
    from lorainit_diffusers import run

    module = importlib.import_module("lorainit_diffusers.attach")
    attach = module.attach
    watched = Watched(case.denoiser)
    module.attach = watched.attach(attach)
    _fresh()
    options = ["--init", init, "--init_batches", str(BATCHES), "--", str(script), *arguments]
    try:
        run.run(run.parse([*options, "--output_dir", str(output), *more]))
    finally:
        module.attach = attach
    return watched


def _with_init(case: Case, init: str, script: Path, arguments: list[str], base: Path, work: Path) -> dict[str, Any]:
    import diffusers

    whole = work / init
    watched = _launch(case, init, script, arguments, whole)
    pipeline = getattr(diffusers, case.pipeline).from_pretrained(base, trust_remote_code=False)
    pipeline.load_lora_weights(whole, weight_name="pytorch_lora_weights.safetensors")
    stock = watched.output(getattr(pipeline, case.denoiser))
    live = watched.output(watched.model.float())
    result: dict[str, Any] = {
        "step_0": watched.step_0,
        "reload": _difference(stock, live),
        "moved": _difference(live, watched.base),
        "components": list(watched.attached.modules),
        "layers": len(watched.attached.report.layers),
        "kohya": (whole / "pytorch_lora_weights_kohya.safetensors").is_file(),
    }
    for component in watched.attached.modules:
        if component != case.denoiser:
            difference = _text_difference(watched, pipeline, component)
            result["text_encoders"] = max(result.get("text_encoders", 0.0), difference)
    return result


def _resumed(case: Case, init: str, script: Path, arguments: list[str], work: Path) -> dict[str, Any]:
    whole, again = work / init, work / f"{init}-resumed"
    shutil.copytree(whole / f"checkpoint-{case.half}", again / f"checkpoint-{case.half}")
    _launch(case, init, script, arguments, again, "--resume_from_checkpoint", f"checkpoint-{case.half}")
    return {"resume": _file_difference(whole, again)}


def _text_difference(watched: Watched, pipeline: Any, component: str) -> float:
    """Between a trained text encoder and the stock pipeline's, which a scaled-up LoRA would show, too."""
    import torch

    ids = torch.arange(24).reshape(2, 12) * 7
    outputs: list[Any] = []
    for model in (watched.attached.modules[component], getattr(pipeline, component)):
        with torch.no_grad():
            outputs.append(model.eval().float()(ids, output_hidden_states=True).hidden_states[-1])
    return _difference(*outputs)


def _file_difference(one: Path, other: Path) -> float:
    from safetensors.torch import load_file

    first, second = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, other))
    if first.keys() != second.keys():
        return float("inf")
    return max(_difference(value, second[key]) for key, value in first.items())


# ---------------------------------------------------------------------------------------------------------- all of it


def verdict(result: dict[str, Any]) -> str:
    """`ok`, or what is wrong."""
    if "error" in result:
        return result["error"]
    worse = [
        name
        for name, limit in (("step_0", STEP_0), ("reload", RELOAD), ("text_encoders", RELOAD), ("resume", 0.0))
        if name in result and not result[name] <= limit and not (name == "resume" and result["stock_resume"])
    ]
    return f"too large: {', '.join(worse)}" if worse else "ok" if result["moved"] > MOVED else "nothing was trained"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = ["| script | adapts | init | step 0 | reload | moved | resume | |", "|---|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        case = CASES[name]
        flags = " ".join(f"`{item}`" for item in case.arguments if item.startswith("--") and item not in _COMMON)
        title = f"`{Path(case.script).name}` {flags}".strip()
        if result["stock"] != "runs":
            lines.append(f"| {title} | | | | | | | fails by itself: {result['stock']} |")
            continue
        for init, found in result.items():
            if init.startswith("stock"):
                continue
            cells = [f"{found[key]:.1g}" if key in found else "" for key in ("step_0", "reload", "moved", "resume")]
            own = found.get("stock_resume")
            if isinstance(own, str):
                cells[3] = f"fails by itself: {own}"
            elif own:
                cells[3] += f" (by itself {own:.1g})"
            adapts = ", ".join(found.get("components", []))
            lines.append(f"| {title} | {adapts} | {init} | {' | '.join(cells)} | {verdict(found)} |")
    versions = ", ".join(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES)
    return "\n".join([*lines, "", f"With {versions}."])


_COMMON = {"--instance_prompt", "--rank", "--max_sequence_length", "--train_batch_size"}


def _write_data(folder: Path) -> Path:
    from sd_fixtures import write_images

    if not (folder / "images").is_dir():
        write_images(folder)
        (folder / "images").mkdir()
        for image in folder.glob("*.png"):  # DreamBooth's scripts open every file of the folder as an image
            shutil.copy(image, folder / "images" / image.name)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--diffusers", type=Path, required=True, metavar="DIR", help="a checkout of diffusers")
    parser.add_argument("--work_dir", type=Path, required=True, metavar="DIR", help="for bases, data and outputs")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--inits", nargs="+", default=list(INITS))
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.work_dir = args.work_dir.resolve()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(args.work_dir / "datasets")}
    from stock_bases import write_base

    if args.child:
        name = args.child
        base = write_base(CASES[name].base, args.work_dir / "bases" / CASES[name].base)
        data = _write_data(args.work_dir / "data")
        work = args.work_dir / "runs" / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        script = (args.diffusers / "examples" / CASES[name].script).resolve()
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            result = run_case(name, script, base, data, work, args.inits)
        (work / "stdout.txt").write_text(log.getvalue())
        (work / "result.json").write_text(json.dumps(result, indent=1))
        return
    path = args.work_dir / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.only:
        print(f"{name} ...", flush=True)
        command = [
            sys.executable,
            __file__,
            "--diffusers",
            args.diffusers,
            "--work_dir",
            args.work_dir,
            "--child",
            name,
        ]
        done = subprocess.run([*command, "--inits", *args.inits], capture_output=True, text=True, check=False)
        found = args.work_dir / "runs" / name / "result.json"
        (args.work_dir / f"{name}.log").write_text(done.stdout + done.stderr)
        results[name] = json.loads(found.read_text()) if found.is_file() else {"stock": done.stderr[-300:]}
        path.write_text(json.dumps(results, indent=1))
    shown = table({name: results[name] for name in CASES if name in results})
    (args.work_dir / "table.md").write_text(shown + "\n")
    print(shown)
    failed = [
        name for name in args.only for init in args.inits if verdict(results[name].get(init, {"error": ""})) != "ok"
    ]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
