"""The one public call: what it sets up, what it reports, and what it refuses before anything is computed."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from core_fixtures import (
    ADAPTED_STATES,
    ATTENTION_LAYERS,
    TinyAttention,
    adapted,
    product,
    relative_error,
    ridged,
    squared_loss,
    symmetric_power,
    tiny_attention,
    token_batches,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lorainit_diffusers import METHODS, InitReport, adapter_state_dict, initialize, make_method
from lorainit_diffusers.adapters import lora_layers, unwrap
from lorainit_diffusers.families.base import StepRecord
from lorainit_diffusers.methods import Solution
from lorainit_diffusers.methods.declared import zero_delta_options
from lorainit_diffusers.offset import get_offset

TARGETS = list(ATTENTION_LAYERS)
PEFT_STATES = [state for state in ADAPTED_STATES if state != "add_adapter"]  # that one is a method of diffusers' models
MEASURED = make_method("cntlora", {"constraint": "alignment", "pretraining": "measured"})
SCORELESS = ("olora", "milora", "orthonormal", "orthogonal", "gaussian", "kaiming")
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)


def run(module: nn.Module, method: Any = "eva", batches: Any = None, loss: Any = None, **kwargs: Any) -> InitReport:
    options = {"rank": 4, "target_modules": TARGETS, "progress": False} | kwargs
    return initialize(
        module, method, token_batches() if batches is None else batches, loss or squared_loss(module), **options
    )


def factors(module: nn.Module) -> dict[str, Tensor]:
    return adapter_state_dict({"": module})


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


# --- ranks, alphas, targets -----------------------------------------------------------------------------------------


def test_a_raw_module_gets_rank_8_and_alpha_equal_to_it_by_default():
    module = tiny_attention()
    report = run(module, "gaussian", rank=None)
    assert {layer.rank for layer in report.layers.values()} == {8}
    assert {layer.alpha for layer in report.layers.values()} == {8.0}
    assert {layer.scaling["default"] for layer in lora_layers(module).values()} == {1.0}


def test_an_adapted_module_keeps_its_rank_its_alpha_and_its_targets():
    module = adapted(tiny_attention(), "get_peft_model", ["to_q", "up"], r=2, lora_alpha=6)
    report = run(module, "eva", rank=None, target_modules=None)
    assert report.layers.keys() == {"to_q", "up"}
    assert {(layer.rank, layer.alpha) for layer in report.layers.values()} == {(2, 6.0)}
    assert {layer.scaling["default"] for layer in lora_layers(module).values()} == {3.0}


@pytest.mark.parametrize("state", PEFT_STATES)
def test_rank_and_alpha_can_be_changed(state):
    module = adapted(tiny_attention(), state, TARGETS)
    report = run(module, "eva", rank=3, alpha=12.0)
    for name, layer in lora_layers(module).items():
        assert layer.lora_A["default"].weight.shape[0] == report.layers[name].rank == 3
        assert layer.scaling["default"] == 4.0
        assert report.layers[name].alpha == 12.0


@pytest.mark.parametrize("variable_rank", [False, True])
def test_rslora_divides_by_the_root_of_the_rank_in_the_model_and_in_the_report(variable_rank):
    module = tiny_attention()
    report = run(module, "eva", rank=4, alpha=6.0, use_rslora=True, variable_rank=variable_rank)
    for name, layer in lora_layers(module).items():
        rank = report.layers[name].rank
        assert layer.scaling["default"] == pytest.approx(6.0 / 4**0.5)
        assert report.layers[name].alpha == pytest.approx(3.0 * rank**0.5)
    assert (len({layer.rank for layer in report.layers.values()}) > 1) == variable_rank


def test_every_state_gets_the_same_factors():
    results = []
    for state in PEFT_STATES:
        module = adapted(tiny_attention(), state, TARGETS, r=4, lora_alpha=4)
        run(module, "cntlora")
        results.append(factors(module))
    assert_same(results[0], results[1])


def test_targets_are_names_endings_or_a_regular_expression():
    block = nn.ModuleDict({"a": tiny_attention(), "b": tiny_attention(1)})
    for targets, expected in (
        (["to_q"], {"a.to_q", "b.to_q"}),
        (["a.to_q", "b.up"], {"a.to_q", "b.up"}),
        (r"b\.to_[qk]", {"b.to_q", "b.to_k"}),
    ):
        module = nn.ModuleDict({key: TinyAttention() for key in block})
        assert run(module, "gaussian", target_modules=targets).layers.keys() == expected


def test_components_have_their_own_targets_and_their_names_in_the_report():
    modules = {"first": tiny_attention(), "second": tiny_attention(1)}

    def loss(batch: Tensor) -> Tensor:
        return modules["second"](modules["first"](batch)).square().mean()

    targets = {"first": ["to_q"], "second": ["up", "down"]}
    report = initialize(modules, "eva", token_batches(), loss, rank=4, target_modules=targets, progress=False)
    assert report.layers.keys() == {"first.to_q", "second.up", "second.down"}
    assert lora_layers(modules["first"]).keys() == {"to_q"}
    assert lora_layers(modules["second"]).keys() == {"up", "down"}


# --- variable ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SCORELESS])
@pytest.mark.parametrize("state", PEFT_STATES)
def test_variable_ranks_spend_the_budget_and_keep_the_scaling(name, state):
    module = adapted(tiny_attention(), state, TARGETS, r=4, lora_alpha=6)
    before = unwrap(module)(token_batches(1)[0]) if state == "raw" else None
    report = run(module, name, alpha=6.0, variable_rank=True)
    ranks = {key: layer.rank for key, layer in report.layers.items()}
    assert sum(ranks.values()) == 4 * 6
    assert all(1 <= rank <= 8 for rank in ranks.values())
    assert len(set(ranks.values())) > 1
    for key, layer in lora_layers(module).items():
        assert layer.lora_A["default"].weight.shape[0] == ranks[key]
        assert layer.scaling["default"] == pytest.approx(1.5)
        assert report.layers[key].alpha == pytest.approx(1.5 * ranks[key])
    if before is not None and make_method(name).step_zero != "moved":
        module.eval()
        expected = tiny_attention().eval()(token_batches(1)[0])
        assert relative_error(module(token_batches(1)[0]), expected) < 1e-5


def test_ranks_follow_the_scores():
    """Any kept component is worth at least as much as any component that was left out, up to the bounds."""
    report = run(tiny_attention(), "eva", variable_rank=True, min_rank=1, max_rank=6, rank_budget=20)
    kept, left = [], []
    for layer in report.layers.values():
        kept += layer.scores[1 : layer.rank]
        left += layer.scores[layer.rank : 6]
    assert min(kept) >= max(left)
    allocation = report.allocation
    assert allocation.last_kept.score == pytest.approx(min(kept), rel=1e-4)
    assert allocation.first_refused.score == pytest.approx(max(left), rel=1e-4)
    assert report.layers[allocation.last_kept.layer].rank == allocation.last_kept.component
    assert report.layers[allocation.first_refused.layer].rank == allocation.first_refused.component - 1
    assert (allocation.budget, allocation.min_rank, allocation.max_rank) == (20, 1, 6)
    assert run(tiny_attention(), "eva").allocation is None


def test_budgets_and_bounds_are_respected():
    report = run(tiny_attention(), "eva", variable_rank=True, rank_budget=13, min_rank=2, max_rank=3)
    ranks = [layer.rank for layer in report.layers.values()]
    assert sum(ranks) == 13
    assert set(ranks) == {2, 3}
    module = tiny_attention()
    report = run(module, "eva", variable_rank=True, parameter_budget=600)
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trainable <= 600
    assert trainable > 600 - (16 + 24)


def test_a_large_max_rank_is_capped_by_each_layer():
    report = run(tiny_attention(), "eva", variable_rank=True, max_rank=1000, rank_budget=60)
    assert max(layer.rank for layer in report.layers.values()) <= 16
    assert sum(layer.rank for layer in report.layers.values()) == 60


def test_variable_ranks_do_not_ask_lora_ga_for_more_than_its_2r_directions():
    """rank 6 fits into 16 features (12 directions); the default cap of twice the rank must shrink to 8, not fail."""
    report = run(tiny_attention(), "lora_ga", rank=6, variable_rank=True)
    ranks = [layer.rank for layer in report.layers.values()]
    assert sum(ranks) == 36
    assert max(ranks) <= 8
    report = run(tiny_attention(), "lora_ga", rank=6, variable_rank=True, max_rank=3, rank_budget=15)
    assert max(layer.rank for layer in report.layers.values()) == 3


# --- determinism and side effects -----------------------------------------------------------------------------------


@EVERY_METHOD
def test_the_seed_decides_everything(name):
    results = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        module = tiny_attention()
        loss = squared_loss(module)
        run(module, name, loss=lambda batch, loss=loss: loss(batch + 0.1 * torch.randn_like(batch)), seed=7)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(factors(module))
    assert_same(*results)


@pytest.mark.parametrize("name", ["gaussian", "kaiming", "orthonormal", "orthogonal"])
def test_random_methods_differ_by_seed_and_by_layer(name):
    results = []
    for seed in (0, 1):
        module = tiny_attention()
        run(module, name, seed=seed)
        results.append(factors(module))
    assert not torch.equal(results[0][".to_q.lora_A"], results[1][".to_q.lora_A"])
    assert not torch.equal(results[0][".to_q.lora_A"], results[0][".to_k.lora_A"])


@pytest.mark.parametrize("name", ["eva", "lora_ga", "corda", "cntlora"])
def test_what_an_adapter_has_learned_does_not_enter_the_statistics(name):
    fresh, trained = tiny_attention(), tiny_attention()
    run(fresh, name)
    run(trained, "gaussian")
    for layer in lora_layers(trained).values():
        layer.lora_B["default"].weight.data.normal_()
    run(trained, name)
    assert_same(factors(trained), factors(fresh))


@pytest.mark.parametrize("state", PEFT_STATES)
@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_a_loss_that_raises_leaves_the_module_as_it_was(state, name):
    module = adapted(tiny_attention(), state, TARGETS).train()
    names = [key for key, _ in module.named_modules()]
    values = {key: value.clone() for key, value in module.state_dict().items()}
    flags = {key: p.requires_grad for key, p in module.named_parameters()}
    torch.manual_seed(0)
    random_state = torch.get_rng_state()

    def loss(batch: Tensor) -> Tensor:
        squared_loss(module)(batch + torch.randn_like(batch))
        raise RuntimeError("broken loss")

    with pytest.raises(RuntimeError, match="broken loss"):
        run(module, name, loss=loss)
    assert [key for key, _ in module.named_modules()] == names
    assert {key: p.requires_grad for key, p in module.named_parameters()} == flags
    assert all(torch.equal(value, values[key]) for key, value in module.state_dict().items())
    assert all(m.training for m in module.modules())
    assert all(not m._forward_pre_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())
    assert all(not layer.disable_adapters for layer in lora_layers(module).values())
    assert torch.equal(torch.get_rng_state(), random_state)


@EVERY_METHOD
def test_training_mode_is_kept_and_gradients_are_clean(name):
    module = tiny_attention().train()
    run(module, name)
    assert module.training
    assert module.dropout.training
    assert all(p.grad is None for p in module.parameters())


def test_batches_are_drawn_once_up_to_the_cap():
    drawn: list[int] = []

    def batches() -> Iterator[Tensor]:
        for index, batch in enumerate(token_batches(5)):
            drawn.append(index)
            yield batch

    module = tiny_attention()
    report = run(module, "eva", batches=batches(), num_batches=2)
    assert drawn == [0, 1]
    assert report.num_passes == 2
    drawn.clear()
    assert run(tiny_attention(), "gaussian", batches=batches()).num_passes == 0
    assert not drawn  # a method that observes nothing draws nothing


# --- a reference ----------------------------------------------------------------------------------------------------


def inputs_of(module: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """All rows that each layer sees, recorded by hooks of our own."""
    rows: dict[str, list[Tensor]] = {name: [] for name in TARGETS}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))
        )
        for name in TARGETS
    ]
    for batch in batches:
        module.eval()(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@pytest.mark.parametrize("share_inputs", [True, False])
def test_reference_batches_are_what_the_inputs_are_aligned_with(share_inputs):
    module, batches, reference = tiny_attention(), token_batches(3), token_batches(2, seed=1)
    seen, wanted = inputs_of(module, batches), inputs_of(module, reference)
    bases = {name: module.get_submodule(name).weight.detach().double() for name in TARGETS}
    report = run(module, MEASURED, batches, reference_batches=reference, rank=16, share_inputs=share_inputs)
    for name, layer in lora_layers(module).items():
        root = symmetric_power(ridged(seen[name], 0.1), 0.5)
        inverse = torch.linalg.inv(root)
        aligned = inverse @ symmetric_power(root @ ridged(wanted[name], 0.1) @ root, 0.5) @ inverse
        change = product((layer.lora_A["default"].weight, layer.lora_B["default"].weight))
        assert relative_error(bases[name] + change, bases[name] @ aligned) < 1e-4, name
        assert float(change.detach().norm()) > 0.01 * float(bases[name].norm())
        assert report.layers[name].num_rows == 2 * 4 * 20
    assert report.num_passes == 5
    assert report.options["pretraining"] == "measured"
    assert report.layers["to_v"].shared_group == ("to_q" if share_inputs else "to_v")
    expected = tiny_attention().eval()(batches[0])
    assert relative_error(module.eval()(batches[0]), expected) < 1e-5  # the offset keeps step 0


def test_the_same_data_as_reference_asks_for_no_change_because_both_passes_draw_the_same_noise():
    module = tiny_attention()

    def loss(batch: Tensor) -> Tensor:
        return squared_loss(module)(batch + torch.randn_like(batch))

    bases = {name: module.get_submodule(name).weight.detach().clone() for name in TARGETS}
    run(module, MEASURED, token_batches(), loss, reference_batches=token_batches())
    for name, layer in lora_layers(module).items():
        change = product((layer.lora_A["default"].weight, layer.lora_B["default"].weight))
        assert float(change.detach().norm()) < 1e-5 * float(bases[name].norm())


def test_reference_batches_are_drawn_once_up_to_the_cap_after_the_others():
    drawn: list[str] = []

    def batches(kind: str) -> Iterator[Tensor]:
        for batch in token_batches(5):
            drawn.append(kind)
            yield batch

    report = run(tiny_attention(), MEASURED, batches("data"), reference_batches=batches("reference"), num_batches=2)
    assert drawn == ["data", "data", "reference", "reference"]
    assert report.num_passes == 4


def test_both_passes_run_the_base_model_and_restore_everything():
    fresh, trained = tiny_attention(), tiny_attention()
    options = {"reference_batches": token_batches(seed=1)}
    run(fresh, MEASURED, **options)
    run(trained, "gaussian")
    for layer in lora_layers(trained).values():
        layer.lora_B["default"].weight.data.normal_()
    broken = token_batches(seed=1)

    def loss(batch: Tensor) -> Tensor:
        if batch is broken[1]:
            raise RuntimeError("broken reference")
        return squared_loss(trained)(batch)

    trained.train()
    values = {key: value.clone() for key, value in trained.state_dict().items()}
    with pytest.raises(RuntimeError, match="broken reference"):
        run(trained, MEASURED, loss=loss, reference_batches=broken)
    assert all(torch.equal(value, values[key]) for key, value in trained.state_dict().items())
    assert trained.training
    assert all(not layer.disable_adapters for layer in lora_layers(trained).values())
    assert all(not m._forward_pre_hooks for m in trained.modules())
    run(trained, MEASURED, **options)
    assert_same(factors(trained), factors(fresh))


def test_variable_ranks_with_a_reference():
    report = run(tiny_attention(), MEASURED, reference_batches=token_batches(seed=1), variable_rank=True)
    ranks = [layer.rank for layer in report.layers.values()]
    assert sum(ranks) == 24
    assert len(set(ranks)) > 1


def test_reference_batches_are_given_exactly_where_they_are_used():
    missing = r"pass reference_batches, samples of the pre-training distribution such as DreamBooth's class images"
    refused(tiny_attention(), missing, MEASURED)
    for method in ("cntlora", "eva", "lora_ga", "gradient_step", "pissa", "gaussian"):
        refused(
            tiny_attention(),
            rf"'{method}' with these options does not use reference_batches; leave them out",
            method,
            reference_batches=token_batches(1),
        )


def test_a_reference_that_is_empty_or_not_finite_is_named():
    with pytest.raises(ValueError, match="got no reference batches"):
        run(tiny_attention(), MEASURED, reference_batches=[])
    with pytest.raises(ValueError, match="layer 'to_q' in reference batch 0"):
        run(tiny_attention(), MEASURED, reference_batches=[torch.full((2, 20, 16), float("nan"))])


# --- few rows -------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """One layer sees a row a token, the other a row a sample, as time embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.pooled = nn.Linear(16, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.tokens(x).mean(1))


