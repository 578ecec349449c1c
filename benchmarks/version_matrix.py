"""The bundled bases under old and new versions of the libraries: do they load whole, and say the same?

    python benchmarks/version_matrix.py --work_dir /tmp/versions            # all environments, about 8 GB on the disk
    python benchmarks/version_matrix.py --work_dir /tmp/versions --only newest
    python benchmarks/version_matrix.py --update                            # store what this environment says

Makes one virtual environment for each row of `ENVIRONMENTS` (kept in the work directory, and used again), loads every
bundled base in it by the library's own loaders, which refuse a weight that is missing, and compares some numbers of
each with `assets/models/expected_outputs.json`: embeddings, a prediction or logits, the loss of a training step, and
that loss once more under a CNTLoRA adapter, which has to be the same. Prints a table; exits with 1 where a number is
off.

PyPI's wheels of old versions of torch are those for CUDA (2.5 GB with its libraries); on another index, say
`--index_url`. Everything runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "assets" / "models"
EXPECTED = MODELS / "expected_outputs.json"
# Numbers of single precision, on kernels of different versions.
TOLERANCE = 2e-3
OTHERS = ["safetensors", "pillow", "numpy", "psutil", "tqdm", "matplotlib"]
# The lower bounds of pyproject.toml, the last releases of transformers 4, and what is installed by default.
ENVIRONMENTS: dict[str, list[str]] = {
    "oldest": ["torch==2.4.0", "diffusers==0.36.0", "transformers==4.46.0", "peft==0.17.0", "accelerate==1.0.0"],
    "middle": ["torch==2.13.0", "diffusers==0.37.0", "transformers==4.57.6", "peft==0.18.0", "accelerate==1.10.0"],
    "newest": ["torch==2.13.0", "diffusers", "transformers!=5.24.*", "peft", "accelerate"],
}
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")


# ---------------------------------------------------------------------------------------- inside of one environment


def few(values: Any, count: int = 4) -> list[float]:
    """The first numbers of a tensor, and its mean square."""
    flat = values.detach().float().flatten()
    return [*flat[:count].tolist(), float(flat.square().mean())]


def seeded(seed: int = 0) -> Any:
    """A CPU generator."""
    import torch

    return torch.Generator().manual_seed(seed)


def images(count: int, side: int) -> Any:
    """(count, 3, side, side) in [0, 1]: smooth colours, the same in every version."""
    import torch

    x = torch.linspace(0, 1, side)
    grid = torch.stack([x[None, :].expand(side, side), x[:, None].expand(side, side), (x[None, :] * x[:, None])])
    return torch.stack([(grid * (index + 1) / count).clamp(0, 1) for index in range(count)])


def adapted_loss(family: Any, batch: Any) -> float:
    """The loss of the same step under an adapter that starts as the base model."""
    import torch

    from lorainit_diffusers.initialize import initialize

    initialize(family, "cntlora", [batch], rank=4, progress=False)
    with torch.no_grad():
        return float(family.loss(batch, seeded(1)))


def measure_diffusion(name: str, kind: str) -> dict[str, list[float]]:
    """Of a text-to-image base: embeddings, and losses."""
    import torch

    from lorainit_diffusers.families import family_class

    family = family_class(kind).from_pretrained(MODELS / name)
    captions = ["a noto emoji of red apple", "a fluent emoji of dog face"]
    batch = {"pixel_values": images(2, family.resolution) * 2 - 1, **family.caption_inputs(captions)}
    with torch.no_grad():
        embeds = family.embed_captions(captions)
        latents, _ = family.encode_images(batch["pixel_values"])
        loss = float(family.loss(batch, seeded(1)))
    found = {column: few(values) for column, values in embeds.items()}
    return {**found, "latents": few(latents), "loss": [loss], "adapted loss": [adapted_loss(family, batch)]}


def measure_clip() -> dict[str, list[float]]:
    """Of the encoder: features of images and of texts."""
    from PIL import Image

    from lorainit_diffusers.evaluation.encoders import load_encoder

    encoder: Any = load_encoder(MODELS / "tiny-clip")
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    return {
        "images": few(encoder.encode_images(pictures)),
        "texts": few(encoder.encode_texts(["a red apple", "a dog face"])),
    }


def measure_classifier() -> dict[str, list[float]]:
    """Of the classifier: logits and losses."""
    import torch

    from lorainit_diffusers.families.classifier import ClassifierFamily

    labels = json.loads((MODELS / "tiny-vit" / "config.json").read_text(encoding="utf-8"))["id2label"]
    names = [labels[key] for key in sorted(labels, key=int)]
    family = ClassifierFamily.from_pretrained(MODELS / "tiny-vit", class_names=names, head="keep")
    batch = {"pixel_values": images(4, family.preparation.resolution), "labels": torch.arange(4)}
    with torch.no_grad():
        found = {"logits": few(family.logits(batch["pixel_values"])), "loss": [float(family.loss(batch, seeded(1)))]}
    return {**found, "adapted loss": [adapted_loss(family, batch)]}


def measure_vlm() -> dict[str, list[float]]:
    """Of the vision-language model: the answer's logits and losses."""
    import torch
    from PIL import Image

    from lorainit_diffusers.families.vlm import VisionLanguageFamily

    family = VisionLanguageFamily.from_pretrained(MODELS / "tiny-vlm")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "a red apple"},
    ]
    batch = family.collate([family.encode(messages, [Image.new("RGB", (64, 64), (200, 30, 30))])])
    with torch.no_grad():
        found = {"logits": few(family.answer_logits(batch).logits), "loss": [float(family.loss(batch, seeded(1)))]}
    return {**found, "adapted loss": [adapted_loss(family, batch)]}


