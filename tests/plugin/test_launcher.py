"""The launcher: scripts run as they are, and what becomes of their LoRA is said, written and exact."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from loops import reset_accelerate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sd_fixtures import ROOT, write_images
from torch import Tensor

from lorainit_diffusers import run
from lorainit_diffusers.init_file import load_init_file

HERE = Path(__file__).parent
TINY = str(HERE / "tiny_script.py")
OFFSET_METHODS = ("cntlora", "lora_ga")


@pytest.fixture(autouse=True)
def _forget_accelerators() -> Generator[None]:
    before = vars(Accelerator)["__init__"], vars(LoraBaseMixin)["write_lora_layers"], list(sys.argv), list(sys.path)
    yield
    reset_accelerate()
    assert (vars(Accelerator)["__init__"], vars(LoraBaseMixin)["write_lora_layers"], sys.argv, sys.path) == before


def launch(*arguments: Any) -> None:
    reset_accelerate()
    run.run(run.parse([str(argument) for argument in arguments]))


def lora(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def losses(folder: Path) -> list[float]:
    return [float(value) for value in (folder / "losses.txt").read_text(encoding="utf-8").split()]


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=0, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("method", ["cntlora", "eva", "lora_ga", "pissa"])
def test_a_script_runs_as_it_is(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch("--init", method, "--init_batches", 3, "--", TINY, "--output_dir", tmp_path)
    printed = capsys.readouterr().out
    count = 0 if method == "pissa" else 3
    assert len(losses(tmp_path)) == 5 + count
    line = f"{method} from {'no losses' if method == 'pissa' else '3 losses of the loop'}: 2 layers of transformer"
    assert f"lorainit: {line}" in printed
    assert (tmp_path / "init_summary.txt").read_text(encoding="utf-8").startswith(line)
    report = json.loads((tmp_path / "init_report.json").read_text(encoding="utf-8"))
    assert report["num_passes"] == count
    ranks = {value.shape[0] for key, value in lora(tmp_path).items() if "lora_A" in key}
    assert ranks == {2 if method == "eva" else 4}


@pytest.mark.parametrize("method", [*OFFSET_METHODS, "eva"])
def test_an_init_file_starts_the_same_run(method: str, tmp_path: Path) -> None:
    options = ("--init", method, "--init_batches", 3)
    launch(*options, "--", TINY, "--output_dir", tmp_path / "whole")
    launch(*options, "--init_only", "--", TINY, "--output_dir", tmp_path / "only")
    assert not (tmp_path / "only" / "losses.txt").exists()
    file = tmp_path / "only" / "lorainit_init.safetensors"
    launch("--init_from", file, "--", TINY, "--output_dir", tmp_path / "started")
    assert_equal(lora(tmp_path / "whole"), lora(tmp_path / "started"))
    assert losses(tmp_path / "started") == losses(tmp_path / "whole")[3:]
    init = load_init_file(file)
    assert (init.method, init.components, init.settings["init_batches"]) == (method, ["transformer"], 3)
    assert init.data["number_of_examples"] == 5


@pytest.mark.parametrize("no_accumulate", [False, True])
def test_restarting_equals_going_on(no_accumulate: bool, tmp_path: Path) -> None:
    """Also where the script counts every loss as a step, which would cost it the steps of the pass."""
    launch("--init", "cntlora", "--init_batches", 3, "--", TINY, "--output_dir", tmp_path / "whole")
    more = ["--no_accumulate"] if no_accumulate else []
    options = ("--init", "cntlora", "--init_batches", 3, "--restart")
    with pytest.warns(UserWarning, match="accumulate") if no_accumulate else _nothing_to_see():
        launch(*options, "--", TINY, "--output_dir", tmp_path / "again", *more)
    assert_equal(lora(tmp_path / "whole"), lora(tmp_path / "again"))
    assert len(losses(tmp_path / "again")) == 5


def _nothing_to_see() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_ranks_by_score(tmp_path: Path) -> None:
    options = ("--init", "eva", "--init_batches", 3, "--variable_rank", "--rank_budget", 3)
    launch(*options, "--", TINY, "--output_dir", tmp_path, "--save_at", 5, "--steps", 8)
    ranks = sorted(value.shape[0] for key, value in lora(tmp_path).items() if "lora_A" in key)
    assert ranks == [1, 2]
    resumed = tmp_path / "resumed"
    launch(*options, "--", TINY, "--output_dir", resumed, "--steps", 8, "--resume_from", tmp_path / "checkpoint-5")
    assert_equal(lora(tmp_path), lora(resumed))


@pytest.mark.parametrize("method", ["cntlora", "eva"])
def test_resume(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--init", method, "--init_batches", 3, "--", TINY, "--steps", 8, "--output_dir")
    launch(*arguments, tmp_path / "whole", "--save_at", 5)
    launch(*arguments, tmp_path / "resumed", "--resume_from", tmp_path / "whole" / "checkpoint-5")
    assert_equal(lora(tmp_path / "whole"), lora(tmp_path / "resumed"))
    assert "lorainit: resumed from" in capsys.readouterr().out
    assert not (tmp_path / "resumed" / "init_report.json").exists()
    with pytest.raises(run.LaunchError, match="not initialised anew: no init file"):
        launch(
            *("--init", method, "--init_only", "--", TINY, "--steps", 8, "--output_dir", tmp_path / "only"),
            *("--resume_from", tmp_path / "whole" / "checkpoint-5"),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "4"], r"made for another base: the values of 'first.weight' of transformer differ"),
        (["--rank", "3"], r"made for rank 2 of transformer.first, this adapter has rank 3"),
    ],
)
def test_an_init_file_of_something_else_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    launch("--init", "eva", "--init_batches", 1, "--init_only", "--", TINY, "--output_dir", tmp_path)
    file = tmp_path / "lorainit_init.safetensors"
    with pytest.raises(ValueError, match=message):
        launch("--init_from", file, "--", TINY, "--output_dir", tmp_path, *arguments)


def test_files_that_are_no_init_file(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.safetensors", tmp_path / "other.safetensors"
    broken.write_bytes(b"nothing")
    save_file({"x": torch.zeros(1)}, other)
    for path, message in (
        (tmp_path / "none", "there is no init file"),
        (broken, "not complete"),
        (other, "no init file"),
    ):
        with pytest.raises(run.LaunchError, match=message):
            launch("--init_from", path, "--", TINY, "--output_dir", tmp_path)


def test_a_script_that_never_gets_there_is_an_error_at_its_end(tmp_path: Path) -> None:
    nothing, no_adapter = tmp_path / "nothing.py", tmp_path / "no_adapter.py"
    nothing.write_text("print('done')", encoding="utf-8")
    no_adapter.write_text(
        "import torch\nfrom accelerate import Accelerator\naccelerator = Accelerator(cpu=True)\n"
        "accelerator.prepare(torch.nn.Linear(2, 2))\n",
        encoding="utf-8",
    )
    with pytest.raises(run.LaunchError, match=r"has ended.* made no accelerate.Accelerator"):
        launch("--init", "eva", "--", nothing)
    with pytest.raises(run.LaunchError, match=r"no model with a PEFT adapter went through accelerator.prepare"):
        launch("--init", "eva", "--", no_adapter)
    with pytest.raises(run.LaunchError, match="made no step"):
        launch("--init", "eva", "--", TINY, "--output_dir", tmp_path, "--steps", 0)
    with pytest.raises(RuntimeError, match="the script's own"):
        launch("--init", "eva", "--init_batches", 1, "--", TINY, "--output_dir", tmp_path, "--fail")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "eva"], "no script"),
        (["--init_batch", "3", "--", "x.py"], "unrecognized arguments"),
        (["--init_from", "a", "--init_only", "--", "x.py"], "leave out --init_only"),
        (["--rank_budget", "3", "--", "x.py"], "need --variable_rank"),
        (["--init_file", "a", "--", "x.py"], "add --init_only"),
        (["--init_option", "base", "--", "x.py"], "no KEY=VALUE"),
    ],
)
def test_command_lines_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--init", "evaa", "--", TINY], "unknown init 'evaa'"),
        (["--init", "eva", "--init_option", "x=3", "--", TINY], "has no option 'x'"),
        (["--", "nowhere.py"], "there is no script 'nowhere.py'"),
        (["--init_only", "--", TINY], "where should the init file go"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run.main(arguments)


def test_options_and_the_scripts_arguments_are_told_apart() -> None:
    options = run.parse(
        ["--init", "cntlora", "--init_option", "base=down_only", "x=1e-3", "n=2", "--", "a.py", "--init", "b"]
    )
    assert options.script_args == ("--init", "b")
    assert options.init_options == {"base": "down_only", "x": 1e-3, "n": 2}
    assert run.parse(["--init", "eva", "a.py", "--rank", "3"]).script_args == ("--rank", "3")
    assert run.parse(["--", "-m", "pkg.mod", "x"]).is_module
    assert run.script_output_dir(["--output_dir=a", "--x", "1"]) == Path("a")
    assert run.script_output_dir(["--x", "--output-dir", "b"]) == Path("b")
    assert run.script_output_dir(["--x"]) is None


def test_help_needs_no_torch() -> None:
    code = """
