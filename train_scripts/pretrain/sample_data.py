"""Builds the bundled sample sets under `assets/data`: styles and a subject to draw, classes, and questions.

The two styles and the cats are never shown to the bundled base model, while the concepts of the style sets are: what a
LoRA has to learn from them is the style (or the subject) and nothing else. Each style comes with 40 training pictures
and 40 held-out pictures of other concepts, so that a trained style can be compared with the true picture of a concept
it was not trained on. The large set has 400 training pictures of one style and the same held-out ones.

The classes and the questions are about pictures in a style that the bundled classifier and vision-language model have
not seen, of concepts that they have: what a LoRA has to learn is to see in that style. No concept is in both halves.

    python train_scripts/pretrain/sample_data.py --output_dir assets/data
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from recipe_options import SampleDataOptions

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.parser import parse_options


def parse_args(argv: Sequence[str] | None = None) -> SampleDataOptions:
    """The options of the command line."""
    return parse_options(SampleDataOptions, argv, __doc__)


if __name__ == "__main__":
    run_script(parse_args)  # a mistake in the options is answered before the imports below, which take seconds

import emoji_pictures as emoji
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from lorainit_diffusers.training.output_dir import Wish, claim_directory, owning

CAPTIONS = {"blobs": "a blob emoji of {}", "high-contrast": "a black line emoji of {}", "cats": "a noto emoji of {}"}
# Pictures of each kind in a set of 40. The blobs are in the faces; in black and white every kind looks different.
QUOTAS = {
    "blobs": {"face": 20, "smileys-emotion": 2, "animals-nature": 8, "food-drink": 4, "objects": 3, "travel-places": 3},
    "high-contrast": {"face": 10, "animals-nature": 12, "food-drink": 8, "objects": 6, "travel-places": 4},
}
# A set that a LoRA does not learn in a hundred steps: many concepts of one style, and the held-out ones of the small.
LARGE_SETS = {"high-contrast-large": ("high-contrast", 400)}
# The style of classes and questions; pictures of a class for training and at most for validation; concepts asked about.
TASK_STYLE = "high-contrast"
CLASS_QUOTAS = (8, 20)
QUESTION_QUOTAS = (240, 120)
# Hardly anything to see, or writing, in one of the two styles.
UNSUITABLE = ("moon", "white-flower", "globe", "outbox-tray")
MIT_LICENCE = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software,
and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
LICENCE_TEXTS = {
    "Apache-2.0": "The text of the Apache License, Version 2.0, is in the file LICENSE at the root of this\n"
    "repository and at https://www.apache.org/licenses/LICENSE-2.0\n",
    "MIT": "Copyright (c) Microsoft Corporation.\n\n" + MIT_LICENCE,
}


def section(name: str, kind: emoji.Kind) -> str:
    """The group of a concept, with the faces as a group of their own."""
    return "face" if kind.group == "smileys-emotion" and "face" in name.split("-") else kind.group


def choose(kinds: Mapping[str, emoji.Kind], quotas: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """Draws disjoint training and held-out concepts, the same number of each section in both.

    The order of drawing is that of a hash of the name: it depends neither on a random generator's version nor on
    which other concepts exist.

    Args:
        kinds: Kind of emoji by concept name, of the concepts that may be drawn.
        quotas: Number of concepts per section, for each of the two halves.

    Raises:
        ValueError: A section has too few concepts.
    """
    train: list[str] = []
    held_out: list[str] = []
    for wanted, count in quotas.items():
        names = [name for name, kind in kinds.items() if section(name, kind) == wanted]
        if len(names) < 2 * count:
            raise ValueError(f"{len(names)} concepts of section {wanted!r}, {2 * count} are needed; lower the quota")
        names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        train += names[:count]
        held_out += names[count : 2 * count]
    return sorted(train), sorted(held_out)


def write_split(directory: Path, icons: emoji.IconSet, names: list[str], template: str, size: int) -> None:
    """Writes PNGs and `metadata.jsonl` (the layout of Hugging Face's `imagefolder`)."""
    directory.mkdir(parents=True)
    lines = []
    for name in tqdm(names, desc=str(directory)):
        Image.fromarray(icons.render(name, size)).save(directory / f"{name}.png", optimize=True)
        lines.append(json.dumps({"file_name": f"{name}.png", "text": template.format(name.replace("-", " "))}))
    (directory / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_licence(directory: Path, key: str, size: int) -> None:
    """Writes where the pictures come from and under which licence they are."""
    package = emoji.PACKAGES[key]
    (directory / "LICENSE.txt").write_text(
        f"Source: {package.source}\n"
        f"Package: {package.name} {package.version} (npm)\n"
        f"Licence: {package.licence}\n"
        f"Changes: rendered from SVG on white at {size}x{size} pixels, centred in a square.\n\n"
        f"{LICENCE_TEXTS[package.licence]}"
    )


def by_hash(names: Iterable[str]) -> list[str]:
    """Names in an order that depends on nothing but the names."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def save_picture(icons: emoji.IconSet, name: str, size: int, path: Path) -> None:
    """Writes a PNG in shades of grey where the picture has no colour."""
    image = Image.fromarray(icons.render(name, size))
    grey = image.convert("L")
    path.parent.mkdir(parents=True, exist_ok=True)
    (grey if image == grey.convert("RGB") else image).save(path, optimize=True)


def write_classes(directory: Path, icons: emoji.IconSet, subgroups: Mapping[str, str], size: int) -> None:
    """Writes a folder of PNGs for each class, in `train` and in `validation`."""
    kinds = {name: emoji.Kind("", subgroup) for name, subgroup in subgroups.items()}
    for label in emoji.class_names(kinds, subgroups):
        names = by_hash(name for name in subgroups if subgroups[name] == label and name in icons.data["icons"])
        num_train, num_validation = CLASS_QUOTAS
        for split, chosen in (("train", names[:num_train]), ("validation", names[num_train:][:num_validation])):
            for name in chosen:
                save_picture(icons, name, size, directory / split / label / f"{name}.png")


def write_questions(directory: Path, icons: emoji.IconSet, subgroups: Mapping[str, str], size: int) -> None:
    """Writes `train.jsonl` and `validation.jsonl`, three questions a picture, and the pictures in `images`."""
    names = by_hash(name for name in subgroups if name in icons.data["icons"])
    num_train, num_validation = QUESTION_QUOTAS
    for split, chosen in (("train", names[:num_train]), ("validation", names[num_train:][:num_validation])):
        lines = []
        for index, name in enumerate(sorted(chosen)):
            save_picture(icons, name, size, directory / "images" / f"{name}.png")
            for asked in emoji.ask(name, subgroups, np.random.default_rng((len(lines), index))):
                lines.append(json.dumps({"image": f"images/{name}.png", **asked._asdict()}))
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@owning
def main(argv: Sequence[str] | None = None) -> None:
    """Writes all sets."""
    options = parse_args(argv)
    directory_of_sets = claim_directory(Wish(options.output_dir, "sample_data", overwrite=options.overwrite_output_dir))
    directory_of_sets.begin(anew=True)
    directory_of_sets.others.append(options.output_dir)  # everything that is new in it at the end is of this run

    kinds = emoji.emoji_kinds(options.cache_dir)
    known = emoji.concepts({key: emoji.IconSet(key, options.cache_dir).names() for key in emoji.BASE_STYLES}, kinds)
    for style, quotas in QUOTAS.items():
        icons = emoji.IconSet(style, options.cache_dir)
        names = [name for name in known if name in icons.data["icons"]]
        available = {name: kinds[name] for name in names if not any(word in name for word in UNSUITABLE)}
        for split, names in zip(("train", "heldout"), choose(available, quotas), strict=True):
            write_split(options.output_dir / style / split, icons, names, CAPTIONS[style], options.size)
        write_licence(options.output_dir / style, style, options.size)

    for large, (style, count) in LARGE_SETS.items():
        icons = emoji.IconSet(style, options.cache_dir)
        names = [n for n in known if n in icons.data["icons"] and not any(word in n for word in UNSUITABLE)]
        _, held_out = choose({name: kinds[name] for name in names}, QUOTAS[style])
        names = sorted(set(names) - set(held_out), key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:count]
        for split, chosen in (("train", sorted(names)), ("heldout", held_out)):
            write_split(options.output_dir / large / split, icons, chosen, CAPTIONS[style], options.size)
        write_licence(options.output_dir / large, style, options.size)

    icons = emoji.IconSet("noto", options.cache_dir)
    write_split(options.output_dir / "cats" / "train", icons, list(emoji.CAT_FACES), CAPTIONS["cats"], options.size)
    write_licence(options.output_dir / "cats", "noto", options.size)

    icons = emoji.IconSet(TASK_STYLE, options.cache_dir)
    styles = {key: emoji.IconSet(key, options.cache_dir).names() for key in emoji.CLASSIFIER_STYLES}
    subgroups = {name: kinds[name].subgroup for name in emoji.concepts(styles, kinds)}
    for name, write in (("classes", write_classes), ("questions", write_questions)):
        directory = options.output_dir / f"{TASK_STYLE}-{name}"
        write(directory, icons, subgroups, options.task_size)
        write_licence(directory, TASK_STYLE, options.task_size)


if __name__ == "__main__":
    run_script(main)
