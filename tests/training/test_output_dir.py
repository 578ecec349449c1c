"""Who may write to a directory: every state of it, and what happens to the files of others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from lorainit_diffusers.files import write_text
from lorainit_diffusers.training.output_dir import (
    MARK,
    RunDirectory,
    Wish,
    claim_directory,
    directory_of,
    owning,
    written_names,
    wrote,
)
from lorainit_diffusers.training.places import check_apart, check_can_be_output


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """Relative names are below the test's folder."""
    monkeypatch.chdir(tmp_path)
    yield
    assert directory_of(tmp_path) is None


def claim(name: str | Path = "out", **options: Any) -> RunDirectory:
    return claim_directory(Wish(Path(name), options.pop("script", "train_a"), **options))


@owning
def run(name: str = "out", *, files: tuple[str, ...] = ("README.md",), error: Any = None, **options: Any) -> Path:
    """As a script does it; `error` is raised after the files are written."""
    directory = claim(name, **options)
    directory.begin(anew=options.get("resume") is None or not list(directory.path.glob("checkpoint-*")))
    for file in files:
        write_text(directory.path / file, "of a run")
    if error is not None:
        raise error
    return directory.path


def stopped(name: str = "out", *, files: tuple[str, ...] = ("metrics.jsonl",), error: Any = None) -> None:
    """A run that ended as by a signal, or with an error."""
    with pytest.raises((KeyboardInterrupt, ValueError)):
        run(name, files=files, error=error or KeyboardInterrupt())


def texts(directory: str | Path = "out") -> dict[str, str]:
    """All files but the mark's."""
    paths = (path for path in Path(directory).rglob("*") if path.is_file() and MARK not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def write(name: str, text: str = "mine") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------------- files of the user


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "samples/a.png", ".env", "config.json", ".git/HEAD"])
@pytest.mark.parametrize("more", [{}, {"overwrite": True}, {"resume": "latest"}, {"goes_on": True}], ids=str)
def test_a_directory_with_files_of_others_is_refused_untouched(name: str, more: dict[str, Any]) -> None:
    write(f"out/{name}")
    with pytest.raises(ValueError, match=r"--output_dir 'out' holds files that no run .*give a new or an empty"):
        run(**more)
    assert texts() == {name: "mine"}
    assert not Path("out", MARK).exists()


def test_an_empty_directory_and_what_file_managers_leave_are_fine() -> None:
    write("out/.DS_Store")
    assert texts(run()) == {"README.md": "of a run", ".DS_Store": "mine"}


def test_a_file_of_the_user_that_comes_meanwhile_is_moved_out_of_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    @owning
    def late() -> None:
        directory = claim()
        directory.begin(anew=True)
        write("out/README.md")
        write("out/README.md.yours-1")
        write_text("out/README.md", "of a run")
        write_text("out/README.md", "of a run, once more")
        assert wrote("out/README.md")
        assert not wrote("out/README.md.yours-2")

    late()
    assert texts() == {
        **{"README.md": "of a run, once more", "README.md.yours-1": "mine", "README.md.yours-2": "mine"},
    }
    assert "was not written by this run, so it is called README.md.yours-2" in capsys.readouterr().out


def test_a_file_in_the_way_of_a_resumed_run_is_named_before_it_starts() -> None:
    stopped(files=("checkpoint-1/state.json",))
    write("out/README.md")
    with pytest.raises(ValueError, match=r"holds README\.md, which this project did not write; move that away"):
        run(resume="latest")
    assert texts()["README.md"] == "mine"


def test_guests_are_nobody_elses_business() -> None:
    write("out/class_images/a.png")
    guests = [Path("out/class_images")]
    run(guests=guests, files=("README.md", "class_images/class-00001.png"))
    run(guests=guests, files=("config.json",), overwrite=True)
    expected = {"class_images/a.png": "mine", "class_images/class-00001.png": "of a run", "config.json": "of a run"}
    assert texts() == expected


