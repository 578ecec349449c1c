"""kohya keys: every name and shape at real size, what other readers make of them, and that merging them is exact.

The models of real size are built without memory for their weights: on the meta device, with expanded scalars where the
adapters look.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from core_fixtures import RandomSD, relative_error, small_unet
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorainit_diffusers import save_diffusers_lora, save_kohya_lora
from lorainit_diffusers.adapters import AdapterWeights, attach, lora_layers, target_layers
from lorainit_diffusers.export.kohya_names import sgm_layer_name
from lorainit_diffusers.methods import LoraFactors

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
PROJECTIONS = ["proj_in", "proj_out"]
EMBEDDINGS = ["time_emb_proj", "time_embedding.linear_1", "time_embedding.linear_2"]
ADD_EMBEDDINGS = ["add_embedding.linear_1", "add_embedding.linear_2"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
RANK = 2

Shapes = dict[str, tuple[int, int]]  # weight name -> (out_features, in_features)


# --- models ---------------------------------------------------------------------------------------------------------


def without_memory(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A model of real size; its linear weights are expanded scalars on the CPU, everything else is on `meta`."""
    with torch.device("meta"):
        module = kind(*args, **kwargs)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(torch.zeros(()).expand(layer.weight.shape), requires_grad=False)
    return module.requires_grad_(False)


def clip_config(hidden: int, layers: int, heads: int, intermediate: int, **kwargs: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        **kwargs,
    )


def adapt(module: nn.Module, targets: Sequence[str], rank: int = RANK, scaling: float = 1.0) -> dict[str, float]:
    """Attach factors of constants, A with another constant in every layer; returns that constant by layer name."""
    layers = target_layers(module, targets)
    constants = {name: float(index) for index, name in enumerate(layers, start=1)}
    weights = {
        name: AdapterWeights(
            LoraFactors(
                torch.full((rank, layer.in_features), constants[name]), torch.full((layer.out_features, rank), 2.0)
            ),
            scaling=scaling,
        )
        for name, layer in layers.items()
    }
    attach(module, weights)
    return constants


