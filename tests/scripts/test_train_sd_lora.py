"""The script in process on a random base: what it writes, that no flag is ignored, resuming, and every bad input."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import train_sd_lora
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from script_fixtures import FAST, argv_of, changes, losses, read_json, run_main, weights
from sd_fixtures import ROOT, write_images
from torch import Tensor
from transformers import CLIPTextModel

from lorainit_diffusers import adapters_disabled
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.methods import METHODS
from lorainit_diffusers.methods.gaussian import Gaussian
from lorainit_diffusers.training import image_outputs, samples
from lorainit_diffusers.training import run as run_module
from lorainit_diffusers.training.data import text_to_image as data_module
from lorainit_diffusers.training.options.fields import option_facts
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions
from lorainit_diffusers.training.run import Run as TrainingRun
from lorainit_diffusers.training.run import start_accelerator
from lorainit_diffusers.training.text_to_image import settle_options

Run = Callable[..., Path]
SCORED = ("cntlora", "eva", "lora_ga", "pissa")  # some of the methods that can allocate ranks
DREAMBOOTH = {
    "train_data_dir": None,
    "instance_data_dir": "/x",
    "instance_prompt": "a sks cat",
    "class_prompt": "a cat",
}


@pytest.fixture
def run(random_sd: Path, image_dir: Path, tmp_path: Path) -> Run:
    """Run the script with tiny settings; options given as None are left out, True is a switch."""

    def call(name: str = "out", **options: Any) -> Path:
        options = {
            "pretrained_model_name_or_path": random_sd,
            "train_data_dir": image_dir,
            "output_dir": tmp_path / name,
            **FAST,
            **options,
        }
        return run_main(train_sd_lora, options)

    return call


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny run's time is its pictures; tests of weights do without."""
    monkeypatch.setattr(image_outputs, "plot_loss", lambda *args: None)
    monkeypatch.setattr(samples, "draw_samples", lambda *args: [Image.new("RGB", (32, 32))])


# ------------------------------------------------------------------------------------------------------------- outputs