@pytest.mark.parametrize("name", ["eva", "cntlora", "corda"])
@pytest.mark.parametrize("variable", [False, True])
def test_a_layer_with_fewer_rows_than_rank_falls_back_and_says_so(name, variable):
    module = Pooled()
    batches = [batch[:1] for batch in token_batches(3)]
    expected = module(batches[0]).detach()
    report = run(
        module,
        name,
        batches,
        lambda b: module(b).square().mean(),
        target_modules=["tokens", "pooled"],
        variable_rank=variable,
    )
    layer = report.layers["pooled"]
    assert layer.num_rows == 3
    assert layer.scores is None
    assert layer.captured is None
    assert "3 rows" in layer.fallback
    assert "Kaiming" in layer.fallback
    assert report.layers["tokens"].fallback is None
    assert "1 layers fell back, first pooled" in report.summary()
    lora = lora_layers(module)["pooled"].requires_grad_(False)
    assert float(lora.lora_B["default"].weight.abs().max()) == 0.0
    bound = 16**-0.5
    assert 0.8 * bound < float(lora.lora_A["default"].weight.abs().max()) <= bound
    assert get_offset(lora, "default") is None
    assert relative_error(module(batches[0]), expected) < 1e-5
    if variable:
        assert layer.rank >= 1


@pytest.mark.parametrize("few", ["data", "reference"])
def test_a_layer_falls_back_where_either_distribution_has_fewer_rows_than_rank(few):
    module, many, three = Pooled(), token_batches(3), [batch[:1] for batch in token_batches(3)]
    batches, reference = (three, many) if few == "data" else (many, three)
    report = run(
        module,
        MEASURED,
        batches,
        lambda b: module(b).square().mean(),
        target_modules=["tokens", "pooled"],
        reference_batches=reference,
    )
    assert report.layers["pooled"].num_rows == 3
    assert "3 rows" in report.layers["pooled"].fallback
    assert report.layers["tokens"].fallback is None


