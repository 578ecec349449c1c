from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lorainit_diffusers.training.data.grouping import (
    connected,
    content_keys,
    hold_out,
    hold_out_of_classes,
    picture_key,
)


@dataclass(frozen=True)
class File:
    path: Path
    image: None = None


def noise(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def decode(file: File) -> Image.Image:
    with Image.open(file.path) as image:
        return image.convert("RGB")


def keys_of(paths: Sequence[Path]) -> list[str]:
    return content_keys([File(path) for path in paths], decode)


# ------------------------------------------------------------------------------------------------------------- pictures


def test_one_picture_in_many_files(tmp_path: Path) -> None:
    image = noise(0)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.bmp")
    image.save(tmp_path / "a.tiff")
    image.save(tmp_path / "small.png", optimize=True, compress_level=9)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "another file, the same picture")
    image.save(tmp_path / "text.png", pnginfo=text)
    image.save(tmp_path / "a.webp", lossless=True)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    (tmp_path / "soft.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "folder").mkdir()
    paths = [*sorted(tmp_path.glob("*.*")), tmp_path / "folder" / ".." / "a.png"]
    assert len(paths) == 11
    assert len(set(keys_of(paths))) == 1


def test_different_pictures(tmp_path: Path) -> None:
    image = noise(0)
    changed = image.copy()
    changed.putpixel((3, 4), (0, 0, 0) if image.getpixel((3, 4)) != (0, 0, 0) else (1, 1, 1))
    reshaped = Image.frombytes("RGB", (12, 10), image.tobytes())  # the same bytes in other lines
    assert reshaped.size != image.size
    images = {"a": image, "pixel": changed, "shape": reshaped, "turned": image.rotate(180), "other": noise(1)}
    for name, each in images.items():
        each.save(tmp_path / f"{name}.png")
    assert len(set(keys_of(sorted(tmp_path.glob("*.png"))))) == len(images)
    grey = image.convert("L")
    assert picture_key(grey) == picture_key(grey.convert("RGB"))


def test_each_picture_is_decoded_once_and_a_broken_one_is_named(tmp_path: Path) -> None:
    for index in range(3):
        noise(index).save(tmp_path / f"{index}.png")
    opened: Counter[str] = Counter()

    def counted(file: File) -> Image.Image:
        opened[file.path.name] += 1
        return decode(file)

    files = [File(tmp_path / f"{index}.png") for index in (0, 1, 0, 2, 1)]
    keys = content_keys(files, counted)
    assert (keys[0], keys[1]) == (keys[2], keys[4])
    assert opened == {"0.png": 1, "1.png": 1, "2.png": 1}
    assert content_keys([], decode) == []

    def refuse(file: File) -> Image.Image:
        raise ValueError(f"cannot read the image {file.path.name}")

    for path in (tmp_path / "missing.png", tmp_path / "0.png"):
        with pytest.raises(ValueError, match=f"cannot read the image {path.name}"):
            content_keys([File(path)], refuse)


# --------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    ("samples", "groups"),
    [
        ([], []),
        (["a", "b", "a"], [0, 1, 0]),
        (["ab", "cd", "bc", "e"], [0, 0, 0, 1]),
        (["a", "b", "c", "d", "cd", "ac"], [0, 1, 0, 0, 0, 0]),
        (["", "", "a"], [0, 1, 2]),
        ([str(i) + str(i + 1) for i in range(0, 9)], [0] * 9),
    ],
)
def test_what_shares_something_is_one_group(samples: Sequence[str], groups: list[int]) -> None:
    assert connected([set(sample) for sample in samples]) == groups


def check(samples: Sequence[set[str]], fraction: float) -> tuple[int, int, int]:
    """The sizes of the three parts, which share no image; the choice is the same in any order."""
    found = hold_out(samples, fraction)
    assert sorted([*found.train, *found.validation, *found.neither]) == list(range(len(samples)))
    train, validation = ({key for i in part for key in samples[i]} for part in (found.train, found.validation))
    assert not train & validation
    order = list(range(len(samples)))
    random.Random(0).shuffle(order)
    again = hold_out([samples[i] for i in order], fraction)
    assert sorted(order[i] for i in again.validation) == found.validation
    return len(found.train), len(found.validation), len(found.neither)


def test_single_images_with_several_questions() -> None:
    samples = [{f"image {index}"} for index in range(50) for _ in range(3)]
    assert check(samples, 0.1) == (135, 15, 0)
    assert check(samples, 0.5) == (75, 75, 0)
    assert check(samples, 0.001) == (147, 3, 0)
    assert check(samples, 0.999) == (3, 147, 0)


def test_new_samples_do_not_move_the_others() -> None:
    samples = [{f"image {index}"} for index in range(40)]
    first = {min(samples[index]) for index in hold_out(samples, 0.25).validation}
    more = [*samples, {"image 40"}, {"image 41"}]
    second = {min(more[index]) for index in hold_out(more, 0.25).validation}
    assert len(first - second) <= 2


def test_groups_that_do_not_fit_are_left_to_the_training() -> None:
    chain = [{f"chain {index}", f"chain {index + 1}"} for index in range(20)]
    samples = [*chain, *({f"single {index}"} for index in range(10))]
    assert check(samples, 0.2) == (24, 6, 0)


def test_one_group_is_torn_apart_where_it_costs_least() -> None:
    names = "abcdefghij"
    pairs = [{a, b} for a in names for b in names if a < b]
    assert check(pairs, 0.2) == (28, 1, 16)
    chain = [*({name} for name in names), *({a, b} for a, b in itertools.pairwise(names))]
    train, validation, neither = check(chain, 0.2)
    assert validation >= 2
    assert neither <= 2
    assert train + validation + neither == 19


@pytest.mark.parametrize(
    "samples",
    [
        [{"a"}],
        [{"a"}, {"a"}],
        [{"a", "b"}, {"a", "b"}],
        [{"reference", str(index)} for index in range(9)],  # all share one
    ],
)
def test_nothing_can_be_held_out(samples: list[set[str]]) -> None:
    with pytest.raises(ValueError, match="none can be held out"):
        hold_out(samples, 0.1)


# -------------------------------------------------------------------------------------------------------------- classes


def in_order(name: str, indices: list[int]) -> list[int]:
    return indices


def test_copies_of_a_class_stay_together() -> None:
    keys = ["a", "b", "a", "c", "d", "e", "f", "g", "h", "i"]
    held = hold_out_of_classes(keys, ["x"] * 10, 0.3, in_order)
    assert held == {0, 2, 1}
    assert hold_out_of_classes(keys, ["x"] * 10, 0.1, in_order) == {1}  # two copies would be more than one of ten


def test_without_copies_it_is_the_first_of_each_class() -> None:
    classes = ["x"] * 5 + ["y"] * 4 + ["z"]
    assert hold_out_of_classes([str(i) for i in range(10)], classes, 0.4, lambda name, found: found[::-1]) == {
        4,
        3,
        8,
        7,
    }


def test_every_class_keeps_a_picture() -> None:
    assert hold_out_of_classes(["a"] * 4, ["x"] * 4, 0.5, in_order) == set()
    assert hold_out_of_classes(["a", "a", "b", "b", "b"], ["x"] * 5, 0.2, in_order) == {0, 1}  # the fewest copies
    # one picture in two classes goes with both, or not at all
    keys, classes = ["a", "b", "c", "a", "d", "e"], ["x", "x", "x", "y", "y", "y"]
    assert hold_out_of_classes(keys, classes, 0.34, in_order) == {0, 3}
    assert hold_out_of_classes(["a", "b", "a"], ["x", "x", "y"], 0.5, in_order) == {1}
