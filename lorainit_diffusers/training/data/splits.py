"""What a split is: one place that knows the names of training, validation and test parts in their usual spellings.

A name says `train` when that is left of it after words that say nothing ("images_train", "Train Set", "seg_train",
"train2017"). Where something else is left ("imagenet_train"), the name counts only beside a validation or test part
with the same rest ("imagenet_val"): so "bullet_train" stays what it is.

For classes the contents decide, too: a split is a folder of class folders, a class a folder of images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from lorainit_diffusers.training.data.files import child_folders, list_folder
from lorainit_diffusers.training.data.notes import DataNotes, some

Kind = Literal["train", "validation", "test", "unlabelled"]

_WORDS: dict[str, Kind] = {
    **dict.fromkeys(("train", "training", "trainval", "trn"), "train"),
    **dict.fromkeys(
        ("val", "vali", "valid", "validate", "validation", "dev", "devel", "eval", "evaluation"), "validation"
    ),
    **dict.fromkeys(("heldout", "holdout", "minival"), "validation"),
    **dict.fromkeys(("test", "tests", "testing", "tst"), "test"),
    **dict.fromkeys(("pred", "preds", "unlabeled", "unlabelled"), "unlabelled"),
}
# Words beside the split's that say nothing of what is in it.
_NEUTRAL = (
    *(
        "set",
        "sets",
        "data",
        "dataset",
        "datasets",
        "split",
        "part",
        "images",
        "image",
        "imgs",
        "img",
        "pictures",
        "photos",
    ),
    *(
        "pics",
        "files",
        "folder",
        "dir",
        "seg",
        "original",
        "raw",
        "all",
        "new",
        "my",
        "the",
        "of",
        "for",
        "samples",
        "sample",
    ),
    *("jpg", "jpeg", "png", "classes", "processed"),
)
_GLUED = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))})({'|'.join(_NEUTRAL)})")
# Of several validation parts the first of these is taken, then the first by name.
_VALIDATION_ORDER = ("validation", "valid", "val")
_HELDOUT = ("heldout", "holdout")
# Beside a training folder these may be anything: a developer's folder, or Linux's devices.
_TOO_GENERAL = frozenset({"dev", "devel", "tests", "eval", "evaluation"})


class SplitName(NamedTuple):
    """What a folder's name says.

    Attributes:
        kind: Of split.
        rest: The other words that say something.
    """

    kind: Kind
    rest: tuple[str, ...]


def parse_split(name: str) -> SplitName | None:
    """What split a name stands for, if any; any case and any separators."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    tokens = [token.lower() for token in re.findall(r"[^\W\d_]+", spaced)]
    words: list[str] = []
    for token in tokens:
        glued = _GLUED.fullmatch(token)
        words += [glued[1], glued[2]] if glued else [token]
    joined = " ".join(words).replace("held out", "heldout").replace("hold out", "holdout").split()
    kinds: set[Kind] = {_WORDS[word] for word in joined if word in _WORDS}
    rest = tuple(word for word in joined if word not in _WORDS and word not in _NEUTRAL)
    if not kinds:
        return None
    if kinds == {"train", "validation"}:
        return SplitName("train", rest)  # "trainval": both of them
    if kinds == {"test", "validation"}:
        return SplitName("test", rest)  # "test-dev"
    return SplitName(kinds.pop(), rest) if len(kinds) == 1 else None


def split_kinds(names: Iterable[str]) -> dict[str, Kind]:
    """Those of some names side by side that are splits."""
    parsed = {name: found for name in names if (found := parse_split(name)) is not None}
    kinds_of: dict[tuple[str, ...], set[Kind]] = {}
    for found in parsed.values():
        kinds_of.setdefault(found.rest, set()).add(found.kind)
    return {
        name: found.kind
        for name, found in parsed.items()
        if not found.rest or ("train" in kinds_of[found.rest] and len(kinds_of[found.rest]) > 1)
    }


def training_split(names: Sequence[str]) -> str | None:
    """The training part by name; None when there is none, or when several could be it."""
    if "train" in names:
        return "train"
    found = [name for name, kind in split_kinds(names).items() if kind == "train"]
    return found[0] if len(found) == 1 else None


def validation_split(names: Sequence[str], *, classes: bool) -> str | None:
    """The part to validate on by name: a validation part, and for classes a test part where there is none.

    What the parts are called decides between several: `heldout` comes first for captions, last for classes.
    """
    kinds = split_kinds(names)

    def rank(name: str) -> tuple[int, int, str]:
        words = [word for word in _VALIDATION_ORDER if word == name.lower()]
        is_heldout = name.lower() in _HELDOUT
        test = kinds[name] == "test"
        order = 1 if test else (2 if classes else -1) if is_heldout else 0
        return order, _VALIDATION_ORDER.index(words[0]) if words else len(_VALIDATION_ORDER), name

    wanted = ("validation", "test") if classes else ("validation",)
    return min((name for name, kind in kinds.items() if kind in wanted), key=rank, default=None)


