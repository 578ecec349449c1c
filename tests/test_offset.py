"""The offset under everything that switches, scales, merges, moves, copies and saves adapters, none of which knows it.

The reference is a plain model whose weights hold ``W + scaling (B A - B0 A0)``, computed here in float64.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier_fixtures import random_classifier
from core_fixtures import TARGETS, relative_error, small_unet, squared_loss, tiny_attention, token_batches
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lorainit_diffusers import (
    adapter_state_dict,
    initialize,
    load_adapter_state_dict,
    load_lora,
    save_diffusers_lora,
    save_merged,
    save_peft_lora,
    trainable_parameters,
)
from lorainit_diffusers.adapters import adapter_weights, lora_layers

LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
OFFSET = ("pissa", "olora", "lora_ga")


def nudge(parameters: list[nn.Parameter], size: float = 0.05, seed: int = 5) -> None:
    """Stands for training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def merged_reference(base: nn.Module, adapted: nn.Module, weight: float = 1.0, name: str = "default") -> nn.Module:
    """A plain copy of the base with the change in its weights, by the definition."""
    reference = copy.deepcopy(base)
    for layer, w in adapter_weights(adapted, name).items():
        delta = w.factors.lora_B.double() @ w.factors.lora_A.double()
        if w.offset is not None:
            delta -= w.offset.lora_B.double() @ w.offset.lora_A.double()
        target = reference.get_submodule(layer).weight
        target.data = (target.double() + weight * w.scaling * delta).to(target.dtype)
    return reference


