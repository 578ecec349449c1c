"""`--init_from`: the run that starts from an init file is the run that collects, or says what differs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import train_classifier_lora
import train_sd_lora
from classifier_fixtures import write_class_folder, write_classifier
from safetensors.torch import load_file, save_file
from script_fixtures import FAST, argv_of, losses, read_json, run_main
from sd_fixtures import write_images

from lorainit_diffusers import initialize
from lorainit_diffusers.families.sd import StableDiffusionFamily
from lorainit_diffusers.init_file import INIT_FILE_NAME, init_of, load_init_file, save_init_file

FILE = INIT_FILE_NAME


@pytest.fixture(scope="module")
def sd(random_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("data")
    write_images(data / "train")
    return {"pretrained_model_name_or_path": random_sd, "train_data_dir": data, "max_train_steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("classes")
    return {
        "pretrained_model_name_or_path": write_classifier(work / "vit"),
        "train_data_dir": write_class_folder(work / "colours"),
        "max_train_steps": 4,
    }


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = [*directory.glob("pytorch_lora_weights.safetensors"), *directory.glob("adapter_model.safetensors")]
    assert len(files) == 1
    return load_file(files[0])


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    before, after = (read_json(directory / "init_report.json") for directory in (one, other))
    assert before["layers"] == after["layers"]


SD_RUNS: list[dict[str, Any]] = [
    {"init": "cntlora", "lora_dropout": 0.2},
    {"init": "eva", "variable_rank": True, "rank_budget": 40, "train_text_encoder": True},
    {"init": "lora_ga", "train_text_encoder": True, "use_rslora": True, "lora_alpha": 3},
    {"init": "cntlora", "init_option": ["base=down_only"], "lora_layers": "to_q,to_v", "use_dora": True},
]
# How they are trained, which no init file decides.
TRAINING = ("lora_dropout",)


@pytest.mark.parametrize("init", SD_RUNS, ids=str)
def test_text_to_image(init: dict[str, Any], sd: dict[str, Any], tmp_path: Path) -> None:
    usual = {name: value for name, value in FAST.items() if name not in ("init", "rank", "init_num_batches")}
    own = {"rank": 3, "init_num_batches": 3, **init}
    only = {name: value for name, value in init.items() if name in TRAINING}
    collects = run_main(train_sd_lora, {**usual, **sd, **own, "output_dir": tmp_path / "a"})
    file = run_main(train_sd_lora, {**usual, **sd, **own, "output_dir": tmp_path / "b", "init_only": True}) / FILE
    shutil.move(file, tmp_path / "start.safetensors")
    start = {"init_from": tmp_path / "start.safetensors", **only}
    reads = run_main(train_sd_lora, {**usual, **sd, **start, "output_dir": tmp_path / "c"})
    assert_same_run(collects, reads)
    config = read_json(reads / "config.json")
    assert config["method"] == read_json(collects / "config.json")["method"]
    assert config["arguments"]["rank"] == 3
    assert read_json(reads / "init_report.json")["forward_s"] == 0


@pytest.mark.parametrize("init", [{"init": "cntlora"}, {"init": "eva", "variable_rank": True}], ids=str)
def test_classifier(init: dict[str, Any], classes: dict[str, Any], tmp_path: Path) -> None:
    usual = {"train_batch_size": 2, "seed": 0}
    own = {"rank": 2, "init_num_batches": 2, **init}
    script = train_classifier_lora
    collects = run_main(script, {**usual, **classes, **own, "output_dir": tmp_path / "a"})
    file = run_main(script, {**usual, **classes, **own, "output_dir": tmp_path / "b", "init_only": True}) / FILE
    reads = run_main(script, {**usual, **classes, "init_from": file, "output_dir": tmp_path / "c"})
    assert_same_run(collects, reads)


def test_the_run_is_resumed_and_repeated(sd: dict[str, Any], made: Path, tmp_path: Path) -> None:
    usual = {**fast(), **sd, "init_from": made, "checkpointing_steps": 2}
    whole = run_main(train_sd_lora, {**usual, "output_dir": tmp_path / "whole"})
    run_main(train_sd_lora, {**usual, "output_dir": tmp_path / "parts"})
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    again = {**usual, "output_dir": tmp_path / "parts", "resume_from_checkpoint": "latest"}
    assert_same_run(whole, run_main(train_sd_lora, again))
    repeated = {"config": whole / "run.yaml", "output_dir": tmp_path / "repeated"}
    assert_same_run(whole, run_main(train_sd_lora, repeated))
    other = shutil.copy(made, tmp_path / "other.safetensors")
    save_file(load_file(other) | {"more": torch.ones(1)}, other, metadata=metadata(made))
    with pytest.raises(ValueError, match=r"the init file is not what the checkpoint was written with .*differs"):
        run_main(train_sd_lora, {**again, "init_from": other})


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


def fast() -> dict[str, Any]:
    return {name: value for name, value in FAST.items() if name not in ("init", "rank", "init_num_batches", "seed")}


@pytest.fixture(scope="module")
def made(sd: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An init file of rank 2."""
    output = tmp_path_factory.mktemp("made") / "out"
    return run_main(train_sd_lora, {**FAST, **sd, "output_dir": output, "init_only": True}) / FILE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 8}, r"--rank is 8, but the init file '.*' was made with 2; leave out --rank, or make the file anew"),
        ({"init": "eva"}, "--init is 'eva', but the init file '.*' was made with 'cntlora'"),
        ({"lora_alpha": 1, "init_seed": 9}, r"--init_seed is 9, .* with 3; --lora_alpha is 1.0, .* with 2.0"),
        ({"init_num_batches": 64}, "--init_num_batches is 64, .* with 2"),
        ({"variable_rank": True}, "--variable_rank is True, .* with False"),
        ({"init_option": ["base=down_only"]}, r"--init_option is \['base=down_only'\], .* with \[\]"),
        ({"lora_layers": "to_q"}, "--lora_layers is 'to_q', .* with None"),
        ({"train_text_encoder": True}, "--train_text_encoder is True, .* with False"),
        ({"use_dora": True}, "--use_dora is True, .* with False"),
        ({"init_only": True}, "--init_only would write what --init_from .* holds already"),
    ],
    ids=str,
)
def test_what_was_given_otherwise_is_named(
    given: dict[str, Any], message: str, sd: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train_sd_lora.parse_args(argv_of({**sd, "init_from": made, "output_dir": tmp_path / "x", **given}))


def test_the_same_may_be_given(sd: dict[str, Any], made: Path) -> None:
    given = {"rank": 2, "init": "cntlora", "init_seed": 3, "init_option": ["base=offset"]}
    options = train_sd_lora.parse_args(argv_of({**sd, "init_from": made, **given}))
    assert (options.rank, options.init_num_batches, options.init_batch_size) == (2, 2, 2)


def test_another_base_or_other_data_are_named_before_anything_is_written(
    sd: dict[str, Any], made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base = shutil.copytree(sd["pretrained_model_name_or_path"], tmp_path / "base")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    changed = load_file(weights)
    name = next(name for name in sorted(changed) if name.endswith("attn1.to_q.weight"))
    changed[name].view(-1)[5] += 0.5  # one number of an adapted weight
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"made for another base: the values of '{name}' of unet differ"):
        run_main(train_sd_lora, {**fast(), **sd, "init_from": made, "output_dir": out, **place(base)})
    write_images(tmp_path / "data" / "train", count=5)
    other = {"train_data_dir": tmp_path / "data"}
    with pytest.raises(ValueError, match=r"made from other training data \(5 samples now, 4 then"):
        run_main(train_sd_lora, {**fast(), **sd, "init_from": made, "output_dir": out, **other})
    with pytest.raises(FileNotFoundError, match="there is no init file"):
        run_main(train_sd_lora, {**fast(), **sd, "init_from": tmp_path / "none", "output_dir": out})
    assert not out.exists() or not [path for path in out.iterdir() if not path.name.startswith(".")]


def place(base: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": base}


def test_no_names_of_the_data_and_no_places_are_in_the_file(made: Path, sd: dict[str, Any]) -> None:
    init = load_init_file(made)
    assert init.data["training data"].keys() == {"num_samples", "digest"}
    assert str(sd["train_data_dir"]) not in metadata(made)["lorainit_init"]
    assert str(sd["pretrained_model_name_or_path"]) not in metadata(made)["lorainit_init"]


def test_a_file_of_another_loop_tells_its_own_options(sd: dict[str, Any], random_sd: Path, tmp_path: Path) -> None:
    """Without this script's settings, rank and alpha are those of the adapters themselves."""
    family = StableDiffusionFamily.from_pretrained(random_sd)
    report = initialize({"unet": family.denoiser}, "gaussian", rank=3, alpha=6, target_modules=["to_q"], seed=4)
    settings = {"init_batches": 7, "num_processes": 1, "seed": 4}
    file = save_init_file(init_of({"unet": family.denoiser}, report, settings=settings), tmp_path / "init.safetensors")
    usual = {**fast(), **sd, "init_from": file}
    options = train_sd_lora.parse_args(argv_of({**usual}))
    found = (options.init, options.rank, options.lora_alpha, options.init_num_batches, options.init_seed)
    assert found == ("gaussian", 3, 6.0, 7, 4)
    out = run_main(train_sd_lora, {**usual, "output_dir": tmp_path / "out"})
    assert read_json(out / "init_report.json")["layers"].keys() == report.layers.keys()
    with pytest.raises(ValueError, match=r"other target layers: unet\.\S+to_k is adapted here, but not in it"):
        run_main(train_sd_lora, {**usual, "lora_layers": "to_q,to_k", "output_dir": tmp_path / "more"})
