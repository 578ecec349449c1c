"""PEFT folders, merged models and our loader, on what diffusers loads no LoRA for: PixArt, DiT, image classifiers."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from classifier_fixtures import CLASSES, SIDE, random_classifier, teacher_deit, write_classifier
from diffusers import DiTTransformer2DModel, ModelMixin, PixArtTransformer2DModel
from peft import PeftModel
from pixart_fixtures import random_dit_transformer, random_pixart_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lorainit_diffusers import (
    METHODS,
    adapters_disabled,
    initialize,
    load_lora,
    make_method,
    save_diffusers_lora,
    save_kohya_lora,
    save_merged,
    save_peft_lora,
    trainable_parameters,
)
from lorainit_diffusers.adapters import adapter_weights
from lorainit_diffusers.families.classifier import ClassifierFamily, ImagePreparation

TARGETS = ["attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v", "ff.net.2"]
SCORED = ("cntlora", "eva", "lora_ga")
RUNS = [(name, False) for name in METHODS] + [(name, True) for name in SCORED]
EVERY_RUN = pytest.mark.parametrize(("name", "variable"), RUNS)
KINDS = ("pixart", "dit")


@pytest.fixture(scope="module")
def bases() -> dict[str, ModelMixin]:
    """Tests copy them and never change them."""
    torch.manual_seed(0)
    return {"pixart": random_pixart_transformer(), "dit": random_dit_transformer()}


def predict(module: nn.Module, seed: int = 9) -> Tensor:
    inner = module.base_model.model if isinstance(module, PeftModel) else module
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (2,), generator=generator)
    if isinstance(inner, DiTTransformer2DModel):
        return module(latents, timestep=timesteps, class_labels=torch.tensor([1, 2])).sample
    return module(
        latents,
        encoder_hidden_states=torch.randn(2, 6, 16, generator=generator),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample


@torch.no_grad()
def output(module: nn.Module) -> Tensor:
    return predict(module.eval())


def trained(base: ModelMixin, name: str = "cntlora", variable: bool = False, **options: object) -> ModelMixin:
    """The base with a LoRA of this kind after three training steps, in evaluation mode."""
    module = copy.deepcopy(base)
    seeds = range(3)
    initialize(
        module,
        name,
        list(seeds) if make_method(name).observes != "nothing" else (),
        lambda seed: predict(module, seed).square().mean(),
        rank=4,
        target_modules=TARGETS,
        variable_rank=variable,
        min_rank=0 if variable else 1,
        progress=False,
        **{"alpha": 6.0, **options},  # type: ignore[arg-type]
    )
    optimizer = torch.optim.Adam(trainable_parameters(module), lr=0.02)
    for seed in seeds:
        optimizer.zero_grad()
        (predict(module.train(), seed) - 1.0).square().mean().backward()
        optimizer.step()
    return module.eval()


def assert_adapted(module: nn.Module, expected: Tensor, base: ModelMixin) -> None:
    torch.testing.assert_close(output(module), expected, rtol=1e-5, atol=1e-5)
    assert (expected - output(base)).abs().max() > 1e-2  # so that the comparison can fail


@EVERY_RUN
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_folder_on_the_original_base(bases, tmp_path, kind, name, variable) -> None:
    module = trained(bases[kind], name, variable)
    folder = save_peft_lora(module, tmp_path / "lora", base_model="a/base", provenance={"init": name})
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "a/base"
    assert config["init_lora_weights"] is True
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert bool(config["rank_pattern"]) == variable
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["lorainit_diffusers"]) == {"init": name}
    stock = PeftModel.from_pretrained(copy.deepcopy(bases[kind]), str(folder))
    assert_adapted(stock, output(module), bases[kind])


@EVERY_RUN
def test_the_merged_model_is_the_adapted_one(bases, tmp_path, name, variable) -> None:
    module = trained(bases["pixart"], name, variable)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    folder = save_merged(module, tmp_path / "merged")
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    stock = PixArtTransformer2DModel.from_pretrained(folder)
    expected = {key: value for key, value in bases["pixart"].config.items() if not key.startswith("_")}
    assert {key: stock.config[key] for key in expected} == expected
    assert stock.state_dict().keys() == bases["pixart"].state_dict().keys()
    assert_adapted(stock, output(module), bases["pixart"])


@pytest.mark.parametrize("saved_as", ["peft", "peft file", "diffusers", "diffusers file"])
@pytest.mark.parametrize(("name", "variable"), [("cntlora", True), ("eva", True), ("gaussian", False)])
def test_our_loader_reads_both_formats_in_place(bases, tmp_path, saved_as, name, variable) -> None:
    module = trained(bases["dit"], name, variable)
    if saved_as.startswith("peft"):
        path = save_peft_lora(module, tmp_path)
        path = path / "adapter_model.safetensors" if saved_as == "peft file" else path
    else:
        path = save_diffusers_lora({"transformer": module}, tmp_path)
        path = path if saved_as == "diffusers file" else tmp_path
    fresh = copy.deepcopy(bases["dit"])
    load_lora(fresh, path)
    assert type(fresh) is DiTTransformer2DModel
    assert_adapted(fresh, output(module), bases["dit"])
    with adapters_disabled({"transformer": fresh}):
        assert torch.equal(output(fresh), output(bases["dit"]))


@pytest.mark.parametrize("variable", [False, True])
def test_dora_is_saved_loaded_and_merged(bases, tmp_path, variable) -> None:
    module = trained(bases["pixart"], "eva", variable, use_dora=True)
    expected = output(module)
    folder = save_peft_lora(module, tmp_path / "lora")
    assert_adapted(PeftModel.from_pretrained(copy.deepcopy(bases["pixart"]), str(folder)), expected, bases["pixart"])
    fresh = copy.deepcopy(bases["pixart"])
    load_lora(fresh, folder)
    assert_adapted(fresh, expected, bases["pixart"])
    merged = PixArtTransformer2DModel.from_pretrained(save_merged(module, tmp_path / "merged"))
    assert_adapted(merged, expected, bases["pixart"])


def test_rslora_and_its_alpha_are_folded(bases, tmp_path) -> None:
    module = trained(bases["dit"], "orthonormal", use_rslora=True)
    fresh = copy.deepcopy(bases["dit"])
    load_lora(fresh, save_peft_lora(module, tmp_path))
    assert_adapted(fresh, output(module), bases["dit"])
    assert {w.scaling for w in adapter_weights(fresh).values()} == {1.0}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_scale_of_a_folder_that_peft_wrote_is_its_configurations(bases, tmp_path, use_rslora) -> None:
    module = trained(bases["dit"], "eva", True, use_rslora=use_rslora)
    wrapped = PeftModel(copy.deepcopy(bases["dit"]), module.peft_config["default"])
    state = {f"base_model.model.{key}": value for key, value in module.state_dict().items() if ".lora_" in key}
    assert not wrapped.load_state_dict(state, strict=False).unexpected_keys
    wrapped.save_pretrained(str(tmp_path))
    fresh = copy.deepcopy(bases["dit"])
    load_lora(fresh, tmp_path)
    assert_adapted(fresh, output(module), bases["dit"])


def test_ranks_are_compressed_and_padded(bases, tmp_path) -> None:
    module = trained(bases["pixart"], "cntlora", True)
    folder = save_peft_lora(module, tmp_path, export_rank=2, pad_rank=4)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {value.shape[0] for key, value in tensors.items() if ".lora_A" in key} == {4}
    stock = PeftModel.from_pretrained(copy.deepcopy(bases["pixart"]), str(folder))
    for name, weights in adapter_weights(module).items():
        delta = weights.factors.lora_B.double() @ weights.factors.lora_A.double()
        delta -= weights.offset.lora_B.double() @ weights.offset.lora_A.double()
        left, values, right = torch.linalg.svd(weights.scaling * delta, full_matrices=False)
        best = left[:, :2] * values[:2] @ right[:2]
        saved = stock.base_model.model.get_submodule(name)
        actual = saved.lora_B["default"].weight.double() @ saved.lora_A["default"].weight.double()
        torch.testing.assert_close(actual, best, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="pad_rank 1 is smaller"):
        save_peft_lora(module, tmp_path, pad_rank=1)


def test_a_merged_model_may_be_in_shards_and_replaces_older_ones(bases, tmp_path) -> None:
    module = trained(bases["dit"])
    save_merged(module, tmp_path, max_shard_size="100KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_adapted(DiTTransformer2DModel.from_pretrained(tmp_path), output(module), bases["dit"])
    save_merged(module, tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["diffusion_pytorch_model.safetensors"]


def test_a_merged_model_keeps_the_bases_dtype_and_rounds_once(bases, tmp_path) -> None:
    module = trained(copy.deepcopy(bases["dit"]), "eva").to(torch.bfloat16)
    saved = load_file(save_merged(module, tmp_path) / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    for name, weights in adapter_weights(module).items():
        delta = weights.scaling * weights.factors.lora_B.double() @ weights.factors.lora_A.double()
        expected = module.get_submodule(name).base_layer.weight.double() + delta
        error = (saved[f"{name}.weight"].double() - expected).abs()
        assert bool((error <= expected.abs() * 2**-8 + 1e-7).all())


def test_a_transformers_model_is_saved_loaded_and_merged(tmp_path) -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    base = CLIPTextModelWithProjection(config).eval()
    tokens = torch.arange(12).view(2, 6)

    def embeds(module: nn.Module) -> Tensor:
        return module(tokens).text_embeds

    module = copy.deepcopy(base)
    initialize(
        module, "eva", [tokens], lambda _: embeds(module).mean(), rank=2, target_modules=["v_proj"], progress=False
    )
    optimizer = torch.optim.Adam(trainable_parameters(module), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (embeds(module) - 1.0).square().mean().backward()
        optimizer.step()
    folder = save_peft_lora(module, tmp_path / "lora")
    diffusers_file = save_diffusers_lora({"text_encoder": module}, tmp_path / "diffusers")
    with torch.no_grad():
        expected = embeds(module)
        assert (expected - embeds(base)).abs().max() > 1e-2
        torch.testing.assert_close(embeds(PeftModel.from_pretrained(copy.deepcopy(base), str(folder))), expected)
        for path in (folder, diffusers_file):
            fresh = copy.deepcopy(base)
            load_lora(fresh, path)
            torch.testing.assert_close(embeds(fresh), expected)
        merged = CLIPTextModelWithProjection.from_pretrained(save_merged(module, tmp_path / "merged"))
        torch.testing.assert_close(embeds(merged), expected)


def test_a_merged_model_with_tied_weights_is_saved_as_the_base_is(tmp_path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)).eval()
    tokens = torch.arange(12).view(2, 6)
    module = copy.deepcopy(base)
    initialize(module, "gaussian", rank=2, target_modules=["v_proj"], progress=False)
    with torch.no_grad():
        trainable_parameters(module)[1].normal_()  # B
        expected = module(tokens).logits
        merged = LlamaForCausalLM.from_pretrained(save_merged(module, tmp_path / "merged")).eval()
        torch.testing.assert_close(merged(tokens).logits, expected)
    base.save_pretrained(tmp_path / "base")
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("base", "merged")]
    assert names[0] == names[1]
    assert "model.embed_tokens.weight" in names[1]


def test_layers_whose_names_end_alike_are_told_apart(tmp_path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"b": nn.Linear(6, 6), "a": nn.ModuleDict({"b": nn.Linear(6, 6)})})
    module = copy.deepcopy(base)
    initialize(module, "gaussian", rank=2, target_modules="b")
    folder = save_peft_lora(module, tmp_path)
    fresh = copy.deepcopy(base)
    load_lora(fresh, folder)
    assert list(adapter_weights(fresh)) == ["b"]
    with pytest.raises(ValueError, match="neither diffusers nor transformers"):
        save_merged(module, tmp_path)


def test_files_that_cannot_be_loaded_are_named(bases, tmp_path) -> None:
    base = bases["dit"]
    with pytest.raises(FileNotFoundError, match="there is no LoRA at"):
        load_lora(copy.deepcopy(base), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds neither adapter_model\.safetensors nor pytorch_lora"):
        load_lora(copy.deepcopy(base), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_lora(copy.deepcopy(base), tmp_path / "adapter_model.bin")
    save_file({"base_model.model.x.bias": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json is missing"):
        load_lora(copy.deepcopy(base), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'x\.bias', which is no part of a LoRA"):
        load_lora(copy.deepcopy(base), tmp_path)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="layer 'x', but DiTTransformer2DModel has no such linear layer"):
        load_lora(copy.deepcopy(base), tmp_path)
    name = "transformer_blocks.0.attn1.to_q"
    save_file({f"base_model.model.{name}.lora_A.weight": torch.zeros(1, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds only part of the LoRA"):
        load_lora(copy.deepcopy(base), tmp_path)


def test_a_lora_of_another_model_is_refused_and_leaves_the_module_as_it_was(bases, tmp_path) -> None:
    folder = save_peft_lora(trained(bases["pixart"]), tmp_path)
    dit = copy.deepcopy(bases["dit"])
    with pytest.raises(ValueError, match=r"attn2\.to_k', but DiTTransformer2DModel has no such linear layer"):
        load_lora(dit, folder)
    wider = random_pixart_transformer(attention_head_dim=8, cross_attention_dim=16)
    with pytest.raises(ValueError, match=r"shape \(32, 32\), but that of PixArtTransformer2DModel has \(16, 16\)"):
        load_lora(wider, folder)
    assert not hasattr(dit, "peft_config")
    assert not hasattr(wider, "peft_config")
    adapted = copy.deepcopy(bases["pixart"])
    load_lora(adapted, folder)
    with pytest.raises(ValueError, match="already carries an adapter 'default'"):
        load_lora(adapted, folder)


def test_a_component_is_chosen_where_a_file_holds_several(bases, tmp_path) -> None:
    first, second = trained(bases["dit"], "eva"), trained(bases["dit"], "lora_ga")
    file = save_diffusers_lora({"transformer": first, "unet": second}, tmp_path)
    with pytest.raises(ValueError, match="holds LoRAs of transformer, unet: say which one"):
        load_lora(copy.deepcopy(bases["dit"]), file)
    with pytest.raises(ValueError, match="there is no 'text_encoder'"):
        load_lora(copy.deepcopy(bases["dit"]), file, component="text_encoder")
    for component, module in {"transformer": first, "unet": second}.items():
        fresh = copy.deepcopy(bases["dit"])
        load_lora(fresh, file, component=component, adapter_name="other")
        assert_adapted(fresh, output(module), bases["dit"])
    kohya = save_kohya_lora({"unet": first}, tmp_path / "kohya.safetensors", sdxl=False)
    with pytest.raises(ValueError, match="is in kohya's format"):
        load_lora(copy.deepcopy(bases["dit"]), kohya)


def test_what_cannot_be_merged_is_refused(bases, tmp_path) -> None:
    with pytest.raises(ValueError, match="carries no adapter 'default'"):
        save_merged(copy.deepcopy(bases["dit"]), tmp_path / "merged")
    module = trained(bases["dit"], "gaussian")
    module.hf_quantizer = object()
    with pytest.raises(ValueError, match="is quantised, and a LoRA cannot be merged into it"):
        save_merged(module, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# --------------------------------------------------------------------------------- modules that were trained in full


def trained_classifier(
    kind: str = "vit",
    name: str = "cntlora",
    variable: bool = False,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> ClassifierFamily:
    """A family after three training steps of adapters and head, on a base whose weights are seeded."""
    torch.manual_seed(0)
    side = 32 if kind == "swin" else SIDE
    base = random_classifier(kind) if model is None else model
    family = ClassifierFamily(base.requires_grad_(False), ImagePreparation(side, side), CLASSES)
    batch = {"pixel_values": pixels(side), "labels": torch.arange(6) % 3}
    usual = {"rank": 2, "alpha": 3.0, "variable_rank": variable, "progress": False}
    initialize(family, name, [batch], **{**usual, **options})
    heads = [parameter for head in family.heads.values() for parameter in head.parameters()]
    optimizer = torch.optim.Adam([*trainable_parameters(family.model), *heads], lr=0.02)
    for seed in range(3):
        optimizer.zero_grad()
        family.loss(batch, torch.Generator().manual_seed(seed)).backward()
        optimizer.step()
    return family


def pixels(side: int = SIDE, count: int = 6) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def untrained(kind: str = "vit") -> PreTrainedModel:
    """The base of `trained_classifier`."""
    torch.manual_seed(0)
    return random_classifier(kind)


@torch.no_grad()
def logits(module: nn.Module, side: int = SIDE) -> Tensor:
    return module.eval()(pixel_values=pixels(side) * 2 - 1).logits


def head_names(family: ClassifierFamily) -> list[str]:
    return [name.removeprefix("model.") for name in family.heads]


@EVERY_RUN
def test_peft_loads_adapter_and_head_on_the_original_base(tmp_path, name, variable) -> None:
    family = trained_classifier(name=name, variable=variable)
    expected = logits(family.model)
    folder = save_peft_lora(family.model, tmp_path, full_modules=head_names(family))
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["modules_to_save"] == ["classifier"]
    assert "base_model.model.classifier.weight" in load_file(folder / "adapter_model.safetensors")
    stock = PeftModel.from_pretrained(untrained(), str(folder))
    torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(untrained())).abs().max() > 1e-2
    ours = untrained()
    load_lora(ours, folder)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    merged = AutoModelForImageClassification.from_pretrained(save_merged(family.model, tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert merged.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize("kind", ["swin", "convnext", "clip", "dinov2"])
def test_heads_of_other_architectures_are_loaded_too(tmp_path, kind) -> None:
    family = trained_classifier(kind, rank=2)
    side = family.preparation.resolution
    folder = save_peft_lora(family.model, tmp_path, full_modules=head_names(family))
    stock = PeftModel.from_pretrained(untrained(kind), str(folder))
    torch.testing.assert_close(logits(stock, side), logits(family.model, side), rtol=1e-4, atol=1e-4)


def test_both_heads_of_a_distilled_model_are_loaded(tmp_path) -> None:
    torch.manual_seed(0)
    base = teacher_deit()
    family = trained_classifier(model=copy.deepcopy(base))
    folder = save_peft_lora(family.model, tmp_path, full_modules=head_names(family))
    assert len(json.loads((folder / "adapter_config.json").read_text("utf-8"))["modules_to_save"]) == 2
    stock = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
    torch.testing.assert_close(logits(stock), logits(family.model), rtol=1e-4, atol=1e-4)


def test_a_head_is_saved_beside_a_dora_and_a_compressed_lora(tmp_path) -> None:
    family = trained_classifier(name="eva", use_dora=True)
    folder = save_peft_lora(family.model, tmp_path / "dora", full_modules=head_names(family))
    stock = PeftModel.from_pretrained(untrained(), str(folder))
    torch.testing.assert_close(logits(stock), logits(family.model), rtol=1e-4, atol=1e-4)
    family = trained_classifier(name="eva")
    folder = save_peft_lora(family.model, tmp_path / "small", full_modules=head_names(family), export_rank=1)
    loaded = PeftModel.from_pretrained(untrained(), str(folder)).base_model.model.classifier
    head = family.heads["model.classifier"]
    assert torch.equal(loaded.modules_to_save["default"].weight, head.weight)


def test_a_new_head_needs_a_base_of_as_many_labels(tmp_path) -> None:
    base = write_classifier(tmp_path / "base")
    names = ("ant", "bee", "cat", "dog")
    family = ClassifierFamily.from_pretrained(base, class_names=names)
    initialize(family, "gaussian", rank=2, progress=False)
    folder = save_peft_lora(family.model, tmp_path / "lora", full_modules=head_names(family))
    fresh = AutoModelForImageClassification.from_pretrained(
        base, id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, str(folder))), logits(family.model))
    small = AutoModelForImageClassification.from_pretrained(base)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    with pytest.raises(ValueError, match=r"'classifier\.\w+', trained in full, has shape \(4,.*\(3,.* in ViT"):
        load_lora(small, folder)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_full_modules_that_cannot_be_saved_or_loaded_are_named(tmp_path) -> None:
    family = trained_classifier()
    with pytest.raises(ValueError, match="has no module 'head' that could have been trained in full"):
        save_peft_lora(family.model, tmp_path, full_modules=["head"])
    block = next(iter(adapter_weights(family.model))).rpartition(".")[0]
    with pytest.raises(ValueError, match="carries an adapter: it cannot be saved in full"):
        save_peft_lora(family.model, tmp_path, full_modules=[block])
    folder = save_peft_lora(family.model, tmp_path, full_modules=["classifier"])
    headless = untrained().vit
    with pytest.raises(ValueError, match=r"holds 'classifier\.\w+', trained in full, but ViTModel"):
        load_lora(headless, folder)