@dataclass(frozen=True)
class Splits:
    """The parts of a data folder.

    Attributes:
        train: The folder of the training images.
        heldout: That of the images to validate on, if there is one.
        skip: Folders below `train` that belong to other parts.
        root: The folder that was given, or the one above its parts.
    """

    train: Path
    heldout: Path | None
    skip: tuple[Path, ...] = ()
    root: Path | None = None


@dataclass(frozen=True)
class _Contents:
    """Which of a folder's images lie where.

    Attributes:
        own: Images directly in it.
        counts: Child folder -> images below it, of those that have any.
        flat: Of them, those with images directly in them.
        nested: Of them, those with images in folders below them.
    """

    own: list[Path] = field(default_factory=list[Path])
    counts: dict[Path, int] = field(default_factory=dict[Path, int])
    flat: set[Path] = field(default_factory=set[Path])
    nested: set[Path] = field(default_factory=set[Path])


def find_image_splits(directory: Path, flag: str, notes: DataNotes) -> Splits:
    """The training folder that a folder of images means, and its held-out folder.

    Splits are looked for in it, in the only folder in it (that of an archive), and beside it where its own name is that
    of a training part. A test part is not used.

    Raises:
        ValueError: When several folders could be the training part, or images lie beside the parts; `flag` begins the
            message.
    """
    folder = directory
    while True:
        contents = _contents(folder)
        kinds = _kinds(contents.counts)
        if kinds or contents.own or len(contents.counts) != 1:
            break
        (folder,) = contents.counts
    train = _single_training_folder(kinds, flag)
    if train is not None:
        _refuse_beside(contents, kinds, flag)
        heldout = _heldout(kinds, notes, contents, classes=False) or _beside(directory, notes, classes=False)
        return Splits(train, heldout, root=directory)
    if kinds:
        others = [path for path in contents.counts if path not in kinds]
        if not (contents.own or others):
            raise ValueError(
                f"{flag} has {some([path.name for path in kinds])}, and no training images beside; add a folder train, "
                "or give the folder of the images itself"
            )
        heldout = _heldout(kinds, notes, contents, classes=False)
        return Splits(folder, heldout, skip=tuple(kinds), root=directory)
    return Splits(directory, _beside(directory, notes, classes=False), root=directory)


def find_class_splits(directory: Path, flag: str, notes: DataNotes) -> Splits:
    """The folder whose folders are the classes, and that of the validation images.

    As `find_image_splits`; here a part is a folder of class folders, and a test part is validated on where there
    is no validation part.

    Raises:
        ValueError: As there, and when folders with the names of splits hold images without classes.
    """
    folder = directory
    while True:
        contents = _contents(folder)
        kinds = _kinds(contents.counts)
        nested: dict[Path, Kind] = {
            path: kind for path, kind in kinds.items() if path in contents.nested and path not in contents.flat
        }
        if nested or contents.own or len(contents.counts) != 1 or not contents.nested or contents.flat:
            break
        (folder,) = contents.counts
    mixed = [path for path in kinds if path in contents.nested and path in contents.flat]
    if mixed:
        raise ValueError(
            f"{flag}: {str(mixed[0])!r} has images beside its class folders; move them into a class "
            "folder, or out of the data"
        )
    train = _single_training_folder(nested, flag)
    if train is not None:
        _refuse_beside(contents, kinds, flag)
        unlabelled = [path for path in kinds if path not in nested]
        notes.leave_out("images without classes", _described(unlabelled, contents))
        heldout = _heldout(nested, notes, contents, classes=True) or _beside(directory, notes, classes=True)
        return Splits(_class_root(train, flag), None if heldout is None else _class_root(heldout, flag), root=directory)
    _check_flat(contents, kinds, nested, flag)
    if contents.own:
        raise ValueError(
            f"{flag}: images lie beside the class folders ({some([path.name for path in contents.own])}); move them "
            "into a class folder, or out of the data"
            if contents.counts
            else _no_classes(flag, folder)
        )
    if nested:
        if len(contents.counts) == len(kinds):
            raise ValueError(
                f"{flag} has {some([path.name for path in kinds])}, and no training folder beside; add a folder train"
            )
        heldout = _heldout(nested, notes, contents, classes=True)
        found = None if heldout is None else _class_root(heldout, flag)
        return Splits(folder, found, skip=tuple(nested), root=directory)
    heldout = _beside(directory, notes, classes=True)
    return Splits(folder, None if heldout is None else _class_root(heldout, flag), root=directory)


