"""EVA against a float64 SVD of all rows, and against PEFT's own EVA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_fixtures import (
    ATTENTION_LAYERS,
    draw_weight,
    largest_principal_angle,
    rows_with_spectrum,
    squared_loss,
    tiny_attention,
    token_batches,
)
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from lorainit_diffusers import initialize
from lorainit_diffusers.methods import METHODS

FEATURES = 32
DEVIATIONS = [0.8**index for index in range(FEATURES)]
MAX_ANGLE = 1e-3
RANK = 4


def principal_directions(rows: Tensor, centered: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Variances and directions by a full float64 SVD of all rows."""
    array = rows.double().numpy()
    array = array - array.mean(0) if centered else array
    _, values, right = np.linalg.svd(array, full_matrices=False)
    return values**2 / len(array), right


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_directions_are_those_of_the_svd_of_all_rows(solve, centered, dtype):
    rows = rows_with_spectrum(500, DEVIATIONS, mean=0.5, dtype=dtype)
    solution = solve("eva", draw_weight(24, FEATURES), rows, max_rank=8, centered=centered)
    variances, directions = principal_directions(rows, centered)
    for rank in (1, 4, 8):
        factors = solution.factors(rank)
        assert largest_principal_angle(factors.lora_A, torch.from_numpy(directions[:rank])) < MAX_ANGLE
        torch.testing.assert_close(factors.lora_A @ factors.lora_A.mT, torch.eye(rank), atol=1e-5, rtol=0)
        assert float(factors.lora_B.abs().max()) == 0.0
    # Component by component and in order, up to sign.
    cosines = (solution.factors(8).lora_A.double() * torch.from_numpy(directions[:8])).sum(1).abs()
    assert float(cosines.min()) > 1 - 1e-6
    np.testing.assert_allclose(solution.scores[:8].numpy(), variances[:8] / variances.sum(), rtol=1e-5)


def test_centring_is_the_default_and_matters(solve):
    rows = rows_with_spectrum(500, DEVIATIONS, mean=2.0)
    weight = draw_weight(24, FEATURES)
    default = solve("eva", weight, rows).factors(RANK).lora_A
    assert torch.equal(default, solve("eva", weight, rows, centered=True).factors(RANK).lora_A)
    uncentred = solve("eva", weight, rows, centered=False).factors(1).lora_A
    mean = rows.double().mean(0, keepdim=True)
    assert largest_principal_angle(uncentred, mean) < 0.1  # the mean is the first direction, uncentred
    assert largest_principal_angle(default[:1], mean) > 0.5


def test_the_sketch_finds_the_same_directions(solve):
    rows = rows_with_spectrum(500, [0.6**index for index in range(FEATURES)])
    factors = solve("eva", draw_weight(24, FEATURES), rows, sketch_columns=24).factors(RANK)
    assert largest_principal_angle(factors.lora_A, torch.from_numpy(principal_directions(rows)[1][:RANK])) < MAX_ANGLE


def test_a_sketch_smaller_than_the_rank_is_refused(solve):
    with pytest.raises(ValueError, match="sketch_columns 3 is smaller than the rank 4"):
        solve("eva", draw_weight(24, FEATURES), torch.randn(30, FEATURES), sketch_columns=3)


