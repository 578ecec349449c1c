"""Options as frozen dataclasses: one class for each concern, and for each field its help, range and rule on resuming.

    @dataclass(frozen=True, kw_only=True)
    class LoraOptions(Options):
        _argument_group_name = "LoRA"

        rank: Annotated[int, RANK] = option(8, "rank of every layer (default 8)")

A script's options inherit from the concerns that it has, and are one flat object: a function that needs a rank takes
`LoraOptions`, whatever script it runs in. Facts about a field stand in its `Annotated`: its `Range`, `MayChange`,
`Place`, `DefaultOf`, `NumValues`. What argparse has to know stands in `option`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, TypeVar

from lorainit_diffusers.ranges import Range
from lorainit_diffusers.training.ranges import check_options

SomeValue = TypeVar("SomeValue")


@dataclass(frozen=True)
class MayChange:
    """A resumed run may have another value than its checkpoint, because of `reason`."""

    reason: str


@dataclass(frozen=True)
class Place:
    """The option says where something is; a resumed run must find the same there, wherever it lies.

    Attributes:
        of: What is there, as the checkpoint's identity calls it.
        is_path: Whether the option may be a path, which the output directory must not be or hold.
    """

    of: str
    is_path: bool = True


@dataclass(frozen=True)
class DefaultOf:
    """Where the option is not given, it is what another one is.

    Attributes:
        name: Of the other option.
        convert: Makes one of the other.
    """

    name: str
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class NumValues:
    """The option takes exactly so many values."""

    count: int


@dataclass(frozen=True)
class Secret:
    """The value is written nowhere."""


@dataclass(frozen=True)
class Facts:
    """What is known of one option beside its type.

    Attributes:
        range: Of its number, or of each of its numbers.
        may_change: Why a resumed run may have another value; `None` where it may not.
        place: What is at the place that it names.
        is_path: Whether it may be the path of something that is read.
        default_of: The option that it follows when it is not given.
        num_values: How many values it takes, where that is fixed.
        secret: Whether it is kept out of every file.
    """

    range: Range | None = None
    may_change: str | None = None
    place: str | None = None
    is_path: bool = False
    default_of: DefaultOf | None = None
    num_values: int | None = None
    secret: bool = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """The base of all options: what follows another option is filled in, and every number is within its range."""

    # Families whose default rates, batches and lengths suit this script's bases; see `training/defaults.py`.
    FAMILIES: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        facts = option_facts(type(self))
        for name, fact in facts.items():
            if fact.default_of is not None and getattr(self, name) is None:
                other = getattr(self, fact.default_of.name, None)
                if other is not None:
                    object.__setattr__(self, name, fact.default_of.convert(other))
        check_values(self)


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    action: str | None = None,
) -> Any:
    """A field with what argparse has to know of it.

    A default of `None` on a field whose type has no `None` says that the value is settled later, before it is read: by
    `DefaultOf`, or by a function of the script that says so; `given` tells the type checker.

    Args:
        default: Of the field; a list is copied for each object.
        help: What `--help` says.
        choices: The values that it can have.
        metavar: What `--help` calls the value.
        action: Of argparse, where the type does not say it.
    """
    given = {"help": help, "choices": choices, "metavar": metavar, "action": action}
    metadata = {name: value for name, value in given.items() if value is not None}
    if isinstance(default, list):
        values = typing.cast(list[Any], default)
        return dataclasses.field(default_factory=lambda: list(values), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def given(value: SomeValue) -> SomeValue | None:
    """The value of a field that is settled later, with the type that it has before."""
    return value


@cache
def option_facts(options: type[Options]) -> dict[str, Facts]:
    """The facts of all options of a class, by name, in the order of its fields."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {field.name: _facts(hints[field.name]) for field in dataclasses.fields(options)}


def _facts(hint: Any) -> Facts:
    values: dict[str, Any] = {}
    for extra in typing.get_args(hint)[1:] if typing.get_origin(hint) is typing.Annotated else ():
        match extra:
            case Range():
                values["range"] = extra
            case MayChange():
                values["may_change"] = extra.reason
            case Place():
                values |= {"place": extra.of, "is_path": extra.is_path}
            case DefaultOf():
                values["default_of"] = extra
            case NumValues():
                values["num_values"] = extra.count
            case Secret():
                values["secret"] = True
            case _:
                raise TypeError(f"{extra!r} is no fact about an option")
    return Facts(**values)


def concerns(options: type[Options]) -> list[type[Options]]:
    """The classes that a script's options consist of, each with fields of its own, in the order of its bases."""
    own = [base for base in options.__mro__ if "_argument_group_name" in vars(base)]
    order = {base: index for index, base in enumerate(_declared(options))}
    return sorted(own, key=lambda base: order[base])


def _declared(options: type) -> list[type]:
    """All bases, the first that is written first: the method resolution order may have it otherwise."""
    found: list[type] = []
    for base in options.__bases__:
        found += [one for one in _declared(base) if one not in found]
    return [*found, options]


def check_values(options: Options) -> None:
    """See that every number is within its range, and that lists have as many values as they must.

    Raises:
        ValueError: Naming the first option that is not so, its value and the remedy.
    """
    facts = option_facts(type(options))
    ranges = {name: fact.range for name, fact in facts.items() if fact.range is not None}
    check_options({name: getattr(options, name) for name in ranges}, ranges)
    for name, fact in facts.items():
        value = getattr(options, name)
        if value is not None and fact.num_values is not None and len(value) != fact.num_values:
            raise ValueError(f"--{name} needs {fact.num_values} values, not {len(value)}.")


def values_of(options: Options) -> dict[str, Any]:
    """All options by name, those that are secret left out: what may be written beside a result."""
    facts = option_facts(type(options))
    return {name: getattr(options, name) for name, fact in facts.items() if not fact.secret}


def default_of(options: type[Options], name: str) -> Any:
    """What an option is when nobody gives it; `None` where there is no such option."""
    for field in dataclasses.fields(options):
        if field.name == name:
            made = field.default_factory
            return made() if made is not dataclasses.MISSING else field.default
    return None