def test_guests_move_with_the_number_of_a_default_name() -> None:
    guests = [Path("out/class_images")]
    run()
    for _ in range(2):  # a run that was killed while it drew them leaves them alone
        write("out-2/class_images/class-00001.png")
    second = run(is_default=True, guests=guests, files=("README.md", "class_images/class_images.json"))
    assert second == Path("out-2")
    assert written_names(second) == ["README.md"]


def test_what_is_known_without_a_list() -> None:
    for name in ("README.md", "adapter_model.safetensors", ".env", "photo.png", "private/README.md"):
        write(f"out/{name}")
    assert written_names("out") == ["README.md", "adapter_model.safetensors"]


def test_overwriting_removes_what_the_run_wrote_and_says_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    run(files=("README.md", "samples/base.png", "checkpoint-1/state.json", "merged/unet/config.json"))
    write("out/samples/mine.png")
    write("out/notes.txt")
    run(files=("config.json",), overwrite=True)
    assert texts() == {"config.json": "of a run", "samples/mine.png": "mine", "notes.txt": "mine"}
    assert {path.name for path in Path("out").iterdir()} == {"config.json", "samples", "notes.txt", MARK}
    assert "the earlier run is replaced; what it did not write stays: notes.txt, samples" in capsys.readouterr().out
    run(files=("README.md",), overwrite=True)  # and the new run's list is its own
    assert texts() == {"README.md": "of a run", "samples/mine.png": "mine", "notes.txt": "mine"}


def test_an_overwritten_run_stays_until_the_new_one_begins() -> None:
    @owning
    def fails_early() -> None:
        claim(overwrite=True)
        raise ValueError("the data cannot be read")

    run()
    with pytest.raises(ValueError, match="cannot be read"):
        fails_early()
    assert texts() == {"README.md": "of a run"}
    with pytest.raises(ValueError, match="that has finished"):
        run()


def test_a_link_that_the_run_wrote_through_is_not_followed_when_it_is_removed() -> None:
    write("elsewhere/kept.txt")
    run(files=("samples/base.png",))
    Path("out/samples/base.png").unlink()
    Path("out/samples/base.png").symlink_to(Path("elsewhere/kept.txt").resolve())
    run(files=(), overwrite=True)
    assert texts("elsewhere") == {"kept.txt": "mine"}


# ------------------------------------------------------------------------------------------------------- earlier runs


def test_a_finished_run_is_refused_by_name_and_numbered_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    with pytest.raises(ValueError, match=r"'out' holds an earlier run that has finished; .*--overwrite_output_dir"):
        run()
    assert run(is_default=True) == Path("out-2")
    assert "'out' holds an earlier run, so this one goes to 'out-2'" in capsys.readouterr().out
    assert run(is_default=True) == Path("out-3")
    write("other/mine.txt")
    assert run("other", is_default=True) == Path("other-2")
    assert texts("other") == {"mine.txt": "mine"}


@pytest.mark.parametrize("is_default", [True, False])
def test_a_stopped_run_is_refused_with_the_way_to_go_on(is_default: bool) -> None:
    stopped()
    with pytest.raises(ValueError, match=r"an earlier run that was stopped; continue it with --resume_from_checkpoint"):
        run(is_default=is_default)
    assert texts() == {"metrics.jsonl": "of a run"}


def test_latest_goes_on_or_starts_anew_in_a_stopped_run() -> None:
    stopped(files=("metrics.jsonl",))
    assert texts(run(resume="latest")) == {"README.md": "of a run"}  # there was no checkpoint: all is new
    stopped("b", files=("metrics.jsonl", "checkpoint-3/state.json"))
    assert texts(run("b", resume="latest")).keys() == {"metrics.jsonl", "checkpoint-3/state.json", "README.md"}
    with pytest.raises(ValueError, match="an earlier run that has finished"):
        run(resume="latest")  # finished, and nothing to go on from
    assert run(resume="latest", is_default=True) == Path("out-2")


def test_latest_means_the_newest_of_the_default_names() -> None:
    run(files=("checkpoint-1/state.json",))
    run(is_default=True, files=("checkpoint-2/state.json",))
    assert run(is_default=True, resume="latest") == Path("out-2")
    assert run(is_default=True, resume="out/checkpoint-1") == Path("out")
    assert run(is_default=True, resume=str(Path("out/checkpoint-1").resolve())) == Path("out")


