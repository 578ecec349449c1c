"""Five lines put the initialisation into scripts that have the shape of diffusers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import StableDiffusionPipeline
from five_lines import FIVE_LINES, TRAIN_TEXT_ENCODER, apply
from peft import LoraConfig
from safetensors.torch import load_file
from sd_fixtures import ROOT, write_images
from torch import Tensor, nn

from lorainit_diffusers import (
    adapter_state_dict,
    adapters_disabled,
    initialize,
    load_adapter_state_dict,
    save_diffusers_lora,
    save_kohya_lora,
    save_lora,
)
from lorainit_diffusers.export.checkpoint_hooks import ADAPTER_STATE_NAME
from lorainit_diffusers.families.sd import StableDiffusionFamily

SCRIPTS = ("text_to_image", "dreambooth", "dreambooth --train_text_encoder")


class Run(NamedTuple):
    unet: Any
    text_encoder: Any
    output_dir: Path

    def adapters(self) -> dict[str, Tensor]:
        modules: dict[str, nn.Module] = {"unet": self.unet, "text_encoder": self.text_encoder}
        return adapter_state_dict({name: m for name, m in modules.items() if getattr(m, "peft_config", None)})


@pytest.fixture
def run_script(random_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    data = write_images(tmp_path / "data")

    def run(
        script: str, method: str, steps: int, resume_from: Path | None = None, lines: dict[str, Any] | None = None
    ) -> Run:
        name, *flags = script.split()
        text = Path(__file__).with_name(f"{name}_shape.py").read_text(encoding="utf-8")
        patched = apply(text, FIVE_LINES if lines is None else lines).replace('"cntlora"', repr(method))
        assert 0 < len(patched.splitlines()) - len(text.splitlines()) <= 5
        if "--train_text_encoder" in flags:
            patched = patched.replace(*TRAIN_TEXT_ENCODER)
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        output_dir = tmp_path / f"{method}-{steps}-{resume_from is not None}"
        argv = ["--base", random_sd, "--data", data, "--output_dir", output_dir, "--steps", steps, *flags]
        argv += ["--resume_from", resume_from] if resume_from else []
        namespace: dict[str, Any] = {"__name__": name}
        exec(compile(patched, f"{name}_shape.py", "exec"), namespace)
        return Run(*namespace["main"]([str(value) for value in argv]), output_dir)

    return run


def output(unet: Any, text_encoder: Any) -> Tensor:
    """What the pair makes of fixed noise and tokens, in evaluation mode."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    input_ids = torch.arange(24).reshape(2, 12) * 7
    unet.eval()
    text_encoder.eval()
    with torch.no_grad():
        return unet(latents, torch.tensor([20, 700]), text_encoder(input_ids)[0]).sample


def stock_output(base: Path, lora: Path | None = None) -> Tensor:
    """The same of an untouched base, with the file that stock diffusers loads into it."""
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    if lora is not None:
        pipeline.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    return output(pipeline.unet, pipeline.text_encoder)


