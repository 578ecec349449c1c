"""The script in process on a random base: what it writes, that no flag is ignored, resuming, and every bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import train_sd_lora
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sd_fixtures import ROOT, write_images
from torch import Tensor

from lorainit_diffusers import adapters_disabled
from lorainit_diffusers.methods import METHODS

Run = Callable[..., Path]
SCORED = ("cntlora", "eva", "lora_ga", "pissa")  # some of the methods that can allocate ranks
FAST = {
    "init": "cntlora",
    "rank": 2,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "init_num_batches": 2,
    "validation_inference_steps": 1,
    "validation_prompt": "a cat",
    "seed": 0,
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
        argv: list[str] = []
        for flag, value in options.items():
            if value is not None and value is not False:
                argv += (
                    [f"--{flag}"]
                    if value is True
                    else [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
                )
        AcceleratorState._reset_state(reset_partial_state=True)  # a script has a process of its own
        return train_sd_lora.main(argv)

    return call


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny run's time is its pictures; tests of weights do without."""
    monkeypatch.setattr(train_sd_lora, "plot_loss", lambda *args: None)
    monkeypatch.setattr(train_sd_lora, "draw_samples", lambda *args: [Image.new("RGB", (32, 32))])


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "pytorch_lora_weights.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def losses(directory: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line[key] for line in lines if key in line]


# ------------------------------------------------------------------------------------------------------------- outputs


def test_writes_everything(run: Run) -> None:
    out = run(validation_prompt=None, max_train_steps=4, validation_steps=2, checkpointing_steps=2)
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors", "init_report.json"),
        *("metrics.jsonl", "loss.png", "samples.png", "samples", "config.json", "README.md"),
        *("checkpoint-2", "checkpoint-4"),
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

    def remember(family: Any, prompts: Any, args: Any) -> list[Image.Image]:
        trained["family"], pipeline = family, family.pipeline()
        trained["images"] = pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images
        return [Image.new("RGB", (32, 32))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sd_lora, "draw_samples", remember)
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
        *("init_report.json", "config.json"),
    }
    assert not any(tensor.any() for name, tensor in weights(out).items() if "lora_B" in name)


def test_instance_mode(run: Run, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "subject")
    (folder / "metadata.jsonl").unlink()
    out = run(
        train_data_dir=None, instance_data_dir=folder, instance_prompt="a sks cat", validation_prompt=None, rank=1
    )
    assert 'instance_prompt: "a sks cat"' in (out / "README.md").read_text(encoding="utf-8")
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
    ],
    ids=lambda options: "-".join(options),
)
def test_flag_changes_the_result(run: Run, options: dict[str, Any], default_weights: dict[str, Tensor]) -> None:
    changed = weights(run(**options))
    assert changed.keys() == default_weights.keys()
    assert any(not torch.equal(changed[name], default_weights[name]) for name in changed)


