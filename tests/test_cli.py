"""The console command: what it runs, what it says of methods and files, and the wheel that brings it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sd_fixtures import ROOT

from lorainit_diffusers import cli
from lorainit_diffusers.export.inspect import inspect_lora
from lorainit_diffusers.methods import METHODS


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    cli.main(words)
    return capsys.readouterr().out


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_help_names_every_command_within_a_second() -> None:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lorainit_diffusers.cli", "--help"],
        **{"capture_output": True, "text": True, "cwd": ROOT, "check": True},
    )
    assert time.perf_counter() - started < 1
    assert all(f"lorainit {command}" in done.stdout for command in cli.COMMANDS)
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (("trian", "sd"), "unknown command 'trian'"),
        (("train",), "needs a kind of base: sd, sdxl, dit, classifier, vlm"),
        (("train", "sdx"), "did you mean sdxl?"),
        (("train", "sd", "--learning_rat", "1"), "did you mean --learning_rate?"),
        (("init", "sd", "--rank", "0"), "--rank 0: must be at least 1"),
        (("methods", "evva"), "did you mean eva?"),
        (("inspect",), "takes one LoRA file"),
        (("inspect", "nothing.safetensors"), "there is no file 'nothing.safetensors'"),
    ],
)
def test_mistakes_are_answered(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], answer: str) -> None:
    assert answer in complaint(capsys, *words)


def test_init_and_train_run_the_functions_of_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorainit_diffusers.training import vlm

    calls: list[list[str]] = []
    monkeypatch.setattr(vlm, "main", calls.append)
    cli.main(["train", "vlm", "--init", "eva"])
    cli.main(["init", "vlm", "--init", "eva"])
    assert calls == [["--init", "eva"], ["--init", "eva", "--init_only"]]


def test_methods_are_a_table_with_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "methods").splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(METHODS)]] == list(METHODS)
    (row,) = (line for line in lines if line.startswith("cntlora "))
    assert "gamma=0.1" in row
    assert "inputs" in row
    text = said(capsys, "methods", "eva")
    assert "--init_option centered=true" in text
    assert "arXiv:2410.07170" in text


# ------------------------------------------------------------------------------------------------------------- inspect


def factors(name: str, rank: int, down: str, up: str) -> dict[str, torch.Tensor]:
    return {f"{name}{down}": torch.zeros(rank, 6), f"{name}{up}": torch.zeros(4, rank)}


@pytest.mark.parametrize(
    ("names", "expected", "component"),
    [
        (("unet.to_q", ".lora_A.weight", ".lora_B.weight"), "diffusers", "unet"),
        (("base_model.model.layer", ".lora_A.weight", ".lora_B.weight"), "PEFT adapter", "model"),
        (("lora_te1_to_q", ".lora_down.weight", ".lora_up.weight"), "kohya", "lora_te1"),
        (("unet.attn1.to_q", ".lora.down.weight", ".lora.up.weight"), "diffusers, of before 2024", "unet"),
        (
            ("unet.attn1.processor.to_q", "_lora.down.weight", "_lora.up.weight"),
            "diffusers, attention processors",
            "unet",
        ),
    ],
)
def test_files_of_every_kind_are_told_apart(
    tmp_path: Path, names: tuple[str, str, str], expected: str, component: str
) -> None:
    save_file(factors(names[0], 2, *names[1:]), tmp_path / "a.safetensors")
    found = inspect_lora(tmp_path / "a.safetensors")
    assert found.format == expected
    (layer,) = found.layers
    assert (layer.rank, layer.alpha, layer.in_features, layer.out_features) == (2, 2.0, 6, 4)
    assert found.components == {component: 1}
    assert found.folded is None


def test_alpha_is_what_a_reader_takes(tmp_path: Path) -> None:
    kohya = factors("lora_unet_a", 4, ".lora_down.weight", ".lora_up.weight") | {"lora_unet_a.alpha": torch.tensor(2.0)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    assert inspect_lora(tmp_path / "kohya.safetensors").layers[0].alpha == 2.0
    folder = tmp_path / "peft"
    folder.mkdir()
    peft = factors("base_model.model.a", 4, ".lora_A.weight", ".lora_B.weight")
    peft |= factors("base_model.model.b", 8, ".lora_A.weight", ".lora_B.weight")
    peft["base_model.model.head.weight"] = torch.zeros(3)
    save_file(peft, folder / "adapter_model.safetensors")
    config = {"r": 4, "lora_alpha": 16, "rank_pattern": {"b": 8}, "alpha_pattern": {"b": 24}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = inspect_lora(folder)
    assert [layer.alpha for layer in found.layers] == [16.0, 24.0]
    assert found.other == ("base_model.model.head.weight",)


def test_what_is_no_lora_is_named(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA"):
        inspect_lora(tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="is no safetensors file"):
        inspect_lora(tmp_path / "text.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no LoRA file in it"):
        inspect_lora(tmp_path / "empty")
    half = {"unet.a.lora_A.weight": torch.zeros(2, 3)}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"has lora_A\.weight but no lora_B\.weight"):
        inspect_lora(tmp_path / "half.safetensors")


# --------------------------------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], list[str]]:
    """An empty directory, the environment in which the wheel is what is imported, and the wheel's files."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
        names = archive.namelist()
    (folder / "empty").mkdir()
    return folder / "empty", {**os.environ, "PYTHONPATH": str(folder / "site"), "PYTHONSAFEPATH": "1"}, names


def run_installed(installed: tuple[Path, dict[str, str], list[str]], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorainit_diffusers.cli", *words]
    return subprocess.run(command, cwd=installed[0], env=installed[1], capture_output=True, text=True)


def test_the_wheel_works_in_an_empty_directory(installed: tuple[Path, dict[str, str], list[str]]) -> None:
    """What is installed runs without the repository, and says where a bundled base is."""
    site, names = Path(installed[1]["PYTHONPATH"]), installed[2]
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert "lorainit = lorainit_diffusers.cli:main" in entry.read_text(encoding="utf-8")
    assert any(name.endswith(".jinja") for name in names)
    assert "arXiv:2410.07170" in run_installed(installed, "methods").stdout
    bare = run_installed(installed, "train", "sd", "--init", "eva")
    assert bare.returncode == 2
    assert "part of the repository of lorainit-diffusers, not of the installed package" in bare.stderr
    help_text = run_installed(installed, "train", "classifier", "--help")
    assert help_text.returncode == 0
    assert "--learning_rate" in help_text.stdout


@pytest.mark.slow
def test_the_wheel_trains_on_a_base_and_data_of_the_user(installed: tuple[Path, dict[str, str], list[str]]) -> None:
    base, data = ROOT / "assets" / "models" / "tiny-sd", ROOT / "assets" / "data" / "blobs"
    options = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(data), "--max_train_steps", "2"]
    options += ["--init_num_batches", "2", "--validation_inference_steps", "2", "--output_dir", "out"]
    done = run_installed(installed, "train", "sd", "--init", "cntlora", *options)
    assert done.returncode == 0, done.stderr
    assert (installed[0] / "out" / "report.html").is_file()
    said = run_installed(installed, "inspect", "out").stdout
    assert "folded    yes" in said
