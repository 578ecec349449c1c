"""A network module for kohya's sd-scripts that starts from an init file and keeps its offset frozen.

Given to `train_network.py` as `--network_module lorainit_diffusers.integrations.sd_scripts` with `--network_args
init=start/lorainit_init.safetensors`. sd-scripts trains networks of its own, not PEFT's, and a plain LoRA file cannot
tell it which half of a start is frozen. This network trains A and B and subtracts the initial product for ever, as the
adapters of this library do. What it saves is a plain file of kohya's names, right on the original base. Ranks and
alphas are the init file's. For Stable Diffusion 1.x, 2.x and XL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lorainit_diffusers.adapters import AdapterWeights
from lorainit_diffusers.export import kohya_names as kohya
from lorainit_diffusers.export.factors import plain_factors, text_model_name
from lorainit_diffusers.files import save_tensors
from lorainit_diffusers.finite import check_finite
from lorainit_diffusers.init_file import InitFile, check_weight, load_init_file
from lorainit_diffusers.methods.base import LoraFactors

# Blocks of SDXL's UNet have this many resnets each, which decides the names of the original's.
SDXL_LAYERS_PER_BLOCK = (2, 2, 2)


class OffsetLora(nn.Module):
    """Adds `scaling * (B A - B0 A0) x` to one linear layer; A and B are trained, in float32."""

    initial_down: Tensor
    initial_up: Tensor

    def __init__(self, weights: AdapterWeights) -> None:
        super().__init__()
        lora_A, lora_B = weights.factors
        self.lora_down = nn.Parameter(lora_A.detach().clone())
        self.lora_up = nn.Parameter(lora_B.detach().clone())
        offset = weights.offset or LoraFactors(torch.zeros_like(lora_A[:0]), torch.zeros_like(lora_B[:, :0]))
        # part of the state, so that a resumed run has those of the first
        self.register_buffer("initial_down", offset.lora_A.detach().clone())
        self.register_buffer("initial_up", offset.lora_B.detach().clone())
        self.scaling = weights.scaling

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        x = x.to(self.lora_down.dtype)
        change = linear(linear(x, self.lora_down), self.lora_up)
        if len(self.initial_down):
            change = change - linear(linear(x, self.initial_down), self.initial_up)
        return self.scaling * change

    def weights(self) -> AdapterWeights:
        """What is trained, and what is subtracted."""
        offset = LoraFactors(self.initial_down, self.initial_up) if len(self.initial_down) else None
        return AdapterWeights(LoraFactors(self.lora_down.detach(), self.lora_up.detach()), self.scaling, offset)


class InitNetwork(nn.Module):
    """The network of an init file; its methods are those that sd-scripts calls.

    Args:
        init: The file.
        text_encoder: One, or a list of two for SDXL.
        unet: Sd-scripts' own.
        multiplier: Of everything that the network adds.

    Raises:
        ValueError: A layer of the file that the models do not have, or another base.
    """

    def __init__(self, init: InitFile, text_encoder: Any, unet: nn.Module, multiplier: float = 1.0) -> None:
        super().__init__()
        encoders: Sequence[nn.Module] = text_encoder if isinstance(text_encoder, (list, tuple)) else [text_encoder]
        models: dict[str, nn.Module] = {"unet": unet, "text_encoder": encoders[0]}
        if len(encoders) > 1:
            models["text_encoder_2"] = encoders[1]
        self.multiplier = multiplier
        self.loras = nn.ModuleDict()
        self._places: dict[str, tuple[str, nn.Linear]] = {}
        prefixes = kohya.SDXL_PREFIXES if len(encoders) > 1 else kohya.PREFIXES
        layers = {
            # transformers 5 has flattened CLIP; kohya's names are those of before
            f"{prefixes[component]}_{(name if component == 'unet' else text_model_name(name)).replace('.', '_')}": (
                component,
                module,
            )
            for component, model in models.items()
            for name, module in model.named_modules()
            if type(module).__name__ == "Linear"
        }
        for component, layer, weights in _layers_of(init):
            key = f"{prefixes[component]}_{_kohya_layer(component, layer, sdxl=len(encoders) > 1).replace('.', '_')}"
            if key not in layers:
                raise ValueError(
                    f"the init file has {component}.{layer}, which is {key!r} here, and no linear layer of that name: "
                    "start from the base that it was made for (SD 1.x's proj_in and proj_out are convolutions)"
                )
            module: Any = layers[key][1]
            check_weight(init.base[component], layer, module.weight)
            self.loras[key] = OffsetLora(weights)
            self._places[key] = component, module

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Make the models' layers add what the network has.

        Raises:
            ValueError: The file holds a part that this run does not train.
        """
        for key, (component, module) in self._places.items():
            if not (apply_unet if component == "unet" else apply_text_encoder):
                raise ValueError(
                    f"the init file holds {component}, which this run does not train: train it, too, or make the file "
                    "without it"
                )
            _add(self, module, self.loras[key])

    def set_multiplier(self, multiplier: float) -> None:
        """Scale all that the network adds."""
        self.multiplier = multiplier

    def is_mergeable(self) -> bool:
        """It is not: a saved file is."""
        return False

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the models' own covers the network's layers."""

    def prepare_grad_etc(self, text_encoder: Any, unet: Any) -> None:
        """Train the factors; the initial ones are buffers."""
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: Any, unet: Any) -> None:
        """Training mode."""
        self.train()

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """The factors."""
        return self.parameters()

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float | None, default_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups, one for the UNet and one for the text encoders."""
        groups: list[dict[str, Any]] = []
        for is_unet, rate in ((False, text_encoder_lr), (True, unet_lr)):
            keys = [key for key, (component, _) in self._places.items() if (component == "unet") == is_unet]
            parameters = [parameter for key in keys for parameter in self.loras[key].parameters()]
            rate = default_lr if rate is None else rate
            if parameters:
                groups.append({"params": parameters, **({} if rate is None else {"lr": rate})})
        return groups

    def load_weights(self, file: str) -> None:
        """Not possible: a plain LoRA file does not say which part of it is frozen.

        Raises:
            ValueError: Always, with what works instead.
        """
        raise ValueError(
            f"{file!r} cannot be read into a network that starts from an init file; continue from a saved state "
            "(--save_state, --resume), or train on with networks.lora"
        )

    def save_weights(self, file: str, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write a LoRA of kohya's names that is right on the original base: rank 2r where there is an offset."""
        tensors: dict[str, Tensor] = {}
        for key, lora in self.loras.items():
            assert isinstance(lora, OffsetLora)
            # decomposed anew in float32: rounding two nearly equal products would lose what was trained
            factors = plain_factors(lora.weights())
            tensors[f"{key}.lora_down.weight"] = factors.lora_A.to(dtype or torch.float32)
            tensors[f"{key}.lora_up.weight"] = factors.lora_B.to(dtype or torch.float32)
            tensors[f"{key}.alpha"] = torch.tensor(float(factors.lora_A.shape[0]))
        check_finite(tensors, f"the LoRA {file!r}")
        if Path(file).suffix != ".safetensors":
            raise ValueError(
                f"{file!r}: only safetensors files are written; leave out --save_model_as, or give it that"
            )
        save_tensors(tensors, file, metadata={"format": "pt", **(metadata or {})})

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move, but stay in float32, whatever the trainer casts its networks to."""
        super()._apply(fn, recurse)
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point() and tensor.itemsize < 4:
                raise ValueError(
                    "the network of an init file must stay in float32, or its offset no longer cancels: train without "
                    "--full_fp16 and --full_bf16"
                )
        return self


def _add(network: InitNetwork, module: nn.Module, lora: nn.Module) -> None:
    original = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = original(x, *args, **kwargs)
        return output + (network.multiplier * lora(x)).to(output.dtype)

    module.forward = forward


def _layers_of(init: InitFile) -> Iterator[tuple[str, str, AdapterWeights]]:
    for full_name, rank in init.ranks.items():
        if rank == 0:
            continue
        component, _, layer = full_name.partition(".")
        state = {key: init.state.get(f"{full_name}.{key}") for key in ("lora_A", "lora_B", "offset_A", "offset_B")}
        lora_A, lora_B = state["lora_A"], state["lora_B"]
        assert lora_A is not None
        assert lora_B is not None
        offset = None
        if state["offset_A"] is not None and state["offset_B"] is not None:
            offset = LoraFactors(state["offset_A"], state["offset_B"])
        scaling = float(init.state[f"{full_name}.scaling"])
        yield component, layer, AdapterWeights(LoraFactors(lora_A, lora_B), scaling, offset)


def _kohya_layer(component: str, layer: str, *, sdxl: bool) -> str:
    if component != "unet":
        return text_model_name(layer)
    return kohya.sgm_layer_name(layer, SDXL_LAYERS_PER_BLOCK) if sdxl else layer


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> InitNetwork:
    """What sd-scripts calls: `init` of its network arguments is the file.

    Raises:
        ValueError: No file, another rank than the file's, or dropout, which the network has not.
    """
    path = kwargs.get("init")
    if not path:
        raise ValueError("no init file: give its path as --network_args init=FILE")
    init = load_init_file(path)
    ranks = sorted(set(init.asked_ranks.values()))
    if network_dim is not None and ranks != [network_dim]:
        raise ValueError(
            f"the init file was made for rank {', '.join(map(str, ranks))}, not {network_dim}: leave --network_dim and "
            "--network_alpha out, or make the file anew"
        )
    if neuron_dropout or kwargs.get("dropout"):
        raise ValueError("the network of an init file has no dropout: leave --network_dropout out")
    return InitNetwork(init, text_encoder, unet, multiplier)


def create_network_from_weights(*args: Any, **kwargs: Any) -> Any:
    """Not possible, see `InitNetwork.load_weights`.

    Raises:
        ValueError: Always.
    """
    raise ValueError("a network that starts from an init file has its ranks from there: leave --dim_from_weights out")
