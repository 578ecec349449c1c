"""The script for diffusion transformers in process on random bases: what differs, and that its files are right."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_dit_lora
import train_sd_lora
from diffusers import DiffusionPipeline
from dit_fixtures import write_random_flux, write_random_sd3
from flow_fixtures import TOKENS
from flow_fixtures import write_base as write_flow_base
from PIL import Image
from pixart_fixtures import write_random_dit, write_random_pixart
from script_fixtures import FAST, read_json, run_main, weights
from sd_fixtures import write_images
from torch import Tensor

from lorainit_diffusers import load_lora
from lorainit_diffusers.families import family_class
from lorainit_diffusers.training import samples
from lorainit_diffusers.training.options.fields import option_facts
from lorainit_diffusers.training.options.text_to_image import StableDiffusionOptions, TransformerOptions

Run = Callable[..., Path]
WRITERS: dict[str, Callable[[Path], None]] = {
    "sd3": write_random_sd3,
    "flux": write_random_flux,
    "pixart": write_random_pixart,
    "dit": write_random_dit,
}
SHORT = {"max_sequence_length": 16}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random base of each family."""
    folder = tmp_path_factory.mktemp("bases")
    for name, write in WRITERS.items():
        torch.manual_seed(0)
        write(folder / name)
    return {name: folder / name for name in WRITERS}


@pytest.fixture
def run(bases: dict[str, Path], image_dir: Path, tmp_path: Path) -> Run:
    """Run the script on a random base with tiny settings; options as `argv_of` takes them."""

    def call(family: str = "sd3", name: str = "out", **options: Any) -> Path:
        base = {
            "family": family,
            "pretrained_model_name_or_path": bases[family],
            "train_data_dir": image_dir,
            "output_dir": tmp_path / name,
            "resolution": 32,
            **({} if family == "dit" else SHORT),
        }
        return run_main(train_dit_lora, {**base, **FAST, **options})

    return call


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny run's time is its pictures; tests of weights do without."""
    monkeypatch.setattr(samples, "draw_samples", lambda *args: [Image.new("RGB", (32, 32))])


def test_writes_everything(run: Run) -> None:
    out = run(max_train_steps=2, train_text_encoder=True)
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("pytorch_lora_weights.safetensors", "init_report.json"),
        *("metrics.jsonl", "run.yaml", "loss.png", "samples.png", "samples", "config.json", "README.md"),
        *(".lorainit", "best", "report.html"),
    }
    with Image.open(out / "samples" / "base.png") as base, Image.open(out / "samples" / "step-000000.png") as start:
        difference = np.asarray(base).astype(int) - np.asarray(start)
    assert np.abs(difference).max() <= 1  # the offset keeps the base's function
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "StableDiffusion3Pipeline.from_pretrained" in card
    assert "kohya" not in card
    assert {name.split(".")[0] for name in weights(out)} == {"transformer", "text_encoder", "text_encoder_2"}


RELOADED: list[tuple[str, dict[str, Any]]] = [
    ("sd3", {"init": "cntlora", "variable_rank": True, "train_text_encoder": True}),
    ("sd3", {"init": "lora_ga", "weighting_scheme": "mode"}),
    ("sd3", {"init": "eva", "use_dora": True}),
    ("flux", {"init": "cntlora", "variable_rank": True, "train_text_encoder": True}),
    ("flux", {"init": "gradient_step", "lora_layers": "attn.to_q,proj_mlp,proj_out,ff.net.2"}),
    ("flux", {"init": "gaussian", "pre_compute_text_embeddings": True, "cache_latents": True}),
]