def test_rows_accumulate_over_batches_before_a_layer_falls_back():
    module = Pooled()
    report = run(
        module, "eva", [batch[:2] for batch in token_batches(3)], lambda b: module(b).mean(), target_modules=["pooled"]
    )
    assert report.layers["pooled"].num_rows == 6
    assert report.layers["pooled"].fallback is None


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_of_a_data_driven_method():
    report = run(tiny_attention(), "eva", variable_rank=True)
    assert report.method == "eva"
    assert report.step_zero == "equal"
    assert report.options == {"centered": True, "whiten": "none", "scale": "paper", "sketch_columns": None}
    assert report.num_passes == 3
    groups = {name: layer.shared_group for name, layer in report.layers.items()}
    assert groups == {"to_q": "to_q", "to_k": "to_q", "to_v": "to_q", "to_out": "to_out", "up": "up", "down": "down"}
    assert {layer.num_rows for layer in report.layers.values()} == {240}
    for layer in report.layers.values():
        assert layer.captured == pytest.approx(sum(layer.scores[: layer.rank]), rel=1e-4)
        assert 0 < layer.captured <= 1
    assert min(report.forward_s, report.statistics_s, report.solve_s) > 0
    assert report.overhead == pytest.approx((report.statistics_s + report.solve_s) / report.forward_s)


