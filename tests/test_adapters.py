"""Adapters on a random Stable Diffusion: step 0, the offset, checkpoints, and files that stock loaders read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from core_fixtures import (
    ADAPTED_STATES,
    TARGETS,
    RandomSD,
    adapted,
    base_weights,
    best_rank,
    product,
    relative_error,
    small_unet,
    tiny_attention,
)
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lorainit_diffusers import (
    METHODS,
    adapter_state_dict,
    adapters_disabled,
    initialize,
    load_adapter_state_dict,
    make_method,
    save_diffusers_lora,
    save_kohya_lora,
    trainable_parameters,
)
from lorainit_diffusers.adapters import (
    AdapterWeights,
    adapter_weights,
    attach,
    lora_layers,
    unwrap,
)
from lorainit_diffusers.export import discarded_energy, exported_factors
from lorainit_diffusers.methods import Initializer, LoraFactors

RANK, ALPHA = 4, 6.0
SCORED = ("cntlora", "eva", "lora_ga", "gradient_step", "corda", "pissa")
OFFSET = [name for name in METHODS if make_method(name).step_zero == "offset"]
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)
EVERY_STATE = pytest.mark.parametrize("state", ADAPTED_STATES)


@pytest.fixture(scope="module")
def pipeline(random_sd: Path) -> StableDiffusionPipeline:
    """The stock pipeline on the original base; tests copy its modules and never change them."""
    torch.manual_seed(0)
    unet = small_unet()  # 16 target layers instead of 32: half the time of these tests goes into injecting adapters
    return StableDiffusionPipeline.from_pretrained(random_sd, unet=unet)


@pytest.fixture
def base(pipeline: StableDiffusionPipeline) -> RandomSD:
    return RandomSD(pipeline.unet, pipeline.text_encoder).copy()


def run(
    model: RandomSD,
    method: str | Initializer,
    components: tuple[str, ...] = ("unet",),
    state: str = "raw",
    **kwargs: object,
) -> dict[str, nn.Module]:
    """Initialise these components of the model in this state; returns them."""
    for component in components:
        setattr(model, component, adapted(getattr(model, component), state, TARGETS[component]))
    modules = {component: getattr(model, component) for component in components}
    if state == "raw":
        kwargs = {"rank": RANK, "alpha": ALPHA, "target_modules": TARGETS} | kwargs
    report = initialize(modules, method, model.batches(), model.loss, progress=False, **kwargs)  # type: ignore[arg-type]
    assert not any(layer.fallback for layer in report.layers.values())
    return modules


def stock(pipeline: StableDiffusionPipeline, file: Path) -> RandomSD:
    """The original base with the file loaded by diffusers' own loader."""
    fresh = StableDiffusionPipeline(
        unet=copy.deepcopy(pipeline.unet),
        text_encoder=copy.deepcopy(pipeline.text_encoder),
        vae=pipeline.vae,
        tokenizer=pipeline.tokenizer,
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    fresh.load_lora_weights(str(file.parent), weight_name=file.name)
    return RandomSD(fresh.unet, fresh.text_encoder)


def all_trainable(modules: dict[str, nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules.values() for parameter in trainable_parameters(module)]


def ranks_of(module: nn.Module) -> dict[str, int]:
    return {name: layer.lora_A["default"].weight.shape[0] for name, layer in lora_layers(module).items()}


# --- step 0 ---------------------------------------------------------------------------------------------------------


@EVERY_METHOD
@EVERY_STATE
def test_step_zero_is_the_base_model_and_only_lora_trains(base, name, state):
    before, weights = base.output(), base_weights(base.unet)
    modules = run(base, name, state=state)
    moved = make_method(name).step_zero == "moved"
    assert (relative_error(base.output(), before) > 1e-3) == moved
    assert moved or relative_error(base.output(), before) < 1e-5
    after = base_weights(base.unet)
    assert after.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(after[key], value), key
    trainable = {key: p for key, p in base.unet.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(ranks_of(base.unet)) == 2 * 16
    assert all(key.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for key in trainable)
    assert all(p.dtype == torch.float32 for p in trainable.values())
    assert {id(p) for p in all_trainable(modules)} == {id(p) for p in trainable.values()}


@EVERY_METHOD
def test_step_zero_holds_for_the_text_encoder_too(base, name):
    before, weights = base.output(), base_weights(base.text_encoder)
    run(base, name, components=("unet", "text_encoder"))
    moved = make_method(name).step_zero == "moved"
    assert (relative_error(base.output(), before) > 1e-3) == moved
    assert moved or relative_error(base.output(), before) < 1e-5
    for key, value in base_weights(base.text_encoder).items():
        assert torch.equal(value, weights[key])
    assert len(ranks_of(base.text_encoder)) == 8


@EVERY_METHOD
def test_the_adapter_learns_and_the_base_stays_bit_identical(base, name):
    before, weights = base.output(), base_weights(base.unet)
    modules = run(base, name)
    start = base.output()
    base.train(all_trainable(modules))
    assert relative_error(base.output(), start) > 1e-3
    with adapters_disabled(modules):
        assert torch.equal(base.output(), before)
    for key, value in base_weights(base.unet).items():
        assert torch.equal(value, weights[key])


def test_an_active_start_moves_and_has_no_offset(base):
    before = base.output()
    modules = run(base, make_method("cntlora", {"base": "active", "gamma": 0.5}))
    assert relative_error(base.output(), before) > 1e-3
    assert not any(weights.offset for weights in adapter_weights(modules["unet"]).values())


@EVERY_STATE
def test_adapters_disabled_restores_everything_even_after_an_exception(base, state):
    modules = run(base, "pissa", state=state)
    base.train(all_trainable(modules), steps=1)
    trained = base.output()
    for layer in lora_layers(base.unet).values():  # PEFT's own switch would make A trainable again
        layer.lora_A["default"].weight.requires_grad_(False)
    flags = [p.requires_grad for p in base.unet.parameters()]
    with pytest.raises(KeyError), adapters_disabled(modules):
        raise KeyError
    assert torch.equal(base.output(), trained)
    assert [p.requires_grad for p in base.unet.parameters()] == flags


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state", ["raw", "add_adapter"])
def test_a_sixteen_bit_base_gets_a_float32_adapter(base, dtype, state):
    base.unet.to(dtype)
    weights = base_weights(base.unet)
    modules = run_without_data(base, "pissa", state)
    assert {p.dtype for p in all_trainable(modules)} == {torch.float32}
    for key, value in base_weights(base.unet).items():
        assert value.dtype == dtype
        assert torch.equal(value, weights[key])
    name, layer = next(iter(lora_layers(base.unet).items()))
    x = torch.randn(3, layer.get_base_layer().in_features).to(dtype)
    expected = layer.get_base_layer()(x)
    assert layer(x).dtype == dtype
    assert relative_error(layer(x), expected) < 5e-3, name


def run_without_data(model: RandomSD, method: str, state: str) -> dict[str, nn.Module]:
    model.unet = adapted(model.unet, state, TARGETS["unet"])
    modules = {"unet": model.unet}
    initialize(modules, method, rank=RANK, alpha=ALPHA, target_modules=TARGETS, progress=False)
    return modules


# --- the offset -----------------------------------------------------------------------------------------------------


def offsets_of(module: nn.Module) -> dict[str, LoraFactors]:
    """Initial factors by layer, which must be in every layer, and nothing that could be trained."""
    offsets = {name: weights.offset for name, weights in adapter_weights(module).items()}
    assert all(offset is not None for offset in offsets.values())
    parameters = {p.data_ptr() for p in module.parameters()}
    for offset in offsets.values():
        for factor in offset:
            assert not factor.requires_grad
            assert factor.dtype == torch.float32
            assert factor.data_ptr() not in parameters
    return offsets


@pytest.mark.parametrize("name", OFFSET)
@EVERY_STATE
def test_no_switch_makes_the_offset_trainable_nor_loses_it(base, name, state):
    before = base.output()
    modules = run(base, name, state=state)
    module = base.unet
    initial = {key: LoraFactors(*(f.clone() for f in offset)) for key, offset in offsets_of(module).items()}
    module.requires_grad_(True)
    offsets_of(module)
    module.requires_grad_(False)
    with adapters_disabled(modules):
        offsets_of(module)
    for layer in lora_layers(module).values():  # what every switch of PEFT and diffusers comes down to
        layer.enable_adapters(False)
        layer.enable_adapters(True)
    if state == "add_adapter":
        module.disable_adapters()
        assert torch.equal(base.output(), before)
        module.enable_adapters()
        module.set_adapter("default")
    if state == "get_peft_model":
        with module.disable_adapter():
            assert torch.equal(base.output(), before)
        module.set_adapter("default")
    assert torch.equal(base.output(), before)  # equal factors cancel bit for bit
    base.train([p for p in module.parameters() if p.requires_grad])
    for key, offset in offsets_of(module).items():
        assert all(torch.equal(a, b) for a, b in zip(offset, initial[key], strict=True))


def test_initialising_again_replaces_the_offset_and_a_zero_delta_method_removes_it(base):
    before = base.output()
    run(base, "pissa")
    base.train(trainable_parameters(base.unet), steps=1)
    modules = {"unet": base.unet}
    initialize(modules, "olora", rank=RANK, progress=False)
    assert relative_error(base.output(), before) < 1e-5
    offsets_of(base.unet)
    initialize(modules, "gaussian", rank=RANK, progress=False)
    assert relative_error(base.output(), before) < 1e-6
    assert not any(weights.offset for weights in adapter_weights(base.unet).values())


def test_another_adapter_is_kept_but_inactive_as_after_pefts_own_add_adapter(base):
    before = base.output()
    base.unet = adapted(base.unet, "add_adapter", ["to_q"], init_lora_weights=False)  # a random "default"
    assert relative_error(base.output(), before) > 1e-3
    others = {key: layer.lora_B["default"].weight.clone() for key, layer in lora_layers(base.unet).items()}
    targets = {"unet": ["to_q", "to_v"]}
    initialize({"unet": base.unet}, "pissa", rank=2, target_modules=targets, adapter_name="mine", progress=False)
    assert relative_error(base.output(), before) < 1e-5
    mine = lora_layers(base.unet, "mine")
    assert len(mine) == 8
    for key, layer in lora_layers(base.unet).items():
        assert torch.equal(layer.lora_B["default"].weight, others[key])
    trainable = {key for key, p in base.unet.named_parameters() if p.requires_grad}
    assert len(trainable) == 16
    assert all(".mine." in key for key in trainable)
    base.train(trainable_parameters(base.unet, "mine"), steps=1)
    assert relative_error(base.output(), before) > 1e-4


# --- an optimiser made before ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["add_adapter", "get_peft_model"])
@pytest.mark.parametrize("name", ["eva", "cntlora", "gaussian"])
def test_an_optimizer_made_before_keeps_its_parameters_where_the_rank_stays(base, name, state):
    base.unet = adapted(base.unet, state, TARGETS["unet"])
    parameters = [p for p in base.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    initialize({"unet": base.unet}, name, base.batches(), base.loss, progress=False)
    assert {id(p) for p in trainable_parameters(base.unet)} == {id(p) for p in parameters}
    start = base.output()
    base.loss(base.batches(1)[0]).backward()
    optimizer.step()
    assert not torch.equal(base.output(), start)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eva", "cntlora", "pissa"])
@pytest.mark.parametrize("variable", [False, True])
@EVERY_STATE
def test_adapter_state_round_trip_is_bit_exact(base, name, variable, state):
    fresh = base.copy()
    components = ("unet", "text_encoder")
    modules = run(base, name, components, variable_rank=variable)
    base.train(all_trainable(modules))
    saved = adapter_state_dict(modules)
    if variable:
        assert len(set(ranks_of(base.unet).values())) > 1
    for component in components:
        setattr(fresh, component, adapted(getattr(fresh, component), state, TARGETS[component]))
    restored = {component: getattr(fresh, component) for component in components}
    load_adapter_state_dict(restored, saved)
    again = adapter_state_dict(restored)
    assert again.keys() == saved.keys()
    for key, value in saved.items():
        assert torch.equal(again[key], value), key
        assert again[key].dtype == value.dtype
    assert torch.equal(fresh.output(), base.output())
    assert ranks_of(fresh.unet) == ranks_of(base.unet)
    if make_method(name).step_zero == "offset":
        offsets_of(fresh.unet)
    assert {key for key, p in fresh.unet.named_parameters() if p.requires_grad} == {
        key for key, p in fresh.unet.named_parameters() if key.endswith(("_A.default.weight", "_B.default.weight"))
    }
    # Both go on alike.
    for model, parts in ((base, modules), (fresh, restored)):
        model.train(all_trainable(parts))
    assert torch.equal(fresh.output(), base.output())


def test_a_state_is_a_snapshot(base):
    modules = run(base, "eva")
    saved = adapter_state_dict(modules)
    frozen = {key: value.clone() for key, value in saved.items()}
    base.train(all_trainable(modules))
    assert all(torch.equal(saved[key], frozen[key]) for key in saved)


def test_a_state_of_other_layers_or_components_is_refused(base):
    fresh = base.copy()
    saved = adapter_state_dict(run(base, "gaussian"))
    with pytest.raises(ValueError, match=r"'text_encoder'.*no layer at all"):
        load_adapter_state_dict({"text_encoder": fresh.text_encoder}, saved)
    renamed = {key.replace("down_blocks.0", "down_blocks.7"): value for key, value in saved.items()}
    with pytest.raises(ValueError, match=r"down_blocks\.7.*same base model"):
        load_adapter_state_dict({"unet": fresh.unet}, renamed)
    with pytest.raises(ValueError, match="carries no adapter 'default'"):
        adapter_state_dict({"unet": fresh.unet})


# --- stock loaders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variable"),
    [*((name, False) for name in METHODS), *((name, True) for name in SCORED)],
    ids=[*METHODS, *(f"{name}-variable" for name in SCORED)],
)
def test_the_saved_file_loads_in_the_stock_pipeline(pipeline, base, tmp_path, name, variable):
    before = base.output()
    modules = run(base, name, ("unet", "text_encoder"), variable_rank=variable)
    base.train(all_trainable(modules))
    trained = base.output()
    assert relative_error(trained, before) > 1e-2
    if variable:
        assert len({rank for module in modules.values() for rank in ranks_of(module).values()}) > 1
    both = stock(pipeline, save_diffusers_lora(modules, tmp_path / "both"))
    assert float((both.output() - trained).abs().max()) < 1e-4
    assert relative_error(both.output(), trained) < 1e-4
    # A file of the UNet alone: as if the text encoder had not been trained.
    only_unet = stock(pipeline, save_diffusers_lora({"unet": modules["unet"]}, tmp_path / "unet"))
    with adapters_disabled({"text_encoder": modules["text_encoder"]}):
        trained_unet = base.output()
    assert relative_error(trained_unet, trained) > 1e-3
    assert float((only_unet.output() - trained_unet).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["eva", "pissa"])
@pytest.mark.parametrize("state", ["add_adapter", "get_peft_model"])
def test_the_file_does_not_depend_on_how_the_module_was_adapted(pipeline, base, tmp_path, name, state):
    modules = run(base, name, state=state)
    base.train(all_trainable(modules))
    path = save_diffusers_lora(modules, tmp_path)
    assert all(key.startswith("unet.") and "base_model" not in key for key in load_file(path))
    assert float((stock(pipeline, path).output() - base.output()).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["eva", "pissa"])
@pytest.mark.parametrize("state", ADAPTED_STATES)
def test_rslora_scales_by_the_root_of_the_rank_and_exports(pipeline, base, tmp_path, name, state):
    base.unet = adapted(base.unet, state, TARGETS["unet"], use_rslora=True)
    modules = {"unet": base.unet}
    before = base.output()
    report = initialize(
        modules,
        name,
        base.batches(),
        base.loss,
        rank=RANK,
        alpha=ALPHA,
        target_modules=TARGETS,
        variable_rank=True,
        use_rslora=True,
        progress=False,
    )
    assert relative_error(base.output(), before) < 1e-5
    for key, layer in lora_layers(base.unet).items():
        assert layer.scaling["default"] == pytest.approx(ALPHA / RANK**0.5)
        assert report.layers[f"unet.{key}"].alpha / report.layers[f"unet.{key}"].rank ** 0.5 == pytest.approx(3.0)
    base.train(all_trainable(modules))
    assert float((stock(pipeline, save_diffusers_lora(modules, tmp_path)).output() - base.output()).abs().max()) < 1e-4


@pytest.mark.parametrize("name", ["eva", "pissa"])
def test_pad_rank_makes_all_ranks_equal_and_changes_nothing(pipeline, base, tmp_path, name):
    modules = run(base, name, variable_rank=True)
    base.train(all_trainable(modules))
    exported = max(ranks_of(base.unet).values()) * (2 if name == "pissa" else 1)
    path = save_diffusers_lora(modules, tmp_path, pad_rank=exported + 1)
    shapes = {key: value.shape for key, value in load_file(path).items()}
    assert {shape[0] for key, shape in shapes.items() if key.endswith("lora_A.weight")} == {exported + 1}
    assert {shape[1] for key, shape in shapes.items() if key.endswith("lora_B.weight")} == {exported + 1}
    assert float((stock(pipeline, path).output() - base.output()).abs().max()) < 1e-4
    with pytest.raises(ValueError, match=f"pad_rank {exported - 1} is smaller than the exported rank {exported}"):
        save_diffusers_lora(modules, tmp_path, pad_rank=exported - 1)


def test_the_metadata_is_minimal_and_has_alpha_equal_to_rank(base, tmp_path):
    modules = run(base, "pissa", ("unet", "text_encoder"), variable_rank=True)
    path = save_diffusers_lora(modules, tmp_path, provenance={"init": "pissa", "seed": 0})
    with safe_open(path, "pt") as file:
        blobs = file.metadata()
    assert json.loads(blobs["lorainit_diffusers"]) == {"init": "pissa", "seed": 0}
    metadata = json.loads(blobs["lora_adapter_metadata"])
    fields = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "init_lora_weights"}
    assert metadata.keys() == {f"{component}.{field}" for component in modules for field in fields}
    for component in modules:
        assert metadata[f"{component}.r"] == metadata[f"{component}.lora_alpha"]
        assert metadata[f"{component}.rank_pattern"] == metadata[f"{component}.alpha_pattern"]
        assert metadata[f"{component}.init_lora_weights"] is True  # "pissa" would change the loader's base weights


@pytest.mark.parametrize("name", ["eva", "cntlora", "pissa"])
def test_the_kohya_file_reproduces_every_weight(pipeline, base, tmp_path, name):
    modules = run(base, name, ("unet", "text_encoder"), variable_rank=name != "pissa")
    base.train(all_trainable(modules))
    path = save_kohya_lora(modules, tmp_path / "kohya.safetensors")
    tensors = load_file(path)
    checked = 0
    for component, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_text_model_")):
        for key, layer in lora_layers(modules[component]).items():
            stem = prefix + key.removeprefix("text_model.").replace(".", "_")
            up, down = tensors[f"{stem}.lora_up.weight"].double(), tensors[f"{stem}.lora_down.weight"].double()
            alpha = float(tensors[f"{stem}.alpha"])
            linear = layer.get_base_layer()
            rebuilt = linear.weight.double() + alpha / down.shape[0] * up @ down
            bias = 0 if linear.bias is None else linear.bias
            effective = (layer(torch.eye(linear.in_features)) - bias).mT.detach()
            assert relative_error(rebuilt, effective) < 1e-5, key
            checked += 3
    assert checked == len(tensors)
    if name == "pissa":  # diffusers' own converter of this format is right for uniform ranks only
        assert float((stock(pipeline, path).output() - base.output()).abs().max()) < 1e-4


def test_a_padded_kohya_file_with_variable_ranks_loads_through_diffusers(pipeline, base, tmp_path):
    modules = run(base, "eva", variable_rank=True)
    base.train(all_trainable(modules))
    rank = max(ranks_of(base.unet).values())
    path = save_kohya_lora(modules, tmp_path / "kohya.safetensors", pad_rank=rank)
    assert {float(value) for key, value in load_file(path).items() if key.endswith(".alpha")} == {float(rank)}
    assert float((stock(pipeline, path).output() - base.output()).abs().max()) < 1e-4


def test_a_kohya_component_without_a_prefix_is_refused(base, tmp_path):
    modules = run(base, "gaussian")
    with pytest.raises(ValueError, match="'transformer' has no kohya key prefix"):
        save_kohya_lora({"transformer": modules["unet"]}, tmp_path / "x.safetensors")
    save_kohya_lora({"prior": modules["unet"]}, tmp_path / "x.safetensors", prefixes={"prior": "lora_prior"})
    assert all(key.startswith("lora_prior_") for key in load_file(tmp_path / "x.safetensors"))


# --- DoRA -----------------------------------------------------------------------------------------------------------


def run_dora(model: RandomSD, state: str = "raw", method: str = "eva", **kwargs: object) -> dict[str, nn.Module]:
    """Initialise DoRA adapters on both components in this state."""
    for component, targets in TARGETS.items():
        setattr(model, component, adapted(getattr(model, component), state, targets, use_dora=True))
    modules = {component: getattr(model, component) for component in TARGETS}
    options: dict[str, object] = {"rank": RANK, "alpha": ALPHA, "target_modules": TARGETS} if state == "raw" else {}
    options |= {"use_dora": True} if state == "raw" else {}
    initialize(modules, method, model.batches(), model.loss, progress=False, **options | kwargs)  # type: ignore[arg-type]
    return modules


def assert_magnitudes_are_the_bases_row_norms(module: nn.Module) -> None:
    layers = lora_layers(module)
    assert layers
    for name, layer in layers.items():
        magnitude = layer.lora_magnitude_vector["default"].weight
        expected = torch.stack([row.norm() for row in layer.get_base_layer().weight.detach().double()])
        assert relative_error(magnitude, expected) < 1e-6, name
        assert magnitude.dtype == torch.float32
        assert magnitude.requires_grad


@EVERY_STATE
def test_dora_starts_at_the_base_model_and_trains_its_magnitudes(base, state):
    before, weights = base.output(), base_weights(base.unet)
    modules = run_dora(base, state)
    assert torch.equal(base.output(), before)
    for module in modules.values():
        assert_magnitudes_are_the_bases_row_norms(module)
        trainable = {key for key, p in module.named_parameters() if p.requires_grad}
        assert len(trainable) == len(trainable_parameters(module)) == 3 * len(lora_layers(module))
        assert sum("lora_magnitude_vector" in key for key in trainable) == len(lora_layers(module))
    parameters = all_trainable(modules)
    copies = [p.detach().clone() for p in parameters]
    base.train(parameters)
    assert not any(torch.equal(p, copied) for p, copied in zip(parameters, copies, strict=True))
    with adapters_disabled(modules):
        assert torch.equal(base.output(), before)
    assert all(torch.equal(value, weights[key]) for key, value in base_weights(base.unet).items())


@pytest.mark.parametrize("rank", [RANK, RANK + 1])
def test_initialising_a_trained_dora_adapter_takes_its_magnitudes_from_the_base(base, rank):
    before = base.output()
    modules = run_dora(base)
    base.train(all_trainable(modules))
    magnitudes = {id(layer.lora_magnitude_vector["default"].weight) for layer in lora_layers(base.unet).values()}
    initialize(modules, "orthonormal", rank=rank, progress=False)
    assert torch.equal(base.output(), before)
    assert set(ranks_of(base.unet).values()) == {rank}
    for module in modules.values():
        assert_magnitudes_are_the_bases_row_norms(module)
    # An optimiser made before still holds them.
    assert magnitudes == {
        id(layer.lora_magnitude_vector["default"].weight) for layer in lora_layers(base.unet).values()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("state", ["raw", "add_adapter"])
def test_dora_on_a_sixteen_bit_base_has_float32_magnitudes_and_the_bases_function(base, dtype, state):
    base.unet = adapted(base.unet.to(dtype), state, TARGETS["unet"], use_dora=True)
    initialize({"unet": base.unet}, "orthonormal", rank=RANK, target_modules=TARGETS, use_dora=True, progress=False)
    assert_magnitudes_are_the_bases_row_norms(base.unet)
    for name, layer in lora_layers(base.unet).items():
        x = torch.randn(3, layer.get_base_layer().in_features).to(dtype)
        assert torch.equal(layer(x), layer.get_base_layer()(x)), name


@pytest.mark.parametrize("variable", [False, True])
@EVERY_STATE
def test_a_dora_state_round_trip_is_bit_exact_and_goes_on_alike(base, variable, state):
    fresh = base.copy()
    modules = run_dora(base, variable_rank=variable)
    base.train(all_trainable(modules))
    saved = adapter_state_dict(modules)
    assert sum(key.endswith(".magnitude") for key in saved) == 16 + 8
    for component, targets in TARGETS.items():
        setattr(fresh, component, adapted(getattr(fresh, component), state, targets, use_dora=True))
    restored = {component: getattr(fresh, component) for component in TARGETS}
    load_adapter_state_dict(restored, saved)
    again = adapter_state_dict(restored)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], value) for key, value in saved.items())
    for model, parts in ((base, modules), (fresh, restored)):
        model.train(all_trainable(parts))
    assert torch.equal(fresh.output(), base.output())


