"""What of the data is held out, so that nothing that is trained on is validated on: by the content of the images.

Two files may hold one picture: under two names, as a copy, as a link, saved in another format without loss. Several
samples may share a picture, and one sample may have several. So samples are compared by the decoded pixels of their
images, and all that are connected by images that they share stay on one side. A picture that was resized, cropped or
saved with loss is another picture here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from PIL import Image

from lorainit_diffusers.progress import progress_bar
from lorainit_diffusers.training.data.images import decoding


class Picture(Protocol):
    """An image of the data: a file, or what `image` reads."""

    @property
    def path(self) -> Path:
        """The file, or a label of a row of a dataset."""
        ...

    @property
    def image(self) -> Callable[[], bytes] | None:
        """Reads the encoded image; `None` for a file."""
        ...


PictureT = TypeVar("PictureT", bound=Picture)


def content_keys(pictures: Sequence[PictureT], decode: Callable[[PictureT], Image.Image]) -> list[str]:
    """What each picture is: the same text for the same size and RGB pixels, whatever file they are in.

    Every picture is decoded once, so one that cannot be is found here; of several whose bytes are equal, the first.

    Args:
        pictures: Files or rows of a dataset.
        decode: To RGB; raises a ValueError that names a picture that cannot be read.
    """

    def file_key(picture: PictureT) -> str:
        try:
            encoded = picture.path.read_bytes() if picture.image is None else picture.image()
        except (OSError, ValueError):
            decode(picture)  # says it in its own words
            raise
        return hashlib.blake2b(encoded, digest_size=16).hexdigest()

    def pixels_key(picture: PictureT) -> str:
        with decoding(picture):
            return picture_key(decode(picture))

    quiet = len(pictures) < 1000
    with ThreadPoolExecutor() as pool:
        files = list(
            progress_bar(pool.map(file_key, pictures), total=len(pictures), desc="comparing files", shown=not quiet)
        )
        first = dict(reversed(list(zip(files, pictures, strict=True))))
        decoded = pool.map(pixels_key, first.values())
        keys = list(progress_bar(decoded, total=len(first), desc="reading images", shown=not quiet))
    known = dict(zip(first, keys, strict=True))
    return [known[key] for key in files]


def picture_key(image: Image.Image) -> str:
    """A digest of the size and the RGB pixels of an image."""
    digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=16)
    digest.update((image if image.mode == "RGB" else image.convert("RGB")).tobytes())
    return digest.hexdigest()


def connected(samples: Sequence[Collection[Hashable]]) -> list[int]:
    """The group of each sample: those that share something, directly or through others, are in one.

    Groups are numbered as they come. A sample without anything is a group of its own.
    """
    parents = list(range(len(samples)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    owners: dict[Hashable, int] = {}
    for index, sample in enumerate(samples):
        for thing in sample:
            first, second = root(owners.setdefault(thing, index)), root(index)
            parents[max(first, second)] = min(first, second)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(index), len(numbers)) for index in range(len(samples))]


class HeldOut(NamedTuple):
    """Indices of samples, each in their order.

    Attributes:
        train: To train on.
        validation: To validate on.
        neither: That share images with both.
    """

    train: list[int]
    validation: list[int]
    neither: list[int]


def hold_out(samples: Sequence[Collection[str]], fraction: float) -> HeldOut:
    """Hold out a share of the images with all samples that they are in; the same whatever the order of the samples is.

    Groups of samples that share images are held out whole, in an order that their content decides, as long as they fit.
    Where none fits, because images connect too many samples, images are held out by themselves: the samples that have
    some on either side are then for neither.

    Args:
        samples: The keys of each sample's images.
        fraction: Of all images; one at least is held out, and one is left.

    Raises:
        ValueError: When nothing would be left on one of the sides.
    """
    images = {key for sample in samples for key in sample}
    target = min(max(1, round(fraction * len(images))), len(images) - 1)
    held: set[str] = set()
    groups: dict[int, set[str]] = {}
    for number, sample in zip(connected(samples), samples, strict=True):
        groups.setdefault(number, set()).update(sample)
    for group in sorted(groups.values(), key=_digest):
        if group and len(held) + len(group) <= target:
            held |= group
    if not held:
        uses = Counter(key for sample in samples for key in set(sample))
        distinct = {frozenset(sample) for sample in samples if sample}
        # first those that tear the fewest samples apart
        for sample in sorted(distinct, key=lambda keys: (sum(uses[key] for key in keys), _digest(keys))):
            if not held or len(held) + len(sample - held) <= target:
                held |= sample
    sides: tuple[list[int], list[int], list[int]] = ([], [], [])
    for index, sample in enumerate(samples):
        inside = sum(key in held for key in sample)
        sides[0 if inside == 0 else 1 if inside == len(sample) else 2].append(index)
    found = HeldOut(*sides)
    if not found.train or not found.validation:
        raise ValueError("the samples share their images in such a way that none can be held out")
    return found


def hold_out_pictures(
    pictures: Sequence[PictureT], fraction: float, decode: Callable[[PictureT], Image.Image], flag: str
) -> tuple[list[PictureT], list[PictureT]]:
    """Training and held-out pictures, each in their order; copies of one picture are on one side.

    Args:
        pictures: Files or rows of a dataset.
        fraction: Of all different pictures; one at least is held out, and one is left.
        decode: To RGB.
        flag: What the fraction is from, for the message.

    Raises:
        ValueError: When there are fewer than two different pictures.
    """
    keys = content_keys(pictures, decode)
    if len(set(keys)) < 2:
        raise ValueError(f"{flag}: the data have one picture only, so none can be held out; leave it out")
    held = hold_out([[key] for key in keys], fraction)
    return [pictures[index] for index in held.train], [pictures[index] for index in held.validation]


def hold_out_of_classes(
    keys: Sequence[str], classes: Sequence[str], fraction: float, shuffle: Callable[[str, list[int]], list[int]]
) -> set[int]:
    """Hold out this share of each class's images, one at least, all copies of a picture together: their indices.

    Every class keeps an image to train on, so one of one picture has none held out.

    Args:
        keys: What each image is.
        classes: Of each image.
        fraction: Of the images of a class.
        shuffle: Gives the indices of a class's images, in a random order.
    """
    members: dict[str, list[int]] = {}
    copies: dict[str, list[int]] = {}
    for index, (key, name) in enumerate(zip(keys, classes, strict=True)):
        members.setdefault(name, []).append(index)
        copies.setdefault(key, []).append(index)
    held: set[int] = set()
    left = Counter(classes)

    def can_go(index: int) -> bool:
        return all(left[name] > count for name, count in Counter(classes[i] for i in copies[keys[index]]).items())

    def take(index: int) -> None:
        held.update(copies[keys[index]])
        left.subtract(classes[i] for i in copies[keys[index]])

    for name, indices in members.items():
        size = len(indices)
        count = min(max(1, round(fraction * size)), size - 1)
        waiting = [index for index in shuffle(name, indices) if index not in held]
        for index in waiting:
            own = sum(classes[i] == name for i in copies[keys[index]])
            if index not in held and size - left[name] + own <= count and can_go(index):
                take(index)
        if left[name] == size:  # all have more copies than there is room for
            possible = [index for index in waiting if can_go(index)]
            if possible:
                take(min(possible, key=lambda index: len(copies[keys[index]])))
    return held


def _digest(keys: Iterable[str]) -> bytes:
    return hashlib.blake2b("/".join(sorted(keys)).encode()).digest()