@pytest.fixture(scope="module")
def default_weights(random_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("default")
    write_images(folder / "train")
    argv = ["--pretrained_model_name_or_path", str(random_sd), "--train_data_dir", str(folder / "train")]
    for flag, value in FAST.items():
        argv += [f"--{flag}", str(value)]
    return weights(train_sd_lora.main([*argv, "--output_dir", str(folder / "out")]))


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"dataloader_num_workers": 1}, {"checkpointing_steps": 1}]
)
def test_flag_that_changes_only_the_way_there(
    run: Run, options: dict[str, Any], default_weights: dict[str, Tensor]
) -> None:
    same = weights(run(**options))
    for name, tensor in same.items():
        torch.testing.assert_close(tensor, default_weights[name], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_text_encoder_gets_its_own_learning_rate(run: Run) -> None:
    frozen = weights(run("a", train_text_encoder=True, text_encoder_lr=0.0, init="kaiming", adam_weight_decay=0.0))
    trained = weights(run("b", train_text_encoder=True, init="kaiming"))
    assert any(name.startswith("text_encoder.") for name in frozen)
    assert not any(t.any() for name, t in frozen.items() if name.startswith("text_encoder.") and "lora_B" in name)
    assert any(t.any() for name, t in trained.items() if name.startswith("text_encoder.") and "lora_B" in name)


def test_mixed_precision_trains_float32_adapters_on_a_half_base(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: dict[str, set[torch.dtype]] = {}

    def look(family: Any, prompts: Any, args: Any) -> list[Image.Image]:
        parameters = list(family.unet.parameters())
        dtypes["trained"] = {parameter.dtype for parameter in parameters if parameter.requires_grad}
        dtypes["frozen"] = {parameter.dtype for parameter in parameters if not parameter.requires_grad}
        dtypes["vae"] = {parameter.dtype for parameter in family.vae.parameters()}
        return [Image.new("RGB", (32, 32))]

    monkeypatch.setattr(train_sd_lora, "draw_samples", look)
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


@pytest.mark.slow
def test_two_processes_share_one_initialisation(random_sd: Path, image_dir: Path, tmp_path: Path) -> None:
    script = str(ROOT / "train_scripts" / "train_sd_lora.py")
    options = {**FAST, "pretrained_model_name_or_path": random_sd, "train_data_dir": image_dir, "init_batch_size": 1}
    argv = [text for flag, value in options.items() for text in (f"--{flag}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, script, *argv, "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert read_json(tmp_path / "out" / "config.json")["num_processes"] == 2
    layers = read_json(tmp_path / "out" / "init_report.json")["layers"]
    tokens = 8 * 8 * 2 * 2  # of the outermost self-attention: two batches of one image in each of two processes
    assert max(layer["num_rows"] for layer in layers.values()) == tokens
    assert len(losses(tmp_path / "out")) == 2


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
        ({"rank_budget": 9}, "need --variable_rank"),
        ({"lora_layers": " , "}, "--lora_layers is empty"),
        ({"cache_latents": True, "random_flip": True}, "leave out --random_flip"),
        ({"resume_from_checkpoint": "latest"}, "--resume_from_checkpoint latest: there is no checkpoint"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "--resume_from_checkpoint checkpoint-7: no such checkpoint"),
        ({"pretrained_model_name_or_path": "/no/such/base"}, "base model '/no/such/base' is not a folder"),
        ({"enable_xformers_memory_efficient_attention": True}, "--enable_xformers_memory_efficient_attention needs"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_option_is_found_before_the_base_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(train_sd_lora.StableDiffusionFamily, "from_pretrained", _must_not_load)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        run(**options)
    assert "\n" not in str(error.value)


def _must_not_load(*args: object, **options: object) -> None:
    raise AssertionError("the base was loaded before the input was checked")


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is fine with CUDA")
def test_fp16_needs_cuda(run: Run) -> None:
    with pytest.raises(ValueError, match="--mixed_precision fp16 needs a CUDA device"):
        run(mixed_precision="fp16")


def test_missing_packages_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to tensorboard needs the package tensorboard"):
        run(report_to="tensorboard")
    with pytest.raises(ValueError, match="--optimizer prodigy needs the package prodigyopt"):
        run(optimizer="prodigy")


def test_bad_data_is_found_before_the_base_is_loaded(
    run: Run, image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_sd_lora.StableDiffusionFamily, "from_pretrained", _must_not_load)
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
    with pytest.raises(ValueError, match=r"metadata\.jsonl', line 5: not a JSON object"):
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
    with pytest.raises(ValueError, match="rank 64"):
        run(rank=64)


def test_layers_that_match_nothing(run: Run) -> None:
    with pytest.raises(ValueError, match=r"'to_nothing'.* match no layer of UNet2DConditionModel"):
        run(lora_layers="to_nothing")


def test_resolution_that_does_not_fit(run: Run) -> None:
    with pytest.raises(ValueError, match="--resolution 30 is not a multiple of 4"):
        run(resolution=30)


def test_non_finite_activations_name_the_layer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    load = train_sd_lora.StableDiffusionFamily.from_pretrained

    def load_damaged(*args: Any, **options: Any) -> Any:
        family = load(*args, **options)
        family.unet.conv_in.weight.data[0] = float("inf")
        return family

    monkeypatch.setattr(train_sd_lora.StableDiffusionFamily, "from_pretrained", load_damaged)
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