@pytest.fixture(scope="module")
def sd15() -> dict[str, nn.Module]:
    unet = without_memory(
        UNet2DConditionModel,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    return {"unet": unet, "text_encoder": without_memory(CLIPTextModel, clip_config(768, 12, 12, 3072))}


def sdxl_modules() -> dict[str, nn.Module]:
    unet = without_memory(
        UNet2DConditionModel,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    big = clip_config(1280, 32, 20, 5120, projection_dim=1280)
    return {
        "unet": unet,
        "text_encoder": without_memory(CLIPTextModel, clip_config(768, 12, 12, 3072)),
        "text_encoder_2": without_memory(CLIPTextModelWithProjection, big),
    }


# --- oracles --------------------------------------------------------------------------------------------------------


def attention_shapes(prefix: str, channels: int, depth: int, context: int, projections: bool) -> Shapes:
    shapes: Shapes = {}
    if projections:
        shapes |= {f"{prefix}.proj_in": (channels, channels), f"{prefix}.proj_out": (channels, channels)}
    for index in range(depth):
        block = f"{prefix}.transformer_blocks.{index}"
        for attention, keys in (("attn1", channels), ("attn2", context)):
            shapes |= {
                f"{block}.{attention}.to_q": (channels, channels),
                f"{block}.{attention}.to_k": (channels, keys),
                f"{block}.{attention}.to_v": (channels, keys),
                f"{block}.{attention}.to_out.0": (channels, channels),
            }
        shapes[f"{block}.ff.net.0.proj"] = (8 * channels, channels)  # GEGLU: value and gate
        shapes[f"{block}.ff.net.2"] = (channels, 4 * channels)
    return shapes


def ldm_shapes(
    channels: int,
    multipliers: Sequence[int],
    num_res_blocks: Sequence[int],
    depths: Sequence[int],
    context: int,
    adm: int,
) -> Shapes:
    """Linear layers of latent-diffusion's UNet, laid out as its constructor counts blocks."""
    embedding = 4 * channels
    shapes: Shapes = {
        "time_embed.0": (embedding, channels),
        "time_embed.2": (embedding, embedding),
        "label_emb.0.0": (embedding, adm),
        "label_emb.0.2": (embedding, embedding),
    }

    def block(name: str, level: int) -> None:
        width = channels * multipliers[level]
        shapes[f"{name}.0.emb_layers.1"] = (width, embedding)
        if depths[level]:
            shapes.update(attention_shapes(f"{name}.1", width, depths[level], context, projections=True))

    index, last = 1, len(multipliers) - 1  # input block 0 is the first convolution
    for level in range(len(multipliers)):
        for _ in range(num_res_blocks[level]):
            block(f"input_blocks.{index}", level)
            index += 1
        index += level != last  # the downsampler is a block of its own
    block("middle_block", last)  # its parts: residual block 0, attention 1, residual block 2
    shapes["middle_block.2.emb_layers.1"] = shapes["middle_block.0.emb_layers.1"]
    index = 0
    for level in reversed(range(len(multipliers))):
        for _ in range(num_res_blocks[level] + 1):
            block(f"output_blocks.{index}", level)
            index += 1
    return shapes


def clip_shapes(hidden: int, layers: int, intermediate: int) -> Shapes:
    shapes: Shapes = {}
    for index in range(layers):
        layer = f"text_model.encoder.layers.{index}"
        shapes |= {f"{layer}.self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
        shapes |= {f"{layer}.mlp.fc1": (intermediate, hidden), f"{layer}.mlp.fc2": (hidden, intermediate)}
    return shapes


def keyed(prefix: str, shapes: Shapes) -> Shapes:
    """By the stem of a file's keys: ComfyUI's rule, the weight's name with underscores behind a prefix."""
    return {f"{prefix}_{name.replace('.', '_')}": shape for name, shape in shapes.items()}


def assert_keys_and_shapes(tensors: dict[str, Tensor], expected: Shapes, rank: int = RANK) -> None:
    assert {key.partition(".")[0] for key in tensors} == expected.keys()
    assert len(tensors) == 3 * len(expected)
    for stem, (out_features, in_features) in expected.items():
        assert tensors[f"{stem}.lora_down.weight"].shape == (rank, in_features), stem
        assert tensors[f"{stem}.lora_up.weight"].shape == (out_features, rank), stem
        assert tensors[f"{stem}.alpha"].shape == (), stem
        assert float(tensors[f"{stem}.alpha"]) == rank, stem


def read_back(tensors: dict[str, Tensor], unet: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What diffusers' own loader makes of a file: component -> PEFT's key of the layer's A or B -> tensor."""
    state = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), unet.config)
    state, alphas = _convert_non_diffusers_lora_to_diffusers(state)  # raises when it leaves keys over
    assert len(alphas) == len(tensors) // 3
    read: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        component, _, rest = key.partition(".")
        read.setdefault(component, {})[rest] = value
    for component, part in read.items():
        if component == "unet":
            read[component] = convert_unet_state_dict_to_peft(part)
        else:
            read[component] = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part))
    return read


def in_this_transformers(name: str, module: nn.Module) -> str:
    """A text encoder's layer under the name that the installed transformers has for it."""
    return name if hasattr(module, "text_model") else name.removeprefix("text_model.")


def assert_read_back_to_the_same_layers(
    tensors: dict[str, Tensor], modules: dict[str, nn.Module], constants: dict[str, dict[str, float]]
) -> None:
    read = read_back(tensors, modules["unet"])
    assert read.keys() == modules.keys()
    for component, module in modules.items():
        found = {
            in_this_transformers(key.removesuffix(".lora_A.weight"), module): float(value.unique())
            for key, value in read[component].items()
            if key.endswith(".lora_A.weight")
        }
        assert found == constants[component]
        assert len(read[component]) == 2 * len(found)


# --- real size ------------------------------------------------------------------------------------------------------


def test_every_key_of_stable_diffusion_1_5(sd15, tmp_path):
    constants = {
        "unet": adapt(sd15["unet"], ATTENTION + FEED_FORWARD),
        "text_encoder": adapt(sd15["text_encoder"], TEXT),
    }
    tensors = load_file(save_kohya_lora(sd15, tmp_path / "sd.safetensors"))
    assert sum(key.startswith("lora_unet_") for key in tensors) == 3 * 160
    assert sum(key.startswith("lora_te_") for key in tensors) == 3 * 72
    unet: Shapes = {}
    blocks = {f"down_blocks.{block}.attentions.{layer}": block for block in (0, 1, 2) for layer in (0, 1)}
    blocks |= {f"up_blocks.{block}.attentions.{layer}": 3 - block for block in (1, 2, 3) for layer in (0, 1, 2)}
    for name, level in blocks.items():
        unet |= attention_shapes(name, (320, 640, 1280)[level], 1, 768, projections=False)
    unet |= attention_shapes("mid_block.attentions.0", 1280, 1, 768, projections=False)
    assert_keys_and_shapes(tensors, keyed("lora_unet", unet) | keyed("lora_te", clip_shapes(768, 12, 3072)))
    assert_read_back_to_the_same_layers(tensors, sd15, constants)
    for published in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj.lora_up.weight",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0.alpha",
        "lora_te_text_model_encoder_layers_11_mlp_fc2.lora_down.weight",
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj.alpha",
    ):
        assert published in tensors


