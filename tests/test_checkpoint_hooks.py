"""Checkpoints of accelerate keep the adapters exactly, whatever the script's own hooks do."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from lorainit_diffusers import adapter_state_dict, initialize, trainable_parameters
from lorainit_diffusers.export.checkpoint_hooks import ADAPTER_STATE_NAME, register_checkpoint_hooks

WIDTH = 6


def make_model(method: str, rank: int = 2, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    initialize(model, method, rank=rank, target_modules=["0", "2"], seed=seed)
    return model


def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, WIDTH, generator=generator)
        accelerator.backward((model(x) - x).square().mean())
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def accelerator() -> Generator[Accelerator]:
    def reset() -> None:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()

    reset()
    yield Accelerator(cpu=True)
    reset()


def fresh(accelerator: Accelerator, model: nn.Module) -> tuple[nn.Module, Any]:
    """Model and optimizer as one run prepares them; the hooks and models of the run before are forgotten."""
    accelerator._save_model_state_pre_hook.clear()
    accelerator._load_model_state_pre_hook.clear()
    accelerator.free_memory()
    return accelerator.prepare(model, torch.optim.AdamW(trainable_parameters(model), lr=0.1))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return adapter_state_dict({"net": model})


@pytest.mark.parametrize("own_hooks", [False, True], ids=["whole model", "models and weights emptied"])
def test_resumed_run_equals_an_uninterrupted_one(accelerator: Accelerator, tmp_path: Path, own_hooks: bool) -> None:
    def register(model: nn.Module) -> None:
        if own_hooks:  # as DreamBooth's, which leave nothing for accelerate to save or load
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
            accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        register_checkpoint_hooks(accelerator, {"net": model})

    model, optimizer = fresh(accelerator, make_model("pissa"))
    register(model)
    train(accelerator, model, optimizer, steps=3, seed=1)
    accelerator.save_state(str(tmp_path))
    saved = state_of(model)
    train(accelerator, model, optimizer, steps=3, seed=2)
    expected = state_of(model)

    # Other initial factors, and another twin, as a run whose data has changed computes them.
    resumed, optimizer = fresh(accelerator, make_model("olora"))
    parameters = trainable_parameters(resumed)
    assert not torch.equal(state_of(resumed)["net.0.offset_A"], saved["net.0.offset_A"])
    register(resumed)
    accelerator.load_state(str(tmp_path))
    for key, value in state_of(resumed).items():
        torch.testing.assert_close(value, saved[key], atol=0, rtol=0)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(a is b is c for a, b, c in zip(trainable_parameters(resumed), parameters, held, strict=True))
    train(accelerator, resumed, optimizer, steps=3, seed=2)
    for key, value in state_of(resumed).items():
        torch.testing.assert_close(value, expected[key], atol=0, rtol=0)


@pytest.mark.parametrize("method", ["pissa", "gaussian"])
def test_twin_follows_the_checkpoint(accelerator: Accelerator, tmp_path: Path, method: str) -> None:
    """A run that started with a twin takes a checkpoint without one, and the reverse."""
    other = {"pissa": "gaussian", "gaussian": "pissa"}[method]
    model, _ = fresh(accelerator, make_model(method))
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    register_checkpoint_hooks(accelerator, {"net": model})
    accelerator.save_state(str(tmp_path))
    resumed, _ = fresh(accelerator, make_model(other))
    accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
    register_checkpoint_hooks(accelerator, {"net": resumed})
    accelerator.load_state(str(tmp_path))
    assert state_of(resumed).keys() == state_of(model).keys()
    x = torch.randn(3, WIDTH)
    torch.testing.assert_close(resumed(x), model(x), atol=0, rtol=0)


def test_wrapped_modules_are_saved_under_their_own_names(accelerator: Accelerator, tmp_path: Path) -> None:
    model = make_model("pissa")
    register_checkpoint_hooks(accelerator, {"net": torch.compile(model)})  # type: ignore[dict-item]
    accelerator.save_state(str(tmp_path))
    trained = state_of(model)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    for key, value in state_of(model).items():
        torch.testing.assert_close(value, trained[key], atol=0, rtol=0)


def test_only_the_main_process_writes(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("pissa")
    register_checkpoint_hooks(accelerator, {"net": model})
    monkeypatch.setattr(PartialState, "is_main_process", property(lambda self: False))
    accelerator.save_state(str(tmp_path))
    assert not (tmp_path / ADAPTER_STATE_NAME).exists()


def test_checkpoint_without_the_file_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    accelerator.save_state(str(tmp_path))
    register_checkpoint_hooks(accelerator, {"net": make_model("pissa")})
    with pytest.raises(ValueError, match=f"has no {ADAPTER_STATE_NAME}.*resume from a checkpoint saved after"):
        accelerator.load_state(str(tmp_path))


def test_checkpoint_of_another_rank_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    model, _ = fresh(accelerator, make_model("pissa", rank=2))
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
    register_checkpoint_hooks(accelerator, {"net": model})
    accelerator.save_state(str(tmp_path))
    resumed, _ = fresh(accelerator, make_model("pissa", rank=3))
    register_checkpoint_hooks(accelerator, {"net": resumed})
    with pytest.raises(ValueError, match=r"lora_A is \(2, 6\), this run's is \(3, 6\); resume with the base, rank"):
        accelerator.load_state(str(tmp_path))


def test_checkpoint_of_other_layers_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    register_checkpoint_hooks(accelerator, {"other": make_model("pissa")})
    accelerator.save_state(str(tmp_path))
    resumed, _ = fresh(accelerator, make_model("pissa"))
    register_checkpoint_hooks(accelerator, {"net": resumed})
    with pytest.raises(ValueError, match=r"net\.0\.lora_A is missing"):
        accelerator.load_state(str(tmp_path))


def test_module_without_the_adapter_is_refused_at_once(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match="carries no adapter 'default'; run initialize"):
        register_checkpoint_hooks(accelerator, {"net": nn.Linear(2, 2)})


def test_sharded_parameters_are_refused() -> None:
    sharded: Any = SimpleNamespace(distributed_type=DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"which FSDP does not keep; launch one process"):
        register_checkpoint_hooks(sharded, {"net": make_model("pissa")})
