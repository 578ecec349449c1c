"""The comparison in process on a random base: what it writes, going on after a kill, growing, and every bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_inits
import pytest
import torch
import train_dit_lora
import train_sd_lora
from diffusers.models.attention_processor import AttnProcessor
from dit_fixtures import write_random_sd3
from PIL import Image
from pixart_fixtures import write_random_dit
from safetensors.torch import load_file
from script_fixtures import argv_of, run_main
from sd_fixtures import ROOT, write_images
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, T5EncoderModel

from lorainit_diffusers.comparison import run, samples, tasks, training
from lorainit_diffusers.comparison.grid import Init, PlannedRun
from lorainit_diffusers.evaluation import METRICS
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.training import loop

Compare = Callable[..., Path]
REPORT = (
    "results.csv",
    "timings.csv",
    "summary.md",
    "curves.png",
    "lr_sweep.png",
    "ranks.png",
    "grid.png",
    "report.html",
)
FAST: dict[str, Any] = {
    "inits": ["gaussian", "cntlora"],
    "learning_rates": [1e-3],
    "seeds": [0],
    "rank": 2,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "init_num_batches": 2,
    "validation_inference_steps": 1,
    "num_eval_prompts": 2,
    "drift_prompts": ["a dog"],
    "num_workers": 1,
}


@pytest.fixture(scope="session")
def random_clip(tmp_path_factory: pytest.TempPathFactory, random_sd: Path) -> Path:
    """A random CLIP of 32x32 images on the tokenizer of the random base."""
    folder = tmp_path_factory.mktemp("encoder") / "random-clip"
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(random_sd / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        **{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "resample": 3},
        **{"crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def random_sd3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for a random Stable Diffusion 3 with T5."""
    folder = tmp_path_factory.mktemp("base") / "random-sd3"
    torch.manual_seed(0)
    write_random_sd3(folder)
    return {"family": "sd3", "pretrained_model_name_or_path": folder}


@pytest.fixture
def options(random_sd: Path, random_clip: Path, image_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": random_sd,
        "train_data_dir": image_dir,
        "output_dir": tmp_path / "out",
        "encoders": [random_clip],
        **FAST,
    }


