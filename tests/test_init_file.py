"""The init file: exact, and only for what it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorainit_diffusers import adapter_state_dict, initialize
from lorainit_diffusers.init_file import apply_init, data_difference, init_of, load_init_file, save_init_file


def make_model(dtype: torch.dtype = torch.float32, width: int = 6) -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width)).to(dtype)


def initialised(method: str, **options: Any) -> tuple[Any, Any]:
    model = make_model()
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    return model, initialize(
        {"net": model}, method, [x], lambda batch: (model(batch) - batch).square().mean(), target_modules=["0", "2"],
        progress=False, **{"rank": 2, **options},
    )  # fmt: skip


@pytest.mark.parametrize("method", ["cntlora", "eva", "pissa"])
@pytest.mark.parametrize("variable_rank", [False, True])
def test_round_trip(method: str, variable_rank: bool, tmp_path: Path) -> None:
    model, report = initialised(method, **({"variable_rank": True, "rank_budget": 3} if variable_rank else {}))
    data = {"number_of_examples": 32}
    asked = {"net.0": 2, "net.2": 2}
    path = save_init_file(init_of({"net": model}, report, asked_ranks=asked, data=data), tmp_path / "init.safetensors")
    init = load_init_file(path)
    assert (init.method, init.report, init.data) == (method, report.to_json(), data)
    fresh = make_model()
    apply_init(init, {"net": fresh})
    expected = adapter_state_dict({"net": model})
    found = adapter_state_dict({"net": fresh})
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=0, rtol=0)
    x = torch.ones(1, 6)
    torch.testing.assert_close(fresh(x), model(x), atol=0, rtol=0)


def test_the_base_in_another_dtype_is_the_same_base(tmp_path: Path) -> None:
    model, report = initialised("cntlora")
    init = load_init_file(save_init_file(init_of({"net": model}, report), tmp_path / "init.safetensors"))
    apply_init(init, {"net": make_model(torch.bfloat16)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model[2].weight.data.mul_(1.5), r"the values of '2.weight' of net differ"),
        (lambda model: model[0].bias.data.add_(1), r"the values of '0.bias' of net differ"),
        (lambda model: model.append(nn.Linear(6, 6)), r"has '3.bias' in this base only"),
        (lambda model: model.__setitem__(0, nn.Linear(6, 9)), r"'0.weight' of net is \[9, 6\] here and \[8, 6\]"),
        (lambda model: initialize(model, "gaussian", rank=3, target_modules=["0", "2"]), "made for rank 2 of net.0"),
        (lambda model: initialize(model, "gaussian", rank=2, target_modules=["0"]), "net.2 is adapted in it, but not"),
        (
            lambda model: initialize(model, "gaussian", rank=2, alpha=4, target_modules=["0", "2"]),
            r"scaling \(alpha / rank\) of 1 in net.0, and this adapter has 2",
        ),
    ],
)
def test_what_differs_is_named(change: Any, message: str) -> None:
    model, report = initialised("eva")
    init = init_of({"net": model}, report)
    other = make_model()
    change(other)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        apply_init(init, {"net": other})
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_components_and_data_are_named() -> None:
    model, report = initialised("eva")
    init = init_of({"net": model}, report, data={"number_of_examples": 5, "fingerprint": "a"})
    with pytest.raises(ValueError, match="has no component 'unet', only net"):
        apply_init(init, {"unet": make_model()})
    assert data_difference(init, {"number_of_examples": 5}) is None
    said = data_difference(init, {"number_of_examples": 4, "fingerprint": "a"})
    assert said == "the init file was made from other data: number of examples 5 in the file, 4 here"


def test_a_trained_adapter_is_no_start(tmp_path: Path) -> None:
    model, report = initialised("cntlora")
    model[0].lora_B["default"].weight.data.add_(0.1)
    with pytest.raises(ValueError, match=r"layer 'net.0' has been trained"):
        save_init_file(init_of({"net": model}, report), tmp_path / "init.safetensors")
    assert not list(tmp_path.iterdir())
