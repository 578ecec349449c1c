"""Models loaded with every weight accounted for.

The libraries fill what a checkpoint lacks with random numbers and only log it. Here a weight that is missing, left
over, of another shape or not finite is an error that names it.

What a checkpoint may lack or have too much without harm: buffers that a model computes by itself (position ids, rotary
frequencies, tables of relative positions), which older versions of the libraries saved; tied weights, which the
libraries know; running copies of weights (EMA); and the parts of a larger model of which only one is used (a text
encoder out of a whole CLIP, a backbone with the head of another task), told by the class that `config.json` names.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from lorainit_diffusers.loading.errors import BrokenModelError, loading_errors

# Names of what models compute by themselves, whatever class they are.
_COMPUTED = frozenset(
    {"position_ids", "inv_freq", "original_inv_freq", "num_batches_tracked", "masked_bias", "relative_position_index"}
)
_RUNNING_COPY = re.compile(r"(^|[._])(model_)?ema([._]|$)")
_NUM_NAMED = 3


def load_model(
    kind: Any, name: str, *, what: str, remedy: str, same_class: bool = True, **options: Any
) -> tuple[Any, dict[str, set[str]]]:
    """Load a model of diffusers or transformers and find out what its checkpoint lacks.

    Args:
        kind: Class, or an `Auto...` of transformers.
        name: Folder or hub name.
        what: What it is, for messages: "unet of the base model".
        remedy: What to do about files that are missing or broken.
        same_class: Whether what is left over counts where `config.json` names no class.
        **options: Of `from_pretrained`.

    Returns:
        The model, and the names of its weights by what is wrong with them: `missing`, `unexpected`, `mismatched`.

    Raises:
        MissingModelError: Files that are not there.
        BrokenModelError: Files that cannot be read, or code of its own.
    """
    is_transformers = str(kind.__module__).startswith("transformers")
    if is_transformers:  # diffusers names them in an error of its own, and would let quantised ones through
        options["ignore_mismatched_sizes"] = True
    with loading_errors(what, name, remedy), _quietly():
        model, loading = cast(
            "tuple[Any, Mapping[str, Any]]",
            kind.from_pretrained(
                name, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **options
            ),
        )
    buffers = _COMPUTED | {key.rpartition(".")[2] for key, _ in model.named_buffers()}
    missing = {*_names(loading.get("missing_keys")), *on_no_device(model)}
    unexpected = _names(loading.get("unexpected_keys"))
    if is_transformers:
        classes = getattr(model.config, "architectures", None)
        if not same_class or not classes or type(model).__name__ not in classes:
            unexpected = set()  # of a larger model, or with the head of another task
    return model, {
        "missing": {key for key in missing if key.rpartition(".")[2] not in _COMPUTED},
        "unexpected": {
            key for key in unexpected if key.rpartition(".")[2] not in buffers and not _RUNNING_COPY.search(key)
        },
        "mismatched": _names(loading.get("mismatched_keys")),
    }


def load_whole(kind: Any, name: str, *, what: str, remedy: str, **options: Any) -> Any:
    """Load a model whose checkpoint must hold exactly its weights, all of them finite.

    Args:
        kind: Class, or an `Auto...` of transformers.
        name: Folder or hub name.
        what: What it is, for messages.
        remedy: What to do about files that are missing or broken.
        **options: Of `from_pretrained`.

    Raises:
        MissingModelError: Files that are not there.
        BrokenModelError: Files that cannot be read, or weights that are missing, left over, of another shape or not
            finite.
    """
    model, problems = load_model(kind, name, what=what, remedy=remedy, **options)
    check_complete(problems, model, f"the {what} {name!r}")
    check_finite(model, f"the {what} {name!r}")
    return model


def check_complete(problems: Mapping[str, Iterable[str]], model: nn.Module, what: str) -> None:
    """Raise for what `load_model` found.

    Raises:
        BrokenModelError: Naming the first weights that are missing, of another shape, or left over.
    """
    kind = type(model).__name__
    for problem, meaning in (
        ("mismatched", f"has {{}} weights of another shape than its {kind}, such as {{}}: they do not fit config.json"),
        ("missing", f"lacks {{}} weights of its {kind}, such as {{}}: they would be random numbers"),
        ("unexpected", f"has {{}} unexpected weights, such as {{}}: its {kind} has no place for them"),
    ):
        keys = names_in_file(model, sorted(problems[problem]))
        if keys:
            raise BrokenModelError(
                f"{what} {meaning.format(len(keys), _some(keys))}; give a complete checkpoint with its own config.json"
            )


def names_in_file(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """What weights are called in the model's files: transformers 5 renames many as it loads them.

    Args:
        model: Just loaded.
        keys: Names in the model.

    Returns:
        The names in the files, where the library can tell; the others as they are.
    """
    try:
        revert: Any = importlib.import_module("transformers.core_model_loading").revert_weight_conversion
    except (ImportError, AttributeError):  # transformers 4 calls them as its files do
        return list(keys)
    state = cast("Mapping[str, Tensor]", model.state_dict())
    names: list[str] = []
    for key in keys:
        try:
            names += revert(model, {key: state[key]}) if isinstance(model, PreTrainedModel) else [key]
        except Exception:  # some are made of several, or are none of the model's
            names.append(key)
    return names


def on_no_device(model: nn.Module) -> set[str]:
    """Weights that were never filled: a loader that saves memory leaves them without storage."""
    return {key for key, tensor in cast("Mapping[str, Tensor]", model.state_dict()).items() if tensor.is_meta}


def check_finite(model: nn.Module, what: str) -> None:
    """See that all weights are finite.

    Raises:
        BrokenModelError: Naming the first that are not.
    """
    bad = {key: tensor.dtype for key, tensor in _stored(model) if not _is_finite(tensor)}
    if bad:
        half = " as float16; load it in bfloat16 or float32 if the file has larger numbers than float16 holds, or"
        raise BrokenModelError(
            f"{what} has NaN or infinity in {len(bad)} weights ({_some(names_in_file(model, list(bad)))})"
            f"{half if torch.float16 in bad.values() else ';'} give a checkpoint that was not damaged"
        )


def check_vocabulary(tokenizer: Any, model: Any, of: str, tokenizer_name: str, model_name: str) -> None:
    """See that a tokenizer has tokens, and that the model knows every one of them.

    Args:
        tokenizer: Of transformers.
        model: With an input embedding.
        of: What both are of, for messages.
        tokenizer_name: What the tokenizer is called there.
        model_name: What the model is called there.

    Raises:
        BrokenModelError: They do not fit.
    """
    size = int(model.get_input_embeddings().weight.shape[0])
    count = 1 + max(cast("dict[str, int]", tokenizer.get_vocab()).values(), default=-1)
    if not 0 < count <= size:
        raise BrokenModelError(
            f"the {tokenizer_name} of the {of} has {count} tokens, but its {model_name} knows {size}; take both from "
            "the same base"
        )


def _stored(model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
    """Parameters and saved buffers, each once; not what a model computes by itself (masks hold infinities)."""
    saved = set(cast("Mapping[str, Tensor]", model.state_dict(keep_vars=True)))
    yield from model.named_parameters()
    yield from ((key, tensor) for key, tensor in model.named_buffers() if key in saved)


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
        return True
    with torch.no_grad():
        data = tensor.detach()
        if data.dtype.itemsize < 2:  # eight bits: few operations know them
            data = data.float()
        # one pass without a mask as large as the weight; NaN comes through
        return bool(torch.stack(torch.aminmax(data)).isfinite().all())


@contextmanager
def _quietly() -> Generator[None, None, None]:
    """Without the library's own report of what is wrong, which the error says in one line."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _names(keys: Any) -> set[str]:
    """Mismatched keys come with their shapes."""
    return {str(key if isinstance(key, str) else key[0]) for key in keys or ()}


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _NUM_NAMED} more" if len(keys) > _NUM_NAMED else ""
    return ", ".join(map(repr, keys[:_NUM_NAMED])) + more
