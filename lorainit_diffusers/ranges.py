"""The range of every number: stated once, checked before any work, at both ends, NaN and infinities included."""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

# Ends that nobody means: float32 can hold no larger number, and no loop or table is longer.
LARGEST = 1e38
LARGEST_COUNT = 10**9
# How messages begin: of a method's hyper-parameters and the library's keywords, of a family's attributes, of a script.
OF_METHOD = "{name} is {value}; it {reason}"
OF_FAMILY = "{name} {reason}, got {value}"
OF_OPTION = "{name} {value}: {reason}"


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes.

    Attributes:
        minimum: The smallest one; None where only float32 ends it.
        maximum: The largest one; None where only float32, or the length of a loop, ends it.
        above: The minimum itself is left out.
        below: The maximum itself is left out.
        integer: Whole numbers only.
        remedy: What to give instead, at the end of the message.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: bool = False
    below: bool = False
    integer: bool = False
    remedy: str = ""

    def __str__(self) -> str:
        """The words after "must": `be at least 1`, `lie in [0, 1]`, `be positive`."""
        low, high = self.minimum, self.maximum
        if low is None and high is None:
            return "be a whole number" if self.integer else "be a finite number"
        if low is None:
            return f"be {'below' if self.below else 'at most'} {high}"
        if high is None:
            if low == 0 and not self.integer:
                return "be positive" if self.above else "not be negative"
            return f"be {'above' if self.above else 'at least'} {low}"
        if self.integer:
            return f"be at least {low} and at most {high}"
        if self.above and self.below:
            return f"lie between {low} and {high}"
        if self.below:
            return f"be at least {low} and below {high}"
        return f"lie in {'(' if self.above else '['}{low}, {high}]"

    @property
    def words(self) -> str:
        """The range alone, for the help of an option: `at least 1`, `in [0, 1]`, `positive`."""
        text = str(self).removeprefix("be ").removeprefix("lie ")
        return "not negative" if text == "not be negative" else text

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest number, the ends that nobody means included."""
        largest = LARGEST_COUNT if self.integer else LARGEST
        low = -largest if self.minimum is None else self.minimum
        return low, largest if self.maximum is None else self.maximum

    def reason(self, value: Any) -> str | None:
        """Why a value is out of the range, as the words after its name; `None` where it is within."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return "must be a number"
        if self.integer and not isinstance(value, numbers.Integral):
            return f"must {self}" if "whole" in str(self) else f"must {self}, and a whole number"
        low, high = self.ends
        number = cast(float, value)  # any real number compares as one, integers of any length included
        within = low <= number <= high and not (self.above and number == low) and not (self.below and number == high)
        if within:
            return None
        if number != number or abs(number) == float("inf"):
            open_end = None in (self.minimum, self.maximum) and "finite" not in str(self)
            return f"must {self}, and a finite number" if open_end else f"must {self}"
        if self.maximum is None and number > high:
            return f"must be at most {high}"
        if self.minimum is None and number < low:
            return f"must be at least {low}"
        return f"must {self}"

    def check(self, name: str, value: Any, form: str = OF_METHOD) -> None:
        """Refuse a value that is out of the range.

        Args:
            name: Of the field, keyword or option.
            value: What was given.
            form: Of the message: `OF_METHOD`, `OF_FAMILY` or `OF_OPTION`.

        Raises:
            ValueError: Naming it, its value, the range and the remedy.
        """
        reason = self.reason(value)
        if reason is not None:
            message = form.format(name=name, value=shown(value), reason=reason)
            raise ValueError(f"{message}; {self.remedy}" if self.remedy else message)


def shown(value: Any) -> str:
    """A value for a message, which a number of thousands of digits must not fill."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"{'-' if value < 0 else ''}10^{int(value.bit_length() * 0.30103)}"
    return str(value) if isinstance(value, numbers.Real) else repr(value)


COUNT = Range(1, integer=True)
COUNT_OR_NONE = Range(0, integer=True)
SEED = Range(0, 2**63 - 1, integer=True)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
FINITE = Range()
SHARE = Range(0, 1)
SHARE_BELOW_ONE = Range(0, 1, below=True)


# What a family's training step takes, by the names of its attributes, which are those of the scripts' options, too.
STEP_RANGES: dict[str, Range] = {
    "snr_gamma": POSITIVE,
    "noise_offset": NOT_NEGATIVE,
    "caption_dropout": SHARE,
    "prior_loss_weight": NOT_NEGATIVE,
    "clip_skip": Range(integer=True),  # its ends are those of the base's text encoders
    "logit_mean": FINITE,
    "logit_std": POSITIVE,
    # beyond these, `mode` maps two places to one noise level (Esser et al. 2024, section 3.1)
    "mode_scale": Range(-1, 1.7519),
    "guidance_scale": NOT_NEGATIVE,
    "max_sequence_length": COUNT,
    "label_smoothing": SHARE_BELOW_ONE,
    "mixup_alpha": NOT_NEGATIVE,
}


def check_step(family: Any) -> None:
    """Check the numbers of a family's training step, those of `STEP_RANGES` that it has.

    Raises:
        ValueError: Naming the first one that is out of its range.
    """
    for name, allowed in STEP_RANGES.items():
        value = getattr(family, name, None)
        if value is not None:
            allowed.check(name, value, OF_FAMILY)


def numeric_fields(kind: type[Any]) -> list[str]:
    """The fields of a dataclass whose type says that they are numbers."""
    hints = typing.get_type_hints(kind)
    return [field.name for field in dataclasses.fields(kind) if field.init and _is_number(hints[field.name])]


def check_fields(instance: Any, form: str = OF_METHOD) -> None:
    """Check every numeric field of a dataclass by the class's `RANGES`; a field without a range is a mistake in it.

    Raises:
        ValueError: Naming the first one that is out of its range.
        TypeError: For a numeric field that has no range.
    """
    kind = type(instance)
    ranges: Mapping[str, Range] = getattr(kind, "RANGES", {})
    for name in numeric_fields(kind):
        if name not in ranges:
            raise TypeError(f"{kind.__name__}.{name} has no range: state one in {kind.__name__}.RANGES")
        value = getattr(instance, name)
        if value is not None:
            ranges[name].check(name, value, form)


def _is_number(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_number(part) for part in typing.get_args(hint))
    return hint in (int, float)