@pytest.fixture
def compare(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Run the comparison with tiny settings; options given as None are left out, True is a switch."""
    monkeypatch.setattr(tasks, "MIN_VALIDATION_SAMPLES", 4)

    def call(**changed: Any) -> Path:
        return run_main(compare_inits, {**options, **changed})

    return call


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_everything_is_written(compare):
    out = compare(seeds=[0, 1], num_eval_prompts=4)
    for name in REPORT:
        assert (out / name).stat().st_size > 0, name
    table = rows(out)
    assert [(row["run"], row["step"]) for row in table] == [
        (f"{init}-lr0.001-seed{seed}", str(step))
        for init in ("gaussian", "cntlora")
        for seed in (0, 1)
        for step in (0, 1, 2)
    ]
    measured = {name.partition("@")[0] for name in table[0] if "@" in name}
    assert measured == {name for name, metric in METRICS.items() if metric.needs_encoder} - {"diversity"}
    for row in table:
        assert float(row["validation_loss"]) > 0
        for name in row:
            if "@" in name and row["step"] in ("0", "2"):
                assert name.endswith("@random-clip")
                assert -1 <= float(row[name]) <= 10
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["seeds"] == [0, 1]
    assert config["baselines"] == ["gaussian"]
    assert "compare_inits.py" in config["command"]


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and tables take most of a tiny comparison's time; tests of numbers do without."""
    monkeypatch.setattr(run, "write_report", lambda directory: [])


@pytest.mark.usefixtures("no_report")
def test_step_zero_of_zero_delta_and_offset_inits_is_the_base(compare):
    inits = ["gaussian", "cntlora", "pissa", "gradient_whitened:step=0.5"]
    out = compare(inits=inits, mixed_precision="bf16", image_metrics="all")
    base = Image.open(out / "base.png")
    for label, equal in zip(inits, (True, True, True, False), strict=True):
        name = PlannedRun(Init.parse(label), 1e-3, 0).name
        strip = Image.open(out / "runs" / name / "samples" / "step-000000.png")
        difference = max(abs(a - b) for a, b in zip(base.tobytes(), strip.tobytes(), strict=True))
        assert (difference <= 1) == equal, label


def test_a_diffusion_transformer_is_compared_as_a_unet_is(compare, random_sd3, monkeypatch):
    encoded: list[int] = []
    encode = T5EncoderModel.forward
    monkeypatch.setattr(
        T5EncoderModel, "forward", lambda self, ids, **k: encoded.append(len(ids)) or encode(self, ids, **k)
    )
    out = compare(**random_sd3, max_sequence_length=16, weighting_scheme="mode", caption_dropout=0.5)
    table = rows(out)
    assert [(row["run"], row["step"]) for row in table] == [
        (f"{init}-lr0.001-seed0", str(step)) for init in ("gaussian", "cntlora") for step in (0, 1, 2)
    ]
    gaussian, cntlora = (table[index] for index in (0, 3))
    # the layers keep the base as it is: the same loss, the same samples
    assert float(gaussian["validation_loss"]) == pytest.approx(float(cntlora["validation_loss"]), rel=1e-5)
    assert float(cntlora["drift@random-clip"]) == pytest.approx(0, abs=1e-6)
    assert len({row["validation_loss"] for row in table}) >= 5
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["family"] == "sd3"
    assert config["arguments"]["weighting_scheme"] == "mode"
    assert (out / "report.html").exists()
    # the captions of 4 training and 2 held-out images and none; for the samples 2 of them, a dog and none: at no step
    assert sum(encoded) == (4 + 2 + 1) + (2 + 1 + 1)


def with_plain_attention(family: StableDiffusionFamily) -> StableDiffusionFamily:
    family.denoiser.set_attn_processor(AttnProcessor())
    return family


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[loop.StepOutcome]:
    """Every step of the comparison and of the training, as it comes."""
    found: list[loop.StepOutcome] = []
    take = loop.take_step

    def noted(*arguments: Any) -> loop.StepOutcome:
        found.append(take(*arguments))
        return found[-1]

    for module in (loop, training):
        monkeypatch.setattr(module, "take_step", noted)
    return found


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(("family", "train_text_encoder"), [("sd", False), ("sd", True), ("sd3", False)])
def test_a_run_is_the_one_that_the_training_script_makes(
    compare, options, random_sd3, tmp_path, family, train_text_encoder, outcomes, monkeypatch
):
    """Bit for bit: otherwise the comparison would say nothing of what users train."""
    # on a processor a comparison of UNets multiplies plainly, which is faster there and the same but for rounding
    load_unet = StableDiffusionFamily.from_pretrained.__func__
    plain = classmethod(lambda cls, *a, **k: with_plain_attention(load_unet(cls, *a, **k)))
    monkeypatch.setattr(StableDiffusionFamily, "from_pretrained", plain)
    base = {"train_text_encoder": train_text_encoder, **(random_sd3 if family == "sd3" else {})}
    shared = {"lora_dropout": 0.1, "lr_scheduler": "cosine", "max_train_steps": 3, "max_grad_norm": 0.01}
    out = compare(inits=["cntlora"], seeds=[3], image_metrics="none", **base, **shared)
    state = load_file(out / "runs" / "cntlora-lr0.001-seed3" / "snapshots" / "step-000003.safetensors")
    same = ("pretrained_model_name_or_path", "train_data_dir", "rank", "train_batch_size")
    script_options = {
        **{name: options[name] for name in (*same, "init_num_batches", "validation_inference_steps")},
        **{"init": "cntlora", "seed": 3, "learning_rate": 1e-3, "cache_latents": True, "checkpointing_steps": 3},
        **{"validation_prompt": "x", "output_dir": tmp_path / "single"},
        "pre_compute_text_embeddings": not train_text_encoder,
    }
    trained = run_main(train_dit_lora if family == "sd3" else train_sd_lora, {**script_options, **base, **shared})
    (checkpoint,) = (trained / "checkpoint-3").glob("adapters*.safetensors")
    single = load_file(checkpoint)
    assert single.keys() == state.keys()
    assert any(name.startswith("text_encoder") for name in state) == train_text_encoder
    assert not [name for name, value in single.items() if not torch.equal(value, state[name])]
    assert len(outcomes) == 6
    assert outcomes[:3] == outcomes[3:]  # loss, norm of the gradients, learning rate


@pytest.mark.usefixtures("no_report")
def test_stopped_at_any_moment_it_ends_with_the_same_results(compare, random_sd3, monkeypatch, tmp_path):
    expected = (compare(output_dir=tmp_path / "whole", **random_sd3) / "results.csv").read_bytes()
    save, count = training.write_json, 0

    def stop(path: Path, document: Any, moment: int) -> None:
        nonlocal count
        count += "runs" in path.parts
        if count == moment:
            raise KeyboardInterrupt
        save(path, document)

    # one comparison, stopped three times; its six files: the reports and results of two runs, the scores of two
    for moment in (1, 4, 3):  # at the first report; at the second result; then, two files later, at the first scores
        count = 0
        with monkeypatch.context() as patch:
            for module in (training, samples):
                patch.setattr(module, "write_json", lambda path, document, at=moment: stop(path, document, at))
            with pytest.raises(KeyboardInterrupt):
                compare(**random_sd3)
    assert (compare(**random_sd3) / "results.csv").read_bytes() == expected


@pytest.mark.usefixtures("no_report")
def test_the_grid_grows_and_finished_runs_are_kept(compare, monkeypatch):
    out = compare(image_metrics="none")
    before = rows(out)
    trained: list[str] = []
    train = training.train
    monkeypatch.setattr(training, "train", lambda *a: (trained.append(a[1].name), train(*a)))
    out = compare(image_metrics="none", inits=["gaussian", "cntlora", "eva"], seeds=[0, 1])
    assert trained == ["gaussian-lr0.001-seed1", "cntlora-lr0.001-seed1", "eva-lr0.001-seed0", "eva-lr0.001-seed1"]
    after = rows(out)
    assert len(after) == 18
    assert all(row in after for row in before)


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_two_workers_do_what_one_does(compare, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "MIN_VALIDATION_SAMPLES", 40)  # as in the workers, which are other processes
    one = compare(output_dir=tmp_path / "one", image_metrics="none")
    two = compare(output_dir=tmp_path / "two", image_metrics="none", num_workers=2)
    for a, b in zip(rows(one), rows(two), strict=True):
        loss = float(a.pop("validation_loss"))
        assert loss == pytest.approx(float(b.pop("validation_loss")), rel=1e-4)
        assert a == b


@pytest.mark.usefixtures("no_report")
def test_options_of_the_run(compare):
    labels = ["cntlora:variable_rank=true", "gaussian:a_lr_ratio=0", "eva:init_num_batches=1"]
    out = compare(inits=labels, image_metrics="none")
    first, last = (
        load_file(out / "runs" / "gaussian-a_lr_ratio=0-lr0.001-seed0" / "snapshots" / f"step-00000{step}.safetensors")
        for step in (0, 2)
    )
    changed = {name.rpartition(".")[2] for name, value in first.items() if not torch.equal(value, last[name])}
    assert changed == {"lora_B"}

    def report(run: str) -> dict[str, Any]:
        return json.loads((out / "runs" / run / "init_report.json").read_text(encoding="utf-8"))

    assert len({layer["rank"] for layer in report("cntlora-variable_rank=true-lr0.001-seed0")["layers"].values()}) > 1
    assert report("eva-init_num_batches=1-lr0.001-seed0")["num_passes"] == 1


@pytest.mark.usefixtures("no_report")
def test_equal_parameters_holds_variable_ranks_to_the_parameters_of_equal_ranks(compare):
    out = compare(inits=["gaussian", "eva:variable_rank=true"], image_metrics="none", equal_parameters=True, rank=4)
    counts = {row["init"]: int(row["num_parameters"]) for row in rows(out)}
    assert counts["eva:variable_rank=true"] <= counts["gaussian"]
    assert counts["eva:variable_rank=true"] == pytest.approx(counts["gaussian"], rel=0.03)


def test_a_run_that_diverges_is_in_the_results_as_the_worst(compare):
    steep = {"learning_rates": [1e-3, 1e30], "optimizer": "sgd", "max_grad_norm": 1e30}
    out = compare(inits=["gaussian", "orthonormal"], image_metrics="none", **steep)
    last = {row["run"]: float(row["validation_loss"]) for row in rows(out) if row["step"] == "2"}
    assert last["gaussian-lr1e+30-seed0"] == float("inf")
    assert last["gaussian-lr0.001-seed0"] < 100
    assert (out / "report.html").exists()


@pytest.mark.usefixtures("no_report")
def test_without_a_held_out_folder_a_quarter_is_held_out(compare, tmp_path):
    write_images(tmp_path / "plain", count=8)
    out = compare(train_data_dir=tmp_path / "plain", image_metrics="none")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["num_images"], config["num_heldout_images"]) == (6, 2)