MEASURES: dict[str, Callable[[], dict[str, list[float]]]] = {
    "tiny-sd": lambda: measure_diffusion("tiny-sd", "sd"),
    "tiny-dit": lambda: measure_diffusion("tiny-dit", "sd3"),
    "tiny-clip": measure_clip,
    "tiny-vit": measure_classifier,
    "tiny-vlm": measure_vlm,
}


def measure() -> dict[str, Any]:
    """What the bundled bases say in this environment; an error as its text."""
    found: dict[str, Any] = {}
    for name, run in MEASURES.items():
        try:
            found[name] = run()
        except Exception as error:  # the table is about what goes wrong
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


def versions() -> dict[str, str]:
    """Of the libraries in this environment."""
    from importlib.metadata import version

    return {library: version(library) for library in LIBRARIES}


# ------------------------------------------------------------------------------------------------- around all of them


def make_environment(directory: Path, packages: list[str], index_url: str | None) -> Path:
    """A virtual environment with these packages; the path of its interpreter."""
    python = directory / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = directory / "packages.json"
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == packages:
        return python
    venv.create(directory, with_pip=True, clear=True)
    index = [] if index_url is None else ["--index-url", index_url]
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", *index, *packages, *OTHERS]
    subprocess.run(command, check=True)
    done.write_text(json.dumps(packages), encoding="utf-8")
    return python


def measured_by(python: Path) -> dict[str, Any]:
    """What another interpreter measures."""
    environment = {
        **os.environ,
        **{"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        **{"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"},
    }
    command = [str(python), str(Path(__file__).resolve()), "--measure"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def largest_difference(found: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """Relative to the size of what is compared; infinite where something is missing or not finite."""
    largest = 0.0
    for key, values in expected.items():
        if len(found.get(key, [])) != len(values):
            return math.inf
        if not all(map(math.isfinite, found[key])):
            return math.inf
        scale = max(1e-3, max(abs(value) for value in values))
        largest = max(largest, max(abs(a - b) for a, b in zip(found[key], values, strict=True)) / scale)
    return largest


def compare(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Base -> whether its numbers are the stored ones and its adapter starts from it, and the cell of the table."""
    cells: dict[str, tuple[bool, str]] = {}
    for name, values in expected.items():
        own = found.get(name, "not measured")
        if isinstance(own, str):
            cells[name] = False, own
            continue
        difference = largest_difference(own, values)
        start = abs(own["adapted loss"][0] - own["loss"][0]) / own["loss"][0] if "loss" in own else 0.0
        good = difference <= TOLERANCE and start <= TOLERANCE
        loss = f", loss {own['loss'][0]:.4f}" if "loss" in own else ""
        cells[name] = good, f"{'equal' if good else 'OFF'} ({difference:.0e}){loss}"
    return cells


def main() -> int:
    """Measure, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, help="where the environments are kept")
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS), help="some of them")
    parser.add_argument("--index_url", help="of the packages, instead of pip's own")
    parser.add_argument("--update", action="store_true", help="store what this environment says")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps({"versions": versions(), "bases": measure()}))
        return 0
    if args.update:
        found = measure()
        broken = {name: values for name, values in found.items() if isinstance(values, str)}
        if broken:
            sys.exit(f"error: nothing was stored: {broken}")
        rounded = {
            name: {key: [float(f"{value:.6g}") for value in numbers] for key, numbers in values.items()}
            for name, values in found.items()
        }
        EXPECTED.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
        return 0
    if args.work_dir is None:
        sys.exit("error: --work_dir is missing: a directory for the environments")
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    all_good = True
    print(f"| environment | {' | '.join(LIBRARIES)} | {' | '.join(expected)} |")
    print("|---" * (1 + len(LIBRARIES) + len(expected)) + "|")
    for name in args.only:
        result = measured_by(make_environment(args.work_dir / name, ENVIRONMENTS[name], args.index_url))
        cells = compare(result["bases"], expected)
        all_good &= all(good for good, _ in cells.values())
        row = [*(result["versions"][library] for library in LIBRARIES), *(cell for _, cell in cells.values())]
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    return 0 if all_good else 1


if __name__ == "__main__":
    sys.exit(main())
