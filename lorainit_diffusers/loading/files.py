"""The files of a model in a local folder, looked at before a library reads them.

A library that finds something odd may guess, warn or raise from deep inside; these checks cost milliseconds and name
the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING

from lorainit_diffusers.loading.errors import (
    BrokenModelError,
    MissingModelError,
    custom_code_error,
    first_line,
    read_json_object,
)

# Weights that are read by unpickling, which runs whatever code a file holds.
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# Files of one model, any of which is JSON.
CONFIGURATIONS = (
    *("config.json", "generation_config.json", "scheduler_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
# What a tokenizer's vocabulary may be kept in.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
    "sentencepiece.bpe.model",
)


def local_folder(name: str, layout: str, *, bare_names: bool = False, what: str = "base model") -> Path | None:
    """The folder of a base that is a local one; None for a name that can only be a hub repository's.

    Args:
        name: Folder or hub name.
        layout: What the folder should be, for the message.
        bare_names: Whether a hub name may lack its owner, as the oldest do.
        what: What it is, for the message.

    Raises:
        FileNotFoundError: When it is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    slashes = name.count("/")
    is_hub_name = slashes == 1 or (bare_names and slashes == 0)
    if folder.is_absolute() or name.startswith((".", "~")) or "\\" in name or not is_hub_name:
        raise MissingModelError(f"{what} {name!r} is not a folder; give {layout} or a hub name (owner/name)")
    return None


def check_transformers_folder(
    name: str, *, bare_names: bool = False, weights: bool = True, what: str = "base model"
) -> None:
    """See that a model given as a local folder is whole, and one of transformers; a hub name is left to the loader.

    Args:
        name: Folder or hub name.
        bare_names: Whether a hub name may lack its owner.
        weights: Whether they are needed.
        what: What it is, for messages.

    Raises:
        MissingModelError: When the folder is missing, or has no `config.json` or no safetensors weights.
        BrokenModelError: When a file is broken, or the model has code of its own.
    """
    if Path(name).is_file() or name.endswith((".safetensors", *PICKLED)):
        beside = Path(name).parent
        remedy = f"give {str(beside)!r}" if (beside / "config.json").is_file() else "save_pretrained writes one"
        raise BrokenModelError(
            f"{what} {name!r} is a single file of weights, without a configuration; give the folder that it belongs to "
            f"({remedy})"
        )
    folder = local_folder(name, "a folder that save_pretrained wrote", bare_names=bare_names, what=what)
    if folder is None:
        return
    if not (folder / "config.json").is_file():
        index = folder / "model_index.json"
        if index.is_file():
            kind = read_json_object(index, f"{what} {name!r}").get("_class_name")
            raise BrokenModelError(f"{what} {name!r} is a text-to-image pipeline ({kind}), not a model of transformers")
        raise MissingModelError(f"{what} folder {name!r} has no config.json; give one that save_pretrained wrote")
    config = check_config(folder, f"the {what} {name!r}")
    check_own_code(config, config.get("model_type") in CONFIG_MAPPING, what, name)
    if weights:
        check_weights(folder, f"the {what} {name!r}", "model")


def check_configurations(folder: Path, what: str) -> None:
    """See that every known JSON file of a folder holds an object.

    Raises:
        BrokenModelError: Naming the first that does not.
    """
    for name in CONFIGURATIONS:
        if (folder / name).is_file():
            read_json_object(folder / name, what)


def check_config(folder: Path, what: str, *, classes: Sequence[str] = ()) -> dict[str, Any]:
    """The `config.json` of one model.

    Args:
        folder: That holds it.
        what: Of the model, for messages: "the unet of the base model 'x'".
        classes: Names of which `_class_name`, where it is there, must be one.

    Raises:
        MissingModelError: There is none.
        BrokenModelError: It is no JSON object, or names another class.
    """
    if not folder.is_dir():
        raise MissingModelError(f"{what} is missing: there is no folder {str(folder)!r}; copy it with the others")
    check_configurations(folder, what)
    config = read_json_object(folder / "config.json", what)
    found = config.get("_class_name")
    if classes and found is not None and found not in classes:
        raise BrokenModelError(
            f"{what} is a {found}, not a {' or '.join(classes)} (its config.json); give a base of this family"
        )
    return config