def test_stable_diffusion_1_5_projects_with_convolutions_which_are_refused(sd15):
    with pytest.raises(ValueError, match=r"proj_in' is a Conv2d; only linear layers"):
        target_layers(sd15["unet"], ["proj_in"], adapter_name="other")


@pytest.mark.parametrize("embeddings", [False, True])
def test_every_key_of_sdxl(tmp_path, embeddings):
    modules = sdxl_modules()
    targets = ATTENTION + FEED_FORWARD + PROJECTIONS + (EMBEDDINGS + ADD_EMBEDDINGS) * embeddings
    constants = {"unet": adapt(modules["unet"], targets)}
    components = {"unet": modules["unet"]}
    unet = ldm_shapes(320, (1, 2, 4), (2, 2, 2), (0, 2, 10), context=2048, adm=2816)
    if not embeddings:
        unet = {name: shape for name, shape in unet.items() if "emb" not in name}
    expected = keyed("lora_unet", unet)
    if not embeddings:  # once is enough for the text encoders
        components = modules
        constants |= {component: adapt(modules[component], TEXT) for component in ("text_encoder", "text_encoder_2")}
        expected |= keyed("lora_te1", clip_shapes(768, 12, 3072)) | keyed("lora_te2", clip_shapes(1280, 32, 5120))
    tensors = load_file(save_kohya_lora(components, tmp_path / "sdxl.safetensors"))
    if embeddings:
        assert sum(key.endswith(".alpha") for key in tensors) == 722 + 4 + 6 + 2 + 9  # embeddings, residual blocks
    else:
        counts = [sum(key.startswith(f"lora_{part}_") for key in tensors) / 3 for part in ("unet", "te1", "te2")]
        assert counts == [722, 72, 192]
    assert_keys_and_shapes(tensors, expected)
    assert_read_back_to_the_same_layers(tensors, components, constants)
    published = ["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_middle_block_1_proj_in"]
    published += ["lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2", "lora_unet_output_blocks_0_1_proj_out"]
    if embeddings:
        published += ["lora_unet_time_embed_0", "lora_unet_label_emb_0_2", "lora_unet_input_blocks_1_0_emb_layers_1"]
    else:
        published += ["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"]
        published += ["lora_te2_text_model_encoder_layers_31_mlp_fc1"]
    for stem in published:
        assert f"{stem}.lora_down.weight" in tensors


# --- the mapping's generality, and what decides on it ---------------------------------------------------------------


def tiny_sdxl_unet(layers_per_block: int | tuple[int, ...] = 2) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=layers_per_block,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


@pytest.mark.parametrize("layers_per_block", [1, 3, (1, 3)])
def test_the_block_counts_come_from_the_unets_configuration(tmp_path, layers_per_block):
    unet = tiny_sdxl_unet(layers_per_block)
    adapt(unet, ATTENTION + FEED_FORWARD + PROJECTIONS + EMBEDDINGS + ADD_EMBEDDINGS)
    tensors = load_file(save_kohya_lora({"unet": unet}, tmp_path / "x.safetensors"))
    counts = (layers_per_block,) * 2 if isinstance(layers_per_block, int) else layers_per_block
    expected = ldm_shapes(16, (1, 2), counts, (0, 2), context=32, adm=32)
    assert_keys_and_shapes(tensors, keyed("lora_unet", expected))


