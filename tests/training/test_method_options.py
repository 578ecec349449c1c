"""docs/methods.md and the help of `--init_option` say what the methods' classes say."""

from __future__ import annotations

import dataclasses
import re

import pytest
from sd_fixtures import ROOT

from lorainit_diffusers.methods import METHODS
from lorainit_diffusers.training.method_options import describe_options, document, method_options
from lorainit_diffusers.training.options.checks import build_method

PAGE = ROOT / "docs" / "methods.md"
REMEDY = (
    "docs/methods.md is not what the methods say; run python -c 'from pathlib import Path; "
    'from lorainit_diffusers.training.method_options import document; p = Path("docs/methods.md"); '
    "p.write_text(document(p.read_text()))'"
)


def test_the_page_is_what_the_classes_say():
    page = PAGE.read_text(encoding="utf-8")
    assert document(page) == page, REMEDY


def test_the_page_has_every_method_and_every_option():
    page = PAGE.read_text(encoding="utf-8")
    overview = re.search(r"<!-- initialisations -->(.*?)<!-- end -->", page, re.DOTALL)
    assert overview
    assert re.findall(r"^\| `(\w+)` \|", overview[1], re.MULTILINE) == list(METHODS)
    for name, method in METHODS.items():
        keys = [field.name for field in dataclasses.fields(method) if field.init]
        assert f"\n## {name}\n" in page
        part = re.search(rf"<!-- options of {name} -->(.*?)<!-- end -->", page, re.DOTALL)
        assert part, f"{name} has no table of options"
        assert re.findall(r"^\| `(\w+)` \|", part[1], re.MULTILINE) == keys


def test_the_short_table_agrees_with_the_full_one():
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", page.partition("## How to set")[0], re.MULTILINE
    )
    assert [name for name, *_ in rows] == list(METHODS)
    step_zero = {"base": "equal", "base (offset)": "offset", "after one step": "moved"}
    for name, seen, start, source in rows:
        method = METHODS[name]()
        assert step_zero[start] == method.step_zero, name
        assert ("inputs" in seen, "gradients" in seen) == ("inputs" in method.observes, "gradients" in method.observes)
        of_papers = r"arXiv:(\d{4}\.\d{5})"
        assert set(re.findall(of_papers, source)) == set(re.findall(of_papers, method.source)), name


@pytest.mark.parametrize("name", METHODS)
def test_options_have_values_a_default_and_a_meaning(name):
    for option in method_options(name):
        assert option.meaning, f"{name}.{option.key} is not in the docstring"
        assert option.values
        method = build_method(name, [f"{option.key}={option.default}"])  # what is printed can be typed
        assert method == build_method(name, [])


def test_choices_and_ranges_are_told():
    by_key = {option.key: option for option in method_options("cntlora")}
    assert by_key["gauge"].values == "one of whitened, activation, balanced"
    assert by_key["ridge"].values.startswith("a number in [0,")
    assert {option.key: option.values for option in method_options("eva")}["sketch_columns"] == (
        "a whole number at least 1 or none"
    )
    assert by_key["gauge"].default == "balanced"


def test_unknown_keys_are_answered_with_the_nearest_and_help_with_all():
    with pytest.raises(ValueError, match=r"known: constraint, .*docs/methods\.md.*did you mean gauge=balanced\?"):
        build_method("cntlora", ["guage=balanced"])
    with pytest.raises(ValueError, match="init gaussian has no options"):
        build_method("gaussian", ["scale=2"])
    with pytest.raises(ValueError, match="has the options") as help_text:
        build_method("cntlora", ["help"])
    assert str(help_text.value) == describe_options("cntlora")
    for option in method_options("cntlora"):
        assert f"{option.key} ({option.values}; default {option.default})" in str(help_text.value)
