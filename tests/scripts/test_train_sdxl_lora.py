"""The SDXL script in process on a random base: what differs from Stable Diffusion's, and that its files are right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_sdxl_lora
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from script_fixtures import FAST, changes, read_json, run_main, weights
from sd_fixtures import write_images
from torch import Tensor

from lorainit_diffusers.training import samples

Run = Callable[..., Path]


@pytest.fixture
def run(random_sdxl: Path, image_dir: Path, tmp_path: Path) -> Run:
    """Run the script with tiny settings; options as `argv_of` takes them."""

    def call(name: str = "out", **options: Any) -> Path:
        base = {
            "pretrained_model_name_or_path": random_sdxl,
            "train_data_dir": image_dir,
            "output_dir": tmp_path / name,
        }
        return run_main(train_sdxl_lora, {**base, **FAST, **options})

    return call


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny run's time is its pictures; tests of weights do without."""
    monkeypatch.setattr(samples, "draw_samples", lambda *args: [Image.new("RGB", (32, 32))])


def test_writes_everything(run: Run) -> None:
    out = run(validation_prompt=None, max_train_steps=2, train_text_encoder=True)
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "init_report.json"),
        *("metrics.jsonl", "run.yaml", "loss.png", "samples.png", "samples", "config.json", "README.md"),
        *(".lorainit", "best", "report.html"),
    }
    with Image.open(out / "samples" / "base.png") as base, Image.open(out / "samples" / "step-000000.png") as start:
        assert base.tobytes() == start.tobytes()  # the offset keeps the base's function
    assert "StableDiffusionXLPipeline.from_pretrained" in (out / "README.md").read_text(encoding="utf-8")
    components = {name.split(".")[0] for name in weights(out)}
    assert components == {"unet", "text_encoder", "text_encoder_2"}
    kohya = load_file(out / "pytorch_lora_weights_kohya.safetensors")
    prefixes = {name.split("_text_model")[0] if "_te" in name[:8] else name[:9] for name in kohya}
    assert prefixes == {"lora_unet", "lora_te1", "lora_te2"}


@pytest.mark.parametrize(
    ("init", "more"),
    [
        *((init, {}) for init in ("cntlora", "lora_ga", "gradient_step", "gaussian")),
        ("cntlora", {"train_text_encoder": True, "variable_rank": True}),
        ("eva", {"train_text_encoder": True, "use_dora": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_reloads_on_the_original_base(run: Run, random_sdxl: Path, init: str, more: dict[str, Any]) -> None:
    trained: dict[str, Any] = {}
    options = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0}

    def draw(pipeline: Any) -> torch.Tensor:
        return pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images

    def remember(args: Any, family: Any, prompts: Any) -> list[Image.Image]:
        trained["images"] = draw(family.pipeline())
        return [Image.new("RGB", (32, 32))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "draw_samples", remember)
        out = run(init=init, lora_alpha=5, learning_rate=1e-2, **more)
    pipeline = StableDiffusionXLPipeline.from_pretrained(random_sdxl)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)  # as samples are drawn
    pipeline.set_progress_bar_config(disable=True)
    before = draw(pipeline)
    pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    reloaded = draw(pipeline)
    torch.testing.assert_close(reloaded, trained["images"], rtol=0, atol=1e-4)
    assert (reloaded - before).abs().max() > 1e-4


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "options",
    [
        {"text_encoder_lr": 1e-5},
        {"no-init_mask_padding": True},
        {"clip_skip": 1},
        {"caption_dropout": 1.0},
        {"prediction_type": "v_prediction"},
        {"aspect_ratio_buckets": "32,32;16,32"},
        {"center_crop": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_flag_changes_the_result(run: Run, options: dict[str, Any], default_weights: dict[str, Tensor]) -> None:
    changed = weights(run(train_text_encoder=True, **options))
    assert changed.keys() <= default_weights.keys()
    assert any(not torch.equal(changed[name], default_weights[name]) for name in changed)


@pytest.fixture(scope="module")
def default_weights(random_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("default")
    write_images(folder / "train")
    options = {"pretrained_model_name_or_path": random_sdxl, "train_data_dir": folder / "train", **FAST}
    return weights(run_main(train_sdxl_lora, {**options, "output_dir": folder / "out", "train_text_encoder": True}))


@pytest.mark.usefixtures("no_pictures")
def test_cached_embeddings_and_latents_give_the_same_kind_of_run(run: Run) -> None:
    plain_sgd = {"optimizer": "sgd", "learning_rate": 0.1}  # Adam would blow rounding up where gradients are near zero
    plain = changes(run("a", **plain_sgd))
    cached = changes(run("b", **plain_sgd, pre_compute_text_embeddings=True, offload=True))
    for name, tensor in cached.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-6)
    assert run("c", pre_compute_text_embeddings=True, cache_latents=True).is_dir()


@pytest.mark.usefixtures("no_pictures")
def test_resumed_run_equals_an_uninterrupted_one(run: Run) -> None:
    options: dict[str, Any] = {
        **{"max_train_steps": 4, "checkpointing_steps": 2, "train_text_encoder": True, "use_ema": True},
        **{"lora_dropout": 0.1, "caption_dropout": 0.3},
    }
    out = run(**options)
    expected = weights(out)
    shutil.rmtree(out / "checkpoint-4")
    run(**options, resume_from_checkpoint="latest")
    assert all(torch.equal(value, weights(out)[name]) for name, value in expected.items())


@pytest.mark.usefixtures("no_pictures")
def test_prior_preservation_and_measured_activations(run: Run, image_dir: Path) -> None:
    out = run(
        **{"train_data_dir": None, "instance_data_dir": image_dir / "train", "instance_prompt": "a sks cat"},
        **{"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 3},
        init_option=["constraint=alignment", "pretraining=measured"],
    )
    assert len(list((out / "class_images").glob("*.png"))) == 3
    assert read_json(out / "init_report.json")["num_passes"] == 4


@pytest.mark.usefixtures("no_pictures")
def test_another_vae_stays_in_float32(
    run: Run, random_sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: set[torch.dtype] = set()

    def look(args: Any, family: Any, prompts: Any) -> list[Image.Image]:
        dtypes.update(parameter.dtype for parameter in family.vae.parameters())
        return [Image.new("RGB", (32, 32))]

    monkeypatch.setattr(samples, "draw_samples", look)
    AutoencoderKL.from_pretrained(random_sdxl, subfolder="vae").half().save_pretrained(tmp_path / "vae")
    run(mixed_precision="bf16", pretrained_vae_model_name_or_path=tmp_path / "vae", max_train_steps=1)
    assert dtypes == {torch.float32}


def test_dry_run(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(dry_run=True, train_text_encoder=True)
    text = capsys.readouterr().out
    assert "text_encoder_2.text_model" in text or "text_encoder_2.encoder" in text
    assert "trained parameters" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        ({"train_data_dir": None}, "there is no data: give --train_data_dir"),
    ],
)
def test_what_has_no_default_is_asked_for(run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_base_of_the_other_family_names_its_script(run: Run, random_sd: Path) -> None:
    with pytest.raises(ValueError, match=r"use `family_class\(.sd.\)` for it"):
        run(pretrained_model_name_or_path=random_sd)