def test_a_dora_state_and_a_plain_adapter_do_not_mix(base):
    plain, fresh = base.copy(), base.copy()
    dora_state = adapter_state_dict({"unet": run_dora(base)["unet"]})
    plain_state = adapter_state_dict(run(plain, "gaussian"))
    with pytest.raises(ValueError, match="hold a DoRA magnitude, but adapter 'default' does not use DoRA"):
        load_adapter_state_dict({"unet": plain.unet}, dora_state)
    with pytest.raises(ValueError, match=r"no DoRA magnitude for layer 'unet\.down_blocks.*without an adapter"):
        load_adapter_state_dict({"unet": base.unet}, plain_state)
    load_adapter_state_dict({"unet": fresh.unet}, dora_state)
    assert all(layer.use_dora["default"] for layer in lora_layers(fresh.unet).values())


@pytest.mark.parametrize("state", ["raw", "get_peft_model"])
def test_dora_refuses_an_offset_and_leaves_the_module_as_it_was(state):
    module = adapted(tiny_attention(), state, ["to_q"], use_dora=True)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    factors = LoraFactors(torch.randn(2, 16), torch.randn(16, 2))
    with pytest.raises(ValueError, match=r"'to_q'.*offset.*DoRA.*eva or orthonormal, or drop use_dora"):
        attach(module, {"to_q": AdapterWeights(factors, 1.0, offset=factors)}, use_dora=True)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("variable", [False, True])
