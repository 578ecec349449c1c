"""Everything that PEFT trains is in every file that can hold it, and refused by name where it cannot be."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier_fixtures import random_classifier
from core_fixtures import TARGETS, relative_error, small_unet, squared_loss, tiny_attention, token_batches
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, CLIPTextModel

from lorainit_diffusers import (
    adapter_state_dict,
    initialize,
    load_adapter_state_dict,
    load_lora,
    save_diffusers_lora,
    save_kohya_lora,
    save_lora,
    save_merged,
    save_peft_lora,
    trainable_parameters,
)
from lorainit_diffusers.adapters import lora_layers

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "modules_to_save": {"modules_to_save": ["classifier"]},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "everything": {"modules_to_save": ["classifier"], "bias": "all", "lora_bias": True, "use_rslora": True},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    random_classifier().save_pretrained(folder)
    return folder


def fresh(folder: Path) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder).eval()


def logits(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=pixels).logits


def trained(folder: Path, pixels: Tensor, method: str = "eva", **options: Any) -> Any:
    """After steps large enough that the loss of any trained tensor shows in the logits."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options)
    model = get_peft_model(fresh(folder), config)

    def loss(_: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, torch.arange(6) % 3)

    initialize(model, method, [0, 1], loss, progress=False)
    parameters = trainable_parameters(model)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for _ in range(10):
        optimizer.zero_grad()
        loss(0).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("method", ["eva", "pissa"])
@EVERY_KIND
def test_folders_and_merged_models_are_the_trained_model(
    base_folder: Path, pixels: Tensor, tmp_path: Path, kind: str, method: str
) -> None:
    model = trained(base_folder, pixels, method, **KINDS[kind])
    expected = logits(model, pixels)
    assert relative_error(expected, logits(fresh(base_folder), pixels)) > 1e-2
    save_peft_lora(model, tmp_path / "peft")
    stock = PeftModel.from_pretrained(fresh(base_folder), tmp_path / "peft")
    assert relative_error(logits(stock, pixels), expected) < 1e-5
    own = fresh(base_folder)
    load_lora(own, tmp_path / "peft")
    assert relative_error(logits(own.eval(), pixels), expected) < 1e-5
    save_merged(model, tmp_path / "merged")
    assert relative_error(logits(fresh(tmp_path / "merged"), pixels), expected) < 1e-5
    assert torch.equal(logits(model, pixels), expected)  # saving changes nothing


@EVERY_KIND
def test_a_checkpoint_holds_it_all(base_folder: Path, pixels: Tensor, kind: str) -> None:
    model = trained(base_folder, pixels, **KINDS[kind])
    state = adapter_state_dict({"model": model})
    other = trained(base_folder, pixels + 1, **KINDS[kind])
    load_adapter_state_dict({"model": other}, state)
    assert torch.equal(logits(other, pixels), logits(model, pixels))
    again = adapter_state_dict({"model": other})
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_a_full_module_named_as_pefts_own_is_saved_once(base_folder: Path, pixels: Tensor, tmp_path: Path) -> None:
    model = trained(base_folder, pixels, modules_to_save=["classifier"])
    save_peft_lora(model, tmp_path, full_modules=["classifier"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    stock = PeftModel.from_pretrained(fresh(base_folder), tmp_path)
    assert relative_error(logits(stock, pixels), logits(model, pixels)) < 1e-5


def test_a_head_that_nothing_saves_is_warned_of(base_folder: Path, pixels: Tensor, tmp_path: Path) -> None:
    model = trained(base_folder, pixels)
    model.get_submodule("base_model.model.classifier").requires_grad_(True)
    with pytest.warns(UserWarning, match=r"2 trainable parameters .*leaves them out: classifier\.weight"):
        save_peft_lora(model, tmp_path)


# --- formats of pipelines -------------------------------------------------------------------------------------------


def adapted_unet(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    base = small_unet().eval().requires_grad_(False)
    unet = copy.deepcopy(base)
    unet.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS["unet"]} | options))
    initialize(unet, "pissa", progress=False)
    with torch.no_grad():
        for number, parameter in enumerate(trainable_parameters(unet)):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return base, unet.eval()