def test_the_report_of_a_method_that_observes_nothing():
    report = run(tiny_attention(), "pissa")
    assert report.overhead is None
    assert report.num_passes == 0
    assert {layer.num_rows for layer in report.layers.values()} == {0}
    report = run(tiny_attention(), "lora_ga")
    assert {layer.num_rows for layer in report.layers.values()} == {3}  # gradients


@EVERY_METHOD
def test_the_report_is_plain_json(tmp_path, name):
    report = run(tiny_attention(), name)
    data = json.loads(report.save(tmp_path / "init_report.json").read_text())
    assert data == json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["method"] == name
    assert data["layers"].keys() == set(TARGETS)
    assert data["totals"]["num_layers"] == 6
    assert data["totals"]["sum_of_ranks"] == 24
    assert data["totals"]["num_shared_groups"] == (4 if METHODS[name].observes.startswith("inputs") else 6)
    summary = report.summary()
    assert f"init {name}" in summary
    assert "6 x rank 4" in summary


def test_a_configured_instance_reports_its_name_and_options():
    report = run(tiny_attention(), make_method("cntlora", {"ridge": 0.5, "base": "down_only"}))
    assert report.method == "cntlora"
    assert report.options["ridge"] == 0.5
    assert report.step_zero == "equal"


def test_a_users_own_method_is_used_as_it_is():
    class Mine(METHODS["gaussian"]):  # type: ignore[misc, name-defined]
        pass

    assert run(tiny_attention(), Mine()).method == "Mine"


