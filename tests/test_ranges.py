"""Every number of the library and of every script has a stated range, and what is outside is refused by name."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import math
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from sd_fixtures import ROOT
from torch import nn

from lorainit_diffusers import METHODS, discarded_energy, initialize, make_method
from lorainit_diffusers import initialize as initialize_function
from lorainit_diffusers.comparison.options import ImageComparisonOptions
from lorainit_diffusers.comparison.task_options import ClassifierComparisonOptions, QuestionComparisonOptions
from lorainit_diffusers.comparison.vtab.options import VtabOptions
from lorainit_diffusers.export import exported_factors
from lorainit_diffusers.families import TEXT_TO_IMAGE_FAMILIES, family_class
from lorainit_diffusers.families.augment import Augmentation
from lorainit_diffusers.families.classifier import ClassifierFamily
from lorainit_diffusers.families.vlm import VisionLanguageFamily
from lorainit_diffusers.ranges import COUNT, LARGEST, SEED, STEP_RANGES, Range, check_fields, numeric_fields, shown
from lorainit_diffusers.training.classification.options import ClassifierTrainingOptions
from lorainit_diffusers.training.options.fields import concerns, option_facts
from lorainit_diffusers.training.options.parser import ScriptParser
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions, TransformerOptions
from lorainit_diffusers.training.questions.options import QuestionTrainingOptions
from lorainit_diffusers.training.ranges import (
    OPTION_RANGES,
    check_options,
    check_schedule,
    numeric_options,
)

HUGE = 10**5000


def outside(allowed: Range) -> list[Any]:
    """Numbers on the wrong side of both ends, as near as there are some, and those that no range takes."""
    low, high = allowed.ends
    if allowed.integer:
        return [low - 1, high + 1, low + 0.5, math.nan, math.inf, -math.inf, HUGE, -HUGE]
    below = low if allowed.above else math.nextafter(low, -math.inf)
    above = high if allowed.below else math.nextafter(high, math.inf)
    return [below, above, math.nan, math.inf, -math.inf, HUGE, -HUGE]


def inside(allowed: Range) -> list[Any]:
    """Both ends, or the nearest number within."""
    low, high = allowed.ends
    if allowed.integer:
        return [low, high]
    return [
        math.nextafter(low, math.inf) if allowed.above else low,
        math.nextafter(high, -math.inf) if allowed.below else high,
    ]


# ------------------------------------------------------------------------------------------------------ the mechanism

EVERY_SHAPE = [
    *(
        Range(low, high, above=above, below=below)
        for low in (None, 0, -2.5)
        for high in (None, 1, 7.5)
        for above in (False, low is not None)
        for below in (False, high is not None)
    ),
    *(Range(low, high, integer=True) for low in (None, 0, 1) for high in (None, 7, 2**63 - 1)),
]


@pytest.mark.parametrize("allowed", EVERY_SHAPE, ids=str)
def test_a_range_holds_at_both_ends(allowed: Range) -> None:
    assert [allowed.reason(value) for value in inside(allowed)] == [None, None]
    for value in [*outside(allowed), True, "8", [1], None, 1j]:
        reason = allowed.reason(value)
        assert reason is not None, value
        assert reason.startswith("must ")
    assert "\n" not in str(allowed)


def test_minus_zero_is_zero() -> None:
    assert Range(0).reason(-0.0) is None
    assert Range(0, above=True).reason(-0.0) == "must be positive"


def test_numbers_of_numpy_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    assert COUNT.reason(np.int64(3)) is None
    assert Range(0, 1).reason(np.float32(0.5)) is None
    assert Range(0, 1).reason(np.float32("nan")) == "must lie in [0, 1]"


def test_messages_are_one_sentence_with_the_value_and_the_remedy() -> None:
    allowed = Range(0, above=True, remedy="leave it out")
    with pytest.raises(ValueError, match=r"^alpha is nan; it must be positive, and a finite number; leave it out$"):
        allowed.check("alpha", math.nan)
    with pytest.raises(ValueError, match=r"^rank is 10\^5000; it must be at most 1000000000$"):
        COUNT.check("rank", HUGE)
    with pytest.raises(ValueError, match=r"^seed is -1; it must be at least 0 and at most 9223372036854775807$"):
        SEED.check("seed", -1)


def test_a_field_without_a_range_is_a_mistake_in_the_class() -> None:
    @dataclasses.dataclass(frozen=True)
    class Forgetful:
        strength: float = 1.0

        def __post_init__(self) -> None:
            check_fields(self)

    with pytest.raises(TypeError, match=r"Forgetful\.strength has no range"):
        Forgetful()


# ---------------------------------------------------------------------------------------------------------- the library

FIELDS = [(name, field) for name, kind in METHODS.items() for field in numeric_fields(kind)]


def test_the_walk_finds_the_fields_of_the_methods() -> None:
    assert {("cntlora", "gamma"), ("eva", "sketch_columns"), ("lora_ga", "gamma"), ("corda", "ridge")} <= set(FIELDS)


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_every_number_of_every_method_has_a_range(name: str, field: str) -> None:
    kind: Any = METHODS[name]
    assert field in kind.RANGES, f"state a range of {name}'s {field} in its RANGES"
    allowed = kind.RANGES[field]
    for value in inside(allowed):
        make_method(name, {field: value})
    for value in [*outside(allowed), True, "8"]:
        with pytest.raises(ValueError, match=rf"{field} is .*; it must "):
            make_method(name, {field: value})


STEP_CLASSES = [*map(family_class, TEXT_TO_IMAGE_FAMILIES), ClassifierFamily, VisionLanguageFamily]


@pytest.mark.parametrize("kind", STEP_CLASSES, ids=lambda kind: kind.__name__)
def test_every_number_of_every_familys_step_has_a_range(kind: type[Any]) -> None:
    numeric = [
        field.name
        for field in dataclasses.fields(kind)
        if field.init and str(field.type).split(" | ")[0] in ("int", "float")
    ]
    assert set(numeric) <= set(STEP_RANGES), "state a range in STEP_RANGES"


@pytest.mark.parametrize("field", numeric_fields(Augmentation))
def test_every_number_of_the_augmentation_has_a_range(field: str) -> None:
    for value in outside(Augmentation.RANGES[field]):
        with pytest.raises(ValueError, match=f"{field} must "):
            Augmentation(**{field: value})
    for value in inside(Augmentation.RANGES[field]):
        Augmentation(**{field: value})


@pytest.mark.parametrize("scale", [(math.nan, 1.0), (0.5, math.nan), (0.0, 1.0), (0.9, 0.5), (0.5, math.inf)])
def test_the_ends_of_a_crop_are_ordered(scale: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="crop_scale must be two increasing"):
        Augmentation(crop_scale=scale)


def numeric_keywords(function: Callable[..., Any]) -> list[str]:
    hints = typing.get_type_hints(function, globalns={**vars(sys.modules[function.__module__]), "ModelFamily": Any})
    names = inspect.signature(function).parameters
    return [name for name in names if hints[name] in (int, float) or set(typing.get_args(hints[name])) & {int, float}]


def linear() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(6, 5)}).requires_grad_(False)


@pytest.mark.parametrize("name", numeric_keywords(initialize_function))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1, HUGE, 1e300, -1e-300], ids=shown)
def test_every_number_of_initialize_is_checked_before_anything_happens(name: str, value: Any) -> None:
    module = linear()
    names = [key for key, _ in module.named_modules()]

    def loss(batch: Any) -> Any:
        raise AssertionError("the loss must not run")

    options: dict[str, Any] = {"rank": 2, "variable_rank": "rank_b" in name or name == "max_rank", name: value}
    with pytest.raises(ValueError, match=name):
        initialize(module, "eva", [torch.ones(1)], loss, target_modules=["a"], progress=False, **options)
    assert [key for key, _ in module.named_modules()] == names


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, math.inf, HUGE], ids=shown)
@pytest.mark.parametrize("name", ["export_rank", "pad_rank"])
def test_the_ranks_of_exports_are_checked(name: str, value: Any) -> None:
    module = linear()
    initialize(module, "kaiming", rank=2, target_modules=["a"], progress=False)
    with pytest.raises(ValueError, match=name):
        exported_factors(module, **{name: value})
    if name == "export_rank":
        with pytest.raises(ValueError, match=name):
            discarded_energy({"unet": module}, value)


# ---------------------------------------------------------------------------------------------------------- the scripts

SCRIPTS = [
    *("train_sd_lora", "train_sdxl_lora", "train_dit_lora", "train_classifier_lora", "train_vlm_lora"),
    *("compare_inits", "vtab_protocol"),
]
# Options with which a script builds one more parser.
MORE = {"compare_inits": [["--family", "classifier"], ["--family", "vlm"], ["--family", "flux"]]}


@contextmanager
def parsers_caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ScriptParser]]:
    """The parsers that are used inside the block, each given up at once."""
    caught: list[ScriptParser] = []
    original = ScriptParser.parse_known_args

    def catch(self: ScriptParser, args: Any = None, namespace: Any = None) -> Any:
        caught.append(self)
        return original(self, args, namespace)

    with monkeypatch.context() as patch:
        patch.setattr(ScriptParser, "parse_known_args", catch)
        yield caught


def parsers_of(script: str, monkeypatch: pytest.MonkeyPatch) -> list[ScriptParser]:
    module = importlib.import_module(script)
    found: list[ScriptParser] = []
    for options in [[], *MORE.get(script, [])]:
        with parsers_caught(monkeypatch) as caught:
            with suppress(ValueError, SystemExit):  # what is missing does not matter: the parser is known
                module.parse_args(options)
        found += caught
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_of_every_script_has_a_range_that_is_checked(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = parsers_of(script, monkeypatch)
    assert found
    for parser in found:
        for name, action in numeric_options(parser).items():
            assert name in parser.ranges, f"{script}: state a range of --{name} at its field"
            allowed = parser.ranges[name]
            assert action.help == argparse.SUPPRESS or f"[{allowed.words}]" in str(action.help)
            for value in outside(allowed):
                if value in (HUGE, -HUGE) or (action.type is int and not isinstance(value, int)):
                    continue  # the text is no number of this kind
                flag = action.option_strings[0]
                more = ["1"] * (action.nargs - 1 if isinstance(action.nargs, int) else 0)
                with pytest.raises((ValueError, SystemExit)) as error:
                    parser.parse_known_args([*required(parser), f"{flag}={value}", *more])
                if error.type is ValueError:
                    assert str(error.value).startswith(f"{flag} {action.type(value)}: must ")


def required(parser: ScriptParser) -> list[str]:
    return [text for action in parser._actions if action.required for text in (action.option_strings[0], "x")]


def test_all_scripts_are_walked() -> None:
    written = {path.stem for path in (ROOT / "train_scripts").glob("*.py") if not path.stem.startswith("common")}
    assert written == set(SCRIPTS)
    for path in [*(ROOT / "train_scripts").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        text = path.read_text("utf-8")
        numeric = "type=int" in text or "type=float" in text
        assert not (numeric and "argparse.ArgumentParser(description" in text), f"{path.name}: numbers without ranges"


def ranges_of_all_options() -> dict[tuple[str, str], Range]:
    """The range of every option by the class that has the field, and of the benchmarks' own."""
    classes = [
        *(StableDiffusionOptions, TransformerOptions, ClassifierTrainingOptions, QuestionTrainingOptions),
        *(ImageComparisonOptions, ClassifierComparisonOptions, QuestionComparisonOptions, VtabOptions),
    ]
    found = {("benchmarks", name): allowed for name, allowed in OPTION_RANGES.items()}
    for kind in classes:
        for concern in concerns(kind):
            for name, fact in option_facts(concern).items():
                if fact.range is not None:
                    found[concern.__name__, name] = fact.range
    return found


