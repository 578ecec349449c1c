"""Prior preservation (DreamBooth, arXiv:2208.12242): the class images, and batches with both kinds of images."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lorainit_diffusers.files import write_text
from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.data.files import list_folder
from lorainit_diffusers.training.data.images import ImageRecord, check_images
from lorainit_diffusers.training.seeds import derive_seed

SETTINGS_FILE = "class_images.json"


def generate_class_images(
    directory: str | os.PathLike[str],
    *,
    prompt: str,
    count: int,
    draw: Callable[[list[str], list[int]], Sequence[Image.Image]],
    batch_size: int,
    settings: Mapping[str, object],
    process: int = 0,
    num_processes: int = 1,
    progress: bool = True,
    scratch: Path | None = None,
) -> list[ImageRecord]:
    """The first `count` class images of a folder; those that it lacks are drawn and stay there.

    Image i has its own seed, so a generation that was killed goes on to the same images. Of several processes each
    draws its share: wait for the others before the images are read.

    Args:
        directory: The folder; made if need be. A user's own images in it count.
        prompt: The prompt of the class, which is also the caption.
        count: How many images are wanted.
        draw: Prompts and seeds to images.
        batch_size: Images that are drawn at once.
        settings: What else the drawn images depend on, such as base and steps; written beside them.
        process: Index of this process.
        num_processes: How many draw.
        progress: Show a bar.
        scratch: Another folder for what is drawn, where the first one is to stay as it is.

    Raises:
        ValueError: As `missing_class_images`.
    """
    folder = Path(directory)
    missing = missing_class_images(folder, prompt=prompt, count=count, settings=settings)
    present = set(list_images(folder))
    target = folder if scratch is None else scratch
    if missing and scratch is None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_description(prompt, settings), indent=2) + "\n"
        # before the first image, and by every process: no generated image is ever without it
        write_text(folder / SETTINGS_FILE, text)
    share = [index for index in missing if index % num_processes == process]
    with progress_bar(desc="class images", total=len(share), shown=progress and bool(share)) as bar:
        for start in range(0, len(share), batch_size):
            indices = share[start : start + batch_size]
            images = draw([prompt] * len(indices), [derive_seed("class", index) for index in indices])
            for index, image in zip(indices, images, strict=True):
                path = _generated_path(target, index)
                half = path.with_suffix(".tmp")
                image.save(half, format="PNG")
                os.replace(half, path)
            bar.update(len(indices))
    # the other processes' images may not be there yet
    paths = sorted(present | {_generated_path(target, index) for index in missing})
    return [ImageRecord(path, prompt) for path in paths[:count]]


def missing_class_images(
    directory: str | os.PathLike[str], *, prompt: str, count: int, settings: Mapping[str, object]
) -> list[int]:
    """Which generated images a folder of class images still needs; the others have been decoded once.

    Raises:
        ValueError: When the folder's images were generated with another prompt or other settings, or one is unreadable.
    """
    folder = Path(directory)
    flag = f"--class_data_dir {str(directory)!r}"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} is not a directory; give a folder")
    settings_path = folder / SETTINGS_FILE
    if settings_path.is_file():
        try:
            saved = dict(json.loads(settings_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{str(settings_path)!r} is not a JSON object ({error}); delete it and class-*.png"
            ) from error
        wanted = _description(prompt, settings)
        for name in {**wanted, **saved}:
            if saved.get(name) != wanted.get(name):
                raise ValueError(
                    f"{flag} has images generated with {name} {saved.get(name)!r}, not {wanted.get(name)!r}; give "
                    f"another --class_data_dir, or delete its {SETTINGS_FILE} and class-*.png"
                )
    paths = list_images(folder) if folder.is_dir() else []
    check_images([ImageRecord(path, prompt) for path in paths])
    # whoever made the images that are there, each of them counts
    free = (index for index in itertools.count() if not os.path.lexists(_generated_path(folder, index)))
    return list(itertools.islice(free, max(0, count - len(paths))))


def pair_batches(
    instance_batches: Iterable[Mapping[str, Tensor]], class_batches: Iterable[Mapping[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Each instance batch with a class batch behind it, and `is_class`: bool, one a sample.

    Raises:
        ValueError: When one of the two ends before the other.
    """
    for instances, classes in zip(instance_batches, class_batches, strict=True):
        pair = {name: torch.cat([rows, classes[name]]) for name, rows in instances.items()}
        sizes = [len(next(iter(batch.values()))) for batch in (instances, classes)]
        pair["is_class"] = torch.arange(sum(sizes)) >= sizes[0]
        yield pair


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders, sorted; none if it is not there."""
    return list(list_folder(folder).images) if folder.is_dir() else []


def _description(prompt: str, settings: Mapping[str, object]) -> dict[str, object]:
    return json.loads(json.dumps({"prompt": prompt, **settings}, default=str))


def _generated_path(folder: Path, index: int) -> Path:
    return folder / f"class-{index:05d}.png"