# --- the memory budget ----------------------------------------------------------------------------------------------


def wide_run(method: Any, budget_gb: float | None, **kwargs: Any) -> tuple[InitReport, nn.Module]:
    """Width 96 in front, 320 in the feed-forward layer: rank 2 sketches in 80 columns."""
    module = tiny_attention(features=96, hidden=320)
    batches = token_batches(2, features=96)
    report = run(module, method, batches, rank=2, memory_budget_gb=budget_gb, **kwargs)
    return report, module


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].observes.startswith("inputs")])
@pytest.mark.parametrize("variable_rank", [False, True])
def test_every_method_of_inputs_runs_under_a_budget_and_says_what_was_sketched(name, variable_rank):
    gradients = 4 * (4 * 96 * 96 + 2 * 96 * 320) if "gradients" in METHODS[name].observes else 0
    budget = gradients + 1_100_000  # the exact moment of width 320 alone takes 1.2 MB
    report, module = wide_run(name, budget / 1e9, variable_rank=variable_rank)
    columns = 96 if variable_rank else 80  # 8 * 4 + 64: a layer may get twice the rank
    assert {key: layer.sketch_columns for key, layer in report.layers.items() if layer.sketch_columns} == {
        "down": columns
    }
    assert 0 < report.statistics_bytes <= report.peak_statistics_bytes <= budget
    assert report.memory_budget_bytes == pytest.approx(budget, abs=1)
    assert report.statistics_device == "cpu"
    assert (
        f"1 layers sketched in up to {columns} columns: statistics took 0.00 GB of 0.00 GB on cpu" in report.summary()
    )
    assert report.to_json()["totals"]["num_sketched_layers"] == 1
    expected = tiny_attention(features=96, hidden=320).eval()(token_batches(1, features=96)[0])
    if make_method(name).step_zero != "moved":
        assert relative_error(module.eval()(token_batches(1, features=96)[0]), expected) < 1e-5


def test_a_sketch_finds_the_directions_of_eva_where_the_spectrum_decays():
    (_, exact), (_, sketched) = wide_run("eva", None), wide_run("eva", 900_000 / 1e9)
    for name in TARGETS:
        first, second = (unwrap(m).get_submodule(name).lora_A["default"].weight.detach() for m in (exact, sketched))
        if name == "down":
            assert not torch.equal(first, second)
            assert float((first @ second.mT).square().sum()) == pytest.approx(2, abs=1e-3)  # one subspace
        else:
            assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["cntlora", "lora_ga", "gradient_step"])
def test_without_a_budget_small_models_are_exact_and_a_generous_one_changes_nothing(name):
    (first, _), (report, module) = wide_run(name, 4.0), wide_run(name, None)
    assert_same(factors(module), factors(wide_run(name, 4.0)[1]))
    assert all(layer.sketch_columns is None for layer in report.layers.values())
    assert "sketched" not in report.summary()
    assert report.statistics_bytes == first.statistics_bytes > 0
    assert report.memory_budget_bytes > 1e8


@pytest.mark.parametrize("name", ["cntlora", "lora_ga", "gradient_step", "eva"])
def test_statistics_on_a_device_of_their_own_give_the_same_adapter(name):
    first, second = wide_run(name, None)[1], wide_run(name, None, statistics_device="cpu")[1]
    for layer, other in zip(lora_layers(first).values(), lora_layers(second).values(), strict=True):
        changes = [product((x.lora_A["default"].weight, x.lora_B["default"].weight)).detach() for x in (layer, other)]
        if bool(changes[0].any()):
            assert relative_error(*changes) < 1e-3
        assert relative_error(*(x.lora_A["default"].weight.abs() for x in (layer, other))) < 1e-3