import runpy, sys
sys.argv = ["run", "--help"]
try:
    runpy.run_module("lorainit_diffusers.run", run_name="__main__")
except SystemExit:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def output(unet: Any, text_encoder: Any) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet.eval()(
            latents, torch.tensor([20, 700]), text_encoder.eval()(torch.arange(24).reshape(2, 12))[0]
        ).sample


@pytest.mark.parametrize("shape", ["text_to_image", "dreambooth --train_text_encoder"])
@pytest.mark.filterwarnings("ignore:the loop does not use accelerator.accumulate")
def test_scripts_of_diffusers_shape(shape: str, random_sd: Path, tmp_path: Path) -> None:
    """Their own files load into a stock pipeline; kohya's file is the same LoRA; reports stand beside it."""
    script, *flags = shape.split()
    data = write_images(tmp_path / "data")
    arguments = [HERE / f"{script}_shape.py", "--base", random_sd, "--data", data, "--steps", 8, *flags]
    launch("--init", "cntlora", "--init_batches", 3, "--", *arguments, "--output_dir", tmp_path / "out")
    loaded: list[Tensor] = []
    kohya = "pytorch_lora_weights_kohya.safetensors"
    assert (tmp_path / "out" / kohya).is_file()
    # diffusers 0.42 cannot read the text encoder of kohya's files with transformers 5
    for name in ("pytorch_lora_weights.safetensors", *([] if flags else [kohya])):
        pipeline = StableDiffusionPipeline.from_pretrained(random_sd)
        before = output(pipeline.unet, pipeline.text_encoder)
        pipeline.load_lora_weights(tmp_path / "out", weight_name=name)
        loaded.append(output(pipeline.unet, pipeline.text_encoder))
        assert (loaded[-1] - before).abs().max() > 1e-3
    torch.testing.assert_close(loaded[0], loaded[-1], atol=1e-4, rtol=0)
    report = json.loads((tmp_path / "out" / "init_report.json").read_text(encoding="utf-8"))
    assert {name.partition(".")[0] for name in report["layers"]} == {"unet", *(["text_encoder"] if flags else [])}