class Unet:
    """A random UNet, one with a trained offset, and an output."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.base = small_unet().eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        config = self.base.config
        self.latents = torch.randn(2, config.in_channels, 8, 8, generator=generator)
        self.text = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
        self.times = torch.tensor([10, 700])
        self.trained = self.start()
        nudge(trainable_parameters(self.trained))
        self.expected = self.output(merged_reference(self.base, self.trained))

    def start(self, method: str = "pissa", **options: Any) -> Any:
        unet = copy.deepcopy(self.base)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS["unet"], **options))
        initialize(unet, method, [0], lambda _: (self(unet) - self.latents).square().mean(), progress=False)
        return unet.eval()

    def __call__(self, unet: Any) -> Tensor:
        return unet(self.latents, self.times, self.text).sample

    def output(self, unet: Any) -> Tensor:
        with torch.no_grad():
            return self(unet)


@pytest.fixture(scope="module")
def shared() -> Unet:
    return Unet()


@pytest.fixture
def unet(shared: Unet) -> Any:
    assert relative_error(shared.output(shared.trained), shared.output(shared.base)) > 1e-2
    return copy.deepcopy(shared.trained)


def style_file(shared: Unet) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{name}.lora_{factor}.weight": 0.3 * torch.randn(shape, generator=generator)
        for name, layer in lora_layers(shared.trained).items()
        for factor, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2)))
    }


def test_the_trained_output_is_the_definition(shared: Unet, unet: Any) -> None:
    assert relative_error(shared.output(unet), shared.expected) < 1e-5


@pytest.mark.parametrize("method", OFFSET)
def test_step_zero_is_the_base_bit_for_bit(shared: Unet, method: str) -> None:
    assert torch.equal(shared.output(shared.start(method)), shared.output(shared.base))


def switched(unet: Any) -> None:
    unet.disable_adapters()
    unet.enable_adapters()


@pytest.mark.parametrize(
    "switch",
    [
        lambda unet: unet.set_adapter("default"),
        lambda unet: unet.set_adapters(["default"]),
        lambda unet: unet.set_adapters("default", 1.0),
        switched,
        lambda unet: unet.requires_grad_(True).requires_grad_(False),
        lambda unet: unet.train().eval(),
        lambda unet: unet.to(torch.bfloat16).to(torch.float32),
        lambda unet: unet.half().float(),
        lambda unet: unet.double().float(),
        lambda unet: unet.load_state_dict(unet.state_dict()),
        lambda unet: unet.load_state_dict(unet.state_dict(), assign=True),
        lambda unet: set_peft_model_state_dict(unet, get_peft_model_state_dict(unet)),
        lambda unet: (unet.fuse_lora(), unet.unfuse_lora()),
        lambda unet: (unet.fuse_lora(safe_fusing=True), unet.unfuse_lora()),
    ],
)
def test_nothing_that_switches_adapters_loses_the_offset(shared: Unet, unet: Any, switch: Callable[[Any], Any]) -> None:
    switch(unet)
    # the casts round the base's weights, but not the adapter's
    rounds = {"bfloat16", "half"} & set(switch.__code__.co_names)
    assert relative_error(shared.output(unet), shared.expected) < (3e-2 if rounds else 1e-5)
    for name, weights in adapter_weights(unet).items():
        before = adapter_weights(shared.trained)[name]
        assert all(torch.equal(a, b) for a, b in zip(weights.factors, before.factors, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(weights.offset, before.offset, strict=True))


@pytest.mark.parametrize("weight", [0.0, 0.5, -1.0])
def test_a_weight_scales_the_change(shared: Unet, unet: Any, weight: float) -> None:
    unet.set_adapters(["default"], [weight])
    assert (
        relative_error(shared.output(unet), shared.output(merged_reference(shared.base, shared.trained, weight))) < 1e-5
    )
    unet.set_adapters(["default"], [1.0])
    assert relative_error(shared.output(unet), shared.expected) < 1e-5


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fusing_puts_the_change_into_the_weights_and_takes_it_out(
    shared: Unet, unet: Any, safe: bool, scale: float
) -> None:
    unet.fuse_lora(lora_scale=scale, safe_fusing=safe)
    expected = merged_reference(shared.base, shared.trained, scale)
    assert relative_error(shared.output(unet), shared.output(expected)) < 1e-5
    for name, layer in lora_layers(unet).items():
        weight = expected.get_submodule(name).weight
        assert relative_error(layer.get_base_layer().weight, weight) < 1e-5
    unet.unfuse_lora()
    unet.disable_adapters()
    assert relative_error(shared.output(unet), shared.output(shared.base)) < 1e-5


def test_deleting_the_adapter_leaves_nothing_for_a_later_one_of_its_name(shared: Unet, unet: Any) -> None:
    unet.delete_adapters("default")
    assert torch.equal(shared.output(unet), shared.output(shared.base))
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS["unet"], init_lora_weights=False))
    assert not any(weights.offset for weights in adapter_weights(unet).values())
    assert relative_error(shared.output(unet), shared.output(merged_reference(shared.base, unet))) < 1e-5
    initialize(unet, "olora", rank=2, progress=False)
    assert torch.equal(shared.output(unet), shared.output(shared.base))


@pytest.mark.parametrize("order", [["style", "default"], ["default", "style"]])
def test_a_second_active_lora_stays_active_and_as_trainable_as_it_was(shared: Unet, order: list[str]) -> None:
    unet = copy.deepcopy(shared.base)
    unet.load_lora_adapter(style_file(shared), prefix=None, adapter_name="style")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS["unet"]))
    unet.set_adapters(order)
    for name, parameter in unet.named_parameters():
        if ".style." in name:
            parameter.requires_grad_(False)
    before = shared.output(unet)
    assert relative_error(before, shared.output(shared.base)) > 1e-2
    initialize(unet, "pissa", progress=False)
    assert relative_error(shared.output(unet), before) < 1e-6
    assert unet.active_adapters() == order
    trainable = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".default." in name for name in trainable)
    nudge(trainable_parameters(unet))
    both = merged_reference(merged_reference(shared.base, unet), unet, name="style")
    assert relative_error(shared.output(unet), shared.output(both)) < 1e-5
    unet.delete_adapters("style")
    assert relative_error(shared.output(unet), shared.output(merged_reference(shared.base, unet))) < 1e-5


def test_copies_and_pickles_are_independent_and_exact(shared: Unet, unet: Any) -> None:
    buffer = io.BytesIO()
    pickle.dump(unet, buffer)
    for other in (copy.deepcopy(unet), pickle.loads(buffer.getvalue())):
        assert torch.equal(shared.output(other), shared.output(unet))
        other.fuse_lora()
        assert relative_error(shared.output(other), shared.expected) < 1e-5
        nudge(trainable_parameters(other))
    assert relative_error(shared.output(unet), shared.expected) < 1e-5


def test_what_diffusers_saves_is_right_on_the_original_base(shared: Unet, unet: Any, tmp_path: Path) -> None:
    unet.save_lora_adapter(tmp_path)
    fresh = copy.deepcopy(shared.base)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert relative_error(shared.output(fresh), shared.expected) < 1e-5


def test_exchanging_the_factors_in_place_is_refused(shared: Unet, unet: Any) -> None:
    with pytest.raises(ValueError, match="incompatible"):
        unet.load_lora_adapter(style_file(shared), prefix=None, adapter_name="default", hotswap=True)
    # diffusers takes an adapter off where loading fails; never the new factors over the old offset
    assert torch.equal(shared.output(unet), shared.output(shared.base))


def test_a_file_of_another_rank_does_not_slip_under_the_offset(unet: Any) -> None:
    plain = {
        key: value[:4] if "lora_A" in key else value[:, :4] for key, value in get_peft_model_state_dict(unet).items()
    }
    with pytest.raises(RuntimeError, match="this adapter has an offset and needs"):
        set_peft_model_state_dict(unet, plain)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casting_the_model_before_saving_loses_nothing(shared: Unet, unet: Any, tmp_path: Path, cast: Any) -> None:
    exact = load_file(save_diffusers_lora({"unet": unet}, tmp_path / "exact"))
    unet.to(cast)
    found = load_file(save_diffusers_lora({"unet": unet}, tmp_path / "cast"))
    assert found.keys() == exact.keys()
    assert all(torch.equal(found[key], value) for key, value in exact.items())


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_that_were_rounded_by_hand_are_refused(unet: Any, tmp_path: Path, dtype: Any, back: bool) -> None:
    for parameter in trainable_parameters(unet):
        parameter.data = parameter.data.to(dtype).float() if back else parameter.data.to(dtype)
    message = f"rounded to {str(dtype).removeprefix('torch.')}.*before the model is cast"
    for save in (
        lambda: save_diffusers_lora({"unet": unet}, tmp_path),
        lambda: save_peft_lora(unet, tmp_path),
        lambda: save_merged(unet, tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            save()
    assert not list(tmp_path.iterdir())


def test_rounded_by_hand_the_model_still_starts_as_the_base(shared: Unet) -> None:
    unet = shared.start()
    for parameter in trainable_parameters(unet):
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(shared.output(unet), shared.output(shared.base))


def test_autocast_keeps_step_zero(shared: Unet) -> None:
    unet = shared.start()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shared.output(unet), shared.output(shared.base))


def test_dropout_is_noise_of_the_trained_part_only(shared: Unet) -> None:
    module = tiny_attention()
    x = token_batches(1)[0]
    initialize(module, "pissa", rank=4, target_modules=LAYERS, lora_dropout=0.5, progress=False)
    nudge(trainable_parameters(module))
    layer, weights = module.train().to_q, adapter_weights(module)["to_q"]
    torch.manual_seed(7)
    found = layer(x)
    torch.manual_seed(7)
    dropped = torch.nn.functional.dropout(x, 0.5)
    expected = layer.get_base_layer()(x) + weights.scaling * (
        dropped @ weights.factors.lora_A.mT @ weights.factors.lora_B.mT
        - x @ weights.offset.lora_A.mT @ weights.offset.lora_B.mT
    )
    assert relative_error(found, expected) < 1e-6
    initialize(module, "gaussian", rank=4, progress=False)
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert layer.lora_dropout["default"].p == 0.5


# --- PEFT models ----------------------------------------------------------------------------------------------------


def peft_model(method: str = "pissa", **options: Any) -> tuple[nn.Module, Any]:
    base = tiny_attention().eval()
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LAYERS} | options)
    )
    initialize(model, method, token_batches(), squared_loss(model), progress=False)
    return base, model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 3}},
        {"use_rslora": True, "rank_pattern": {"to_q": 2}},
        {"lora_bias": True},
    ],
)
@pytest.mark.parametrize("method", OFFSET)
def test_pefts_own_folder_is_right_on_the_original_base(method: str, options: Any, tmp_path: Path) -> None:
    base, model = peft_model(method, **options)
    x = token_batches(1)[0]
    assert torch.equal(model(x), base(x))
    nudge(trainable_parameters(model))
    model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(restored(x), model(x)) < 1e-6
    loaded = copy.deepcopy(base)
    load_lora(loaded, tmp_path)
    assert relative_error(loaded(x), model(x)) < 1e-6
    # what the user asked for is still there; only what is written counts the initial factors
    assert model.peft_config["default"].r == 4
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8


def test_pefts_load_adapter_over_it_restores_trained_and_initial_factors(tmp_path: Path) -> None:
    _, model = peft_model("pissa")
    nudge(trainable_parameters(model))
    model.save_pretrained(tmp_path)
    _, other = peft_model("olora")  # other initial factors, as changed data would give
    other.load_adapter(tmp_path, "default", is_trainable=True)
    saved, found = adapter_state_dict({"m": model}), adapter_state_dict({"m": other})
    assert all(torch.equal(found[key], value) for key, value in saved.items())
    assert sum(p.requires_grad for p in other.parameters()) == 2 * len(lora_layers(other))


def test_merging_unloading_and_deleting_with_peft(tmp_path: Path) -> None:
    base, model = peft_model()
    nudge(trainable_parameters(model))
    x = token_batches(1)[0]
    expected = merged_reference(base, model)(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.merge_adapter()
    assert relative_error(model(x), expected) < 1e-5
    model.unmerge_adapter()
    assert relative_error(model(x), expected) < 1e-5
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert relative_error(merged(x), expected) < 1e-5
    assert relative_error(copy.deepcopy(model).unload()(x), base(x)) < 1e-5
    model.add_adapter("other", LoraConfig(r=2, target_modules=LAYERS))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert relative_error(model(x), base(x)) < 1e-5


def test_optimizers_and_resuming_see_an_ordinary_lora() -> None:
    base, model = peft_model("lora_ga")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in names)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.1)
    initial = {key: value for key, value in adapter_state_dict({"m": model}).items() if "offset" in key}
    loss = squared_loss(model.train())
    for batch in token_batches():
        loss(batch).backward()
        optimizer.step()
    after = adapter_state_dict({"m": model})
    assert all(torch.equal(after[key], value) for key, value in initial.items())
    assert relative_error(model.eval()(token_batches(1)[0]), merged_reference(base, model)(token_batches(1)[0])) < 1e-5


def test_a_checkpoint_of_the_first_version_resumes(tmp_path: Path) -> None:
    """Its layout, written here by hand: factors, scaling and the factors of what was a second adapter then."""
    base, model = peft_model()
    nudge(trainable_parameters(model))
    state: dict[str, Tensor] = {}
    for name, w in adapter_weights(model).items():
        values = (w.factors.lora_A, w.factors.lora_B, torch.tensor(w.scaling, dtype=torch.float64), *w.offset)
        keys = ("lora_A", "lora_B", "scaling", "offset_A", "offset_B")
        state |= {f"unet.{name}.{key}": value.clone() for key, value in zip(keys, values, strict=True)}
    save_file(state, tmp_path / "old.safetensors")
    fresh = copy.deepcopy(base)
    load_adapter_state_dict({"unet": fresh}, load_file(tmp_path / "old.safetensors"))
    x = token_batches(1)[0]
    assert torch.equal(fresh.eval()(x), model(x))
    assert adapter_state_dict({"unet": fresh}).keys() == state.keys()


class Examples(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": index % 3}


@pytest.mark.parametrize("options", [{}, {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}])
def test_resuming_with_transformers_trainer_is_the_uninterrupted_run(tmp_path: Path, options: dict[str, Any]) -> None:
    base = random_classifier()
    pixels = torch.stack([Examples()[index]["pixel_values"] for index in range(8)])

    def start(method: str = "pissa") -> Any:
        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
        initialize(model, method, progress=False)
        return model

    def run(model: Any, resume: str | None = None) -> Tensor:
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(model, arguments, train_dataset=Examples(), eval_dataset=Examples())
        trainer.train(resume_from_checkpoint=resume)
        with torch.no_grad():
            return model.eval()(pixel_values=pixels).logits

    whole = start()
    expected = run(whole)
    assert relative_error(expected, base.eval()(pixel_values=pixels).logits) > 1e-2
    reference = merged_reference(base, whole)
    assert relative_error(expected, reference.eval()(pixel_values=pixels).logits) < 1e-5
    # other initial factors, as data that have changed would give: the checkpoint holds the run's own
    assert relative_error(run(start("olora"), str(tmp_path / "run" / "checkpoint-3")), expected) < 1e-5
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "run" / "checkpoint-6").eval()
    if not options:
        assert relative_error(stock(pixel_values=pixels).logits, expected) < 1e-5