def test_a_reference_shares_the_budget():
    module = tiny_attention(features=96, hidden=320)
    report = run(
        module,
        MEASURED,
        token_batches(2, features=96),
        rank=2,
        memory_budget_gb=1.5e-3,  # both exact moments of `down` take 2.5 MB
        reference_batches=token_batches(2, features=96, seed=1),
    )
    assert [key for key, layer in report.layers.items() if layer.sketch_columns] == ["down"]
    assert report.peak_statistics_bytes <= 1.5e6


def test_budgets_that_cannot_be_met_are_refused():
    refused(tiny_attention(), "memory_budget_gb is 0; it must be positive", memory_budget_gb=0.0)
    refused(tiny_attention(), r"gradients of 6 layers need 7.17e-06 GB, more than", "lora_ga", memory_budget_gb=1e-6)
    message = r"layer 'to_q' \(input width 16.*raise memory_budget_gb.*statistics_device='cpu'.*target_modules"
    with pytest.raises(ValueError, match=message):
        run(tiny_attention(), "eva", memory_budget_gb=1e-6)


def test_the_solve_frees_what_it_no_longer_needs(monkeypatch):
    """With one rank for all, no layer's statistic or decomposition outlives its own solve."""
    alive: list[int] = []
    seen: list[weakref.ref[Any]] = []
    eva = METHODS["eva"]

    class Watched(eva):  # type: ignore[misc, valid-type]
        def solve(self, weight: Tensor, statistic: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(weakref.ref(statistic))
            alive.append(len({id(ref()) for ref in seen if ref() is not None}))
            return super().solve(weight, statistic, *args, **kwargs)

    run(tiny_attention(), Watched())
    assert max(alive) == 1
    assert len(alive) == 6


# --- a model family -------------------------------------------------------------------------------------------------


class TinyFamily:
    """The smallest model family: padded tokens, timesteps, and a module of its own."""

    def __init__(self) -> None:
        self.module = tiny_attention()
        self.step = StepRecord()
        self.strata: list[int] = []
        self.poison = False

    @property
    def adapted(self) -> dict[str, nn.Module]:
        return {"model": self.module}

    @property
    def heads(self) -> dict[str, nn.Module]:
        return {"model.down": self.module.down}

    def default_targets(self, component: str) -> list[str]:
        return {"model": ["to_q", "up"]}[component]

    def loss(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(batch.shape, generator=generator)
        self.step.timesteps = torch.tensor([3, 7])
        self.step.token_masks = {"model": torch.arange(batch.shape[1]).expand(batch.shape[:2]) < 5}
        output = self.module(batch + 0.1 * noise)
        return (output * (float("nan") if self.poison else 1.0)).mean()

    @contextmanager
    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> Iterator[None]:
        self.strata.append(num_samples)
        yield


def test_a_family_brings_its_loss_targets_masks_and_stratified_timesteps():
    family = TinyFamily()
    report = initialize(family, "eva", token_batches(3), rank=4, progress=False)
    assert report.layers.keys() == {"model.to_q", "model.up"}
    assert report.layers["model.to_q"].num_rows == 3 * 4 * 5  # the masked tokens are left out
    assert family.strata == [3]
    again = TinyFamily()
    initialize(again, "eva", iter(token_batches(3)), rank=4, num_batches=3, progress=False)
    assert_same(factors(again.module), factors(family.module))
    other = TinyFamily()
    initialize(other, "eva", token_batches(3), rank=4, seed=1, progress=False)
    assert not torch.equal(factors(other.module)[".to_q.lora_A"], factors(family.module)[".to_q.lora_A"])


def test_a_familys_heads_are_trainable_afterwards():
    family = TinyFamily()
    initialize(family, "eva", token_batches(2), rank=4, progress=False)
    trained = {name for name, parameter in family.module.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        f"down.{name}" for name, _ in family.module.down.named_parameters()
    }


def test_a_reference_has_its_own_strata_and_masks():
    family = TinyFamily()
    report = initialize(
        family, MEASURED, token_batches(3), reference_batches=token_batches(2, seed=1), rank=4, progress=False
    )
    assert family.strata == [3, 2]
    assert report.layers["model.to_q"].num_rows == 2 * 4 * 5
    family = TinyFamily()
    reference = iter(token_batches(4, seed=1))
    initialize(family, MEASURED, token_batches(3), reference_batches=reference, num_batches=2, rank=4, progress=False)
    assert family.strata == [2, 2]


@pytest.mark.parametrize("name", ["eva", "cntlora", "corda"])
def test_padding_counts_only_where_it_is_not_masked(name):
    """Tokens from the sixth on are padding: `to_q` is fed by the batch itself, so other padding is all that differs."""
    results = {}
    for mask_padding in (True, False):
        for padding in (1.0, 3.0):
            family, batches = TinyFamily(), token_batches(3)
            for batch in batches:
                batch[:, 5:] *= padding
            report = initialize(family, name, batches, rank=4, mask_padding=mask_padding, progress=False)
            assert report.layers["model.to_q"].num_rows == 3 * 4 * (5 if mask_padding else 20)
            results[mask_padding, padding] = factors(family.module)[".to_q.lora_A"]
    assert torch.equal(results[True, 1.0], results[True, 3.0])
    assert not torch.allclose(results[False, 1.0], results[False, 3.0], atol=1e-3)
    assert not torch.allclose(results[False, 1.0], results[True, 1.0], atol=1e-3)


def test_non_finite_values_in_a_family_name_layer_batch_and_timesteps():
    family = TinyFamily()
    with pytest.raises(ValueError, match=re.escape("layer 'model.to_q' in batch 0 (timesteps [3, 7])")):
        initialize(family, "eva", [torch.full((2, 20, 16), float("nan"))], rank=4, progress=False)
    family.poison = True
    with pytest.raises(ValueError, match=r"weight gradient at layer 'model\.\w+' in batch 0 \(timesteps \[3, 7\]\)"):
        initialize(family, "lora_ga", token_batches(1), rank=4, progress=False)


@pytest.mark.parametrize("variable_rank", [False, True])
def test_decompositions_are_in_full_float32_whatever_the_caller_chose(monkeypatch, variable_rank):
    """TF32 (here by its switch) and autocast serve training; ten bits would not do for a subspace."""
    seen: list[tuple[str, bool]] = []
    solve = METHODS["eva"].solve

    def note() -> None:
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))

    def noted(self: Any, *args: Any, **kwargs: Any) -> Solution:
        note()
        solution = solve(self, *args, **kwargs)

        def factors(rank: int) -> Any:
            note()
            return solution.factors(rank)

        return Solution(solution.scores, factors)

    monkeypatch.setattr(METHODS["eva"], "solve", noted)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            run(tiny_attention(), "eva", variable_rank=variable_rank)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(seen) >= 2 * len(TARGETS)
    assert set(seen) == {("highest", False)}