@pytest.mark.parametrize("count", [300, 3000])
def test_whitening_divides_by_what_it_says_whatever_the_number_of_rows(solve, count):
    rows = rows_with_spectrum(count, DEVIATIONS, mean=0.5)
    variances, directions = principal_directions(rows)
    weight = draw_weight(24, FEATURES)
    divisors = {
        "none": np.ones(RANK),
        "variance_ratio": np.sqrt(variances[:RANK] / variances.sum()),
        "singular_value": np.sqrt(np.sqrt(variances[:RANK])),  # of X / sqrt(n)
    }
    for whiten, divisor in divisors.items():
        lora_A = solve("eva", weight, rows, whiten=whiten).factors(RANK).lora_A.double().numpy()
        np.testing.assert_allclose(np.abs((lora_A * directions[:RANK]).sum(1)), 1 / divisor, rtol=1e-4)
    hidden = rows.double() @ solve("eva", weight, rows, whiten="variance_ratio").factors(RANK).lora_A.double().mT
    covariance = torch.cov(hidden.mT, correction=0)
    torch.testing.assert_close(covariance / covariance[0, 0], torch.eye(RANK).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("whiten", ["none", "singular_value", "variance_ratio"])
@pytest.mark.parametrize("centered", [True, False])
def test_matched_scale_gives_the_hidden_power_of_kaiming(solve, whiten, centered):
    rows = rows_with_spectrum(500, DEVIATIONS, mean=0.7)
    options = {"scale": "matched", "whiten": whiten, "centered": centered}
    lora_A = solve("eva", draw_weight(24, FEATURES), rows, **options).factors(RANK).lora_A
    power = (rows.double() @ lora_A.double().mT).square().sum(1).mean()
    generator = torch.Generator().manual_seed(0)
    kaiming = torch.empty(4000 * RANK, FEATURES)
    nn.init.kaiming_uniform_(kaiming, a=5**0.5, generator=generator)
    wanted = (rows.double() @ kaiming.double().mT).square().mean() * RANK
    assert float(power) == pytest.approx(float(wanted), rel=0.02)


def lora_A_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: module.get_submodule(name).lora_A["default"].weight.detach() for name in ATTENTION_LAYERS}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16 autocast"])
def test_the_whole_streamed_path_agrees_with_the_svd_of_all_rows(autocast):
    module, batches = tiny_attention(), token_batches(4)
    loss = squared_loss(module)

    def loss_fn(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return loss(batch)

    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in ATTENTION_LAYERS
    ]
    module.eval()
    with torch.no_grad():
        for batch in batches:
            loss_fn(batch)
    for handle in handles:
        handle.remove()
    report = initialize(
        module, "eva", batches, loss_fn, rank=RANK, target_modules=list(ATTENTION_LAYERS), progress=False
    )
    for name, lora_A in lora_A_of(module).items():
        rows = torch.cat(seen[name])
        variances, directions = principal_directions(rows)
        assert variances[RANK] < 0.9 * variances[RANK - 1], "the oracle needs a gap"
        assert largest_principal_angle(lora_A, torch.from_numpy(directions[:RANK])) < MAX_ANGLE, name
        assert report.layers[name].num_rows == len(rows)
        expected = variances[:RANK].sum() / variances.sum()
        assert report.layers[name].captured == pytest.approx(expected, rel=1e-4)


class ThreeLayers(nn.Module):
    """An MLP whose layers see inputs of very different spectra, so that ranks move between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(FEATURES, 40), nn.Linear(40, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.tanh(self.fc2(torch.relu(self.fc1(x)))))


def three_layers() -> ThreeLayers:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = ThreeLayers()
    # Decaying spectra leave gaps between components; without a gap a component is no definite direction.
    for seed, (layer, decay) in enumerate(((module.fc1, 0.75), (module.fc2, 0.6))):
        left, _, right = torch.linalg.svd(draw_weight(*layer.weight.shape, seed=seed), full_matrices=False)
        layer.weight.data = left * decay ** torch.arange(left.shape[1]) @ right
    return module


def peft_eva(batches: list[Tensor], rank: int, rho: float, tau: float) -> dict[str, Tensor]:
    """layer -> components, by PEFT's incremental PCA."""
    targets = ["fc1", "fc2", "fc3"]
    config = LoraConfig(r=rank, target_modules=targets, init_lora_weights="eva", eva_config=EvaConfig(rho=rho, tau=tau))

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    model = get_peft_model(three_layers(), config, low_cpu_mem_usage=True)
    state = get_eva_state_dict(
        model,
        batches,
        forward_fn=forward,
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    return {name.removeprefix("base_model.model."): value for name, value in state.items()}


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_agrees_with_pefts_eva_within_its_own_tolerance(rho):
    """PEFT stops at a cosine of tau between successive estimates of a component: ours must be as close to them."""
    tau = 0.99
    batches = list(rows_with_spectrum(4 * 3000, [0.7**index for index in range(FEATURES)], mean=0.3).split(3000))
    theirs = peft_eva(batches, RANK, rho, tau)
    module = three_layers()
    report = initialize(
        module,
        "eva",
        batches,
        lambda batch: module(batch).square().mean(),
        rank=RANK,
        target_modules=["fc1", "fc2", "fc3"],
        variable_rank=rho > 1,
        min_rank=0,
        progress=False,
    )
    ranks = {name: layer.rank for name, layer in report.layers.items()}
    their_ranks = {name: len(theirs[name]) for name in ranks if name in theirs}
    assert sum(ranks.values()) == 3 * RANK
    assert ranks == {name: their_ranks.get(name, 0) for name in ranks}
    if rho > 1:
        assert len(set(ranks.values())) > 1  # there was something to redistribute
    for name, rank in ranks.items():
        lora_A = module.get_submodule(name).lora_A["default"].weight.detach()
        assert lora_A.shape[0] == rank
        cosines = nn.functional.cosine_similarity(lora_A, theirs[name]).abs()
        assert float(cosines.min()) > tau, name


def test_eva_is_in_the_methods_under_its_name():
    assert METHODS["eva"].__name__ == "EVA"
