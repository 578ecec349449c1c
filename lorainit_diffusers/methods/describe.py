"""All that can be said of the initialisations, as plain data: for tables, documentation and command lines."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorainit_diffusers.methods import METHODS, declared
from lorainit_diffusers.ranges import Range

_WORDS = {bool: "true, false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}


@dataclass(frozen=True)
class MethodOption:
    """One hyper-parameter of an initialisation.

    Attributes:
        key: Its name.
        values: What it takes, with its range.
        default: What it is when nothing is said.
        meaning: As the method's docstring has it.
    """

    key: str
    values: str
    default: str
    meaning: str


@dataclass(frozen=True)
class MethodDescription:
    """One initialisation; `dataclasses.asdict` makes JSON of it.

    Attributes:
        name: Its key in `METHODS`.
        summary: What it does, in one sentence.
        observes: What its collection pass looks at, or `"nothing"`.
        needs: What the caller has to give, in words; empty where that is nothing.
        gives_scores: Whether variable ranks can be allocated by it.
        step_zero: `"equal"`, `"offset"` or `"moved"` with the default options, see `Initializer.step_zero`; `""` where
            that depends on options without a default.
        zero_delta: Options with which it starts at the base model without an offset, where it by default does not.
        cost: What it takes beside training, in one line.
        source: The paper, or whose idea it is.
        options: Its hyper-parameters, in the order of its class.
    """

    name: str
    summary: str
    observes: str
    needs: Sequence[str]
    gives_scores: bool
    step_zero: str
    zero_delta: Mapping[str, Any]
    cost: str
    source: str
    options: Sequence[MethodOption]


def describe_methods() -> list[MethodDescription]:
    """Every initialisation of `METHODS`, those included that a program has added."""
    return [describe_method(name) for name in METHODS]


def describe_method(name: str) -> MethodDescription:
    """One initialisation by name."""
    method: Any = METHODS[name]
    instance = method() if _has_defaults(method) else None
    either = method if instance is None else instance
    step_zero = "" if instance is None else instance.step_zero
    summary = getattr(method, "summary", "") or (inspect.getdoc(method) or "").partition("\n\n")[0]
    return MethodDescription(
        name=name,
        summary=" ".join(summary.split()),
        observes=either.observes,
        needs=_needs(either),
        gives_scores=declared.gives_scores(either),
        step_zero=step_zero,
        zero_delta={} if step_zero == "equal" else dict(declared.zero_delta_options(method)),
        cost=getattr(method, "cost", ""),
        source=getattr(method, "source", ""),
        options=method_options(name),
    )


def method_options(name: str) -> list[MethodOption]:
    """The options of the initialisation `name`, in the order of its class."""
    method: Any = METHODS[name]
    if not dataclasses.is_dataclass(method):
        return []
    hints, meanings = typing.get_type_hints(method), _meanings(METHODS[name])
    ranges: Mapping[str, Range] = getattr(method, "RANGES", {})
    return [
        MethodOption(
            field.name,
            _values(hints[field.name], ranges.get(field.name)),
            _default(field),
            meanings.get(field.name, ""),
        )
        for field in dataclasses.fields(method)
        if field.init
    ]


def _needs(method: Any) -> list[str]:
    """What the caller has to give, in words."""
    needs: list[str] = []
    if method.observes != "nothing":
        needs.append("batches and their loss")
    if method.observes.startswith("inputs"):
        needs.append("as many rows of inputs a layer as its rank")
    options = declared.reference_options(method)
    if options:
        with_options = ", ".join(f"{key}={value}" for key, value in options.items())
        needs.append(f"reference batches with {with_options}")
    elif not isinstance(method, type) and declared.needs_reference(method):
        needs.append("reference batches")
    return needs


def _has_defaults(method: type) -> bool:
    parameters = inspect.signature(method).parameters.values()
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "must be given" if field.default_factory is dataclasses.MISSING else f"{field.default_factory()}"
    return str(field.default).lower() if field.default in (True, False, None) else f"{field.default}"


def _values(hint: Any, allowed: Range | None) -> str:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    words = [
        f"one of {', '.join(map(str, typing.get_args(kind)))}"
        if typing.get_origin(kind) is typing.Literal
        else _WORDS.get(kind) or getattr(kind, "__name__", str(kind))
        for kind in kinds
    ]
    if allowed is not None:
        words[0] += f" {allowed.words}" if allowed.words.startswith(("at", "in", "between")) else f", {allowed.words}"
    return " or ".join(words)


def _meanings(method: type) -> dict[str, str]:
    """The entries of `Attributes:` in the docstrings of a class and of those that it comes from."""
    found: dict[str, str] = {}
    for kind in reversed(method.__mro__):
        text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
        _, _, block = text.partition("Attributes:\n")
        block = re.split(r"\n\s*\n", block)[0]
        for entry in re.split(r"\n(?= {4}\S)", "\n" + block):
            key, colon, meaning = entry.strip().partition(":")
            if colon and key.isidentifier():
                place = f"`{kind.__module__.replace('.', '/')}.py`"
                meaning = " ".join(meaning.split()).replace("the module's docstring", place)
                found[key] = meaning.replace("``", "`").replace("|", r"\|")
    return found
