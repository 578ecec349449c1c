"""Deliberate breaks of the code, one at a time: for each, a test must fail.

    python tests/mutations.py                       # all; 0 when nothing survives
    python tests/mutations.py --only "noise"        # those with this in their names
    python tests/mutations.py --jobs 4 --table breaks.md

The checkout is copied to a temporary directory first, and stays untouched. Every test that a break names is run once
without any break, so that one that fails anyway is not taken for a catch. Run it after every large change: a break that
survives is a test that is missing.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import pytest
from breaks import Break
from breaks_core import BREAKS as CORE
from breaks_data import BREAKS as DATA
from breaks_evaluation import BREAKS as EVALUATION
from breaks_families import BREAKS as FAMILIES
from breaks_files import BREAKS as FILES
from breaks_training import BREAKS as TRAINING

ROOT = Path(__file__).resolve().parent.parent
BREAKS: tuple[Break, ...] = (*TRAINING, *DATA, *FAMILIES, *CORE, *FILES, *EVALUATION)
TIMEOUT_S = 600
_FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
_LEFT_OUT = shutil.ignore_patterns(".git", "__pycache__", ".pytest_cache", ".ruff_cache", ".venv", "outputs", "*.tmp")


@dataclass(frozen=True)
class Run:
    """How pytest ended (`None`: it did not), and what it printed."""

    code: int | None
    output: str


@dataclass(frozen=True)
class Outcome:
    """What the tests said of one break.

    Attributes:
        broken: the break.
        caught_by: the test that failed; `None` when all passed, and the break survives.
        seconds: that it took.
        problem: why there is no answer: tests that could not be run.
    """

    broken: Break
    caught_by: str | None
    seconds: float
    problem: str | None = None


def copy_tree(destination: Path) -> Path:
    """Copy the checkout, without its history and caches."""
    return Path(shutil.copytree(ROOT, destination, ignore=_LEFT_OUT, symlinks=True))


def preload() -> None:
    """Import what the project's scripts import of other packages, so that the processes of the tests need not.

    The project's own modules are forgotten again: those of a copy are imported in their place.
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT), str(ROOT / "train_scripts")]
    sys.path[:0] = paths
    for script in sorted((ROOT / "train_scripts").glob("train_*.py")):
        importlib.import_module(script.stem)
    for fixtures in sorted((ROOT / "tests").glob("*_fixtures.py")):
        importlib.import_module(fixtures.stem)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).is_relative_to(ROOT) and name != "__main__":
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path not in (*paths, str(ROOT / "tests"))]


def run_tests(tree: Path, tests: Iterable[str], *options: str) -> Run:
    """Run tests of a copy, in a process of their own that is forked from this one."""
    with tempfile.TemporaryFile() as output:
        process = multiprocessing.get_context("fork").Process(
            target=_run_tests_here, args=(tree, list(tests), options, output.fileno())
        )
        process.start()
        process.join(TIMEOUT_S)
        if process.pid is not None and process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)  # with whatever the tests have started
            process.join()
            return Run(None, "")
        output.seek(0)
        return Run(process.exitcode, output.read().decode(errors="replace"))


def _run_tests_here(tree: Path, tests: list[str], options: Sequence[str], output: int) -> None:
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
    os.chdir(tree)
    sys.dont_write_bytecode = True
    paths = [str(tree), str(tree / "train_scripts")]
    sys.path[:0] = paths
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}  # for scripts that tests run
    # tests of the slow tier count, too
    flags = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "--tb=line", *(options or ("-n", "0"))]
    code = pytest.main([*flags, *tests])
    sys.stdout.flush()
    os._exit(code)


def try_break(broken: Break, tree: Path) -> Outcome:
    """Break the copy, run the tests that must notice, and mend it again."""
    started = time.perf_counter()
    path = tree / broken.file
    source = path.read_text(encoding="utf-8")
    path.write_text(broken.applied(source), encoding="utf-8")
    try:
        done = run_tests(tree, broken.tests)
    finally:
        path.write_text(source, encoding="utf-8")
    seconds = time.perf_counter() - started
    if done.code == 0:
        return Outcome(broken, None, seconds)
    found = _FAILED.search(done.output)
    if done.code is None:
        return Outcome(broken, None, seconds, f"no end after {TIMEOUT_S} s")
    if done.code != 1 or found is None:  # not a test that failed: no such test, or code that cannot be imported
        last = " / ".join(done.output.strip().splitlines()[-3:])
        return Outcome(broken, None, seconds, f"pytest ended with {done.code}: {last}")
    return Outcome(broken, found.group(1), seconds)


def try_all(breaks: Sequence[Break], jobs: int) -> list[Outcome]:
    """Try every break, each job in a copy of its own; in the order given.

    Raises:
        ValueError: when a test that is to notice a break fails without one, or a break does not fit the code.
    """
    for broken in breaks:
        broken.applied((ROOT / broken.file).read_text(encoding="utf-8"))
    preload()
    with tempfile.TemporaryDirectory(prefix="lorainit-breaks-") as scratch:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            trees.put(copy_tree(Path(scratch) / f"tree-{job}"))
        tree = trees.get()
        print(f"without a break: {len({test for b in breaks for test in b.tests})} tests", file=sys.stderr, flush=True)
        done = run_tests(tree, dict.fromkeys(test for broken in breaks for test in broken.tests), "-n", str(jobs))
        trees.put(tree)
        if done.code != 0:
            raise ValueError(f"the tests do not pass without a break:\n{done.output[-6000:]}")

        def attempt(broken: Break) -> Outcome:
            tree = trees.get()
            try:
                outcome = try_break(broken, tree)
            finally:
                trees.put(tree)
            said = outcome.problem or outcome.caught_by or "SURVIVED"
            print(f"{broken.name}: {said} ({outcome.seconds:.0f} s)", file=sys.stderr, flush=True)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(attempt, breaks))


def to_table(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table of what was broken and by which test it was caught."""
    rows = ["| break | file | caught by | s |", "|---|---|---|---|"]
    for outcome in outcomes:
        test = (outcome.caught_by or "").rpartition("/")[2].replace("|", "\\|")
        said = f"`{test}`" if test else f"**{outcome.problem or 'nothing'}**"
        file = outcome.broken.file.removeprefix("lorainit_diffusers/")
        rows.append(f"| {outcome.broken.name} | `{file}` | {said} | {outcome.seconds:.0f} |")
    return "\n".join(rows) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Try the breaks that were asked for; the number of those that no test has noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="breaks with this text in their name or file")
    parser.add_argument("--jobs", type=int, default=1, help="breaks at once, each in a copy of the checkout")
    parser.add_argument("--list", action="store_true", help="print the breaks and their tests, and run none")
    parser.add_argument("--table", metavar="FILE", help="write the Markdown table there, too")
    args = parser.parse_args(argv)
    chosen = [broken for broken in BREAKS if args.only is None or args.only in f"{broken.name} {broken.file}"]
    if not chosen:
        parser.error(f"--only {args.only!r} is in no break's name; see --list")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    if args.list:
        for broken in chosen:
            print(f"{broken.name}  [{broken.file}]", *broken.tests, sep="\n    ")
        return 0
    outcomes = try_all(chosen, args.jobs)
    table = to_table(outcomes)
    print(table)
    survived = [outcome for outcome in outcomes if outcome.caught_by is None]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} breaks were caught")
    if args.table is not None:
        Path(args.table).write_text(table, encoding="utf-8")
    return len(survived)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