def unet_output(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    config = unet.config
    latents = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, 5, config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 700]), text).sample


def test_the_diffusers_file_holds_biases_of_b_and_the_kohya_file_refuses_them(tmp_path: Path) -> None:
    base, unet = adapted_unet(lora_bias=True)
    file = save_diffusers_lora({"unet": unet}, tmp_path)
    assert sum(key.endswith("lora_B.bias") for key in load_file(file)) == len(lora_layers(unet))
    for load in (
        lambda module: module.load_lora_adapter(tmp_path, prefix="unet", weight_name=file.name),
        lambda module: load_lora(module, file),
    ):
        loaded = copy.deepcopy(base)
        load(loaded)
        assert relative_error(unet_output(loaded), unet_output(unet)) < 1e-5
    with pytest.raises(ValueError, match="kohya format cannot hold what LoraConfig's lora_bias trains"):
        save_kohya_lora({"unet": unet}, tmp_path / "kohya.safetensors")


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("bias", {"bias": "lora_only"}),
        ("bias", {"bias": "all"}),
        ("modules_to_save", {"modules_to_save": ["conv_out"]}),
    ],
)
def test_what_files_of_pipelines_cannot_hold_is_named_and_nothing_is_written(
    tmp_path: Path, field: str, options: Any
) -> None:
    torch.manual_seed(0)
    unet = get_peft_model(small_unet(), LoraConfig(r=2, target_modules=["to_out.0"], **options))
    for save in (
        lambda: save_diffusers_lora({"unet": unet}, tmp_path / "lora"),
        lambda: save_kohya_lora({"unet": unet}, tmp_path / "kohya.safetensors"),
        lambda: save_lora({"unet": unet}, tmp_path / "both", formats=("kohya", "diffusers")),
    ):
        with pytest.raises(ValueError, match=f"format cannot hold what LoraConfig's {field} trains .*save_peft_lora"):
            save()
    assert not list(tmp_path.iterdir())


class WithConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 16)
        self.conv = nn.Conv1d(16, 16, 1)
        self.linear = nn.Linear(16, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.conv(self.words(ids).mT).mT)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["linear", "words"]), "adapts 'words', a Embedding"),
        (LoraConfig(target_modules=["linear", "conv"]), "adapts 'conv', a Conv1d"),
        (LoHaConfig(target_modules=["linear"]), "is no LoRA: layer 'linear' is PEFT's Linear"),
        (IA3Config(target_modules=["linear"], feedforward_modules=[]), "is no LoRA: layer 'linear' is PEFT's Linear"),
        (LoraConfig(target_modules=["linear"], init_lora_weights="pissa"), "init_lora_weights='pissa', which changes"),
        (LoraConfig(target_modules=["linear"], init_lora_weights="olora"), "init_lora_weights='olora', which changes"),
        (LoraConfig(target_modules=["linear"], init_lora_weights="pissa_niter_2"), "init_lora_weights='pissa_niter_2'"),
        (LoraConfig(target_modules=["linear"], alora_invocation_tokens=[1]), "is a variant of LoRA"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_initialize_and_by_every_export(
    config: Any, message: str, tmp_path: Path
) -> None:
    model = get_peft_model(WithConvolution(), config)
    ids = torch.arange(10)[None]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for work in (
        lambda: initialize(model, "eva", [ids], lambda batch: model(batch).square().mean(), progress=False),
        lambda: save_peft_lora(model, tmp_path / "a"),
        lambda: save_diffusers_lora({"unet": model}, tmp_path / "b"),
        lambda: save_merged(model, tmp_path / "c"),
        lambda: adapter_state_dict({"": model}),
    ):
        with pytest.raises(ValueError, match=message):
            work()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_rows_of_an_embedding_are_in_the_folder_of_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = WithConvolution()
    config = LoraConfig(r=2, target_modules=["linear"], trainable_token_indices={"words": [1, 3]})
    model = get_peft_model(copy.deepcopy(base), config)
    initialize(model, "gaussian", progress=False)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.3)
    assert len(trainable_parameters(model)) == 3
    ids = torch.arange(10)[None]
    save_peft_lora(model, tmp_path)
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(stock(ids), model(ids)) < 1e-6
    with pytest.raises(ValueError, match="trainable_token_indices"):
        load_lora(copy.deepcopy(base), tmp_path)
    with pytest.raises(ValueError, match="diffusers format cannot hold what LoraConfig's trainable_token_indices"):
        save_diffusers_lora({"unet": model}, tmp_path / "file")