def _no_classes(flag: str, folder: Path) -> str:
    return (
        f"{flag} has no class folders in it; put the images of each class into a folder of the class's name, such as "
        f"{folder / 'cat' / 'one.png'}"
    )


def _contents(folder: Path) -> _Contents:
    contents = _Contents()
    for path in list_folder(folder).images:
        parts = path.relative_to(folder).parts
        if len(parts) == 1:
            contents.own.append(path)
            continue
        child = folder / parts[0]
        contents.counts[child] = contents.counts.get(child, 0) + 1
        (contents.flat if len(parts) == 2 else contents.nested).add(child)
    return contents


def _kinds(folders: Iterable[Path]) -> dict[Path, Kind]:
    by_name = {path.name: path for path in folders}
    return {by_name[name]: kind for name, kind in split_kinds(by_name).items()}


def _single_training_folder(kinds: Mapping[Path, Kind], flag: str) -> Path | None:
    found = [path for path, kind in kinds.items() if kind == "train"]
    if len(found) > 1:
        raise ValueError(
            f"{flag} has several training folders ({some([path.name for path in found])}); give one of them, or put "
            "their images into one"
        )
    return found[0] if found else None


def _refuse_beside(contents: _Contents, kinds: Mapping[Path, Kind], flag: str) -> None:
    """See that all images are in a split."""
    beside = [f"{path.name} ({contents.counts[path]} images)" for path in contents.counts if path not in kinds]
    beside += [path.name for path in contents.own]
    if beside:
        parts = some([f"{path.name}/" for path in kinds])
        raise ValueError(
            f"{flag}: images lie beside the split folders {parts}: {some(beside)}; move them into one, or out of the "
            "data, or give the training folder itself"
        )


def _heldout(kinds: Mapping[Path, Kind], notes: DataNotes, contents: _Contents, *, classes: bool) -> Path | None:
    by_name = {path.name: path for path in kinds}
    name = validation_split(list(by_name), classes=classes)
    unused = [path for path, kind in kinds.items() if kind != "train" and path.name != name]
    notes.leave_out("split folders that are not used", _described(unused, contents))
    return None if name is None else by_name[name]


def _described(folders: Sequence[Path], contents: _Contents) -> list[str]:
    return [f"{path.name}/ with {contents.counts[path]:,d} images" for path in folders]


def _beside(folder: Path, notes: DataNotes, *, classes: bool) -> Path | None:
    """The part to validate on beside a folder that is called as a training part."""
    here = folder.absolute()
    if (own := parse_split(here.name)) is None or own.kind != "train":
        return None
    names = [path.name for path in child_folders(here.parent) if path.name.lower() not in _TOO_GENERAL]
    kinds = split_kinds(names)
    if kinds.get(here.name) != "train":
        return None
    contents = {name: _contents(here.parent / name) for name, kind in kinds.items() if kind in ("validation", "test")}
    usable = [name for name, found in contents.items() if found.counts or (found.own and not classes)]
    name = validation_split([here.name, *usable], classes=classes)
    unused = (f"{other}/" for other in usable if other != name)
    notes.leave_out("split folders beside it that are not used", unused)
    parent = folder.parent if folder.name == here.name else here.parent  # as the user wrote it, for messages
    return None if name is None else parent / name


def _class_root(folder: Path, flag: str) -> Path:
    """The folder whose folders are the classes: a part, or the only folder in it.

    Raises:
        ValueError: When images lie beside the class folders.
    """
    while True:
        contents = _contents(folder)
        if contents.own:
            raise ValueError(
                f"{flag}: images lie beside the class folders of {str(folder)!r} "
                f"({some([path.name for path in contents.own])}); move them into a class folder, or out of the data"
            )
        if len(contents.counts) != 1 or contents.flat:
            return folder
        (folder,) = contents.counts


def _check_flat(contents: _Contents, kinds: Mapping[Path, Kind], nested: Mapping[Path, Kind], flag: str) -> None:
    """See that folders with the names of splits and images directly in them can be classes.

    A train is a thing, so a folder `train` among others is a class; a folder `test` is one beside it only. No thing is
    called val, training or test_set.
    """
    flat = [path for path in kinds if path not in nested]
    if flat and len(contents.counts) == len(kinds):
        raise ValueError(
            f"{flag} has the split folders {some([path.name for path in kinds])} and no class folders in them; put the "
            "images of each class into a folder of the class's name there, "
            f"such as {flat[0] / 'cat' / 'one.png'}"
        )
    things = {"train", "test"} if any(path.name.lower() == "train" for path in flat) else set[str]()
    strange = [path.name for path in flat if path.name.lower() not in things]
    if strange:
        raise ValueError(
            f"{flag}: the folder {strange[0]!r} beside the class folders is called as a split but holds images "
            "directly; put them into a folder for each class there, move it out of the data, or, if it is a class, "
            "rename it"
        )
