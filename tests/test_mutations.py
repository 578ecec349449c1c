"""The list of deliberate breaks fits the code; in the slow tier, every break is caught."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import mutations
import pytest
from breaks import Break
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


SMALL = {
    "small.py": "def double(number):\n    return 2 * number\n",
    "test_small.py": "import small\n\n\ndef test_double():\n    assert small.double(3) == 6\n",
}


@pytest.mark.skipif(sys.platform == "win32", reason="the tests of a break run in a forked process")
@pytest.mark.parametrize(
    ("replacement", "tests", "caught_by", "problem"),
    [
        ("3 * number", "test_small.py", "test_small.py::test_double", None),
        ("number * 2", "test_small.py", None, None),
        ("2 *", "test_small.py", None, "pytest ended with"),
        ("3 * number", "test_small.py::test_gone", None, "pytest ended with 4"),
    ],
)
def test_a_break_is_caught_or_survives_and_is_mended(
    tmp_path: Path, replacement: str, tests: str, caught_by: str | None, problem: str | None
) -> None:
    for name, text in SMALL.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    outcome = mutations.try_break(Break("small", "small.py", "2 * number", replacement, (tests,)), tmp_path)
    assert outcome.caught_by == caught_by
    assert (outcome.problem is None) == (problem is None)
    assert (problem or "") in (outcome.problem or "")
    assert (tmp_path / "small.py").read_text(encoding="utf-8") == SMALL["small.py"]


@pytest.mark.skipif(sys.platform == "win32", reason="the tests of a break run in a forked process")
def test_a_break_without_an_end_is_no_catch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in SMALL.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(mutations, "TIMEOUT_S", 2)
    endless = Break("small", "small.py", "2 * number", "sum(1 for _ in iter(int, 1))", ("test_small.py",))
    outcome = mutations.try_break(endless, tmp_path)
    assert (outcome.caught_by, outcome.problem) == (None, "no end after 2 s")


def test_breaks_are_chosen_by_name_and_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert mutations.main(["--list", "--only", "kohya_names.py"]) == 0
    assert all("kohya" in line for line in capsys.readouterr().out.splitlines())
    with pytest.raises(SystemExit):
        mutations.main(["--list", "--only", "nothing is called so"])
    assert "is in no break's name" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_break_is_caught(capsys: pytest.CaptureFixture[str]) -> None:
    survived = mutations.main(["--jobs", "2"])
    assert survived == 0, capsys.readouterr().out