def run_in_two_processes(*arguments: Any) -> list[subprocess.CompletedProcess[str]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes: list[subprocess.Popen[str]] = []
    for process in range(2):
        own = {"RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        own |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "lorainit_diffusers.run", *(str(argument) for argument in arguments)]
        processes.append(
            subprocess.Popen(
                command,
                env={**os.environ, **own, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    done: list[subprocess.CompletedProcess[str]] = []
    for process in processes:
        out, _ = process.communicate(timeout=120)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out))
    assert [process.returncode for process in done] == [0, 0], done[0].stdout[-2000:] + done[1].stdout[-2000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cntlora", "lora_ga"])
def test_two_processes(method: str, tmp_path: Path) -> None:
    """Every process collects its own losses; resuming, and starting from a file with ranks by score, are exact."""
    base = ("--init", method, "--init_batches", 2)
    done = run_in_two_processes(*base, "--", TINY, "--output_dir", tmp_path, "--save_at", 3, "--steps", 3)
    assert "lorainit: " in done[0].stdout
    assert "lorainit: " not in done[1].stdout
    report = json.loads((tmp_path / "init_report.json").read_text(encoding="utf-8"))
    assert {layer["num_rows"] for layer in report["layers"].values()} == {4}
    resumed = tmp_path / "resumed"  # and saved: accelerate keeps no order of batches for several processes
    arguments = ("--output_dir", resumed, "--steps", 3, "--resume_from", tmp_path / "checkpoint-3")
    run_in_two_processes(*base, "--", TINY, *arguments)
    assert_equal(lora(tmp_path), lora(resumed))
    if method == "cntlora":
        ranked = tmp_path / "ranked"
        run_in_two_processes(*base, "--variable_rank", "--rank_budget", 3, "--", TINY, "--output_dir", ranked)
        assert sorted(value.shape[0] for key, value in lora(ranked).items() if "lora_A" in key) == [2, 4]
        with safe_open(ranked / "lorainit_init.safetensors", framework="pt") as opened:
            assert json.loads(opened.metadata()["lorainit_init"])["settings"]["num_processes"] == 2