def test_another_directory_may_begin_at_a_checkpoint_of_this_one() -> None:
    run(files=("checkpoint-1/state.json",))
    run("b")
    with pytest.raises(ValueError, match="'b' holds an earlier run that has finished"):
        run("b", resume="out/checkpoint-1")
    assert texts("b") == {"README.md": "of a run"}
    assert run("c", resume="out/checkpoint-1") == Path("c")


def test_a_run_that_fails_before_it_begins_leaves_nothing() -> None:
    @owning
    def fails_early(name: str) -> None:
        claim(name)
        raise ValueError("no such data")

    Path("empty").mkdir()
    for name in ("a/b/c", "empty"):
        with pytest.raises(ValueError, match="no such data"):
            fails_early(name)
    assert [path.name for path in Path().iterdir()] == ["empty"]
    assert list(Path("empty").iterdir()) == []


def test_a_run_that_failed_without_a_result_gives_way_to_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    stopped(error=ValueError("the loss is nan"))
    assert texts(run()) == {"README.md": "of a run"}
    assert "the earlier run is replaced" in capsys.readouterr().out
    stopped("b", files=("checkpoint-1/state.json",), error=ValueError("the loss is nan"))
    with pytest.raises(ValueError, match=r"holds checkpoint-1 of an earlier run that was stopped"):
        run("b")
    stopped("c", files=("adapter_model.safetensors",), error=ValueError("no place for the report"))
    with pytest.raises(ValueError, match="that has finished"):
        run("c")


def test_a_result_that_is_finished_stays_so_when_its_upload_fails() -> None:
    @owning
    def upload_fails() -> None:
        directory = claim()
        directory.begin(anew=True)
        directory.finish()
        raise ValueError("the hub is away")

    with pytest.raises(ValueError, match="hub"):
        upload_fails()
    assert json.loads(Path("out", MARK, "run.json").read_text(encoding="utf-8"))["status"] == "finished"


def test_another_scripts_directory_is_refused() -> None:
    run(files=("checkpoint-1/state.json",))
    for more in ({"resume": "latest"}, {"overwrite": True}, {"goes_on": True}, {}):
        with pytest.raises(ValueError, match="'out' belongs to a run of train_a; give another directory"):
            run(script="train_b", **more)


def test_overwriting_and_resuming_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        claim(overwrite=True, resume="latest")


def test_a_directory_of_an_earlier_version_is_resumed_and_nothing_else() -> None:
    for name in ("checkpoint-3/state.json", "config.json", "metrics.jsonl", "samples/base.png", "samples/mine.png"):
        write(f"out/{name}", '{"arguments": {}, "versions": {}}')
    write("out/notes.txt")
    for more in ({}, {"overwrite": True}):
        with pytest.raises(ValueError, match=r"holds checkpoint-3 of an earlier run; continue it with --resume"):
            run(**more)
    assert run(is_default=True) == Path("out-2")
    run(resume="latest", files=("config.json",))
    assert texts()["config.json"] == "of a run"
    directory = RunDirectory(Path("out"), Wish(Path("out"), "train_a"))
    directory.attach()
    assert [directory.wrote(f"out/{name}") for name in ("samples/base.png", "samples/mine.png", "notes.txt")] == [
        *(True, False, False),
    ]
    directory.release(None)


def test_repeated_calls_of_a_comparison_go_on() -> None:
    run(goes_on=True, files=("results.csv",))
    stopped_files = texts(run(goes_on=True, files=("runs/a/result.json",)))
    assert stopped_files.keys() == {"results.csv", "runs/a/result.json"}