def test_repeated_images_are_not_on_both_sides(options, tmp_path):
    write_images(tmp_path / "plain", count=8)
    argv = argv_of({**options, "train_data_dir": tmp_path / "plain", "repeats": 3})
    training, heldout = tasks.split_records(compare_inits.parse_args(argv))
    assert (len(training), len(heldout)) == (18, 2)
    assert not set(training) & set(heldout)


@pytest.mark.usefixtures("no_report")
def test_images_of_one_subject_have_no_pairs(compare, tmp_path):
    write_images(tmp_path / "plain", count=8)
    subject = {"instance_data_dir": tmp_path / "plain", "instance_prompt": "a photo of sks", "train_data_dir": None}
    (row, *_) = rows(compare(inits=["gaussian"], **subject))
    assert "image_similarity@random-clip" in row
    assert "paired_similarity@random-clip" not in row


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"inits": ["gaussian", "lora-ga"]}, "--inits 'lora-ga': unknown init"),
        ({"inits": ["cntlora:guage=balanced"]}, "'guage=balanced'.*gauge.*options of the run are variable_rank"),
        ({"inits": ["eva:init_num_batches=few"]}, "'few' is not a value of init_num_batches"),
        ({"inits": ["eva:init_num_batches=0"]}, "init_num_batches=0.*at least 1"),
        ({"inits": ["gaussian:variable_rank=true"]}, "gaussian:variable_rank=true.*no scores"),
        ({"inits": ["cntlora:constraint=alignment,pretraining=measured"]}, "pretraining=measured needs class images"),
        ({"inits": ["eva", "eva"]}, "--inits eva eva: name each once"),
        ({"learning_rates": [0.0]}, "--learning_rates 0.0: must be positive"),
        ({"eval_steps": [1, 5]}, r"--eval_steps \[0, 1, 2, 5\].*--max_train_steps 2"),
        ({"num_eval_prompts": 0}, "--num_eval_prompts 0: must be at least 1"),
        ({"encoders": ["no/such/folder"]}, "no/such/folder"),
        ({"pretrained_model_name_or_path": "nowhere"}, "'nowhere' is not a folder"),
        ({"rank": 0}, "--rank 0"),
        ({"family": "sd3"}, r"is a StableDiffusionPipeline, .*; use `family_class\('sd'\)` for it"),
        ({"family": "flux", "pretrained_model_name_or_path": None}, "--family flux has no bundled base"),
        ({"weighting_scheme": "mode"}, "--weighting_scheme mode has no effect on Stable Diffusion"),
    ],
)
def test_bad_input_is_refused_before_any_run(compare, changed, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare(**changed)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_base_of_another_family_is_refused_with_the_right_one(compare, random_sd3):
    base = random_sd3["pretrained_model_name_or_path"]
    with pytest.raises(ValueError, match=r"is a StableDiffusion3Pipeline, .*; use `family_class\('sd3'\)` for it"):
        compare(pretrained_model_name_or_path=base)


def test_drift_prompts_that_are_no_classes_are_refused_before_training(compare, tmp_path):
    write_random_dit(tmp_path / "dit")
    with pytest.raises(ValueError, match="--drift_prompts: 'a dog' is no class of this base"):
        compare(family="dit", pretrained_model_name_or_path=tmp_path / "dit")


def test_the_default_base_is_the_familys_bundled_one():
    for family, name in (("sd", "tiny-sd"), ("sd3", "tiny-dit")):
        args = compare_inits.parse_args(["--family", family])
        assert args.pretrained_model_name_or_path == str(ROOT / "assets" / "models" / name)
        assert samples.encoder_names(args) == [str(ROOT / "assets" / "models" / "tiny-clip")]
        assert tasks.drift_prompts(args) == list(tasks.EMOJI_DRIFT_PROMPTS)


def test_too_few_images_to_hold_any_out(compare, tmp_path):
    write_images(tmp_path / "few", count=3)
    with pytest.raises(ValueError, match="has 3 images and no heldout folder"):
        compare(train_data_dir=tmp_path / "few")


@pytest.mark.usefixtures("no_report")
def test_another_comparison_in_the_same_directory_is_refused(compare):
    out = compare(image_metrics="none")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    for name in ("family", "weighting_scheme", "max_sequence_length"):  # as written before there were other families
        del config["arguments"][name]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    compare(image_metrics="none")
    with pytest.raises(ValueError, match=r"--rank is 3, but --output_dir .* holds runs with 2"):
        compare(image_metrics="none", rank=3)


def fail(phase: str, options: Any, device: str, count: int, part: int) -> None:
    """In the place of a worker's work."""
    raise ValueError(f"the {phase} of part {part} of {count} cannot be done")


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_worker_that_fails_says_why(compare, monkeypatch):
    monkeypatch.setattr(run, "work_part", fail)
    with pytest.raises(ValueError, match=r"a worker failed \(.*worker-\d.log\): the training of part \d of 2 cannot"):
        compare(num_workers=2)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_a_real_kill_and_a_second_start_end_with_the_same_results(options, tmp_path):
    def command(name: str) -> list[str]:
        changed = {**options, "output_dir": tmp_path / name, "num_workers": 2, "seeds": [0, 1], "max_train_steps": 8}
        return [sys.executable, str(ROOT / "train_scripts" / "compare_inits.py"), *argv_of(changed)]

    subprocess.run(command("whole"), check=True)
    for moment in (8.0, 14.0, 20.0):
        process = subprocess.Popen(command("killed"))
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)  # the workers see that their parent is gone
        process.wait()
        time.sleep(2.0)
    subprocess.run(command("killed"), check=True)
    assert (tmp_path / "killed" / "results.csv").read_bytes() == (tmp_path / "whole" / "results.csv").read_bytes()


@pytest.mark.slow
def test_the_processes_of_a_launch_split_the_grid(options, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29518"]
    script = str(ROOT / "train_scripts" / "compare_inits.py")
    changed = {**options, "num_workers": None, "num_eval_prompts": 4}
    subprocess.run([*launch, script, *argv_of(changed)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    out = tmp_path / "out"
    assert not list(out.glob("worker-*.log"))  # no workers of their own
    assert len(rows(out)) == 6
    assert all((out / name).exists() for name in REPORT)
