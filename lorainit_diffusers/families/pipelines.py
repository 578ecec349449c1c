"""Bases in the diffusers layout: what their files must say, and loading them with every weight accounted for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import diffusers
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorainit_diffusers.families import TEXT_TO_IMAGE_FAMILIES, family_class
from lorainit_diffusers.loading.errors import (
    BrokenModelError,
    MissingModelError,
    custom_code_error,
    loading_errors,
    read_json_object,
)
from lorainit_diffusers.loading.files import check_config, check_tokenizer, check_weights, local_folder
from lorainit_diffusers.loading.hub import hub_options
from lorainit_diffusers.loading.single_file import check_single_file, is_single_file, load_single_file
from lorainit_diffusers.loading.weights import check_complete, check_finite, check_vocabulary, load_whole, on_no_device

if TYPE_CHECKING:
    from lorainit_diffusers.families.loading import BaseParts

BASE = "base model"
LAYOUT = "a folder in the diffusers layout"
REMEDY = "give a folder in the diffusers layout with safetensors weights, or a hub name"
CLIP_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)
DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"

Family = type["BaseParts"]


@dataclass(frozen=True)
class LoadedBase:
    """The parts of a base.

    Attributes:
        index: Its `model_index.json`.
        parts: Text encoders and tokenizers by field name; `None` for those that it does without.
        denoiser: UNet or transformer.
        vae: Autoencoder, in float32.
        scheduler: Configuration of its noise schedule.
    """

    index: Mapping[str, Any]
    parts: Mapping[str, Any]
    denoiser: Any
    vae: Any
    scheduler: Mapping[str, Any]


# ------------------------------------------------------------------------------------------------------------ the files


def check_base(family: Family, name: str) -> None:
    """See that a base given as a local folder or file exists, is whole, and is one of this family.

    A name that can only be a hub repository's is left to the loader.

    Raises:
        FileNotFoundError: When the folder, or a file that it needs, is missing.
        ValueError: When it holds another kind of pipeline, or a file is broken.
    """
    if is_single_file(name):
        check_single_file(family.PIPELINES[0], name, BASE)
        return
    folder = local_folder(name, LAYOUT)
    if folder is None:
        return
    if not (folder / "model_index.json").is_file():
        raise _no_index(folder, name)
    index = read_json_object(folder / "model_index.json", f"{BASE} {name!r}")
    check_index(family, name, index)
    for component, classes in _modules(family).items():
        if is_absent(family, index, component):
            continue
        check_config(folder / component, _its(name, component), classes=classes)
        if component in family.TEXT_ENCODERS:
            tokenizer = tokenizer_of(component)
            check_tokenizer(folder / tokenizer, _its(name, tokenizer))
    read_json_object(folder / "scheduler" / "scheduler_config.json", _its(name, "scheduler"))


def check_base_weights(family: Family, name: str, index: Mapping[str, Any], variant: str | None, vae: bool) -> None:
    """See that a local folder has whole safetensors weights of this variant; `vae` says whether its own is used."""
    folder = Path(name)
    if not folder.is_dir():
        return
    for component in _modules(family):
        if is_absent(family, index, component) or (component == "vae" and not vae):
            continue
        stem = TRANSFORMERS_STEM if component in family.TEXT_ENCODERS else DIFFUSERS_STEM
        check_weights(folder / component, _its(name, component), stem, variant)


def _its(name: str, component: str) -> str:
    """How messages about a file of a component begin."""
    return f"cannot load the {BASE} {name!r}: its {component}"


def _modules(family: Family) -> dict[str, tuple[str, ...]]:
    """Components with weights, and the names of the classes that their configuration may name."""
    return {
        **dict.fromkeys(family.TEXT_ENCODERS, ()),
        family.DENOISER: (family.DENOISER_CLASS.__name__, *family.FORMER_NAMES),
        "vae": (str(family.VAE_CLASS.__name__),),
    }


def _no_index(folder: Path, name: str) -> MissingModelError:
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if (folder / "config.json").is_file():
        config = read_json_object(folder / "config.json", f"{BASE} {name!r}")
        kind = config.get("_class_name") or next(iter(config.get("architectures") or ()), "a single model")
        reason = f"; it is {kind}, not a text-to-image pipeline: give the folder of the whole pipeline"
    elif files:
        reason = f"; it holds a single file, give that: {str(folder / files[0])!r}"
    else:
        reason = f"; convert single-file checkpoints to the diffusers layout, and give {LAYOUT}"
    return MissingModelError(f"{BASE} folder {name!r} has no model_index.json{reason}")


def check_index(family: Family, name: str, index: Mapping[str, Any]) -> None:
    """See that `model_index.json` names a pipeline of this family, its parts, and a scheduler of its kind of noise.

    Raises:
        ValueError: When it names another class (the message says which family is for it), lacks a part, has code of
            its own or another kind of noise.
    """
    known = [pipeline.__name__ for pipeline in family.PIPELINES]
    found = index.get("_class_name")
    if isinstance(found, (list, tuple)):  # a file of the repository, and the class in it
        raise custom_code_error(BASE, name)
    if found not in known:
        wanted = " or ".join(known)
        other = family_of(str(found))
        remedy = f"use `family_class({other!r})` for it" if other is not None else f"this family takes a {wanted}"
        raise BrokenModelError(f"{BASE} {name!r} is a {found}, not a {wanted}; {remedy}")
    for component in [*_modules(family), *map(tokenizer_of, family.TEXT_ENCODERS), "scheduler"]:
        if not is_absent(family, index, component):
            _check_entry(family, name, index, component)
    family.check_scheduler_class(name, str(index["scheduler"][1]))
    family.check_index_entries(name, index)


def family_of(pipeline: str) -> str | None:
    """The short name of the family that takes bases of this pipeline; imports the families until one does."""
    for name in TEXT_TO_IMAGE_FAMILIES:
        try:
            kinds = family_class(name).PIPELINES
        except ImportError:  # a family of pipelines that this version of diffusers does not have
            continue
        if pipeline in [kind.__name__ for kind in kinds]:
            return name
    return None


def _check_entry(family: Family, name: str, index: Mapping[str, Any], component: str) -> None:
    """One component of `model_index.json`: [library, class]."""
    entry = index.get(component)
    pair = cast("list[Any]", entry) if isinstance(entry, (list, tuple)) else []
    if entry is None or pair == [None, None]:
        raise MissingModelError(
            f"cannot load the {BASE} {name!r}: its model_index.json names no {component}; give a complete base"
        )
    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise BrokenModelError(
            f"cannot load the {BASE} {name!r}: for its {component}, model_index.json says {entry!r} instead of a "
            "library and a class; give a complete base"
        )
    library, kind = str(pair[0]), str(pair[1])
    libraries: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
    if library not in libraries:
        raise custom_code_error(f"{component} of the {BASE}", name)
    expected = _modules(family).get(component, ())
    if component in family.ENCODER_CLASSES:
        expected = tuple(cast(type, known).__name__ for known in family.ENCODER_CLASSES[component])
    if expected and kind not in expected:
        raise BrokenModelError(
            f"the {component} of the {BASE} {name!r} is a {kind}, not a {' or '.join(expected)}; give a base of this "
            "family"
        )
    is_tokenizer = component in map(tokenizer_of, family.TEXT_ENCODERS)  # which go by several names
    if not is_tokenizer and not hasattr(libraries[library], kind):
        raise BrokenModelError(
            f"the {component} of the {BASE} {name!r} is a {kind}, which {library} {libraries[library].__version__} "
            "does not know; use a newer version, or another base"
        )


def is_absent(family: Family, index: Mapping[str, Any], component: str) -> bool:
    """Whether the base does without a text encoder that it may do without (SD3's T5), or that one's tokenizer."""
    encoder = component.replace("tokenizer", "text_encoder")
    entry = index.get(encoder)
    return encoder in family.OPTIONAL_ENCODERS and (entry is None or entry in ([None, None], (None, None)))


def _encoder_class(family: Family, index: Mapping[str, Any], component: str) -> Any:
    """The class that `model_index.json` names, of those that the family has; None where it has but one."""
    known = family.ENCODER_CLASSES.get(component, ())
    return next((kind for kind in known if kind.__name__ == index[component][1]), None)


def tokenizer_of(text_encoder: str) -> str:
    """The field of a text encoder's tokenizer."""
    return text_encoder.replace("text_encoder", "tokenizer")


# ---------------------------------------------------------------------------------------------------------- the weights


def load_base(
    family: Family,
    name: str,
    *,
    revision: str | None,
    variant: str | None,
    vae_path: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    weight_dtype: torch.dtype,
    quantization_config: Any,
) -> LoadedBase:
    """Load all parts of a base; for the arguments see `BaseParts.from_pretrained`.

    Raises:
        FileNotFoundError: When there is no such base or VAE, or it has no safetensors weights, or the hub cannot be
            reached.
        ValueError: When it is another family's, a file is broken, or weights are missing, left over, of another shape
            or not finite.
    """
    check_base(family, name)
    if Path(name).exists() and revision is not None:
        raise BrokenModelError(
            f"`revision` {revision!r} is one of a hub repository, but {name!r} is local; leave it out"
        )
    if is_single_file(name):
        return _load_single_file(family, name, vae_path, cache_dir, weight_dtype, quantization_config)
    source: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    source |= hub_options(BASE, name, "model_index.json", **source)
    weights: dict[str, Any] = {**source, "variant": variant}
    with loading_errors(BASE, name, REMEDY):
        index: dict[str, Any] = dict(cast(Any, family.PIPELINES[0].load_config(name, **source)))
        check_index(family, name, index)
    check_base_weights(family, name, index, variant, vae_path is None)
    with loading_errors(f"scheduler of the {BASE}", name, REMEDY):
        scheduler: Any = diffusers.DDPMScheduler.load_config(name, subfolder="scheduler", **source)
    parts: dict[str, Any] = {}
    for component, usual in family.TEXT_ENCODERS.items():
        tokenizer = tokenizer_of(component)
        if is_absent(family, index, component):
            parts[tokenizer] = parts[component] = None
            continue
        kind = _encoder_class(family, index, component) or usual
        tokenizer_class: Any = CLIPTokenizer if kind in CLIP_ENCODERS else AutoTokenizer
        with loading_errors(f"{tokenizer} of the {BASE}", name, REMEDY):
            parts[tokenizer] = tokenizer_class.from_pretrained(
                name, subfolder=tokenizer, trust_remote_code=False, **source
            )
        # transformers has renamed `torch_dtype` to `dtype`; both are understood by the versions supported, so the text
        # encoders are loaded as they are and cast below.
        what = f"{component} of the {BASE}"
        parts[component] = load_whole(kind, name, what=what, remedy=REMEDY, subfolder=component, **weights)
        parts[component].to(dtype=weight_dtype)
        _check_cast(parts[component], what, name, weight_dtype)
        check_vocabulary(parts[tokenizer], parts[component], f"{BASE} {name!r}", tokenizer, component)
    quantized = {} if quantization_config is None else {"quantization_config": quantization_config}
    denoiser = load_whole(
        family.DENOISER_CLASS,
        name,
        what=f"{family.DENOISER} of the {BASE}",
        remedy=REMEDY,
        subfolder=family.DENOISER,
        torch_dtype=weight_dtype,
        **weights,
        **quantized,
    )
    if vae_path is None:
        vae = load_whole(
            family.VAE_CLASS,
            name,
            what=f"vae of the {BASE}",
            remedy=REMEDY,
            subfolder="vae",
            torch_dtype=torch.float32,
            **weights,
        )
    else:
        vae = load_vae(family, os.fspath(vae_path), cache_dir, name)
    return LoadedBase(index, parts, denoiser, vae, dict(scheduler))


def _check_cast(module: nn.Module, what: str, name: str, dtype: torch.dtype) -> None:
    """Numbers that the file's precision holds and this one does not have become infinite."""
    if dtype == torch.float16:
        check_finite(module, f"the {what} {name!r}")


def load_vae(family: Family, name: str, cache_dir: str | os.PathLike[str] | None, base: str) -> Any:
    """Another VAE than the base's own: a folder, a hub name, or a single file with the base's configuration."""
    what = "VAE"
    if is_single_file(name):
        check_single_file(family.VAE_CLASS, name, what)
        beside = {"config": base, "subfolder": "vae"} if Path(base).is_dir() else {}
        vae = load_single_file(family.VAE_CLASS, name, what=what, dtype=torch.float32, cache_dir=cache_dir, **beside)
        _check_filled(vae, what, name)
        return vae
    try:
        folder = local_folder(name, "")
    except MissingModelError as error:
        raise MissingModelError(f"cannot load the {what} {name!r}: it is not a folder; {REMEDY}") from error
    if folder is not None:
        if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
            raise BrokenModelError(f"{what} {name!r} is a whole base; give its folder {str(folder / 'vae')!r}")
        prefix = f"cannot load the {what} {name!r}: it"
        check_config(folder, prefix, classes=(family.VAE_CLASS.__name__,))
        check_weights(folder, prefix, DIFFUSERS_STEM)
    source: dict[str, Any] = {"cache_dir": cache_dir}
    source |= hub_options(what, name, "config.json", **source)
    return load_whole(family.VAE_CLASS, name, what=what, remedy=REMEDY, torch_dtype=torch.float32, **source)


def _load_single_file(
    family: Family,
    name: str,
    vae_path: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    weight_dtype: torch.dtype,
    quantization_config: Any,
) -> LoadedBase:
    """A base in one `.safetensors` file."""
    if quantization_config is not None:
        raise BrokenModelError(
            f"{BASE} {name!r} is a single file, which is not quantised; give a folder or a hub name, "
            "or leave out quantization_config"
        )
    pipeline_class = family.PIPELINES[0]
    # In float32 first, for the VAE; the others are cast.
    pipeline: Any = load_single_file(pipeline_class, name, what=BASE, dtype=torch.float32, cache_dir=cache_dir)
    index = {"_class_name": pipeline_class.__name__, **pipeline.config}
    check_index(family, name, index)
    modules: dict[str, Any] = {component: getattr(pipeline, component) for component in _modules(family)}
    if vae_path is not None:
        modules["vae"] = load_vae(family, os.fspath(vae_path), cache_dir, name)
    for component, module in modules.items():
        if module is not None:
            _check_filled(module, f"{component} of the {BASE}", name)
            if component != "vae":
                module.to(dtype=weight_dtype)
                _check_cast(module, f"{component} of the {BASE}", name, weight_dtype)
    parts: dict[str, Any] = {}
    for component in family.TEXT_ENCODERS:
        tokenizer = tokenizer_of(component)
        parts[component], parts[tokenizer] = modules[component], getattr(pipeline, tokenizer)
        if parts[component] is not None:
            check_vocabulary(parts[tokenizer], parts[component], f"{BASE} {name!r}", tokenizer, component)
    return LoadedBase(index, parts, modules[family.DENOISER], modules["vae"], dict(pipeline.scheduler.config))


def _check_filled(module: nn.Module, what: str, name: str) -> None:
    missing = on_no_device(module)
    check_complete({"mismatched": (), "missing": missing, "unexpected": ()}, module, f"the {what} {name!r}")
    check_finite(module, f"the {what} {name!r}")
