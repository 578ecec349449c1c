"""The VTAB-1k protocol on tiny random data."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import vtab_protocol as script
from classifier_fixtures import write_class_folder, write_classifier
from script_fixtures import argv_of, run_main

from lorainit_diffusers.comparison.vtab import runs
from lorainit_diffusers.comparison.vtab.data import read_task
from lorainit_diffusers.comparison.vtab.options import Setting, run_options

FAST: dict[str, Any] = {
    "inits": ["gaussian", "cntlora:base=down_only"],
    "ranks": [2],
    "learning_rates": [1e-4, 2e-2],
    "seeds": [0, 1],
    "max_train_steps": 3,
    "train_batch_size": 6,
    "init_num_batches": 1,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("base") / "vit")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One task as folders, one as lists."""
    root = tmp_path_factory.mktemp("vtab")
    folders = root / "folders"
    write_class_folder(folders, train=4, validation=2, split="val")
    shutil.copytree(folders / "val", folders / "test")
    lists = root / "lists"
    for part, name in (("train", "train800"), ("val", "val200"), ("test", "test")):
        images = sorted((folders / part).rglob("*.png"))
        lists.mkdir(exist_ok=True)
        lines = []
        for number, image in enumerate(images):
            target = lists / "images" / part / f"{number:03d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target)
            lines.append(f"images/{part}/{target.name} {('blue', 'green', 'red').index(image.parent.name)}")
        (lists / f"{name}.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return root


def run(base: Path, root: Path, output: Path, **options: Any) -> Path:
    given = {"pretrained_model_name_or_path": base, "vtab_dir": root, "output_dir": output}
    return run_main(script, {**FAST, **given, **options})


def parse(base: Path, root: Path, **options: Any) -> Any:
    given = {"pretrained_model_name_or_path": base, "vtab_dir": root}
    return script.parse_args(argv_of({**FAST, **given, **options}))


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "results.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_grid_is_run_chosen_from_and_tested_once(base, tasks, tmp_path, monkeypatch) -> None:
    output = run(base, tasks, tmp_path / "vtab")
    rows = rows_of(output)
    select, test = ([row for row in rows if row["stage"] == stage] for stage in ("select", "test"))
    assert len(select) == 2 * 2 * 2  # tasks, inits, learning rates
    assert len(test) == 2 * 2 * 2  # tasks, inits, seeds
    for row in test:
        alike = [r for r in select if (r["task"], r["init"]) == (row["task"], row["init"])]
        best = max(alike, key=lambda r: (float(r["accuracy"]), -float(r["validation_loss"])))
        assert row["learning_rate"] == best["learning_rate"]
    text = (output / "summary.md").read_text(encoding="utf-8")
    assert "## Mean of 2 tasks" in text
    assert "| gaussian | " in text
    assert "lr 0.02" in text
    assert "[" in text
    assert "missing" not in text

    # nothing runs again, and more is added
    ran: list[Any] = []
    original = runs.run

    def counted(*args: Any) -> Any:
        ran.append(args)
        return original(*args)

    monkeypatch.setattr(runs, "run", counted)
    run(base, tasks, output)
    assert not ran
    assert rows_of(output) == rows
    run(base, tasks, output, tasks=["lists"], inits=["gaussian"], seeds=[0, 1, 2])
    assert len(ran) == 1
    assert len(rows_of(output)) == len(rows) + 1
    with pytest.raises(ValueError, match=r"--lora_dropout is 0\.1, but the runs in .* were made with 0\.0"):
        run(base, tasks, output, lora_dropout=0.1)


def test_runs_are_functions_of_their_settings(base, tasks, tmp_path) -> None:
    options = {"tasks": ["folders"], "inits": ["gaussian"], "learning_rates": [1e-2]}
    first, second = (run(base, tasks, tmp_path / name, **options) for name in ("first", "second"))
    for a, b in zip(rows_of(first), rows_of(second), strict=True):
        assert {**a, "init_s": "", "total_s": ""} == {**b, "init_s": "", "total_s": ""}


def test_lists_and_folders_hold_the_same(base, tasks) -> None:
    folders, lists = (read_task(tasks / name) for name in ("folders", "lists"))
    assert folders.data("select").class_names == ("blue", "green", "red")
    assert lists.data("test").class_names == ("0", "1", "2")
    for stage, train, heldout in (("select", 12, 6), ("test", 18, 6)):
        for task in (folders, lists):
            assert (len(task.data(stage).train), len(task.data(stage).validation)) == (train, heldout)


def test_options_of_a_run_follow_its_setting(base, tasks) -> None:
    args = parse(base, tasks, ranks=[2, 4], head_lr=5e-2)
    own = run_options(args, Setting("t", "cntlora:base=down_only", 4, "test", 0.02, 7))
    assert (own.init, own.init_option, own.rank, own.lora_alpha) == ("cntlora", ["base=down_only"], 4, 4.0)
    assert (own.seed, own.init_seed, own.learning_rate, own.head_lr) == (7, 7, 0.02, 0.05)
    assert run_options(parse(base, tasks), own_setting()).head_lr == 0.02


def own_setting() -> Any:
    return Setting("t", "gaussian", 2, "select", 0.02, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, "--rank is decided by the protocol"),
        ({"shots": 4}, "--shots is decided by the protocol"),
        ({"inits": ["nothing"]}, "unknown init 'nothing'"),
        ({"inits": ["eva", "eva"]}, "give each once"),
        ({"ranks": [0]}, "--ranks 0: must be at least 1"),
        ({"learning_rates": [0.0]}, "must be positive"),
        ({"inits": ["cntlora"], "use_dora": True}, "DoRA"),
    ],
)
def test_options_that_cannot_work_are_named(base, tasks, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        parse(base, tasks, **options)


def test_tasks_that_cannot_be_used_are_named(base, tasks, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        run(base, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"--tasks pets: there is no such folder .*folders, lists"):
        run(base, tasks, tmp_path / "out", tasks=["pets"])
    copied = tmp_path / "vtab" / "lists"
    shutil.copytree(tasks / "lists", copied)
    (copied / "val200.txt").write_text("images/train/000.png\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"val200\.txt', line 1: .* is not a path and a label"):
        read_task(copied)
    (copied / "val200.txt").write_text("images/none.png 1\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"line 1: there is no image .*none\.png"):
        read_task(copied)
    (copied / "val200.txt").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the val part of the task, .*, has no images"):
        read_task(copied)
    (copied / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no val part; add one of val, validation, val200\.txt"):
        run(base, copied.parent, tmp_path / "out")
    assert not (tmp_path / "out").exists()