@pytest.mark.parametrize("method", ["cntlora", "gaussian", "eva"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_stock_loading_gives_the_trained_model(script: str, method: str, run_script: Any, random_sd: Path) -> None:
    run = run_script(script, method, steps=4)
    live, base = output(run.unet, run.text_encoder), stock_output(random_sd)
    assert (live - base).abs().max() > 1e-2, "nothing was trained"
    torch.testing.assert_close(stock_output(random_sd, run.output_dir), live, atol=1e-4, rtol=0)
    with adapters_disabled({"unet": run.unet, "text_encoder": run.text_encoder}):
        torch.testing.assert_close(output(run.unet, run.text_encoder), base, atol=0, rtol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_steps_is_the_base(script: str, run_script: Any, random_sd: Path) -> None:
    run = run_script(script, "cntlora", steps=0)
    assert any(key.endswith("offset_A") for key in run.adapters())
    torch.testing.assert_close(output(run.unet, run.text_encoder), stock_output(random_sd), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["cntlora", "gaussian", "eva"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_equals_an_uninterrupted_one(script: str, method: str, run_script: Any) -> None:
    whole = run_script(script, method, steps=4)
    resumed = run_script(script, method, steps=4, resume_from=whole.output_dir / "checkpoint-2")
    expected, found = whole.adapters(), resumed.adapters()
    assert found.keys() == expected.keys()
    assert any(key.endswith("offset_A") for key in found) == (method == "cntlora")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=0, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_offset_comes_from_the_checkpoint(script: str, run_script: Any) -> None:
    """Another initialisation on resuming, as data that changed would give, must not move the restored run."""
    whole = run_script(script, "cntlora", steps=4)
    resumed = run_script(script, "pissa", steps=4, resume_from=whole.output_dir / "checkpoint-2")
    for key, value in whole.adapters().items():
        torch.testing.assert_close(resumed.adapters()[key], value, atol=0, rtol=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_files_that_the_script_itself_saves_are_right_too(script: str, run_script: Any, random_sd: Path) -> None:
    lines = {anchor: added for anchor, added in FIVE_LINES.items() if anchor != "# Final inference"}
    run = run_script(script, "cntlora", steps=4, lines=lines)
    live = output(run.unet, run.text_encoder)
    assert (live - stock_output(random_sd)).abs().max() > 1e-2, "nothing was trained"
    torch.testing.assert_close(stock_output(random_sd, run.output_dir), live, atol=1e-4, rtol=0)
    checkpoint = run.output_dir / "checkpoint-2"
    if script == "text_to_image":  # its checkpoints hold the whole UNet
        return
    state = load_file(checkpoint / ADAPTER_STATE_NAME)
    load_adapter_state_dict({key: getattr(run, key) for key in {key.partition(".")[0] for key in state}}, state)
    restored = output(run.unet, run.text_encoder)
    torch.testing.assert_close(stock_output(random_sd, checkpoint), restored, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["cntlora", "gaussian"])
def test_optimizer_holds_the_adapters_under_bf16(method: str, run_script: Any) -> None:
    """PEFT makes bf16 adapters on a bf16 base, and the script's optimizer holds them before they become float32."""
    script = "text_to_image --mixed_precision bf16"
    start, trained = run_script(script, method, steps=0).adapters(), run_script(script, method, steps=2).adapters()
    for key in (key for key in start if key.endswith(("lora_A", "lora_B"))):
        assert not torch.equal(start[key], trained[key]), key
        assert trained[key].dtype == torch.float32


def test_a_text_encoder_that_the_family_does_not_adapt_is_named(random_sd: Path, tmp_path: Path) -> None:
    """At `initialize`, and at the last line, where it would be lost from the file that the script has saved."""
    pipeline = StableDiffusionPipeline.from_pretrained(random_sd)
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    family = StableDiffusionFamily(pipeline.tokenizer, text_encoder, pipeline.vae, unet, pipeline.scheduler)
    unet.requires_grad_(False).add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    initialize(family, "gaussian", progress=False)
    text_encoder.requires_grad_(False).add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    for work in (
        lambda: initialize(family, "gaussian", progress=False),
        lambda: save_diffusers_lora(family.adapted, tmp_path / "lora"),
        lambda: save_diffusers_lora(family, tmp_path / "lora"),
        lambda: save_kohya_lora(family, tmp_path / "kohya.safetensors"),
        lambda: save_lora(family, tmp_path, formats=("diffusers", "kohya")),
    ):
        with pytest.raises(ValueError, match=r"text_encoder carries an adapter .*train_text_encoder=True"):
            work()
    assert not list(tmp_path.iterdir())
    family.train_text_encoder = True
    initialize(family, "gaussian", progress=False)
    assert set(save_lora(family, tmp_path, formats=("diffusers", "kohya"))) == {"diffusers", "kohya"}


def test_a_family_without_a_text_encoder_says_so(random_sd: Path) -> None:
    """What `--pre_compute_text_embeddings` leaves: no tokenizer, no text encoder, embeddings in place of ids."""
    pipeline = StableDiffusionPipeline.from_pretrained(random_sd)
    family = StableDiffusionFamily(None, None, pipeline.vae, pipeline.unet, pipeline.scheduler)
    batch = {"pixel_values": torch.zeros(1, 3, 16, 16), "input_ids": torch.zeros(1, 5, 32)}
    with pytest.raises(ValueError, match=r"needs prompt_embeds, and .*has let its text encoders go, as under pre_comp"):
        initialize(family, "eva", [batch], rank=2, progress=False)


def test_documentation_has_the_same_lines() -> None:
    text = (ROOT / "docs" / "plugin.md").read_text(encoding="utf-8")
    for anchor, added in FIVE_LINES.items():
        for line in (anchor, *added):
            assert line in text
    assert TRAIN_TEXT_ENCODER[1].removesuffix(")") in text


def test_an_anchor_must_stand_once() -> None:
    with pytest.raises(ValueError, match="stands 2 times"):
        apply("x = 1\nx = 1\n", {"x = 1": ("y = 2",)})