# --- refusals -------------------------------------------------------------------------------------------------------


def refused(module: nn.Module, message: str, *args: Any, **kwargs: Any) -> None:
    """The call is refused with this message, without a forward pass and without a trace on the module."""
    names = [key for key, _ in module.named_modules()]

    def loss(batch: Tensor) -> Tensor:
        raise AssertionError("the loss must not run")

    with pytest.raises(ValueError, match=message) as error:
        run(module, *args, loss=loss, **kwargs)
    assert "\n" not in str(error.value)
    assert [key for key, _ in module.named_modules()] == names


def test_an_unknown_method_lists_the_known_ones():
    refused(tiny_attention(), r"unknown init 'evva'; known: cntlora, eva, lora_ga.*kaiming", "evva")


def test_targets_that_match_nothing_list_what_there_is():
    refused(tiny_attention(), r"\['to_qq'\] match no layer of TinyAttention.*to_q", target_modules=["to_qq"])
    refused(tiny_attention(), "no target_modules were given", target_modules=None)


def test_targets_that_disagree_with_the_adapter_are_refused():
    module = tiny_attention()
    run(module, target_modules=["to_q"])
    with pytest.raises(ValueError, match="disagree with it about layer 'to_k'"):
        run(module, target_modules=["to_q", "to_k"])
    with pytest.raises(ValueError, match="disagree with it about layer 'to_q'"):
        run(module, target_modules=["to_k"])
    assert run(module, target_modules=["to_q"]).layers.keys() == run(module, target_modules=None).layers.keys()


def test_targets_that_are_no_linear_layers_are_named():
    module = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3), "linear": nn.Linear(4, 4)})
    refused(module, "layer 'conv' is a Conv2d; only linear layers", target_modules=["conv", "linear"])


def test_a_rank_that_does_not_fit_names_the_layer():
    refused(tiny_attention(), r"`rank` 17 is larger than the smallest dimension of layer 'to_q'.*at most 16", rank=17)
    refused(tiny_attention(), "rank is 0", rank=0)


def test_limits_of_a_method_name_the_layer():
    refused(tiny_attention(), r"layer 'to_q': init 'lora_ga'.*use rank 8", "lora_ga", rank=9)
    refused(tiny_attention(), r"layer 'to_q': init 'orthogonal'.*rank 3", "orthogonal", rank=3)
    refused(tiny_attention(), r"layer 'to_q': sketch_columns 2", make_method("eva", {"sketch_columns": 2}))


@pytest.mark.parametrize("option", [{"rank_budget": 8}, {"parameter_budget": 800}, {"max_rank": 8}])
def test_budgets_without_variable_ranks_are_refused(option):
    refused(tiny_attention(), "need variable_rank=True", **option)


@pytest.mark.parametrize("name", SCORELESS)
def test_variable_ranks_without_scores_are_refused(name):
    refused(tiny_attention(), f"'{name}' gives no scores", name, variable_rank=True)