@EVERY_STATE
def test_a_dora_file_loads_in_the_stock_pipeline(pipeline, base, tmp_path, variable, state):
    modules = run_dora(base, state, variable_rank=variable)
    base.train(all_trainable(modules))
    assert relative_error(base.output(), RandomSD(pipeline.unet, pipeline.text_encoder).output()) > 1e-2
    path = save_diffusers_lora(modules, tmp_path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.use_dora"] is metadata["text_encoder.use_dora"] is True
    loaded = stock(pipeline, path)
    assert float((loaded.output() - base.output()).abs().max()) < 1e-4
    trained = {name: layer.lora_magnitude_vector["default"].weight for name, layer in lora_layers(base.unet).items()}
    for name, layer in lora_layers(loaded.unet, "default_0").items():
        assert torch.equal(layer.lora_magnitude_vector["default_0"].weight, trained[name])


def test_a_dora_adapter_saved_by_peft_reloads(base, tmp_path):
    fresh = base.copy()
    modules = run_dora(base, "get_peft_model", variable_rank=True)
    base.train(all_trainable(modules))
    for component, module in modules.items():
        module.save_pretrained(tmp_path / component)
        setattr(fresh, component, PeftModel.from_pretrained(getattr(fresh, component), tmp_path / component))
    assert relative_error(fresh.output(), base.output()) < 1e-6


# --- compression ----------------------------------------------------------------------------------------------------


def dense_products(module: nn.Module) -> dict[str, Tensor]:
    """All that each layer's adapter adds to its weight, in float64, from the parameters themselves."""
    products: dict[str, Tensor] = {}
    for name, weights in adapter_weights(module).items():
        products[name] = product(weights.factors, weights.scaling)
        if weights.offset is not None:
            products[name] -= product(weights.offset, weights.scaling)
    return products


def discarded_by_svd(matrix: Tensor, rank: int) -> float:
    return float((matrix - best_rank(matrix, rank)).square().sum() / matrix.square().sum())


@pytest.mark.parametrize(("name", "variable"), [("eva", True), ("pissa", False), ("pissa", True)])
@pytest.mark.parametrize("export_rank", [1, 3, 5])
def test_compression_is_the_best_approximation_and_says_what_it_discards(base, name, variable, export_rank):
    modules = run(base, name, variable_rank=variable)
    base.train(all_trainable(modules))
    products, full = dense_products(base.unet), exported_factors(base.unet)
    energy = discarded_energy(modules, export_rank)
    assert energy.keys() == {f"unet.{key}" for key in full}
    for key, factors in exported_factors(base.unet, export_rank=export_rank).items():
        rank = full[key].lora_A.shape[0]
        assert factors.lora_A.shape[0] == factors.lora_B.shape[1] == min(rank, export_rank)
        assert factors.lora_A.dtype == factors.lora_B.dtype == torch.float32
        if rank <= export_rank:
            assert energy[f"unet.{key}"] == 0
            assert all(torch.equal(a, b) for a, b in zip(factors, full[key], strict=True))
            continue
        assert relative_error(product(factors), best_rank(products[key], export_rank)) < 1e-4
        assert energy[f"unet.{key}"] == pytest.approx(discarded_by_svd(products[key], export_rank), rel=1e-3, abs=1e-9)
        gram_A, gram_B = factors.lora_A @ factors.lora_A.mT, factors.lora_B.mT @ factors.lora_B
        assert relative_error(gram_A, gram_B) < 1e-4  # balanced
    assert max(energy.values()) > 1e-3 or export_rank >= max(factors.lora_A.shape[0] for factors in full.values())


@pytest.mark.parametrize("name", ["eva", "pissa"])
def test_a_compressed_and_padded_file_is_the_base_plus_the_best_approximations(pipeline, base, tmp_path, name):
    reference = base.copy()
    modules = run(base, name, ("unet", "text_encoder"), variable_rank=True)
    base.train(all_trainable(modules))
    for component, module in modules.items():
        for key, delta in dense_products(module).items():
            getattr(reference, component).get_submodule(key).weight.data += best_rank(delta, 2).float()
    assert relative_error(reference.output(), base.output()) > 1e-3
    diffusers_file = save_diffusers_lora(modules, tmp_path, export_rank=2, pad_rank=3)
    kohya_file = save_kohya_lora(modules, tmp_path / "kohya.safetensors", export_rank=2, pad_rank=3)
    for path, ending in ((diffusers_file, "lora_A.weight"), (kohya_file, "lora_down.weight")):
        tensors = load_file(path)
        assert {value.shape[0] for key, value in tensors.items() if key.endswith(ending)} == {3}
        assert {float(value) for key, value in tensors.items() if key.endswith(".alpha")} <= {3.0}
        assert float((stock(pipeline, path).output() - reference.output()).abs().max()) < 1e-4


def test_an_untrained_adapter_discards_nothing_and_can_still_be_trained_from_its_file(base):
    twin = base.copy()
    modules = run(base, "eva")
    assert set(discarded_energy(modules, 1).values()) == {0.0}
    for key, factors in exported_factors(base.unet, export_rank=2).items():
        assert torch.equal(factors.lora_A, exported_factors(base.unet)[key].lora_A[:2])
        assert not factors.lora_B.any()
    # B A - B0 A0 = 0 with factors that are not: what is left is rounding, of which no share is discarded.
    assert set(discarded_energy(run(twin, "pissa"), 1).values()) == {0.0}


def test_a_layer_narrower_than_its_rank_is_compressed_too():
    module = tiny_attention(features=4, hidden=24)
    factors = LoraFactors(torch.randn(10, 4), torch.randn(24, 10))
    attach(module, {"up": AdapterWeights(factors, 0.5)})
    compressed = exported_factors(module, export_rank=6)["up"]
    assert compressed.lora_A.shape[0] <= 6
    assert relative_error(product(compressed), product(factors, 0.5)) < 1e-6
    assert discarded_energy({"x": module}, 6) == {"x.up": 0.0}
    assert discarded_energy({"x": module}, 2)["x.up"] == pytest.approx(discarded_by_svd(product(factors), 2))


def test_export_ranks_that_cannot_be_are_refused(base, tmp_path):
    modules = run(base, "gaussian")
    for call in (
        lambda: save_diffusers_lora(modules, tmp_path, export_rank=0),
        lambda: save_kohya_lora(modules, tmp_path / "x.safetensors", export_rank=0),
        lambda: discarded_energy(modules, 0),
        lambda: exported_factors(base.unet, export_rank=0),
    ):
        with pytest.raises(ValueError, match="export_rank 0 must be at least 1"):
            call()
    with pytest.raises(ValueError, match=r"pad_rank 2 is smaller than the exported rank 3 of .*export_rank"):
        save_kohya_lora(modules, tmp_path / "x.safetensors", export_rank=3, pad_rank=2)
    assert not list(tmp_path.iterdir())


# --- layers without an adapter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eva", "pissa"])
@EVERY_STATE
def test_layers_of_rank_zero_become_plain_again(pipeline, base, tmp_path, name, state):
    before = base.output()
    modules = run(base, name, state=state, variable_rank=True, min_rank=0, rank_budget=6)
    ranks = ranks_of(base.unet)
    assert sum(ranks.values()) == 6
    assert len(ranks) <= 6
    plain = [
        key
        for key, module in unwrap(base.unet).named_modules()
        if key.endswith(("to_q", "to_k", "to_v", "to_out.0")) and type(module) is nn.Linear
    ]
    assert len(plain) == 16 - len(ranks)
    assert not any(isinstance(module, LoraLayer) and not len(module.lora_A) for module in base.unet.modules())
    assert relative_error(base.output(), before) < 1e-5
    base.train(all_trainable(modules))
    assert float((stock(pipeline, save_diffusers_lora(modules, tmp_path)).output() - base.output()).abs().max()) < 1e-4
    saved, fresh = adapter_state_dict(modules), RandomSD(pipeline.unet, pipeline.text_encoder).copy()
    fresh.unet = adapted(fresh.unet, state, TARGETS["unet"])
    load_adapter_state_dict({"unet": fresh.unet}, saved)
    assert torch.equal(fresh.output(), base.output())


def test_no_adapter_at_all_is_an_error(base):
    with pytest.raises(ValueError, match="every rank is 0"):
        run(base, "pissa", variable_rank=True, min_rank=0, rank_budget=0)


# --- PEFT's own saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("orthonormal", {}),
        ("eva", {}),
        ("eva", {"variable_rank": True}),
        ("eva", {"variable_rank": True, "min_rank": 0}),
        ("cntlora-down", {"variable_rank": True}),
    ],
)
def test_pefts_own_saving_reloads_zero_delta_methods(base, tmp_path, name, options):
    fresh = base.copy()
    method = make_method("cntlora", {"base": "down_only"}) if name == "cntlora-down" else name
    modules = run(base, method, state="get_peft_model", **options)
    assert isinstance(base.unet, PeftModel)
    base.train(all_trainable(modules))
    base.unet.save_pretrained(tmp_path)
    fresh.unet = PeftModel.from_pretrained(fresh.unet, tmp_path)
    assert relative_error(fresh.output(), base.output()) < 1e-6
    assert ranks_of(fresh.unet) == ranks_of(base.unet)