# --- configurations of files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the weights of the base"),
        ({"init_lora_weights": "PiSSA_niter_4"}, "init_lora_weights='PiSSA_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "of_tomorrow"}, "init_lora_weights='of_tomorrow'"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\]"),
        ({"target_parameters": ["experts.w1"]}, "target_parameters="),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens="),
        ({"megatron_config": {"a": 1}}, "megatron_config="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices="),
        ({"a_field_of_tomorrow": True}, "a_field_of_tomorrow=True"),
        ({"use_dora": True}, r"use_dora=True, but no tensor '.*lora_magnitude_vector'"),
        ({"lora_bias": True}, r"lora_bias=True, but no tensor '.*lora_B.bias'"),
        ({"r": 3}, "have ranks 4 and 4, but its configuration says 3"),
        ({"rank_pattern": {"to_q": 7}}, "configuration says 7"),
    ],
)
def test_a_foreign_configuration_that_cannot_be_honoured_is_refused_by_its_field(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = tiny_attention().eval()
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=message):
        load_lora(base, tmp_path)
    assert base.state_dict().keys() == before.keys()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 3}},
        {"rank_pattern": {"^to_q": 2}, "use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"lora_bias": True},
        {"bias": "all"},
        {"lora_dropout": 0.3},
    ],
)
def test_a_foreign_folder_is_what_peft_makes_of_it(options: dict[str, Any], tmp_path: Path) -> None:
    base, x = tiny_attention().eval(), token_batches(1)[0]
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k"]} | options)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(base)
    load_lora(loaded, tmp_path)
    assert relative_error(loaded.eval()(x), PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x)) < 1e-6


def test_metadata_of_a_diffusers_file_is_honoured_or_refused_too(tmp_path: Path) -> None:
    base, unet = adapted_unet()
    file = save_diffusers_lora({"unet": unet}, tmp_path)
    tensors = load_file(file)
    config = {"unet.r": 8, "unet.lora_alpha": 8, "unet.init_lora_weights": "pissa"}
    save_file(tensors, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(ValueError, match=r"metadata of .*init_lora_weights='pissa'"):
        load_lora(copy.deepcopy(base), file)


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_configuration_that_is_no_json_object_is_named(text: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_attention(), LoraConfig(target_modules=["to_q"]))
    save_peft_lora(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json' (is no JSON|holds no JSON object)"):
        load_lora(tiny_attention(), tmp_path)


# --- ranks and alphas of the user -----------------------------------------------------------------------------------


def shapes(module: nn.Module) -> dict[str, tuple[int, float, float]]:
    return {
        name: (layer.r["default"], float(layer.lora_alpha["default"]), round(layer.scaling["default"], 6))
        for name, layer in lora_layers(module).items()
    }


@pytest.mark.parametrize("method", ["eva", "pissa", "gaussian", "cntlora"])
@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {"to_q": 16}},
        {"rank_pattern": {"to_v": 2}},
        {"rank_pattern": {"to_v": 2, "to_k": 6}, "alpha_pattern": {"to_v": 2}},
        {"rank_pattern": {"to_v": 2}, "use_rslora": True},
    ],
)
def test_ranks_and_alphas_are_the_users_layer_by_layer(method: str, options: dict[str, Any]) -> None:
    module = get_peft_model(
        tiny_attention(), LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v"]} | options)
    )
    before = shapes(module)
    report = initialize(module, method, token_batches(), squared_loss(module), progress=False)
    assert shapes(module) == before
    assert {name: (layer.rank, pytest.approx(layer.alpha)) for name, layer in report.layers.items()} == {
        name: (rank, alpha) for name, (rank, alpha, _) in before.items()
    }


