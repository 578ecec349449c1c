from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from sd_fixtures import write_images

from lorainit_diffusers.families import TEXT_TO_IMAGE_FAMILIES, family_class
from lorainit_diffusers.families.pipelines import family_of
from lorainit_diffusers.training import dit
from lorainit_diffusers.training.options.family import families_by_pipeline, settled_family


def write_index(folder: Path, pipeline: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return str(folder)


def test_pipelines_are_those_of_the_families() -> None:
    expected = {kind.__name__: name for name in TEXT_TO_IMAGE_FAMILIES for kind in family_class(name).PIPELINES}
    assert dict(families_by_pipeline()) == expected
    assert {pipeline: family_of(pipeline) for pipeline in expected} == expected


def test_they_are_known_without_torch() -> None:
    code = (
        "import sys; from lorainit_diffusers.training.options.family import families_by_pipeline as f; "
        "assert len(f()) > 10; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("pipeline", ["FluxPipeline", "Flux2KleinPipeline", "QwenImagePipeline", "DiTPipeline"])
def test_the_pipeline_of_the_base_decides(pipeline: str, tmp_path: Path) -> None:
    base = write_index(tmp_path / "base", pipeline)
    assert settled_family("auto", base) == families_by_pipeline()[pipeline]
    assert settled_family("sana", base) == "sana"  # what is given is checked when the base is looked at


def test_what_says_nothing(tmp_path: Path) -> None:
    assert settled_family("auto", None) == "sd3"
    # what is wrong with these is said when the base is looked at
    assert settled_family("auto", str(tmp_path)) == "sd3"
    (tmp_path / "model_index.json").write_text("[")
    assert settled_family("auto", str(tmp_path)) == "sd3"
    with pytest.raises(ValueError, match=r"--family is missing: 'a\.safetensors' is a single file"):
        settled_family("auto", "a.safetensors")


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("StableDiffusionXLPipeline", r"not a diffusion transformer; train_sdxl_lora\.py trains it"),
        ("AudioPipeline", "is a AudioPipeline, which no family takes; known: StableDiffusionPipeline, "),
    ],
)
def test_what_other_scripts_train(pipeline: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        settled_family("auto", write_index(tmp_path / "base", pipeline))


def test_a_command_line_without_a_family(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    data = ["--train_data_dir", str(tmp_path / "images")]
    options = dit.parse_args(["--pretrained_model_name_or_path", write_index(tmp_path / "base", "WanPipeline"), *data])
    assert options.family == options.family_name == "wan"
    assert dit.parse_args([]).family == "sd3"
