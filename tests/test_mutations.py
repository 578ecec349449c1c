"""The list of deliberate breaks fits the code; in the slow tier, every break is caught."""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

import mutations
import pytest
from mutations import BREAKS, ROOT, Outcome, to_table


@cache
def functions(path: Path) -> frozenset[str]:
    """Names of the functions of a test file, those in classes as `Class::function`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return frozenset(names)


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.name)
def test_a_break_fits_the_code_and_names_tests_that_exist(broken: mutations.Break) -> None:
    source = (ROOT / broken.file).read_text(encoding="utf-8")
    compile(broken.applied(source), broken.file, "exec")
    assert broken.tests
    for test in broken.tests:
        file, _, name = test.partition("::")
        assert name.partition("[")[0] in functions(ROOT / file), f"{broken.name}: there is no test {test}"


def test_there_are_many_breaks_with_names_of_their_own() -> None:
    assert len(BREAKS) >= 40
    assert [name for name, count in Counter(broken.name for broken in BREAKS).items() if count > 1] == []


def test_the_table_says_what_survived() -> None:
    one, two, three = BREAKS[:3]
    outcomes = [
        Outcome(one, "tests/scripts/test_a.py::test_b[x|y]", 3.4),
        Outcome(two, None, 2.0),
        Outcome(three, None, 1.0, "pytest ended with 4"),
    ]
    rows = to_table(outcomes).splitlines()[2:]
    assert rows[0].endswith("| `test_a.py::test_b[x\\|y]` | 3 |")
    assert "**nothing**" in rows[1]
    assert "**pytest ended with 4**" in rows[2]


def test_a_break_that_no_longer_fits_is_an_error() -> None:
    with pytest.raises(ValueError, match="its text occurs 0 times"):
        BREAKS[0].applied("something else")
    with pytest.raises(ValueError, match="its text occurs 2 times"):
        BREAKS[0].applied(BREAKS[0].text * 2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_break_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    survived = mutations.main(["--jobs", "2"])
    assert survived == 0, capsys.readouterr().out
