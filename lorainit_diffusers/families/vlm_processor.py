"""The processor of a vision-language base: loading it without torchvision, and writing it again."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.utils.hub import cached_file

from lorainit_diffusers.loading.errors import loading_errors
from lorainit_diffusers.loading.hub import hub_options

REMEDY = "give a folder with safetensors weights and the processor's files, or a hub name"
# Files of a processor beside the tokenizer's, for one that cannot be saved whole.
_PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)


class _NoVideos(dict[str, Any]):
    """Stands in a processor for the part that reads videos; empty, as processors write their parts as JSON."""

    model_input_names: tuple[str, ...] = ()
    # SmolVLM's chat template asks for them, whatever it is given.
    num_frames = fps = size = None


def load_processor(name: str, *, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None) -> Any:
    """The processor of a base, without torchvision where it is not installed.

    transformers' image processors fall back to Pillow by themselves. The parts that read videos (Qwen-VL, SmolVLM2) do
    not: a processor that has one is then built without it, and takes images only.

    Raises:
        FileNotFoundError: When there is none.
        ValueError: When it needs a package that is missing.
    """
    source: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    source |= hub_options("base model", name, "config.json", **source)
    with loading_errors("processor of the base model", name, REMEDY):
        try:
            return AutoProcessor.from_pretrained(name, trust_remote_code=False, **source)
        except (ImportError, TypeError) as error:
            # transformers 4 looks for the class of the video part, and finds None in its place
            missing = importlib.util.find_spec("torchvision") is None
            if not missing or not (isinstance(error, TypeError) or "torchvision" in str(error).lower()):
                raise
            try:
                return _load_images_only(name, source)
            except ImportError as unknown:
                raise ImportError(
                    f"{unknown}; without a name, torchvision, which transformers 5 does not need"
                ) from error


def _load_images_only(name: str, source: Mapping[str, Any]) -> Any:
    """Build the processor of a base without the part that reads videos."""
    names: Any = importlib.import_module("transformers.models.auto.processing_auto").PROCESSOR_MAPPING_NAMES
    model_type = str(AutoConfig.from_pretrained(name, trust_remote_code=False, **source).model_type)
    if model_type not in names:
        raise ImportError(f"torchvision: transformers {transformers.__version__} has no processor for {model_type!r}")
    found = names[model_type]
    processor_class: Any = getattr(transformers, found if isinstance(found, str) else found[0])
    parts: list[str] = (
        processor_class.get_attributes() if hasattr(processor_class, "get_attributes") else processor_class.attributes
    )
    loaders: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    if unknown := [part for part in parts if part not in {*loaders, "video_processor"}]:
        raise ImportError(f"torchvision, for the parts of {processor_class.__name__} beside {unknown[0]}")

    def load_parts(cls: Any, *_: Any, **__: Any) -> list[Any]:
        return [
            loaders[part].from_pretrained(name, trust_remote_code=False, **source) if part in loaders else _NoVideos()
            for part in parts
        ]

    def check_part(self: Any, part: str, value: Any) -> Any:
        return (
            type(value)
            if isinstance(value, _NoVideos)
            else processor_class.check_argument_for_proper_class(self, part, value)
        )

    overridden = {
        "_get_arguments_from_pretrained": classmethod(load_parts),
        "check_argument_for_proper_class": check_part,
        "images_only": True,
        "__doc__": processor_class.__doc__,
        "__init__": processor_class.__init__,
    }
    images_only: Any = type(processor_class.__name__, (processor_class,), overridden)
    return images_only.from_pretrained(name, trust_remote_code=False, **source)


def save_processor(
    processor: Any, directory: str | os.PathLike[str], base_name: str, source: Mapping[str, Any]
) -> None:
    """Write a processor; the files of one without its part for videos are copied from the base.

    Args:
        processor: From `load_processor`.
        directory: To write to.
        base_name: Folder or hub name that it comes from.
        source: `revision` and `cache_dir` of the base.
    """
    if not getattr(processor, "images_only", False):
        processor.save_pretrained(directory)
        return
    processor.tokenizer.save_pretrained(directory)
    missing_is_none = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    for file in _PROCESSOR_FILES:
        found = cached_file(base_name, file, **source, **missing_is_none)
        if found is not None:
            shutil.copyfile(found, Path(directory) / file)


def image_token_ids(config: Any, processor: Any) -> set[int]:
    """The ids of the tokens that stand for an image."""
    found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    found.append(getattr(processor, "image_token_id", None))
    return {int(token) for token in found if isinstance(token, int)}
