"""What the hyper-parameters of the initialisations take and mean, read off their dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorainit_diffusers.methods import METHODS
from lorainit_diffusers.ranges import Range

_WORDS = {bool: "true, false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}


@dataclass(frozen=True)
class MethodOption:
    """One key of `--init_option`.

    Attributes:
        key: its name.
        values: what it takes, with its range.
        default: what it is when nothing is said.
        meaning: as the method's docstring has it.
    """

    key: str
    values: str
    default: str
    meaning: str


def method_options(name: str) -> list[MethodOption]:
    """The options of the initialisation `name`, in the order of its class."""
    method: Any = METHODS[name]
    hints, meanings = typing.get_type_hints(method), _meanings(method)
    ranges: Mapping[str, Range] = getattr(method, "RANGES", {})
    return [
        MethodOption(
            field.name,
            _values(hints[field.name], ranges.get(field.name)),
            str(field.default).lower() if field.default in (True, False, None) else f"{field.default}",
            meanings.get(field.name, ""),
        )
        for field in dataclasses.fields(method)
        if field.init
    ]


def describe_options(name: str) -> str:
    """All options of an initialisation in one line."""
    options = [f"{option.key} ({option.values}; default {option.default})" for option in method_options(name)]
    return f"init {name} has the options {', '.join(options)}" if options else f"init {name} has no options"


def options_table(name: str) -> str:
    """The options of an initialisation as a table in Markdown."""
    rows = [
        f"| `{option.key}` | {option.values} | `{option.default}` | {option.meaning} |"
        for option in method_options(name)
    ]
    return "\n".join(["| key | values | default | meaning |", "|---|---|---|---|", *rows]) if rows else "No options."


def document(page: str) -> str:
    """A page with its tables as they are now: what stands between `<!-- options of NAME -->` and `<!-- end -->`."""

    def renewed(match: re.Match[str]) -> str:
        return f"<!-- options of {match[1]} -->\n\n{options_table(match[1])}\n\n<!-- end -->"

    return re.sub(r"<!-- options of (\w+) -->.*?<!-- end -->", renewed, page, flags=re.DOTALL)


def _values(hint: Any, allowed: Range | None) -> str:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    words = [
        f"one of {', '.join(map(str, typing.get_args(kind)))}"
        if typing.get_origin(kind) is typing.Literal
        else _WORDS[kind]
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