def test_sdxl_is_recognised_and_can_be_said(tmp_path):
    def stems(modules: dict[str, nn.Module], **kwargs: Any) -> set[str]:
        tensors = load_file(save_kohya_lora(modules, tmp_path / "x.safetensors", **kwargs))
        return {key.partition(".")[0] for key in tensors}

    plain, xl = small_unet(), tiny_sdxl_unet()
    config = clip_config(16, 1, 2, 32, projection_dim=8)
    first, second = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    for module, targets in ((plain, ["to_q"]), (xl, ["to_q"]), (first, ["q_proj"])):
        adapt(module, targets)
    adapt(second, ["q_proj", "text_projection"])
    q_proj = "text_model_encoder_layers_0_self_attn_q_proj"
    assert all(stem.startswith("lora_unet_down_") or "mid_block" in stem for stem in stems({"unet": plain}))
    assert all("put_blocks" in stem or "middle_block" in stem for stem in stems({"unet": xl}))
    assert all("_attentions_" in stem for stem in stems({"unet": xl}, sdxl=False))
    assert stems({"text_encoder": first}) == {f"lora_te_{q_proj}"}
    assert stems({"text_encoder": first}, sdxl=True) == {f"lora_te1_{q_proj}"}
    both = {"text_encoder": first, "text_encoder_2": second}
    assert stems(both) == {f"lora_te1_{q_proj}", f"lora_te2_{q_proj}", "lora_te2_text_projection"}
    assert stems({"text_encoder_2": second}, prefixes={"text_encoder_2": "lora_x"}) >= {f"lora_x_{q_proj}"}
    with pytest.raises(ValueError, match="'text_encoder_2' has no kohya key prefix"):
        stems(both, sdxl=False)


@pytest.mark.parametrize(
    "name", ["encoder_hid_proj", "down_blocks.0.resnets.0.conv1", "down_blocks.0.motion_modules.0.x"]
)
def test_a_layer_that_the_original_unet_does_not_have_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*no counterpart.*sdxl=False"):
        sgm_layer_name(name, [2, 2, 2])


# --- merging and stock loading --------------------------------------------------------------------------------------


@dataclass
class TinySDXL:
    """A random SDXL: two text encoders, whose hidden states are joined and whose second one is pooled, and a UNet."""

    modules: dict[str, nn.Module]

    @torch.no_grad()
    def output(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 90, (2, 12), generator=generator)
        first = self.modules["text_encoder"](ids).last_hidden_state
        second = self.modules["text_encoder_2"](ids, output_hidden_states=True)
        conditions = {"text_embeds": second.text_embeds, "time_ids": torch.ones(2, 6)}
        embeds = torch.cat([first, second.hidden_states[-2]], dim=-1)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        unet = self.modules["unet"]
        return unet(latents, torch.tensor([3, 700]), encoder_hidden_states=embeds, added_cond_kwargs=conditions).sample


@pytest.fixture(scope="module")
def tiny_sdxl() -> TinySDXL:
    torch.manual_seed(0)
    config = clip_config(
        16, 2, 2, 32, projection_dim=8, vocab_size=100, max_position_embeddings=12, bos_token_id=97, eos_token_id=98
    )
    modules: dict[str, nn.Module] = {
        "unet": tiny_sdxl_unet(),
        "text_encoder": CLIPTextModel(config),
        "text_encoder_2": CLIPTextModelWithProjection(config),
    }
    return TinySDXL({name: module.eval().requires_grad_(False) for name, module in modules.items()})


def adapt_randomly(modules: dict[str, nn.Module], unet_targets: Sequence[str], use_dora: bool) -> None:
    """As after training: random factors everywhere, and random magnitudes with DoRA."""
    torch.manual_seed(1)
    for component, module in modules.items():
        weights: dict[str, AdapterWeights] = {}
        for name, layer in target_layers(module, unet_targets if component == "unet" else TEXT).items():
            factors = LoraFactors(torch.randn(3, layer.in_features), torch.randn(layer.out_features, 3))
            norms = layer.weight.detach().norm(dim=1)
            magnitude = norms * (0.5 + torch.rand(layer.out_features)) if use_dora else None
            weights[name] = AdapterWeights(factors, scaling=0.15, magnitude=magnitude)
        attach(module, weights, use_dora=use_dora)


def merge(tensors: dict[str, Tensor], modules: dict[str, nn.Module], layer_of: dict[str, str]) -> int:
    """kohya's and LyCORIS' rule, into base weights: W + alpha/r up down, its rows scaled to DoRA's norms if any."""
    merged = 0
    for stem, full_name in layer_of.items():
        component, _, name = full_name.partition("/")
        weight = modules[component].get_submodule(name).weight.data
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        new = weight + float(tensors[f"{stem}.alpha"]) / down.shape[0] * up @ down
        if f"{stem}.dora_scale" in tensors:
            scale = tensors[f"{stem}.dora_scale"]
            assert scale.shape == (weight.shape[0], 1)
            new = scale * new / new.norm(dim=1, keepdim=True)
        weight.copy_(new)
        merged += sum(key.startswith(f"{stem}.") for key in tensors)
    return merged


