"""PEFT's own data-driven initialisations on the batches of `run.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from torch import Tensor, nn

from lorainit_diffusers.families.latent_diffusion import UNET_TARGETS

if TYPE_CHECKING:
    from run import Bench


class _OutOfTimeError(Exception):
    """PEFT's EVA makes passes until every layer has converged, which some never do."""


class _Endless:
    """The batches again and again, as PEFT's EVA asks for them."""

    def __init__(self, num_batches: int) -> None:
        self._num_batches = num_batches

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._num_batches))

    def __len__(self) -> int:
        return self._num_batches


def _config(bench: Bench, **options: Any) -> LoraConfig:
    return LoraConfig(r=bench.rank, lora_alpha=bench.rank, target_modules=list(UNET_TARGETS), **options)


def _eva(bench: Bench, limit_s: float) -> tuple[dict[str, Tensor], str]:
    from peft.tuners.lora.eva import get_eva_state_dict

    deadline, passes = time.process_time() + limit_s, [0]

    def forward(model: nn.Module, index: int) -> None:
        if time.process_time() > deadline:
            raise _OutOfTimeError
        passes[0] += 1
        bench.loss(index, model)

    model = get_peft_model(bench.unet, _config(bench, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)))
    try:
        found = get_eva_state_dict(
            model,
            _Endless(bench.num_batches),
            forward_fn=forward,
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda inputs, *_rest: inputs[0].reshape(-1, inputs[0].shape[-1]),
            show_progress_bar=False,
        )
    except _OutOfTimeError:
        return {}, f"not converged after {passes[0]} passes"
    return {name.removeprefix("base_model.model."): rows for name, rows in found.items()}, f"{passes[0]} passes"


def run_eva(bench: Bench, limit_s: float) -> str:
    """PEFT's EVA; says how many passes it made."""
    return _eva(bench, limit_s)[1]


def eva_directions(bench: Bench, limit_s: float) -> dict[str, Tensor]:
    """Layer -> the directions that PEFT's EVA finds; nothing for a layer that it gives no rank."""
    try:
        return _eva(bench, limit_s)[0]
    finally:
        bench.remove_adapters()


def run_corda(bench: Bench, limit_s: float) -> str:
    """PEFT's CorDA, instruction-previewed mode."""
    from peft.tuners.lora.corda import preprocess_corda

    config = _config(bench, init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm"))

    @torch.no_grad()
    def run_model() -> None:
        for index in range(bench.num_batches):
            bench.loss(index)

    preprocess_corda(bench.unet, config, run_model=run_model)
    get_peft_model(bench.unet, config)
    return f"{bench.num_batches} passes"


def run_lora_ga(bench: Bench, limit_s: float) -> str:
    """PEFT's LoRA-GA."""
    from peft.tuners.lora.loraga import preprocess_loraga

    config = _config(bench, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def train_step() -> None:
        for index in range(bench.num_batches):
            bench.loss(index).backward()

    preprocess_loraga(bench.unet, config, train_step)
    get_peft_model(bench.unet, config)
    bench.unet.requires_grad_(False)
    return f"{bench.num_batches} passes"


RUNS: dict[str, Callable[[Bench, float], str]] = {"eva": run_eva, "corda": run_corda, "lora_ga": run_lora_ga}