def test_an_explicit_rank_and_alpha_win_and_variable_ranks_keep_each_scaling() -> None:
    def start(**asked: Any) -> dict[str, tuple[int, float, float]]:
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], alpha_pattern={"to_q": 16})
        module = get_peft_model(tiny_attention(), config)
        initialize(module, "eva", token_batches(), squared_loss(module), progress=False, **asked)
        return shapes(module)

    assert start(rank=2) == {"to_q": (2, 8, 4), "to_k": (2, 2, 1), "to_v": (2, 2, 1)}
    assert start(rank=2, alpha=6) == dict.fromkeys(("to_q", "to_k", "to_v"), (2, 6, 3))
    varied = start(variable_rank=True)
    assert sum(rank for rank, _, _ in varied.values()) == 12
    assert {name: scaling for name, (_, _, scaling) in varied.items()} == {"to_q": 4, "to_k": 1, "to_v": 1}


def test_every_component_keeps_its_own_configuration(random_sd: Path) -> None:
    torch.manual_seed(0)
    unet = small_unet()
    encoder: Any = CLIPTextModel.from_pretrained(random_sd, subfolder="text_encoder")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS["unet"]))
    encoder.add_adapter(LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj"]))
    before = shapes(unet), shapes(encoder)
    initialize({"unet": unet, "text_encoder": encoder}, "pissa", progress=False)
    assert (shapes(unet), shapes(encoder)) == before


def test_save_lora_names_what_it_cannot_write_and_the_files_it_leaves(tmp_path: Path) -> None:
    _, unet = adapted_unet()
    with pytest.raises(ValueError, match="must name one or more of diffusers, kohya, peft"):
        save_lora({"unet": unet}, tmp_path, formats=("comfy",))
    with pytest.raises(ValueError, match="a PEFT folder holds one component, not unet, transformer"):
        save_lora({"unet": unet, "transformer": unet}, tmp_path, formats=("peft",))
    written = save_lora({"unet": unet}, tmp_path, formats=("diffusers", "kohya", "peft"))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("pytorch_lora_weights.safetensors", "pytorch_lora_weights_kohya.safetensors"),
        *("adapter_model.safetensors", "adapter_config.json"),
    }
    assert written["peft"] == tmp_path
    with pytest.warns(UserWarning, match=r"_kohya\.safetensors' was not written by this call.*add 'kohya' to formats"):
        save_lora({"unet": unet}, tmp_path, formats=("diffusers", "peft"))


def test_another_component_in_the_file_is_not_overwritten(tmp_path: Path) -> None:
    _, unet = adapted_unet()
    save_diffusers_lora({"unet": unet, "text_encoder": unet}, tmp_path)
    with pytest.raises(ValueError, match=r"also holds the LoRA of text_encoder, which this call would overwrite"):
        save_diffusers_lora({"unet": unet}, tmp_path)
    save_diffusers_lora({"unet": unet, "text_encoder": unet}, tmp_path)


# --- names of labels ------------------------------------------------------------------------------------------------


def test_label_names_are_written_for_classifiers_only_and_must_fit(
    base_folder: Path, pixels: Tensor, tmp_path: Path
) -> None:
    model = trained(base_folder, pixels, modules_to_save=["classifier"])
    save_peft_lora(model, tmp_path, labels={0: "cat", 1: "dog", 2: "owl"})
    own = fresh(base_folder)
    load_lora(own, tmp_path)
    assert own.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert own.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    path = tmp_path / "label_names.json"
    for text, message in (
        ('{"id2label": {"0": "cat", "1": "dog"}}', "names 2 labels, but ViTForImageClassification has 3"),
        ('{"id2label": {"1": "cat"}}', "holds no id2label from 0 on"),
        ("[", "holds no id2label from 0 on"),
    ):
        path.write_text(text, encoding="utf-8")
        unchanged = fresh(base_folder)
        before = {key: value.clone() for key, value in unchanged.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_lora(unchanged, tmp_path)
        assert all(torch.equal(value, before[key]) for key, value in unchanged.state_dict().items())
    _, unet = adapted_unet()
    save_peft_lora(unet, tmp_path / "unet")
    assert not (tmp_path / "unet" / "label_names.json").exists()