def layers_by_stem(tensors: dict[str, Tensor], modules: dict[str, nn.Module]) -> dict[str, str]:
    """stem -> "component/layer", as diffusers' loader reads the names: the number of each stem arrives at its layer."""
    stems = sorted({key.partition(".")[0] for key in tensors})
    numbered: dict[str, Tensor] = {}
    for number, stem in enumerate(stems):
        numbered[f"{stem}.lora_down.weight"] = torch.tensor(number)
        numbered[f"{stem}.lora_up.weight"] = torch.tensor(number)
        numbered[f"{stem}.alpha"] = torch.tensor(1.0)
    return {
        stems[int(value)]: f"{component}/{in_this_transformers(key.removesuffix('.lora_A.weight'), modules[component])}"
        for component, part in read_back(numbered, modules["unet"]).items()
        for key, value in part.items()
        if key.endswith(".lora_A.weight")
    }


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_sdxl_file_merged_by_kohyas_rule_is_the_trained_model(tiny_sdxl, tmp_path, use_dora):
    trained, fresh = copy.deepcopy(tiny_sdxl), copy.deepcopy(tiny_sdxl)
    adapt_randomly(trained.modules, ATTENTION + FEED_FORWARD + PROJECTIONS, use_dora)
    assert relative_error(trained.output(), fresh.output()) > 0.05
    tensors = load_file(save_kohya_lora(trained.modules, tmp_path / "x.safetensors"))
    assert merge(tensors, fresh.modules, layers_by_stem(tensors, fresh.modules)) == len(tensors)
    assert len(tensors) == (3 + use_dora) * sum(len(lora_layers(module)) for module in trained.modules.values())
    assert relative_error(fresh.output(), trained.output()) < 1e-4


@pytest.mark.parametrize(("file_format", "use_dora"), [("kohya", False), ("diffusers", False), ("diffusers", True)])
def test_an_sdxl_file_loads_in_the_stock_pipeline(tiny_sdxl, tmp_path, file_format, use_dora):
    trained, fresh = copy.deepcopy(tiny_sdxl), copy.deepcopy(tiny_sdxl)
    adapt_randomly(trained.modules, ATTENTION + FEED_FORWARD + PROJECTIONS, use_dora)
    if file_format == "kohya":
        path = save_kohya_lora(trained.modules, tmp_path / "x.safetensors")
    else:
        path = save_diffusers_lora(trained.modules, tmp_path)
    pipeline = StableDiffusionXLPipeline(
        vae=None, tokenizer=None, tokenizer_2=None, scheduler=DDIMScheduler(), add_watermarker=False, **fresh.modules
    )
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    assert float((fresh.output() - trained.output()).abs().max()) < 1e-4


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_stable_diffusion_file_merged_by_kohyas_rule_is_the_trained_model(random_sd, tmp_path, use_dora):
    trained = RandomSD(small_unet(), CLIPTextModel.from_pretrained(random_sd / "text_encoder"))
    fresh = trained.copy()
    modules = {"unet": trained.unet, "text_encoder": trained.text_encoder}
    adapt_randomly(modules, ATTENTION + FEED_FORWARD, use_dora)
    assert relative_error(trained.output(), fresh.output()) > 0.05
    tensors = load_file(save_kohya_lora(modules, tmp_path / "x.safetensors"))
    # sd-scripts enumerates the modules of a diffusers UNet and of transformers' text encoder, underscores for dots.
    names = {f"lora_unet_{name.replace('.', '_')}": f"unet/{name}" for name, _ in fresh.unet.named_modules()}
    for name, _ in fresh.text_encoder.named_modules():
        nested = "text_model_" + name.removeprefix("text_model.").replace(".", "_")
        names[f"lora_te_{nested}"] = f"text_encoder/{name}"
    stems = {key.partition(".")[0] for key in tensors}
    bases = {"unet": fresh.unet, "text_encoder": fresh.text_encoder}
    assert merge(tensors, bases, {stem: names[stem] for stem in stems}) == len(tensors)
    assert relative_error(fresh.output(), trained.output()) < 1e-4