ALL_RANGES = ranges_of_all_options()


@pytest.mark.parametrize(("place", "name"), ALL_RANGES)
def test_every_range_of_an_option_holds_at_both_ends(place: str, name: str) -> None:
    allowed = ALL_RANGES[place, name]
    ranges = {name: allowed}
    for value in inside(allowed):
        check_options({name: value}, ranges)
        check_options({name: [value, value]}, ranges)
    for value in outside(allowed):
        for given in (value, [inside(allowed)[0], value], (value,)):
            with pytest.raises(ValueError, match=rf"^--{name} .*: must ") as error:
                check_options({name: given}, ranges)
            assert "\n" not in str(error.value)
    check_options({name: None, "text": "nan", "unknown": math.nan}, ranges)


# --------------------------------------------------------------------------------- numbers that belong to one another


def test_a_warm_up_ends_within_the_run_and_has_an_effect() -> None:
    check_schedule("constant", 0, 1)
    check_schedule("cosine", 10, 10)
    with pytest.raises(ValueError, match=r"--lr_warmup_steps 11: the run ends after 10 steps.*lower it"):
        check_schedule("cosine", 11, 10)
    with pytest.raises(ValueError, match=r"--lr_warmup_steps 5 has no effect with --lr_scheduler constant"):
        check_schedule("constant", 5, 10)


def test_ends_that_nobody_means_are_those_of_float32() -> None:
    assert torch.tensor(LARGEST).isfinite()
    assert not torch.tensor(LARGEST * 10).isfinite()
