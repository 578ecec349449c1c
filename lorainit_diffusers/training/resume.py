"""Whether a run that is resumed is the run that wrote the checkpoint: its options, its data and its base.

Every option must be the same, but for those whose field says `MayChange`, since they decide nothing about the weights,
and those that are a `Place`: what is there must be the same, wherever it lies. `data_identity` and `base_identity` say
what is there, in plain values that a checkpoint keeps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import huggingface_hub

from lorainit_diffusers.training.options.fields import Facts

# Schedules of which step k is the same however many steps there are.
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup")
REMEDY = "resume with the same, or leave out --resume_from_checkpoint and give another --output_dir"

# Samples that a checkpoint names one by one; of more it keeps one digest of all.
MAX_NAMED_SAMPLES = 20_000
# Files of a base that decide what is loaded; larger ones are read at evenly spaced places.
_BASE_FILES = (".safetensors", ".json", ".txt", ".model", ".jinja")
_WHOLE_FILE_BYTES, _NUM_BLOCKS, _BLOCK_BYTES = 64 * 2**20, 64, 2**16


# ------------------------------------------------------------------------------------------------------------- options


def option_differences(
    now: Mapping[str, Any],
    before: Mapping[str, Any],
    facts: Mapping[str, Facts],
    *,
    defaults: Callable[[str], Any] = lambda name: None,
    known: Collection[str] = (),
) -> dict[str, tuple[Any, Any]]:
    """The options that differ: name -> (value now, value before).

    An option that one of the two does not know counts with its default there: it was added or dropped by another
    version.

    Args:
        now: Options of this run.
        before: Options of the run that wrote the checkpoint, as JSON has them.
        facts: Of the options: which may differ, and which say where something is.
        defaults: The default of an option.
        known: Identities that are compared instead of the options that say where something is.
    """
    now = json.loads(json.dumps(dict(now), default=str))  # tuples and paths, as they are written
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys((*now, *before)):
        fact = facts.get(name, Facts())
        if fact.may_change is not None or fact.place in known:
            continue
        values = [_value(name, side, fact, defaults) for side in (now, before)]
        added_or_dropped = name not in now or name not in before
        if values[0] != values[1] and not (added_or_dropped and not any(values)):  # not given: None, False, 0, []
            found[name] = (values[0], values[1])
    return found


def describe_differences(found: Mapping[str, tuple[Any, Any]], where: str) -> list[str]:
    """One clause an option, with both values; `where` is what has the second one."""
    return [f"--{name} is {now!r}, but {where} {before!r}" for name, (now, before) in found.items()]


def _value(name: str, side: Mapping[str, Any], fact: Facts, defaults: Callable[[str], Any]) -> Any:
    if name in side:
        return side[name]
    derived = side.get(fact.default_of.name) if fact.default_of is not None else None
    value = defaults(name) if derived is None else derived
    return json.loads(json.dumps(value, default=str))


def check_steps(step: int, max_train_steps: int, before: int, lr_scheduler: str) -> None:
    """See that a run of this many steps is one that the checkpoint lies on.

    Args:
        step: Of the checkpoint.
        max_train_steps: Of this run.
        before: Of the run that wrote the checkpoint.
        lr_scheduler: Name of the schedule.

    Raises:
        ValueError: When the checkpoint has more steps, or the schedule depends on a number that has changed.
    """
    if max_train_steps < step:
        raise ValueError(
            f"--max_train_steps is {max_train_steps}, but the checkpoint has done {step} steps; give at least {step}, "
            "or resume from an earlier checkpoint"
        )
    if max_train_steps != before and lr_scheduler not in ENDLESS_SCHEDULES:
        raise ValueError(
            f"--max_train_steps is {max_train_steps}, but the checkpoint was written with {before}, and every step of "
            f"--lr_scheduler {lr_scheduler} depends on it; resume with {before}, or start anew in another --output_dir"
        )


# ---------------------------------------------------------------------------------------------------------------- data


def data_identity(records: Sequence[Any]) -> dict[str, Any]:
    """What samples are, wherever they lie: names below their common folder, contents, and captions or answers.

    Args:
        records: With `path`, `caption` and `image` (bytes of what is no file) each, or with `images`, which are such
            records, and `messages`, `answers` and `kind`. Their order counts: it decides the batches. What lies beside
            an image, `beside`, belongs to it.

    Returns:
        `num_samples`, `digest` of all, and `samples`: [name, digest of the images, digest of the text] of each, where
        there are at most `MAX_NAMED_SAMPLES`; where something lies beside, its digests by kind are a fourth entry.
    """
    images = [tuple(getattr(record, "images", (record,))) for record in records]
    folders = [os.path.dirname(os.path.abspath(image.path)) for group in images for image in group]
    root = os.path.commonpath(folders) if len({folder[:1] for folder in folders}) == 1 else ""
    contents: dict[str, str] = {}

    def content(image: Any) -> str:
        if image.image is not None:
            return _digest(image.image())
        key = os.path.abspath(image.path)
        if key not in contents:  # several questions have one image
            contents[key] = _digest(Path(image.path).read_bytes())
        return contents[key]

    whole = hashlib.blake2b(digest_size=16)
    samples: list[list[Any]] = []
    for record, group in zip(records, images, strict=True):
        names = [os.path.relpath(os.path.abspath(image.path), root) if root else str(image.path) for image in group]
        name = " ".join(names).replace(os.sep, "/") or "a question without an image"
        text = _digest(_text(record).encode())
        sample: list[Any] = [name, " ".join(content(image) for image in group), text]
        beside = {kind: content(part) for kind, part in getattr(record, "beside", {}).items()}
        if beside:
            sample.append(beside)
        whole.update(json.dumps(sample).encode())
        samples.append(sample)
    named = {"samples": samples} if len(samples) <= MAX_NAMED_SAMPLES else {}
    return {"num_samples": len(samples), "digest": whole.hexdigest(), **named}


def data_differences(now: Mapping[str, Any], before: Mapping[str, Any], limit: int = 3) -> list[str]:
    """What differs between two of `data_identity`, each in a few words; empty for the same data."""
    if now["digest"] == before["digest"]:
        return []
    if "samples" not in now or "samples" not in before:
        return [f"{now['num_samples']} samples now, {before['num_samples']} then, not all of them the same"]
    one, other = (dict(_numbered(side["samples"])) for side in (now, before))
    found = [f"{name!r} is new" for name in one if name not in other]
    found += [f"{name!r} is missing" for name in other if name not in one]
    for name in one:
        if name in other:
            found += [f"the image {name!r} has changed"] * (one[name][0] != other[name][0])
            found += [f"the text of {name!r} has changed"] * (one[name][1] != other[name][1])
            kinds = dict.fromkeys((*one[name][2], *other[name][2]))
            found += [
                f"the {kind} of {name!r} has changed"
                for kind in kinds
                if one[name][2].get(kind) != other[name][2].get(kind)
            ]
    found = found or ["they are in another order"]
    return [*found[:limit], *([f"{len(found) - limit} more differences"] if len(found) > limit else [])]


def _numbered(samples: Sequence[Sequence[Any]]) -> Iterator[tuple[str, tuple[str, str, dict[str, str]]]]:
    """Name -> digests; the second sample of a name has a number."""
    counts: dict[str, int] = {}
    for name, image, text, *beside in samples:
        counts[name] = counts.get(name, 0) + 1
        yield (f"{name} ({counts[name]})" if counts[name] > 1 else name), (image, text, beside[0] if beside else {})


def _text(record: Any) -> str:
    if hasattr(record, "caption"):
        return str(record.caption)
    return json.dumps([record.messages, list(record.answers), record.kind], default=str, sort_keys=True)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()


# ---------------------------------------------------------------------------------------------------------------- base


def base_identity(name: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """What a base is: of a folder or file its contents, wherever it lies; of a repository its name and commit.

    Weights above 64 MiB are not read in full: their header, which has names, shapes and sizes, and 64 places of each
    file stand for them.

    Args:
        name: Folder, safetensors file or hub name.
        revision: Of a hub repository.
        cache_dir: Where downloads are.
    """
    path = Path(name)
    if path.is_file():
        return {"files": {"": _file_digest(path)}}
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.suffix in _BASE_FILES and file.is_file())
        names = [(file, file.relative_to(path)) for file in inside]
        visible = [(file, part) for file, part in names if not any(piece.startswith(".") for piece in part.parts)]
        return {"files": {part.as_posix(): _file_digest(file) for file, part in visible}}
    for file in ("model_index.json", "config.json"):
        found = huggingface_hub.try_to_load_from_cache(name, file, cache_dir=cache_dir, revision=revision)
        if isinstance(found, str):
            return {"repository": name, "commit": Path(found).parent.name}
    return {"repository": name, "commit": revision}


def base_differences(now: Mapping[str, Any], before: Mapping[str, Any], limit: int = 3) -> list[str]:
    """What differs between two of `base_identity`, each in a few words; empty for the same base."""
    if now == before:
        return []
    if "files" not in now or "files" not in before:
        kinds = [
            f"{side['repository']} at {side['commit'] or 'main'}" if "repository" in side else "a folder"
            for side in (now, before)
        ]
        return [f"{kinds[0]} now, {kinds[1]} then"]
    one, other = (cast("dict[str, str]", side["files"]) for side in (now, before))
    found = [f"{name or 'the file'!r} differs" for name in one if name in other and one[name] != other[name]]
    found += [f"{name!r} is new" for name in one if name not in other]
    found += [f"{name!r} is missing" for name in other if name not in one]
    return [*found[:limit], *([f"{len(found) - limit} more differences"] if len(found) > limit else [])]


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    with path.open("rb") as file:
        if size <= _WHOLE_FILE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for block in range(_NUM_BLOCKS + 1):  # the first has the header
            file.seek(block * (size - _BLOCK_BYTES) // _NUM_BLOCKS)
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()