def test_impossible_budgets_are_refused_before_the_pass():
    refused(tiny_attention(), "rank_budget 5 is too small", "eva", variable_rank=True, rank_budget=5)
    refused(tiny_attention(), "exactly one", "eva", variable_rank=True, rank_budget=12, parameter_budget=900)
    refused(tiny_attention(), "min_rank=5, max_rank=4", "eva", variable_rank=True, min_rank=5, max_rank=4)


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_no_batches_and_no_loss_are_refused(name):
    module = tiny_attention()
    refused(module, "no batches", name, batches=[])
    refused(module, "no batches", name, num_batches=0)
    with pytest.raises(ValueError, match="loss_fn is missing"):
        initialize(module, name, token_batches(), rank=4, target_modules=TARGETS, progress=False)
    assert not lora_layers(module)


def test_compiled_modules_are_refused():
    compiled = torch.compile(tiny_attention(), backend="eager")
    with pytest.raises(ValueError, match=r"OptimizedModule.*before torch\.compile and accelerator\.prepare"):
        run(compiled)


def test_wrapped_modules_are_refused(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny_attention())
        with pytest.raises(ValueError, match=r"DistributedDataParallel.*\(component 'unet'\).*accelerator\.prepare"):
            run({"unet": wrapped})  # type: ignore[arg-type]
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match="DataParallel"):
        run(nn.DataParallel(tiny_attention()))


@pytest.mark.parametrize("name", [name for name in METHODS if make_method(name).step_zero != "equal"])
def test_dora_with_an_offset_or_a_moved_start_is_refused(name):
    refused(tiny_attention(), f"'{name}'.*DoRA", name, use_dora=True)
    module = get_peft_model(tiny_attention(), LoraConfig(r=4, target_modules=TARGETS, use_dora=True))
    refused(module, f"'{name}'.*DoRA", name, target_modules=None)


def test_the_remedy_for_dora_is_one_that_works():
    refused(
        tiny_attention(),
        r"use it with base=down_only, which is make_method\('cntlora', \{'base': 'down_only'\}\), or a zero-delta init "
        "such as eva or orthonormal, or drop use_dora",
        "cntlora",
        use_dora=True,
    )
    refused(tiny_attention(), r"; use a zero-delta init such as eva", "pissa", use_dora=True)
    for name, kind in METHODS.items():
        if not zero_delta_options(kind):
            continue
        method = make_method(name, zero_delta_options(kind))
        assert method.step_zero == "equal"
        module = tiny_attention()
        run(module, method, use_dora=True)
        assert all(layer.use_dora["default"] for layer in lora_layers(module).values())
    for name in ("eva", "orthonormal"):
        assert make_method(name).step_zero == "equal"


def test_new_dora_adapters_start_as_the_base_with_its_magnitudes():
    module = tiny_attention()
    bases = {name: module.get_submodule(name).weight.detach().clone() for name in TARGETS}
    run(module, "eva", use_dora=True)
    for name, layer in lora_layers(module).items():
        assert layer.use_dora["default"]
        magnitudes = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(magnitudes.detach(), bases[name].norm(dim=1), rtol=1e-5, atol=0)
    expected = tiny_attention().eval()(token_batches(1)[0])
    assert relative_error(module.eval()(token_batches(1)[0]), expected) < 1e-5


def test_an_existing_adapter_says_whether_it_is_dora():
    module = get_peft_model(tiny_attention(), LoraConfig(r=4, target_modules=TARGETS))
    run(module, "pissa", target_modules=None, use_dora=True)  # the adapter is a plain one
    assert not any(layer.use_dora.get("default", False) for layer in lora_layers(module).values())


def test_an_existing_dora_adapter_starts_as_the_base_again():
    module = get_peft_model(tiny_attention(), LoraConfig(r=4, target_modules=TARGETS, use_dora=True))
    for layer in lora_layers(module).values():  # as if it had been trained
        layer.lora_B["default"].weight.data.normal_()
        layer.lora_magnitude_vector["default"].weight.data.mul_(1.5)
    run(module, "eva", target_modules=None)
    expected = tiny_attention().eval()(token_batches(1)[0])
    assert relative_error(module.eval()(token_batches(1)[0]), expected) < 1e-5


def test_one_component_with_dora_is_enough_to_refuse_an_offset():
    modules = {
        "plain": get_peft_model(tiny_attention(), LoraConfig(r=4, target_modules=TARGETS)),
        "dora": get_peft_model(tiny_attention(), LoraConfig(r=4, target_modules=TARGETS, use_dora=True)),
    }
    with pytest.raises(ValueError, match="base=down_only"):
        initialize(modules, "cntlora", token_batches(), lambda batch: pytest.fail("the loss must not run"))


@pytest.mark.parametrize("name", ["pissa", "cntlora", "milora"])
def test_a_weight_that_is_not_finite_names_its_layer(name):
    module = tiny_attention()
    module.up.weight.data[0, 0] = float("nan")

    def loss(batch: Tensor) -> Tensor:
        return module.up(batch).nan_to_num().square().mean()

    with pytest.raises(ValueError, match="layer 'up' cannot be decomposed"):
        run(module, name, loss=loss, target_modules=["up"])
    assert not lora_layers(module)