def test_a_mark_that_cannot_be_read_is_named() -> None:
    run()
    Path("out", MARK, "run.json").write_text("{half", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.json' cannot be read"):
        run(overwrite=True)


# ------------------------------------------------------------------------------------------------------- two at once


@pytest.mark.parametrize("begun", [False, True])
def test_the_second_of_two_runs_is_refused_and_names_the_first(begun: bool) -> None:
    first = claim()
    if begun:
        first.begin(anew=True)
    for more in ({}, {"overwrite": True}, {"resume": "latest"}):
        with pytest.raises(ValueError, match=rf"'out' is in use by train_a \(process {os.getpid()} on ") as error:
            claim(**more)
        assert "\n" not in str(error.value)
    second = claim(is_default=True)
    assert second.path == Path("out-2")
    second.release(None)
    first.release(None)
    assert run(overwrite=True) == Path("out")


def test_workers_of_a_run_add_to_its_list() -> None:
    first = claim(goes_on=True)
    first.begin(anew=True)
    worker = RunDirectory(Path("out"), first.wish)
    worker.attach()
    write_text("out/runs/a.json", "of a worker")
    worker.release(None)
    first.release(None)
    again = claim(goes_on=True)
    assert written_names("out") == ["runs/a.json"]
    again.release(None)


# ------------------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Path("."), "is the working directory"),
        (lambda: Path(""), "is the working directory"),
        (lambda: Path.cwd(), "is the working directory"),
        (lambda: Path("/"), "is the root"),
        (lambda: Path.home(), "is your home directory"),
        (lambda: write("file"), "is a file"),
    ],
)
def test_places_that_no_run_may_fill(make: Callable[[], Path], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("home").mkdir()
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    with pytest.raises(ValueError, match=f"--output_dir .* {message}; give a directory"):
        check_can_be_output(make(), "--output_dir")


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ("data", "data"),
        ("data/", "./data"),
        ("data/out", "data"),
        ("data/a/b/out", "data"),
        ("x/../data/out", "data"),
        ("link/out", "data"),
        ("data/out", "link"),
        ("link", "data"),
        ("outer", "outer/data"),
        ("outer", "inner_link"),
        ("outer", "outer/data/train.jsonl"),
    ],
)
def test_output_and_input_are_different_places(output: str, place: str) -> None:
    for folder in ("data", "outer/data", "x"):
        Path(folder).mkdir(parents=True)
    write("outer/data/train.jsonl")
    Path("link").symlink_to("data")
    Path("inner_link").symlink_to("outer/data")
    before = sorted(Path().rglob("*"))
    with pytest.raises(
        ValueError, match=r"--output_dir '.*' and --train_data_dir '.*' (overlap|are the same)"
    ) as error:
        claim(output, inputs={"--train_data_dir": place})
    assert repr(output.rstrip("/")) in str(error.value)
    assert repr(place) in str(error.value)
    assert sorted(Path().rglob("*")) == before


def test_neighbours_and_names_of_the_hub_are_fine() -> None:
    write("data/a.png")
    write("questions.jsonl")
    inputs = {"--a": "data", "--b": "owner/name", "--c": None, "--d": "questions.jsonl", "--e": "no/such/place"}
    check_apart(Path("data-2"), "--output_dir", inputs)
    check_apart(Path("owner"), "--output_dir", inputs)
    check_apart(Path("out"), "--output_dir", {"--class_data_dir": "out/x"})
    Path("out/x").mkdir(parents=True)
    check_apart(Path("out"), "--output_dir", {"--class_data_dir": "out/x"}, legal_within=["--class_data_dir"])
    with pytest.raises(ValueError, match="same directory"):
        check_apart(Path("out/x"), "--output_dir", {"--class_data_dir": "out/x"}, legal_within=["--class_data_dir"])


def test_the_merged_model_of_an_earlier_run_is_a_base_like_any_other() -> None:
    run(files=("merged/config.json",))
    assert run(is_default=True, inputs={"--base": "out/merged"}) == Path("out-2")
    with pytest.raises(ValueError, match="'out' and --base 'out/merged' overlap"):
        run(inputs={"--base": "out/merged"}, overwrite=True)


def test_a_directory_that_cannot_be_written_leaves_nothing() -> None:
    write("file")
    with pytest.raises(ValueError, match=r"--output_dir 'file/out' cannot be written"):
        claim("file/out")
    Path("broken").symlink_to("nowhere/at/all")
    with pytest.raises(ValueError, match=r"--output_dir 'broken' cannot be written"):
        claim("broken")
    assert sorted(path.name for path in Path().iterdir()) == ["broken", "file"]