@pytest.mark.parametrize(("family", "options"), RELOADED, ids=lambda value: value if isinstance(value, str) else None)
def test_reloads_on_the_original_base(
    run: Run, bases: dict[str, Path], family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, Any] = {}
    drawing: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 2.0, **SHORT}

    def draw(pipeline: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("a cat", generator=generator, height=32, width=32, **drawing).images

    def remember(args: Any, live: Any, prompts: Any) -> list[Image.Image]:
        if live.text_encoders:
            trained["images"] = draw(live.pipeline())
        else:
            embeds, _ = live._embed_prompts(prompts)
            generator = torch.Generator().manual_seed(0)
            trained["images"] = live.pipeline()(**embeds, generator=generator, height=32, width=32, **drawing).images
        return [Image.new("RGB", (32, 32))]

    monkeypatch.setattr(samples, "draw_samples", remember)
    out = run(family, lora_alpha=5, learning_rate=1e-2, **options)
    if options.get("variable_rank"):
        assert len({w.shape[0] for name, w in weights(out).items() if name.endswith("lora_A.weight")}) > 1
    pipeline = DiffusionPipeline.from_pretrained(bases[family])
    pipeline.set_progress_bar_config(disable=True)
    before = draw(pipeline)
    pipeline.load_lora_weights(out, weight_name="pytorch_lora_weights.safetensors")
    reloaded = draw(pipeline)
    torch.testing.assert_close(reloaded, trained["images"], rtol=0, atol=1e-4)
    assert (reloaded - before).abs().max() > 1e-4


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("family", ["pixart", "dit"])
def test_families_without_a_loader_write_a_peft_adapter(
    run: Run, bases: dict[str, Path], image_dir: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    live: list[Any] = []
    monkeypatch.setattr(samples, "draw_samples", lambda options, family, prompts: live.append(family) or [_blank()])
    out = run(
        family,
        **{"variable_rank": True, "export_merged": True, "validation_prompt": "1"},
        **{"train_data_dir": None, "instance_data_dir": image_dir / "train", "instance_prompt": "1"},
    )
    assert {"adapter_config.json", "adapter_model.safetensors", "merged"} <= {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "load_lora(pipeline.transformer" in card
    transformer = live[0].transformer
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    uniform = torch.full((1,), 0.4, dtype=torch.float64)
    noisy = live[0]._add_noise(latents, latents, uniform)
    embeds = {name: values[:1] for name, values in live[0].embed_captions(["1"]).items()}

    def output(model: Any) -> Tensor:
        live[0].transformer = model
        with torch.no_grad():
            return live[0]._predict(noisy.latents, noisy.timesteps, embeds, {})

    transformer.eval()
    expected = output(transformer)
    base = type(transformer).from_pretrained(bases[family], subfolder="transformer")
    assert (output(base) - expected).abs().max() > 1e-4
    load_lora(base, out)
    torch.testing.assert_close(output(base), expected, rtol=0, atol=1e-4)
    merged = type(transformer).from_pretrained(out / "merged" / "transformer")
    torch.testing.assert_close(output(merged), expected, rtol=0, atol=1e-4)


def _blank() -> Image.Image:
    return Image.new("RGB", (32, 32))


@pytest.fixture(scope="module")
def default_weights(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("default")
    write_images(folder / "train")
    options = {"pretrained_model_name_or_path": bases["sd3"], "train_data_dir": folder / "train", "resolution": 32}
    return weights(run_main(train_dit_lora, {**options, **FAST, **SHORT, "output_dir": folder / "out"}))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "options",
    [
        {"weighting_scheme": "none"},
        {"weighting_scheme": "mode", "mode_scale": 0.5},
        {"logit_mean": 1.0},
        {"logit_std": 0.3},
        {"max_sequence_length": 4},
        {"caption_dropout": 1.0},
        {"clip_skip": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_flag_changes_the_result(run: Run, options: dict[str, Any], default_weights: dict[str, Tensor]) -> None:
    changed = weights(run(**options))
    assert any(not torch.equal(changed[name], default_weights[name]) for name in changed)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_resumed_run_equals_an_uninterrupted_one(run: Run, family: str) -> None:
    options: dict[str, Any] = {
        **{"max_train_steps": 4, "checkpointing_steps": 2, "lora_dropout": 0.1, "caption_dropout": 0.3},
        **{"pre_compute_text_embeddings": True, "gradient_checkpointing": True},
    }
    out = run(family, **options)
    expected = weights(out)
    shutil.rmtree(out / "checkpoint-4")
    run(family, **options, resume_from_checkpoint="latest")
    assert all(torch.equal(value, weights(out)[name]) for name, value in expected.items())


@pytest.mark.usefixtures("no_pictures")
def test_text_encoders_leave_memory(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    monkeypatch.setattr(
        samples,
        "draw_samples",
        lambda options, family, prompts: held.append(bool(family.text_encoders)) or [_blank()],
    )
    run("flux", pre_compute_text_embeddings=True)
    run("flux", name="kept")
    assert held == [False, False, False, True, True, True]


@pytest.mark.usefixtures("no_pictures")
def test_memory_budget_is_reported(run: Run) -> None:
    out = run("flux", init_memory_budget_gb=0.0008, init="eva")
    layers = read_json(out / "init_report.json")["layers"]
    sketched = {layer["sketch_columns"] is not None for layer in layers.values()}
    assert sketched == {True, False}


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart", "dit"])
def test_wrong_family_is_named_with_the_right_one(run: Run, bases: dict[str, Path], family: str) -> None:
    other = "flux" if family == "sd3" else "sd3"
    with pytest.raises(ValueError, match=rf"use `family_class\('{other}'\)` for it"):
        run(family, pretrained_model_name_or_path=bases[other], max_sequence_length=None)
    with pytest.raises(ValueError, match=rf"use `family_class\('{family}'\)` for it"):
        run_main(train_sd_lora, {"pretrained_model_name_or_path": bases[family], **FAST})


def test_base_of_a_unet_names_its_script(run: Run, random_sd: Path) -> None:
    with pytest.raises(ValueError, match=r"use `family_class\(.sd.\)` for it"):
        run(pretrained_model_name_or_path=random_sd)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd3", {"snr_gamma": 5.0}, "--snr_gamma 5.0 has no effect on Stable Diffusion 3"),
        ("sd3", {"guidance_scale": 1.0}, "--guidance_scale 1.0 has no effect on Stable Diffusion 3"),
        ("flux", {"clip_skip": 1}, "--clip_skip 1 has no effect on Flux"),
        ("dit", {"logit_std": 2.0}, "--logit_std 2.0 has no effect"),
        ("dit", {"train_text_encoder": True}, "--train_text_encoder"),
        ("pixart", {"train_text_encoder": True}, "--train_text_encoder"),
        ("sd3", {"logit_std": 0.0}, "--logit_std 0.0: must be positive"),
        ("sd3", {"resolution": 36}, "--resolution 36 is not a multiple of 8"),
        ("sd3", {"init_memory_budget_gb": -1.0}, "--init_memory_budget_gb -1.0"),
        ("flux", {"pretrained_model_name_or_path": None}, "--pretrained_model_name_or_path is missing"),
        ("dit", {}, "'picture 0' is no class of this base"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input(run: Run, family: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(family, **options)


def test_every_option_of_its_own_is_in_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    own = option_facts(TransformerOptions).keys() - option_facts(StableDiffusionOptions).keys()
    assert {name for name in own if f'"{name}"' not in source and f"{name}=" not in source} == set()


def test_quantization_needs_package_and_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    known: dict[str, Any] = {"bitsandbytes": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: known.get(name, find_spec(name, *rest)))
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes.*lorainit-diffusers\[8bit\]"):
        run(quantization="nf4")
    known["bitsandbytes"] = object()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--quantization nf4 needs a CUDA device"):
        run(quantization="nf4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--export_merged adds to weights in full"):
        run(quantization="nf4", export_merged=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("no_pictures")
def test_quantized_base(run: Run) -> None:
    pytest.importorskip("bitsandbytes")
    out = run("flux", quantization="nf4", init="cntlora", mixed_precision="bf16")
    assert any(name.startswith("transformer.") for name in weights(out))


@pytest.mark.usefixtures("no_pictures")
def test_embeddings_that_a_run_has_kept_are_those_of_the_next(run: Run, tmp_path: Path) -> None:
    kept: dict[str, Any] = {"pre_compute_text_embeddings": True, "embeddings_cache_dir": tmp_path / "kept"}
    plain = weights(run("flux", "plain", pre_compute_text_embeddings=True))
    for name in ("first", "second"):
        found = weights(run("flux", name, **kept))
        assert found.keys() == plain.keys()
        for key, values in plain.items():
            torch.testing.assert_close(found[key], values)
    with pytest.raises(ValueError, match="keeps what --pre_compute_text_embeddings makes: give both or none"):
        run("flux", "third", embeddings_cache_dir=tmp_path / "kept")


@pytest.mark.parametrize("kind", ["flux2-klein", "qwen_image", "z_image", "sana", "wan"])
@pytest.mark.usefixtures("no_pictures")
def test_the_newer_families_train_without_being_named(kind: str, image_dir: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **{"pretrained_model_name_or_path": write_flow_base(tmp_path / "base", kind), "train_data_dir": image_dir},
        **{"output_dir": tmp_path / "out", "resolution": 32, "max_sequence_length": TOKENS[kind], "init": "eva"},
        **{"pre_compute_text_embeddings": True, "cache_latents": True},
    }
    out = run_main(train_dit_lora, {**options, **FAST})
    assert {name.split(".")[0] for name in weights(out)} == {"transformer"}
    pipeline = family_class(kind.partition("-")[0]).PIPELINES[-1].__name__
    assert pipeline.removesuffix("KleinPipeline") in (out / "README.md").read_text(encoding="utf-8")