def effective_weight(layer: nn.Module) -> Tensor:
    return layer(torch.eye(layer.in_features)).mT.detach()


def test_layers_whose_names_end_alike_are_told_apart(tmp_path):
    """PEFT takes names as endings: `proj` matches `block.proj` as well, in its targets and in its rank patterns."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(16, 16, bias=False)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.block, self.other = nn.Linear(16, 12, bias=False), Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(self.block.proj(x) + self.other.proj(x))

    torch.manual_seed(0)
    module = Net()
    x = torch.randn(5, 16)
    exact = copy.deepcopy(module)
    initialize(exact, "pissa", rank=2, target_modules="proj", progress=False)  # a string is a regular expression
    assert ranks_of(exact) == {"proj": 2}
    assert torch.allclose(exact(x), module(x), atol=1e-5)

    # The common rank is 5; the exception is the layer whose name is an ending of the others.
    ranks = {"proj": 2, "block.proj": 5, "other.proj": 5}
    peft_model = adapted(copy.deepcopy(module), "get_peft_model", ["proj"])
    weights = {}
    for name, rank in ranks.items():
        layer = module.get_submodule(name)
        factors = LoraFactors(torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank))
        weights[name] = AdapterWeights(factors, scaling=0.3 if name == "proj" else 1.5)
    attach(peft_model, weights)
    assert ranks_of(peft_model) == ranks
    peft_model.save_pretrained(tmp_path)
    restored = PeftModel.from_pretrained(copy.deepcopy(module), tmp_path)
    assert ranks_of(restored) == ranks
    assert relative_error(restored(x), peft_model(x)) < 1e-6
    for name, layer in lora_layers(restored).items():
        assert layer.scaling["default"] == pytest.approx(weights[name].scaling)

    # what diffusers gives PEFT of the file's metadata
    path = save_diffusers_lora({"unet": peft_model}, tmp_path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    config = LoraConfig(**{key.removeprefix("unet."): value for key, value in metadata.items()})
    assert ranks_of(inject_adapter_in_model(config, copy.deepcopy(module))) == ranks


@pytest.mark.parametrize("name", OFFSET)
def test_half_precision_keeps_what_an_offset_init_has_learned(base, name):
    """A reader in bfloat16 rounds the change itself, not the two products whose difference it is."""
    modules = run(base, name)
    base.train(all_trainable(modules), steps=2, learning_rate=1e-3)
    weights = adapter_weights(base.unet)
    for layer, exported in exported_factors(base.unet).items():
        own, twin = weights[layer].factors, weights[layer].offset
        change = weights[layer].scaling * (product(own) - product(twin))
        rounded = LoraFactors(*(factor.bfloat16() for factor in exported))
        assert exported.lora_A.shape[0] == 2 * RANK
        assert relative_error(product(exported), change) < 1e-4
        assert relative_error(product(rounded), change) < 4e-3  # of its 8 bits
    side_by_side = product(LoraFactors(*(f.bfloat16() for f in own))) - product(
        LoraFactors(*(f.bfloat16() for f in twin))
    )
    assert relative_error(weights[layer].scaling * side_by_side, change) > 4e-3


@pytest.mark.parametrize("name", OFFSET)
def test_an_untrained_offset_init_can_be_trained_from_its_file(base, name):
    run(base, name)
    for exported in exported_factors(base.unet).values():
        assert exported.lora_A.any()
        assert exported.lora_B.any()
        assert product(exported).abs().max() < 1e-6