def test_writes_everything(run: Run) -> None:
    out = run(validation_prompt=None, max_train_steps=4, validation_steps=2, checkpointing_steps=2)
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "init_report.json"),
        *("metrics.jsonl", "run.yaml", "loss.png", "samples.png", "samples", "config.json", "README.md", "report.html"),
        *("checkpoint-2", "checkpoint-4", ".lorainit", "best"),
    }
    rows = sorted(path.name for path in (out / "samples").iterdir())
    assert rows == ["base.png", "step-000000.png", "step-000002.png", "step-000004.png"]
    with Image.open(out / "samples" / "base.png") as base, Image.open(out / "samples" / "step-000000.png") as start:
        assert base.size == (32 * 4, 32)  # two trained and two held-out prompts
        assert base.tobytes() == start.tobytes()  # the offset keeps the base's function
    with Image.open(out / "samples.png") as grid:
        assert grid.height > 4 * 128
    assert len(losses(out)) == 4
    assert len(losses(out, "validation_loss")) == 3
    config = read_json(out / "config.json")
    assert config["arguments"]["resolution"] == 32
    assert config["arguments"]["lora_alpha"] == 2.0
    assert config["seeds"] == {"seed": 0, "init_seed": 0}
    assert {"torch", "diffusers", "peft"} <= config["versions"].keys()
    report = read_json(out / "init_report.json")
    assert report["method"] == "cntlora"
    assert report["num_passes"] == 2
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nbase_model: ")
    assert "cntlora" in card
    kohya = load_file(out / "pytorch_lora_weights_kohya.safetensors")
    assert all(name.startswith("lora_unet_") for name in kohya)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("init", "more"),
    [
        *((init, {"train_text_encoder": True}) for init in METHODS),
        *((init, {"variable_rank": True}) for init in SCORED),
    ],
)
def test_every_method_trains_and_reloads_on_the_original_base(
    run: Run, random_sd: Path, init: str, more: dict[str, Any]
) -> None:
    trained: dict[str, Any] = {}
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0}

    def remember(args: Any, family: Any, prompts: Any) -> list[Image.Image]:
        trained["family"], pipeline = family, family.pipeline()
        trained["images"] = pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images
        return [Image.new("RGB", (32, 32))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "draw_samples", remember)
        out = run(init=init, lora_alpha=5, learning_rate=1e-2, **more)
    pipeline = StableDiffusionPipeline.from_pretrained(random_sd, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    before = pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images
    pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    reloaded = pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images
    torch.testing.assert_close(reloaded, trained["images"], rtol=0, atol=1e-4)
    assert (reloaded - before).abs().max() > 1e-4

    family = trained["family"]
    with adapters_disabled(family.adapted):
        disabled = family.pipeline()("a cat", generator=torch.Generator().manual_seed(0), **options).images
    assert torch.equal(disabled, before)
    for part, weight_name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        live = {name.replace(".base_layer", ""): tensor for name, tensor in getattr(family, part).state_dict().items()}
        for name, tensor in load_file(random_sd / part / f"{weight_name}.safetensors").items():
            assert torch.equal(tensor, live.get(name, live.get(name.removeprefix("text_model."))))
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lorainit_diffusers"])["init"]["name"] == init


def test_init_only_stops_after_the_initialisation(run: Run) -> None:
    out = run(init="eva", init_only=True)
    assert {path.name for path in out.iterdir()} == {
        *("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"),
        *("init_report.json", "config.json", "README.md", "lorainit_init.safetensors", "run.yaml"),
        ".lorainit",
    }
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "not trained" in card
    assert "samples.png" not in card
    assert not any(tensor.any() for name, tensor in weights(out).items() if "lora_B" in name)


def test_instance_mode(run: Run, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "subject")
    (folder / "metadata.jsonl").unlink()
    out = run(
        train_data_dir=None, instance_data_dir=folder, instance_prompt="a sks cat", validation_prompt=None, rank=1
    )
    assert "instance_prompt: a sks cat" in (out / "README.md").read_text(encoding="utf-8")
    assert losses(out, "validation_loss") == []


def test_same_seed_same_result(run: Run) -> None:
    first, second = weights(run("a")), weights(run("b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"init_seed": 1},
        {"init_num_batches": 1},
        {"init_batch_size": 1},
        {"init_option": "ridge=3.0"},
        {"lora_alpha": 4},
        {"lora_dropout": 0.5},
        {"use_rslora": True},
        {"resolution": 16},
        {"center_crop": True},
        {"random_flip": True},
        {"snr_gamma": 1.0},
        {"noise_offset": 0.5},
        {"caption_dropout": 1.0},
        {"learning_rate": 1e-2},
        {"lr_scheduler": "linear"},
        {"lr_warmup_steps": 2, "lr_scheduler": "constant_with_warmup"},
        {"optimizer": "sgd"},
        {"adam_beta1": 0.5},
        {"adam_weight_decay": 10.0},
        {"max_grad_norm": 1e-9},
        {"max_train_steps": 3},
        {"train_batch_size": 3},
        {"gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16"},
        {"aspect_ratio_buckets": "32,32;16,32"},
        {"max_train_samples": 2},
        {"repeats": 3},
        {"prediction_type": "v_prediction"},
        {"clip_skip": 1},
        {"scale_lr": True},
        {"use_ema": True, "max_train_steps": 3},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1.0},
        {"optimizer": "prodigy"},
        {"lr_scheduler": "polynomial", "lr_power": 2.0},
        {"num_train_epochs": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_flag_changes_the_result(run: Run, options: dict[str, Any], default_weights: dict[str, Tensor]) -> None:
    changed = weights(run(**options))
    assert changed.keys() == default_weights.keys()
    assert any(not torch.equal(changed[name], default_weights[name]) for name in changed)


@pytest.fixture(scope="module")
def default_run(random_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("default")
    write_images(folder / "train")
    options = {"pretrained_model_name_or_path": random_sd, "train_data_dir": folder / "train", **FAST}
    return run_main(train_sd_lora, {**options, "output_dir": folder / "out"})


@pytest.fixture
def default_weights(default_run: Path) -> dict[str, Tensor]:
    return weights(default_run)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("shared", "option"),
    [
        ({"use_ema": True, "max_train_steps": 4}, {"ema_decay": 0.1}),
        ({"lr_scheduler": "polynomial", "max_train_steps": 3}, {"lr_power": 3.0}),
        ({"lr_scheduler": "cosine_with_restarts", "max_train_steps": 4}, {"lr_num_cycles": 2}),
        ({"resolution": 16}, {"image_interpolation_mode": "nearest"}),
        ({"optimizer": "prodigy", "learning_rate": 1e2, "max_train_steps": 4}, {"prodigy_beta3": 0.1}),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, {"no-prodigy_decouple": True}),
        ({"optimizer": "prodigy", "learning_rate": 1.0}, {"no-prodigy_use_bias_correction": True}),
        ({"optimizer": "prodigy", "learning_rate": 1e2, "max_train_steps": 4}, {"no-prodigy_safeguard_warmup": True}),
        ({"train_text_encoder": True}, {"no-init_mask_padding": True}),
        ({"instance_data_dir": "", "class_prompt": "a cat"}, {"prior_loss_weight": 5.0}),
        ({"instance_data_dir": "", "class_prompt": "a cat"}, {"num_class_images": 2}),
        ({"instance_data_dir": "", "class_prompt": "a cat"}, {"class_prompt": "a dog"}),
    ],
    ids=lambda options: "-".join(options),
)
def test_option_of_an_option_changes_the_result(
    run: Run, image_dir: Path, shared: dict[str, Any], option: dict[str, Any]
) -> None:
    if "instance_data_dir" in shared:
        prior = {"instance_prompt": "a sks cat", "with_prior_preservation": True, "num_class_images": 1}
        shared = {**prior, **shared, "instance_data_dir": image_dir / "train", "train_data_dir": None}
    first, second = weights(run("a", **shared)), weights(run("b", **{**shared, **option}))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"dataloader_num_workers": 1},
        {"checkpointing_steps": 1},
        {"pre_compute_text_embeddings": True},
        {"offload": True},
    ],
)
def test_flag_that_changes_only_the_way_there(run: Run, options: dict[str, Any], default_run: Path) -> None:
    same, expected = changes(run(**options)), changes(default_run)
    for name, change in same.items():
        torch.testing.assert_close(change, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_text_encoder_gets_its_own_learning_rate(run: Run) -> None:
    frozen = weights(run("a", train_text_encoder=True, text_encoder_lr=0.0, init="kaiming", adam_weight_decay=0.0))
    trained = weights(run("b", train_text_encoder=True, init="kaiming"))
    assert any(name.startswith("text_encoder.") for name in frozen)
    assert not any(t.any() for name, t in frozen.items() if name.startswith("text_encoder.") and "lora_B" in name)
    assert any(t.any() for name, t in trained.items() if name.startswith("text_encoder.") and "lora_B" in name)


def test_mixed_precision_trains_float32_adapters_on_a_half_base(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: dict[str, set[torch.dtype]] = {}

    def look(args: Any, family: Any, prompts: Any) -> list[Image.Image]:
        parameters = list(family.unet.parameters())
        dtypes["trained"] = {parameter.dtype for parameter in parameters if parameter.requires_grad}
        dtypes["frozen"] = {parameter.dtype for parameter in parameters if not parameter.requires_grad}
        dtypes["vae"] = {parameter.dtype for parameter in family.vae.parameters()}
        return [Image.new("RGB", (32, 32))]

    monkeypatch.setattr(samples, "draw_samples", look)
    run(mixed_precision="bf16")
    assert dtypes == {"trained": {torch.float32}, "frozen": {torch.bfloat16}, "vae": {torch.float32}}


@pytest.mark.usefixtures("no_pictures")
def test_lora_layers_chooses_the_layers(run: Run) -> None:
    names = weights(run(lora_layers="to_q, attn2.to_v"))
    assert {name.split(".lora_")[0].split(".", 1)[1].rsplit("attn", 1)[1] for name in names} == {
        *("1.to_q", "2.to_q", "2.to_v"),
    }


@pytest.mark.usefixtures("no_pictures")
def test_variable_rank_keeps_the_budget_and_the_cap(run: Run) -> None:
    report = read_json(run(variable_rank=True, rank_budget=50, max_rank=3) / "init_report.json")
    ranks = [layer["rank"] for layer in report["layers"].values()]
    assert sum(ranks) == 50
    assert max(ranks) == 3
    assert len(set(ranks)) > 1


@pytest.mark.usefixtures("no_pictures")
def test_cache_latents_equals_encoding_every_time(run: Run) -> None:
    cached = run("a", cache_latents=True)
    assert read_json(cached / "config.json")["arguments"]["center_crop"] is True
    # the posterior samples are drawn from other seeds, so the losses agree in size only
    assert losses(cached) == pytest.approx(losses(run("b", center_crop=True)), rel=0.5)


def test_validation_prompts_and_images(run: Run) -> None:
    out = run(validation_prompt=["a cat", "a dog"], num_validation_images=3, max_train_steps=1)
    with Image.open(out / "samples" / "base.png") as row:
        assert row.size == (32 * 6, 32)
        first, second = row.crop((0, 0, 32, 32)), row.crop((32, 0, 64, 32))
        assert first.tobytes() != second.tobytes()


@pytest.mark.usefixtures("no_pictures")
def test_caption_column_and_image_column(run: Run, image_dir: Path) -> None:
    for split in ("train", "heldout"):
        metadata = image_dir / split / "metadata.jsonl"
        text = metadata.read_text(encoding="utf-8").replace('"text"', '"caption"').replace('"file_name"', '"image"')
        metadata.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no column 'file_name' \(it has caption, image\); set --image_column"):
        run()
    with pytest.raises(ValueError, match=r"has no column 'text'.*set --caption_column"):
        run(image_column="image")
    assert run(image_column="image", caption_column="caption", max_train_steps=1).is_dir()


@pytest.mark.usefixtures("no_pictures")
def test_report_to_tensorboard(run: Run) -> None:
    pytest.importorskip("tensorboard")
    out = run(report_to="tensorboard", logging_dir="events")
    assert list((out / "events").rglob("events.out.tfevents.*"))


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("init", ["cntlora", "gaussian"])
def test_resumed_run_equals_an_uninterrupted_one(run: Run, init: str) -> None:
    options: dict[str, Any] = {
        **{"init": init, "max_train_steps": 5, "checkpointing_steps": 2, "validation_steps": 2},
        **{"lr_scheduler": "cosine", "lora_dropout": 0.1, "random_flip": True, "caption_dropout": 0.2},
        **{"train_text_encoder": True, "gradient_accumulation_steps": 2},
    }
    out = run(**options)
    expected, expected_losses, rows = weights(out), losses(out), (out / "samples.png").read_bytes()
    for later in ("checkpoint-4", "samples/step-000005.png"):
        path = out / later
        path.unlink() if path.is_file() else path.rename(out / "gone")
    (out / "pytorch_lora_weights.safetensors").unlink()
    assert run(**options, resume_from_checkpoint="latest") == out
    resumed = weights(out)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert losses(out) == expected_losses
    assert (out / "samples.png").read_bytes() == rows


@pytest.mark.usefixtures("no_pictures")
def test_checkpoints_are_pruned_to_the_limit(run: Run) -> None:
    out = run(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.usefixtures("no_pictures")
def test_resuming_with_other_options_is_refused(run: Run) -> None:
    run(max_train_steps=1, checkpointing_steps=1)
    with pytest.raises(ValueError, match="--init is 'eva', but the checkpoint was written with 'cntlora'"):
        run(init="eva", resume_from_checkpoint="latest")


@pytest.mark.usefixtures("no_pictures")
def test_a_new_run_does_not_mix_with_the_checkpoints_of_an_old_one(run: Run) -> None:
    run(max_train_steps=1, checkpointing_steps=1)
    with pytest.raises(ValueError, match="holds checkpoint-1 of an earlier run"):
        run()


@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_is_replaced_only_when_that_is_asked_for(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    first = weights(run(max_train_steps=1, checkpointing_steps=1))
    with pytest.raises(ValueError, match=r"holds checkpoint-1 of an earlier run that has finished; .*--overwrite"):
        run(seed=1)
    out = run(seed=2, max_train_steps=1, overwrite_output_dir=True)
    assert "the earlier run is replaced" in capsys.readouterr().out
    assert not (out / "checkpoint-1").exists()
    assert any(not torch.equal(value, first[name]) for name, value in weights(out).items())


@pytest.mark.slow
def test_two_processes_share_one_initialisation(random_sd: Path, image_dir: Path, tmp_path: Path) -> None:
    script = str(ROOT / "train_scripts" / "train_sd_lora.py")
    options = {**FAST, "pretrained_model_name_or_path": random_sd, "train_data_dir": image_dir, "init_batch_size": 1}
    argv = argv_of(options)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, script, *argv, "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert read_json(tmp_path / "out" / "config.json")["num_processes"] == 2
    layers = read_json(tmp_path / "out" / "init_report.json")["layers"]
    tokens = 8 * 8 * 2 * 2  # of the outermost self-attention: two batches of one image in each of two processes
    assert max(layer["num_rows"] for layer in layers.values()) == tokens
    assert len(losses(tmp_path / "out")) == 2


# -------------------------------------------------------------------------------- options that act on something else


def test_every_option_is_in_a_test() -> None:
    files = [*Path(__file__).parent.glob("*.py"), *(Path(__file__).parents[1] / "training").rglob("*.py")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    for option in option_facts(StableDiffusionOptions):
        named = (*(f'"{prefix}{option}"' for prefix in ("", "no-", "--")), f"{option}=")
        assert any(name in source for name in named), f"--{option} has no test"


@pytest.mark.usefixtures("no_pictures")
def test_options_of_loading_reach_the_loader(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    load = StableDiffusionFamily.from_pretrained

    def spy(path: Any, **options: Any) -> Any:
        seen.update(options)
        return load(path, **{**options, "revision": None})

    monkeypatch.setattr(StableDiffusionFamily, "from_pretrained", spy)
    run(revision="abc", cache_dir=tmp_path / "cache", offload=True, max_train_steps=1)
    assert seen["revision"] == "abc"
    assert seen["cache_dir"] == str(tmp_path / "cache")
    assert seen["offload"] is True


@pytest.mark.usefixtures("no_pictures")
def test_variant_chooses_the_weight_files(run: Run, random_sd: Path, tmp_path: Path) -> None:
    base = shutil.copytree(random_sd, tmp_path / "base")
    for path in list(base.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    with pytest.raises(FileNotFoundError, match="cannot load the base model"):
        run(pretrained_model_name_or_path=base)
    assert run(pretrained_model_name_or_path=base, variant="fp16", max_train_steps=1).is_dir()


@pytest.mark.usefixtures("no_pictures")
def test_another_vae(run: Run, random_sd: Path, tmp_path: Path, default_weights: dict[str, Tensor]) -> None:
    vae = AutoencoderKL.from_pretrained(random_sd, subfolder="vae")
    vae.encoder.conv_in.weight.data.mul_(-3.0)
    vae.save_pretrained(tmp_path / "vae")
    changed = weights(run(pretrained_vae_model_name_or_path=tmp_path / "vae"))
    assert any(not torch.equal(changed[name], default_weights[name]) for name in changed)


@pytest.mark.usefixtures("no_pictures")
def test_budget_and_device_of_the_statistics(run: Run) -> None:
    report = read_json(
        run("a", init="eva", init_memory_budget_gb=2.5, init_statistics_device="cpu") / "init_report.json"
    )
    assert report["memory_budget_bytes"] == 2.5e9
    assert report["statistics_device"] == "cpu"
    with pytest.raises(ValueError, match=r"need more than the 1e-06 GB"):
        run("b", init="eva", init_memory_budget_gb=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_merged_unet(run: Run, random_sd: Path) -> None:
    out = run(export_merged=True, learning_rate=1e-2)
    merged, base = (
        UNet2DConditionModel.from_pretrained(path) for path in (out / "merged" / "unet", random_sd / "unet")
    )
    change = {name: merged.get_parameter(name) - weight for name, weight in base.named_parameters()}
    for layer, expected in changes(out).items():
        torch.testing.assert_close(change.pop(f"{layer.removeprefix('unet.')}.weight"), expected, rtol=0, atol=1e-5)
    assert not any(value.any() for value in change.values())


@pytest.mark.usefixtures("no_pictures")
def test_xformers_and_tf32_are_switched_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    known = {"xformers": object()}
    calls: list[str] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: known.get(name) or find_spec(name, *rest))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    given = ["--enable_xformers_memory_efficient_attention", "--allow_tf32", "--output_dir", str(tmp_path)]
    args = train_sd_lora.parse_args(given)
    monkeypatch.undo()

    class Family:
        resolution, resolution_multiple = 32, 4

        class denoiser:
            @staticmethod
            def enable_xformers_memory_efficient_attention() -> None:
                calls.append("xformers")

    AcceleratorState._reset_state(reset_partial_state=True)
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        accelerator = start_accelerator(args)
        assert torch.backends.cuda.matmul.allow_tf32
        settle_options(TrainingRun("test", args, args, Gaussian(), tmp_path, None, accelerator), Family())
        assert calls == ["xformers"]
        start_accelerator(replace(args, allow_tf32=False))
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("no_pictures")
def test_text_embeddings_are_computed_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {True: 0, False: 0}
    forward = CLIPTextModel.forward
    for cached in (True, False):

        def count(self: Any, *args: Any, cached: bool = cached, **options: Any) -> Any:
            calls[cached] += 1
            return forward(self, *args, **options)

        monkeypatch.setattr(CLIPTextModel, "forward", count)
        run(str(cached), pre_compute_text_embeddings=cached, max_train_steps=4)
    # training set, held-out set, the prompts of the samples, the empty caption; then the encoder is let go
    assert calls[True] <= 4 < calls[False]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("option", [{"cache_latents": True}, {}], ids=lambda option: "-".join(option))
def test_latents_are_encoded_once(run: Run, monkeypatch: pytest.MonkeyPatch, option: dict[str, Any]) -> None:
    calls: list[int] = []
    encode = StableDiffusionFamily.encode_images

    def count(self: Any, pixel_values: Tensor) -> Any:
        calls.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(StableDiffusionFamily, "encode_images", count)
    run(**option, max_train_steps=3)
    held_out, training, steps = 2, 4, (2 + 3) * 2
    assert sum(calls) == held_out + (training if option else steps)


@pytest.mark.usefixtures("no_pictures")
def test_gradient_checkpointing_is_switched_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    on: list[str] = []
    monkeypatch.setattr(UNet2DConditionModel, "enable_gradient_checkpointing", lambda self: on.append("unet"))
    monkeypatch.setattr(CLIPTextModel, "gradient_checkpointing_enable", lambda self, **_: on.append("text_encoder"))
    run(gradient_checkpointing=True, train_text_encoder=True, max_train_steps=1)
    assert on == ["unet", "text_encoder"]


@pytest.mark.usefixtures("no_pictures")
def test_gradient_checkpointing_reaches_the_text_encoder(run: Run) -> None:
    options: dict[str, Any] = {"train_text_encoder": True, "optimizer": "sgd", "learning_rate": 0.1, "init": "gaussian"}
    plain, checkpointed = changes(run("a", **options)), changes(run("b", **options, gradient_checkpointing=True))
    assert any(change.any() for name, change in checkpointed.items() if name.startswith("text_encoder."))
    for name, change in checkpointed.items():
        torch.testing.assert_close(change, plain[name], rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("no_pictures")
def test_learning_rate_is_scaled_by_the_batch(run: Run) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-4, "gradient_accumulation_steps": 2, "max_train_steps": 1}
    assert losses(run("a", **options), "lr") == [1e-4]
    assert losses(run("b", **options, scale_lr=True), "lr") == pytest.approx([4e-4])


@pytest.mark.usefixtures("no_pictures")
def test_epochs_count_images_and_repeats(run: Run) -> None:
    assert len(losses(run("a", num_train_epochs=2))) == 4
    assert len(losses(run("b", num_train_epochs=2, repeats=3))) == 12
    assert len(losses(run("c", num_train_epochs=2, max_train_samples=1))) == 2
    assert len(losses(run("d", num_train_epochs=2, gradient_accumulation_steps=2))) == 2


@pytest.mark.usefixtures("no_pictures")
def test_eight_bit_adam(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, groups: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(groups, **options)

    package = types.ModuleType("bitsandbytes")
    package.optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    package.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    run(use_8bit_adam=True, adam_beta1=0.8, max_train_steps=1)
    assert made == [{"betas": (0.8, 0.999), "weight_decay": 1e-2, "eps": 1e-8}]


def test_samples_are_drawn_as_the_options_say(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, dict[str, Any]]] = []

    def spy(self: Any, prompts: Any, seeds: Any, **options: Any) -> list[Image.Image]:
        calls.append((len(prompts), options))
        return [Image.new("RGB", (32, 32)) for _ in prompts]

    monkeypatch.setattr(StableDiffusionFamily, "sample", spy)
    run(
        validation_prompt=["a", "b", "c"],
        validation_inference_steps=7,
        validation_guidance_scale=2.5,
        sample_batch_size=2,
        max_train_steps=1,
    )
    assert [count for count, _ in calls] == [2, 1] * 3
    assert calls[0][1] == {"resolution": 32, "num_inference_steps": 7, "guidance_scale": 2.5}


@pytest.mark.usefixtures("no_pictures")
def test_use_dora_trains_magnitudes(run: Run, random_sd: Path) -> None:
    out = run(use_dora=True, init="eva", learning_rate=1e-2, max_train_steps=3)
    magnitudes = {name: t for name, t in weights(out).items() if name.endswith("lora_magnitude_vector")}
    assert len(magnitudes) == 32
    base = load_file(random_sd / "unet" / "diffusion_pytorch_model.safetensors")
    for name, magnitude in magnitudes.items():
        layer = name.removeprefix("unet.").removesuffix(".lora_magnitude_vector")
        start = base[f"{layer}.weight"].norm(dim=1)
        assert 0 < (magnitude - start).abs().max() < 0.1  # from the base's row norms, and trained
    kohya = load_file(out / "pytorch_lora_weights_kohya.safetensors")
    assert sum(name.endswith(".dora_scale") for name in kohya) == 32


def test_trackers_get_losses_and_pictures(run: Run) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = run(report_to="tensorboard", logging_dir="events")
    events = accumulator.EventAccumulator(str(next((out / "events").rglob("events.out.tfevents.*")).parent))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert {event.step for event in events.Images("samples")} == {0, 2}


@pytest.mark.usefixtures("no_pictures")
def test_report_to_wandb(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int | None, list[str]]] = []
    monkeypatch.setattr(run_module, "Accelerator", _with_tracker(logged))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: object() if name == "wandb" else found(name, *more)
    )
    run(report_to="wandb", max_train_steps=1)
    assert (1, ["loss", "lr", "grad_norm", "step_s"]) in logged
    assert (0, ["samples"]) in logged


def _with_tracker(logged: list[tuple[int | None, list[str]]]) -> Callable[..., Any]:
    """The accelerator with a tracker that is called wandb, in place of the service."""

    class Tracker(GeneralTracker):
        name = "wandb"
        requires_logging_directory = False
        tracker = None

        def __init__(self) -> None:
            super().__init__(_blank=True)

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert "hub_token" not in values

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            logged.append((step, list(values)))

        log_images = log

    def make(**options: Any) -> Any:
        assert options.pop("log_with") == "wandb"
        return accelerate.Accelerator(**options, log_with=Tracker())

    return make


# -------------------------------------------------------------------------------------------------------------- exports


@pytest.mark.usefixtures("no_pictures")
def test_export_rank_compresses_and_says_what_it_discards(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    whole = weights(run("a", learning_rate=1e-2))
    small = run("b", learning_rate=1e-2, export_rank=1)
    assert "--export_rank 1 discards " in capsys.readouterr().out
    energy = read_json(small / "config.json")["discarded_energy"]
    for name, lora_A in weights(small).items():
        if ".lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            assert lora_A.shape[0] == 1
            full = whole[other].double() @ whole[name].double()
            cut = weights(small)[other].double() @ lora_A.double()
            expected = 1 - (torch.linalg.svdvals(full)[0] / full.norm()).square()
            assert energy[name.removesuffix(".lora_A.weight")] == pytest.approx(float(expected), abs=1e-4)
            assert float(((full - cut).norm() / full.norm()).square()) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.usefixtures("no_pictures")
def test_pad_rank(run: Run) -> None:
    out = run(variable_rank=True, pad_rank=8)
    assert {t.shape[0] for name, t in weights(out).items() if "lora_A" in name} == {8}
    with pytest.raises(ValueError, match="--pad_rank 3 is smaller than the largest rank in the file, 4"):
        run("b", pad_rank=3)
    assert not (out.parent / "b" / "metrics.jsonl").exists() or losses(out.parent / "b") == []
    assert run("c", pad_rank=3, export_rank=2).is_dir()


@pytest.mark.usefixtures("no_pictures")
def test_push_to_hub(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(name: str, **options: Any) -> Any:
        calls.append(("create", {"name": name, **options}))
        return types.SimpleNamespace(repo_id=f"me/{name}")

    monkeypatch.setattr("huggingface_hub.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.upload_folder", lambda **options: calls.append(("upload", options)))
    out = run(push_to_hub=True, hub_token="secret", hub_model_id="my-lora", checkpointing_steps=1)
    assert [kind for kind, _ in calls] == ["create", "upload"]
    assert calls[0][1] == {"name": "my-lora", "exist_ok": True, "token": "secret"}
    assert calls[1][1]["repo_id"] == "me/my-lora"
    assert calls[1][1]["folder_path"] == str(out)
    options = {name: calls[1][1][name] for name in ("allow_patterns", "ignore_patterns")}
    names = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    assert sorted(filter_repo_objects([*names, ".env", "notes/README.md", "photo.png"], **options)) == [
        *("README.md", "best/best.json", "best/pytorch_lora_weights.safetensors"),
        *("config.json", "init_report.json", "metrics.jsonl"),
        *("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "report.html", "run.yaml"),
        "samples.png",
    ]
    for path in out.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path
    assert "my-lora" in (out / "README.md").read_text(encoding="utf-8")

    public = types.SimpleNamespace(private=False)
    for exists, private in ((types.SimpleNamespace(private=True), True), (None, True), (public, False)):

        def repo_info(name: str, info: Any = exists, **options: Any) -> Any:
            if info is None:
                raise OSError("offline")
            return info

        monkeypatch.setattr("huggingface_hub.repo_info", repo_info)
        calls.clear()
        if private:
            run(f"private-{exists is None}", push_to_hub=True, hub_private=True, init_only=True, init="eva")
            assert calls[0][1]["private"] is True
            assert [kind for kind, _ in calls] == ["create", "upload"]
        else:
            with pytest.raises(ValueError, match="--hub_private: the repository 'me/b' exists and is public"):
                run("b", push_to_hub=True, hub_private=True)
            assert not (out.parent / "b").exists()
    with pytest.raises(ValueError, match="--hub_private has no effect without --push_to_hub"):
        run("b", hub_private=True)
    calls.clear()
    run("b", push_to_hub=True, dry_run=True)
    assert calls == []

    def fail(**options: Any) -> None:
        raise OSError("the line is down")

    monkeypatch.setattr("huggingface_hub.upload_folder", fail)
    with pytest.raises(ValueError, match=r"cannot upload to 'me/c' .the line is down.; the result is in '.*c'"):
        run("c", push_to_hub=True, init_only=True, init="eva")
    with pytest.raises(ValueError, match="holds an earlier run that has finished"):
        run("c")

    def refuse(name: str, **options: Any) -> Any:
        raise LocalTokenNotFoundError("nobody is logged in")

    monkeypatch.setattr("huggingface_hub.create_repo", refuse)
    monkeypatch.setattr(StableDiffusionFamily, "from_pretrained", _must_not_load)
    with pytest.raises(ValueError, match=r"--push_to_hub cannot make the repository 'b' .*hf auth login"):
        run("b", push_to_hub=True)


# -------------------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize(
    "more",
    [{}, {"variable_rank": True}, {"gradient_checkpointing": True, "init": "eva", "use_dora": True}],
    ids=lambda more: "-".join(more),
)
def test_dry_run_says_what_the_run_would_do(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    run("dry", dry_run=True, **more)
    assert not (tmp_path / "dry").exists()
    lines = capsys.readouterr().out.splitlines()
    planned = {
        line.split()[0]: (int(line.split()[1]), int(line.split()[2].replace(",", "")))
        for line in lines
        if line.startswith("unet.")
    }
    out = run("real", **more)
    report = read_json(out / "init_report.json")["layers"]
    assert {name: rank for name, (rank, _) in planned.items()} == {n: layer["rank"] for n, layer in report.items()}
    trained = read_json(out / "config.json")["num_trainable_parameters"]
    assert sum(count for _, count in planned.values()) == trained
    assert f"{trained:,d} trained parameters, to be initialised by {more.get('init', 'cntlora')}" in lines
    sizes = {line[:34].strip(): float(line[34:].split()[0].replace(",", "")) for line in lines if line.endswith("MiB")}
    assert sizes["together"] == pytest.approx(sum(sizes.values()) - sizes["together"], abs=0.01)
    assert sizes["optimiser (adamw)"] == pytest.approx(8 * trained / 2**20, abs=0.001)
    assert ("frozen twin" in sizes) == ("init" not in more)
    assert sizes["activations (2 samples)"] > 0


def test_dry_run_counts_what_checkpointing_saves(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: list[float] = []
    for checkpointing in (False, True):
        run(dry_run=True, gradient_checkpointing=checkpointing, train_batch_size=64, resolution=64)
        line = next(line for line in capsys.readouterr().out.splitlines() if "activations (64 samples)" in line)
        sizes.append(float(line[34:].split()[0].replace(",", "")))
    assert sizes[1] < 0.8 * sizes[0]


# ----------------------------------------------------------------------------------------------------------- DreamBooth


@pytest.mark.parametrize("init", ["cntlora", "gaussian"])
def test_prior_preservation_draws_class_images_once(
    run: Run, image_dir: Path, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    drawn: list[int] = []
    sample = samples.sample

    def spy(args: Any, family: Any, prompts: Any, seeds: Any) -> list[Image.Image]:
        drawn.append(sum(prompt == "a cat" for prompt in prompts))
        return sample(args, family, prompts, seeds)

    monkeypatch.setattr(data_module, "sample", spy)
    options: dict[str, Any] = {
        **{"train_data_dir": None, "instance_data_dir": image_dir / "train", "instance_prompt": "a sks cat"},
        **{"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 3, "sample_batch_size": 2},
        **{"init": init, "validation_prompt": "x"},
    }
    out = run(**options)
    assert drawn[:2] == [2, 1]
    assert len(list((out / "class_images").glob("*.png"))) == 3
    assert "images of `a cat`" in (out / "README.md").read_text(encoding="utf-8")
    drawn.clear()
    again = run("again", **options, class_data_dir=out / "class_images")
    assert sum(drawn) == 0
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(out).items())
    with pytest.raises(ValueError, match="a dog"):
        run("other", **{**options, "class_prompt": "a dog"}, class_data_dir=out / "class_images")


@pytest.mark.usefixtures("no_pictures")
def test_class_images_are_the_measured_pre_training_data(run: Run, image_dir: Path) -> None:
    options: dict[str, Any] = {
        **{"train_data_dir": None, "instance_data_dir": image_dir / "train", "instance_prompt": "a sks cat"},
        **{"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 3, "init_only": True},
    }
    isotropic = run("a", **options, init_option="constraint=alignment")
    measured = run("b", **options, init_option=["constraint=alignment", "pretraining=measured"])
    assert read_json(isotropic / "init_report.json")["num_passes"] == 2
    assert read_json(measured / "init_report.json")["num_passes"] == 4
    # apart, the instance images alone are the fine-tuning data: half of the rows of a batch with both
    rows = [read_json(out / "init_report.json")["layers"].values() for out in (isotropic, measured)]
    assert [row["num_rows"] for row in rows[0]] == [2 * row["num_rows"] for row in rows[1]]
    assert any(not torch.equal(value, weights(measured)[name]) for name, value in weights(isotropic).items())


# ------------------------------------------------------------------------------------------------------------- datasets


@pytest.mark.usefixtures("no_pictures")
def test_dataset_by_name(run: Run, image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    for config in ("first", "second"):
        rows = {
            "picture": [str(path) for path in sorted((image_dir / "train").glob("*.png"))],
            "words": [f"picture {index}" for index in range(4)],
        }
        if config == "second":
            rows = {name: values[:2] for name, values in rows.items()}
        table = datasets.Dataset.from_dict(rows).cast_column("picture", datasets.Image())
        (folder / config).mkdir(parents=True)
        table.to_parquet(folder / config / "train-00000-of-00001.parquet")
    header = "---\nconfigs:\n" + "".join(
        f"- config_name: {c}\n  data_files: {c}/train-*\n" for c in ("first", "second")
    )
    (folder / "README.md").write_text(header + "---\n", encoding="utf-8")
    options: dict[str, Any] = {
        **{"train_data_dir": None, "dataset_name": folder, "image_column": "picture", "caption_column": "words"},
        **{"cache_dir": tmp_path / "cache"},
    }
    out = run("a", **options, dataset_config_name="first")
    assert read_json(out / "config.json")["num_images"] == 4
    from_folder = run("b", train_data_dir=image_dir / "train")
    assert all(torch.equal(value, weights(out)[name]) for name, value in weights(from_folder).items())
    second = run("c", **options, dataset_config_name="second")
    assert read_json(second / "config.json")["num_images"] == 2


# ------------------------------------------------------------------------------------------------------------ real kill


def test_killed_run_resumes_to_the_same_weights(random_sd: Path, image_dir: Path, tmp_path: Path) -> None:
    script = str(ROOT / "train_scripts" / "train_sd_lora.py")
    options = {
        **{**FAST, "max_train_steps": 40, "checkpointing_steps": 3, "checkpoints_total_limit": 1},
        **{"pretrained_model_name_or_path": random_sd, "train_data_dir": image_dir, "lr_scheduler": "cosine"},
        **{"validation_steps": 10, "lora_dropout": 0.1, "caption_dropout": 0.2, "noise_offset": 0.1},
    }
    argv = argv_of({**options, "use_ema": True, "train_text_encoder": True, "random_flip": True})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def command(out: Path) -> list[str]:
        return [sys.executable, script, *argv, "--output_dir", str(out), "--resume_from_checkpoint", "latest"]

    def lines(out: Path) -> int:
        path = out / "metrics.jsonl"
        return path.read_bytes().count(b'"loss"') if path.exists() else 0

    killed = tmp_path / "killed"
    for kill_after in (1, 14):  # before the first checkpoint, and between two
        process = subprocess.Popen(command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and lines(killed) < kill_after:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert 0 < lines(killed) < 40
    subprocess.run(command(killed), env=environment, check=True, capture_output=True)
    whole = tmp_path / "whole"
    subprocess.run(command(whole), env=environment, check=True, capture_output=True)
    expected, resumed = weights(whole), weights(killed)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    assert losses(killed) == losses(whole)
    assert (killed / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()
    assert [path.name for path in killed.glob("checkpoint-*")] == ["checkpoint-39"]


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "more",
    [
        {"use_ema": True},
        {"use_dora": True, "init": "eva"},
        {"optimizer": "prodigy", "learning_rate": 1.0, "init": "eva"},
        {"aspect_ratio_buckets": "32,32;16,32"},
        {"cache_latents": True, "pre_compute_text_embeddings": True},
        {"prior": True},
    ],
    ids=lambda more: "-".join(more),
)
def test_every_state_is_resumed(run: Run, image_dir: Path, more: dict[str, Any]) -> None:
    if more.pop("prior", False):
        more = {
            **{"train_data_dir": None, "instance_data_dir": image_dir / "train", "instance_prompt": "a sks cat"},
            **{"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 3},
        }
    options: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 3, **more}
    out = run(**options)
    expected = weights(out)
    shutil.rmtree(out / "checkpoint-4")
    (out / "pytorch_lora_weights.safetensors").unlink()
    run(**options, resume_from_checkpoint="latest")
    resumed = weights(out)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("no_pictures")
def test_latest_starts_anew_where_there_is_no_checkpoint(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    first = weights(run("a"))
    second = weights(run("b", resume_from_checkpoint="latest"))
    assert "so the run starts anew" in capsys.readouterr().out
    assert all(torch.equal(second[name], first[name]) for name in first)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "lora_xyz"}, "unknown init 'lora_xyz'; known: cntlora"),
        ({"init_option": "no_such=1"}, "'no_such=1': give key=value with a key of cntlora .known: constraint"),
        ({"init_option": "ridge=much"}, "'ridge=much': 'much' is not float"),
        ({"init_option": "gauge=round"}, "'gauge=round': 'round' is not whitened | balanced"),
        ({"init_num_batches": 0}, "--init_num_batches 0: must be at least 1"),
        ({"train_batch_size": 0}, "--train_batch_size 0: must be at least 1"),
        ({"train_data_dir": "/no/such/folder"}, "--train_data_dir '/no/such/folder' is not a directory"),
        ({"instance_data_dir": "/x", "instance_prompt": "y"}, "exclude each other"),
        ({"train_data_dir": None, "instance_data_dir": "/x"}, "give both or neither"),
        ({"instance_prompt": "a cat"}, "is for --instance_data_dir or --dataset_name"),
        ({"dataset_name": "/x"}, "--train_data_dir and --dataset_name exclude each other"),
        ({"dataset_config_name": "x"}, "--dataset_config_name needs --dataset_name"),
        ({"class_prompt": "a cat"}, "--class_prompt has no effect without --with_prior_preservation"),
        ({"class_data_dir": "/x"}, "--class_data_dir has no effect without --with_prior_preservation"),
        ({"with_prior_preservation": True}, "--with_prior_preservation needs --class_prompt"),
        ({"with_prior_preservation": True, "class_prompt": "a cat"}, "belongs to DreamBooth"),
        ({**DREAMBOOTH, "with_prior_preservation": True, "aspect_ratio_buckets": "auto"}, "leave out --aspect_ratio"),
        ({**DREAMBOOTH, "with_prior_preservation": True, "prior_loss_weight": -1}, "--prior_loss_weight -1"),
        ({"init_option": ["pretraining=measured", "constraint=alignment"]}, "add --with_prior_preservation"),
        ({"init_option": "pretraining=measured"}, "pretraining"),
        ({"use_dora": True}, "base=down_only"),
        ({"init": "pissa", "use_dora": True}, "use_dora"),
        ({"init_only": True, "export_rank": 1}, "which is zero before training with --init cntlora"),
        ({"ema_decay": 1.0}, "--ema_decay 1.0: must be at least 0 and below 1"),
        ({"pre_compute_text_embeddings": True, "train_text_encoder": True}, "leave out --train_text_encoder"),
        ({"use_8bit_adam": True, "optimizer": "sgd"}, "--use_8bit_adam is a form of adamw"),
        ({"optimizer": "prodigy", "train_text_encoder": True, "text_encoder_lr": 0.5}, "one step size for all"),
        ({"report_to": "wandb", "hub_token": "secret"}, "records the command line"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0: must be at least 1"),
        ({"export_rank": 0}, "--export_rank 0: must be at least 1"),
        ({"clip_skip": 0}, "--clip_skip 0: must be at least 1"),
        ({"rank_budget": 9}, "need --variable_rank"),
        ({"lora_layers": " , "}, "--lora_layers is empty"),
        ({"cache_latents": True, "random_flip": True}, "leave out --random_flip"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint checkpoint-7: no such checkpoint"),
        ({"pretrained_model_name_or_path": "/no/such/base"}, "base model '/no/such/base' is not a folder"),
        ({"enable_xformers_memory_efficient_attention": True}, "--enable_xformers_memory_efficient_attention needs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_option_is_found_before_the_base_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(StableDiffusionFamily, "from_pretrained", _must_not_load)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(**options)
    assert "\n" not in str(error.value)


def _must_not_load(*args: object, **options: object) -> None:
    raise AssertionError("the base was loaded before the input was checked")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is fine with CUDA")
def test_fp16_needs_cuda(run: Run) -> None:
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a CUDA device"):
        run(mixed_precision="fp16")


@pytest.mark.parametrize(
    ("options", "package", "extra"),
    [
        ({"report_to": "tensorboard"}, "tensorboard", "tracking"),
        ({"report_to": "wandb"}, "wandb", "wandb"),
        ({"optimizer": "prodigy"}, "prodigyopt", "prodigy"),
        ({"use_8bit_adam": True}, "bitsandbytes", "8bit"),
        ({"train_data_dir": None, "dataset_name": "a/b"}, "datasets", "datasets"),
        ({"enable_xformers_memory_efficient_attention": True}, "xformers", "xformers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_missing_packages_are_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], package: str, extra: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flag = list(options)[-1]
    message = rf"--{flag}.* needs the package {package}, .*pip install \"lorainit-diffusers\[{extra}\]\""
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_bad_data_is_found_before_the_base_is_loaded(
    run: Run, image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusionFamily, "from_pretrained", _must_not_load)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--train_data_dir '.*empty' has no images in it"):
        run(train_data_dir=tmp_path / "empty")
    train = image_dir / "train"
    metadata = (train / "metadata.jsonl").read_text(encoding="utf-8")
    (train / "metadata.jsonl").write_text("\n".join(metadata.splitlines()[:2]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"2 of 4 images have no caption: 02\.png, 03\.png"):
        run()
    (train / "metadata.jsonl").write_text(metadata + '{"file_name": "gone.png", "text": "x"}\n', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"names images that do not exist: gone\.png"):
        run()
    (train / "metadata.jsonl").write_text(metadata + "{oops\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.jsonl', line 5: not JSON .*; write one object a line"):
        run()
    (train / "metadata.jsonl").write_text(metadata, encoding="utf-8")
    data = (train / "01.png").read_bytes()
    for damaged in (data[: len(data) // 2], b"not an image", b""):
        (train / "01.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read the image '.*01\.png'"):
            run()


def test_output_directory_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output_dir '.*file/out' cannot be written"):
        run(output_dir=tmp_path / "file" / "out")


def test_rank_that_does_not_fit(run: Run) -> None:
    with pytest.raises(ValueError, match="`rank` 64"):
        run(rank=64)


def test_layers_that_match_nothing(run: Run) -> None:
    with pytest.raises(ValueError, match=r"'to_nothing'.* match no layer of UNet2DConditionModel"):
        run(lora_layers="to_nothing")


def test_resolution_that_does_not_fit(run: Run) -> None:
    with pytest.raises(ValueError, match="--resolution 30 is not a multiple of 4"):
        run(resolution=30)


def test_non_finite_activations_name_the_layer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = StableDiffusionFamily.from_pretrained

    def load_damaged(*args: Any, **options: Any) -> Any:
        family = load(*args, **options)
        family.unet.conv_in.weight.data[0] = float("inf")
        return family

    monkeypatch.setattr(StableDiffusionFamily, "from_pretrained", load_damaged)
    with pytest.raises(ValueError, match=r"unet\.down_blocks\.0\.attentions\.0.*to_q"):
        run()


def test_diverging_training_stops(run: Run) -> None:
    with pytest.raises(ValueError, match=r"the loss is .* lower --learning_rate"):
        run(learning_rate=1e30, max_train_steps=10, max_grad_norm=1e30, optimizer="sgd")


def test_command_line_shows_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train_scripts" / "train_sd_lora.py"), "--init", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: unknown init 'nope'; known: cntlora, ")
    assert "Traceback" not in done.stderr