def check_own_code(config: dict[str, Any], known: bool, what: str, name: str) -> None:
    """Refuse a model whose class is in files beside its weights.

    Args:
        config: Its `config.json`.
        known: Whether the library has a class for it.
        what: Of the model, for messages.
        name: Folder or hub name.

    Raises:
        BrokenModelError: It has code of its own, and the library none.
    """
    if "auto_map" in config and not known:
        raise custom_code_error(what, name)


def check_tokenizer(folder: Path, what: str) -> None:
    """See that a tokenizer's folder holds a vocabulary.

    Raises:
        MissingModelError: The folder or the vocabulary is missing.
        BrokenModelError: One of its JSON files is broken.
    """
    if not folder.is_dir():
        raise MissingModelError(f"{what} is missing: there is no folder {str(folder)!r}; copy it with the others")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise MissingModelError(
            f"{what} has no vocabulary in {str(folder)!r} (tokenizer.json, vocab.json or a SentencePiece model); "
            "copy it from where the model comes from"
        )
    check_configurations(folder, what)


def check_weights(folder: Path, what: str, stem: str, variant: str | None = None) -> None:
    """See that a folder holds whole safetensors weights, in one file or in shards.

    Args:
        folder: Of one model.
        what: Of the model, for messages.
        stem: Of the file name: `diffusion_pytorch_model`, `model`.
        variant: In the file name, such as `fp16`.

    Raises:
        MissingModelError: No weights, or only pickled ones, or a shard is missing.
        BrokenModelError: A file that is cut off.
    """
    dotted = "" if variant is None else f".{variant}"
    single = folder / f"{stem}{dotted}.safetensors"
    indices = [folder / f"{stem}.safetensors.index{dotted}.json", folder / f"{stem}{dotted}.safetensors.index.json"]
    index = next((path for path in indices if path.is_file()), None)
    if single.is_file():
        files = [single]
    elif index is not None:
        shards: Any = read_json_object(index, what).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise BrokenModelError(f"{what}: {str(index)!r} has no weight_map; copy the file again")
        files = [folder / str(file) for file in sorted({str(file) for file in shards.values()})]
    else:
        raise _no_weights(folder, what, single, variant)
    for file in files:
        check_safetensors(file, what)


def _no_weights(folder: Path, what: str, wanted: Path, variant: str | None) -> Exception:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        has = f"{what} has no {wanted.name} in {str(folder)!r} (it has {', '.join(others[:4])})"
        remedy = f"leave out the variant {variant!r}" if variant is not None else "name the variant, such as fp16"
        return MissingModelError(f"{has}; {remedy}, or rename the file")
    if pickled:
        return MissingModelError(
            f"{what} has no {wanted.name}, only pickled weights ({pickled[0]} in {str(folder)!r}), which are never "
            "read: they may run any code; get the safetensors version, or convert pickled ones that you trust with "
            "save_pretrained(..., safe_serialization=True)"
        )
    return MissingModelError(f"{what} has no {wanted.name}: there are no weights in {str(folder)!r}; copy them again")


def check_safetensors(file: Path, what: str) -> None:
    """See that a safetensors file is there and whole, by its header.

    Raises:
        MissingModelError: It is not there.
        BrokenModelError: It is cut off, or no safetensors file.
    """
    if not file.is_file():
        raise MissingModelError(f"{what} has no {file.name} in {str(file.parent)!r}, which its index names; copy it")
    try:
        with safe_open(file, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise BrokenModelError(
            f"{what}: {str(file)!r} is cut off or no safetensors file ({first_line(error)}); copy or download it again"
        ) from error
