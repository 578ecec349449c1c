"""The collection pass: what it gathers, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from core_fixtures import ATTENTION_LAYERS, relative_error, squared_loss, tiny_attention, token_batches
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorainit_diffusers.budget import MemoryBudget
from lorainit_diffusers.collect import Collection, PassOptions, collect, known_length
from lorainit_diffusers.statistics import GradientMean, InputsAndGradient, InputsAndReference, SecondMoment
from lorainit_diffusers.training_step import TrainingStep


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


def second_moment(name: str, layer: nn.Linear) -> SecondMoment:
    return SecondMoment(layer.in_features)


def gradient_mean(name: str, layer: nn.Linear) -> GradientMean:
    return GradientMean((layer.out_features, layer.in_features))


def both_statistics(name: str, layer: nn.Linear) -> InputsAndGradient:
    return InputsAndGradient(second_moment(name, layer), gradient_mean(name, layer))


MAKE_STATISTIC = {"inputs": second_moment, "gradients": gradient_mean, "inputs and gradients": both_statistics}


def run(
    module: nn.Module,
    batches: Any,
    loss: Callable[[Any], Tensor] | None = None,
    observes: str = "inputs",
    **kwargs: Any,
) -> Collection:
    return collect(
        {"module": module},
        kwargs.pop("layers", linear_layers(module)),
        batches,
        loss or squared_loss(module),
        kwargs.pop("make_statistic", MAKE_STATISTIC[observes]),
        observes=observes,
        progress=False,
        **kwargs,
    )


def recorded_inputs(module: nn.Module, batches: list[Tensor], loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All rows that every linear layer sees, recorded by hooks of our own in evaluation mode."""
    rows: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: rows.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, layer in linear_layers(module).items()
    ]
    module.eval()
    with torch.no_grad():
        for batch in batches:
            loss(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def covariance(rows: Tensor) -> Tensor:
    rows = rows.double()
    return (rows - rows.mean(0)).mT @ (rows - rows.mean(0)) / len(rows)


def snapshot(module: nn.Module) -> dict[str, Any]:
    return {
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in module.modules()],
        "parameter hooks": [len(p._post_accumulate_grad_hooks or {}) for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "grad": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in module.parameters()],
        "values": [p.tolist() for p in module.parameters()],
        "random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


# --- what is gathered -----------------------------------------------------------------------------------------------


def test_statistics_equal_brute_force_over_all_rows():
    module, batches = tiny_attention(), token_batches()
    module.train()
    collection = run(module, batches)
    for name, rows in recorded_inputs(module, batches, squared_loss(module)).items():
        statistic = collection.statistics[name]
        assert statistic.num_rows == len(rows) == 3 * 4 * 20
        assert relative_error(statistic.covariance(), covariance(rows)) < 2e-6
    assert collection.num_passes == 3
    assert collection.forward_s > 0
    assert collection.statistics_s > 0


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_the_split_into_batches_does_not_matter(batch_size):
    module, rows = tiny_attention(), torch.cat(token_batches())
    expected = run(module, [rows]).statistics
    split = run(module, list(rows.flip(0).split(batch_size))).statistics
    for name in ATTENTION_LAYERS:
        assert relative_error(split[name].covariance(), expected[name].covariance()) < 1e-5


def test_under_bf16_autocast_the_statistic_is_that_of_the_computed_rows():
    module, batches = tiny_attention(), token_batches()

    def loss(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return squared_loss(module)(batch)

    collection = run(module, batches, loss)
    recorded = recorded_inputs(module, batches, loss)
    assert recorded["to_out"].dtype == torch.bfloat16
    for name, rows in recorded.items():
        assert relative_error(collection.statistics[name].covariance(), covariance(rows)) < 2e-6


def test_gradients_equal_autograd_of_the_mean_loss():
    module, batches = tiny_attention(), token_batches()
    module.eval()
    weights = [layer.weight for layer in linear_layers(module).values()]
    mean_loss = sum(squared_loss(module)(batch) for batch in batches) / len(batches)
    expected = torch.autograd.grad(mean_loss, weights)
    module.train()
    collection = run(module, batches, observes="gradients")
    for (name, statistic), gradient in zip(collection.statistics.items(), expected, strict=True):
        assert relative_error(statistic.mean(), gradient) < 1e-5, name
        assert statistic.num_rows == 3


def test_one_pass_for_both_gathers_what_two_passes_do():
    module, batches = tiny_attention(), token_batches()
    both = run(module, batches, observes="inputs and gradients")
    inputs, gradients = run(module, batches), run(module, batches, observes="gradients")
    assert both.leaders == inputs.leaders
    assert both.num_passes == 3
    for name, statistic in both.statistics.items():
        assert isinstance(statistic, InputsAndGradient)
        assert statistic.inputs is both.statistics[both.leaders[name]].inputs  # type: ignore[union-attr]
        assert statistic.num_rows == inputs.statistics[name].num_rows
        assert torch.equal(statistic.inputs.covariance(), inputs.statistics[name].covariance())
        assert torch.equal(statistic.gradient.mean(), gradients.statistics[name].mean())
    assert all(weight.grad is None for weight in module.parameters())


def test_a_pass_over_a_reference_is_joined_layer_by_layer():
    module = tiny_attention()
    inputs, reference = run(module, token_batches(3)), run(module, token_batches(2, seed=1))
    joined = inputs.with_reference(reference)
    assert joined.leaders == inputs.leaders
    assert joined.num_passes == 5
    assert joined.forward_s == inputs.forward_s + reference.forward_s
    assert joined.statistics_s == inputs.statistics_s + reference.statistics_s
    assert joined.statistics.keys() == inputs.statistics.keys()
    for name, statistic in joined.statistics.items():
        assert isinstance(statistic, InputsAndReference)
        # No copies: layers that one tensor feeds hold one moment of each distribution between them.
        assert statistic.inputs is inputs.statistics[inputs.leaders[name]]
        assert statistic.reference is reference.statistics[reference.leaders[name]]
    assert joined.statistics["to_v"].reference is joined.statistics["to_q"].reference  # type: ignore[union-attr]


def test_gradients_of_float16_weights_do_not_underflow():
    """Gradients of 1e-8 to 1e-7: below float16's smallest normal number (6e-5) and around its smallest (6e-8)."""
    torch.manual_seed(0)
    layer, exact = nn.Linear(8, 8, bias=False).half(), nn.Linear(8, 8, bias=False)
    exact.weight.data.copy_(layer.weight.data)
    batches = [torch.randn(16, 8).half() for _ in range(4)]
    target = torch.randn(16, 8)

    def loss_of(model: nn.Linear) -> Callable[[Tensor], Tensor]:
        return lambda batch: 1e-6 * (model(batch.to(model.weight.dtype)).float() - target).square().mean()

    (expected,) = torch.autograd.grad(sum(loss_of(exact)(batch) for batch in batches) / 4, [exact.weight])
    (unscaled,) = torch.autograd.grad(loss_of(layer)(batches[0]), [layer.weight])
    assert int((unscaled == 0).sum()) > 16  # what the scale is for
    collection = run(layer, batches, loss_of(layer), observes="gradients", layers={"layer": layer})
    assert collection.statistics["layer"].mean().dtype == torch.float32
    assert relative_error(collection.statistics["layer"].mean(), expected) < 3e-3  # float16's precision


def test_dropout_is_off_and_gradients_are_off_for_inputs():
    module, seen = tiny_attention().train(), []

    def loss(batch: Tensor) -> Tensor:
        output = module(batch)
        seen.append((module.training, module.dropout.training, torch.is_grad_enabled(), output.requires_grad))
        return output.mean()

    run(module, token_batches(1), loss)
    assert seen == [(False, False, False, False)]


def test_keyword_inputs_are_collected():
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    module, batches = ByKeyword(), token_batches()
    statistic = run(module, batches, lambda batch: module(batch).mean()).statistics["layer"]
    assert relative_error(statistic.covariance(), covariance(torch.cat(batches).reshape(-1, 16))) < 2e-6


def test_inputs_made_under_inference_mode_are_collected():
    """Cached prompt embeddings are often computed under inference_mode; such tensors have no version counter."""
    module = tiny_attention()
    with torch.inference_mode():
        batches = [batch + 0 for batch in token_batches()]
    collection = run(module, batches, lambda batch: module(batch).mean())
    assert collection.leaders["to_v"] == "to_q"
    assert collection.statistics["to_q"].num_rows == 240


# --- shared inputs --------------------------------------------------------------------------------------------------


def test_layers_fed_by_one_tensor_share_one_statistic():
    collection = run(tiny_attention(), token_batches())
    assert collection.leaders == {
        "to_q": "to_q",
        "to_k": "to_q",
        "to_v": "to_q",
        "to_out": "to_out",
        "up": "up",
        "down": "down",
    }
    assert collection.statistics["to_q"] is collection.statistics["to_k"] is collection.statistics["to_v"]
    assert len({id(statistic) for statistic in collection.statistics.values()}) == 4
    assert collection.statistics["to_q"].num_rows == 240  # counted once, not three times


def test_a_budget_sketches_the_widest_layers_and_no_number_changes():
    module, batches = tiny_attention(), token_batches()
    exact = run(module, batches).statistics
    budget = MemoryBudget(16_000, num_columns=12)
    collection = run(module, batches, budget=budget)
    assert collection.leaders["to_v"] == "to_q"
    assert {name for name, s in collection.statistics.items() if not isinstance(s, SecondMoment)} == {"down"}
    expected = exact["down"].sketched(12).state_dict()
    for key, value in collection.statistics["down"].state_dict().items():
        assert relative_error(value, expected[key]) < 1e-5
    for name in ("to_q", "to_v", "to_out", "up"):
        assert torch.equal(collection.statistics[name].covariance(), exact[name].covariance())
    assert 0 < budget.used <= budget.peak <= 16_000


def test_a_pass_over_a_reference_may_demote_what_the_first_has_gathered():
    module = tiny_attention()
    exact, exact_reference = run(module, token_batches(3)), run(module, token_batches(2, seed=1))
    budget = MemoryBudget(30_000, num_columns=12)
    first = run(module, token_batches(3), budget=budget)
    assert all(isinstance(statistic, SecondMoment) for statistic in first.statistics.values())
    joined = first.with_reference(run(module, token_batches(2, seed=1), budget=budget))
    assert budget.peak <= 30_000
    for name, pair in joined.statistics.items():
        for part, expected in ((pair.inputs, exact), (pair.reference, exact_reference)):
            if name == "down":
                assert part.num_columns == 12
                sketch = expected.statistics[name].sketched(12).state_dict()["sketch"]
                assert relative_error(part.state_dict()["sketch"], sketch) < 1e-5
            else:
                assert torch.equal(part.covariance(), expected.statistics[name].covariance())
    assert joined.statistics["to_v"].inputs is joined.statistics["to_q"].inputs


def test_mean_gradients_that_do_not_fit_are_refused_before_the_pass():
    def loss(batch: Tensor) -> Tensor:
        raise AssertionError("the loss must not run")

    for observes in ("gradients", "inputs and gradients"):
        with pytest.raises(ValueError, match=r"mean gradients of 6 layers need .*largest: layer 'up'"):
            run(tiny_attention(), token_batches(1), loss, observes, budget=MemoryBudget(6_000, num_columns=12))


def test_sharing_can_be_switched_off_and_changes_no_number():
    module, batches = tiny_attention(), token_batches()
    together, alone = run(module, batches), run(module, batches, share_inputs=False)
    assert all(leader == name for name, leader in alone.leaders.items())
    assert len({id(statistic) for statistic in alone.statistics.values()}) == 6
    for name in ATTENTION_LAYERS:
        assert torch.equal(alone.statistics[name].covariance(), together.statistics[name].covariance())


class TwoLayers(nn.Module):
    """`first` and `second`, with a step between them that a test chooses."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(self.between(x))


def test_a_tensor_modified_in_place_is_another_input():
    module = TwoLayers(lambda x: x.mul_(2.0))
    batches = token_batches()
    rows = torch.cat(batches).reshape(-1, 16).clone()
    collection = run(module, [batch.clone() for batch in batches], lambda batch: module(batch).mean())
    assert collection.leaders["second"] == "second"
    assert relative_error(collection.statistics["first"].covariance(), covariance(rows)) < 2e-6
    assert relative_error(collection.statistics["second"].covariance(), 4 * covariance(rows)) < 2e-6


def test_a_new_tensor_in_freed_memory_is_another_input():
    class Temporaries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            # Every input dies before the next one is made, which may get its id and its address.
            return sum(layer(x * (index + 1)).mean() for index, layer in enumerate(self.layers))

    module, batches = Temporaries(), token_batches(1)
    collection = run(module, batches, module)
    for index in range(8):
        statistic = collection.statistics[f"layers.{index}"]
        assert relative_error(statistic.covariance(), (index + 1) ** 2 * covariance(batches[0].reshape(-1, 16))) < 2e-6


def test_inconsistent_sharing_is_refused_with_the_remedy():
    shares = iter([True, False])
    module = TwoLayers(lambda x: x if next(shares) else x + 1)
    with pytest.raises(ValueError, match=r"'second'.*'first'.*share_inputs=False"):
        run(module, token_batches(2), lambda batch: module(batch).mean())
    shares = iter([True, False])
    batches = token_batches(2)
    collection = run(module, batches, lambda batch: module(batch).mean(), share_inputs=False)
    rows = torch.cat([batches[0], batches[1] + 1]).reshape(-1, 16)
    assert relative_error(collection.statistics["second"].covariance(), covariance(rows)) < 2e-6


def test_layers_that_share_by_chance_in_a_later_batch_keep_their_own_statistics():
    shares = iter([False, True])
    module, batches = TwoLayers(lambda x: x if next(shares) else x + 1), token_batches(2)
    collection = run(module, batches, lambda batch: module(batch).mean())
    rows = torch.cat([batches[0] + 1, batches[1]]).reshape(-1, 16)
    assert relative_error(collection.statistics["second"].covariance(), covariance(rows)) < 2e-6
    assert (
        relative_error(collection.statistics["first"].covariance(), covariance(torch.cat(batches).reshape(-1, 16)))
        < 2e-6
    )


@pytest.mark.parametrize(("skipped_batch", "skipped"), [(0, "second"), (1, "first"), (1, "second")])
def test_a_sharing_layer_that_runs_in_some_batches_only_is_refused(skipped_batch, skipped):
    module, count = TwoLayers(lambda x: x), itertools.count()

    def loss(batch: Tensor) -> Tensor:
        if next(count) == skipped_batch:
            return (module.second if skipped == "first" else module.first)(batch).mean()
        return module(batch).mean()

    with pytest.raises(ValueError, match="share_inputs=False"):
        run(module, token_batches(2), loss)


def test_a_layer_of_its_own_may_run_a_varying_number_of_times():
    """As with classifier-free guidance in some batches; nothing is shared, so nothing can be inconsistent."""
    module, count = nn.Sequential(nn.Linear(16, 16)), itertools.count(1)
    batches = token_batches(3)

    def loss(batch: Tensor) -> Tensor:
        return sum(module(batch + step).mean() for step in range(next(count)))

    statistic = run(module, batches, loss).statistics["0"]
    rows = torch.cat([batch + step for index, batch in enumerate(batches) for step in range(index + 1)])
    assert statistic.num_rows == 6 * 80
    assert relative_error(statistic.covariance(), covariance(rows.reshape(-1, 16))) < 2e-6


def test_a_group_may_run_several_times_in_a_batch():
    module, batches = TwoLayers(lambda x: x), token_batches(2)
    collection = run(module, batches, lambda batch: module(batch).mean() + module(batch + 1).mean())
    rows = torch.cat([*batches, *(batch + 1 for batch in batches)]).reshape(-1, 16)
    assert collection.statistics["first"] is collection.statistics["second"]
    assert collection.statistics["first"].num_rows == len(rows)
    assert relative_error(collection.statistics["first"].covariance(), covariance(rows)) < 2e-6


# --- token masks ----------------------------------------------------------------------------------------------------


def test_padding_changes_no_statistic():
    module = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    batches = token_batches(2)
    padded = [torch.cat([batch, torch.full((4, 7, 16), 1e3)], dim=1) for batch in batches]
    mask = torch.cat([torch.ones(4, 20), torch.zeros(4, 7)], dim=1).bool()

    def loss(batch: Tensor) -> Tensor:
        return module(batch).mean()

    expected = run(module, batches, loss).statistics
    masked = run(module, padded, loss, token_mask=lambda name: mask).statistics
    unmasked = run(module, padded, loss).statistics
    for name in ("0", "2"):
        assert masked[name].num_rows == 2 * 4 * 20
        assert relative_error(masked[name].covariance(), expected[name].covariance()) < 2e-6
        assert relative_error(unmasked[name].covariance(), expected[name].covariance()) > 1


def test_a_mask_may_cover_some_layers_only_and_change_by_batch():
    module, batches, masks = TwoLayers(lambda x: x + 1), token_batches(2), []

    def loss(batch: Tensor) -> Tensor:
        masks.append(torch.arange(20).expand(4, 20) < 10 + len(masks))
        return module(batch).mean()

    collection = run(module, batches, loss, token_mask=lambda name: masks[-1] if name == "first" else None)
    rows = torch.cat([batches[0][:, :10].reshape(-1, 16), batches[1][:, :11].reshape(-1, 16)])
    assert relative_error(collection.statistics["first"].covariance(), covariance(rows)) < 2e-6
    assert collection.statistics["second"].num_rows == 160


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observes", MAKE_STATISTIC)
@pytest.mark.parametrize("batches", ["none", "capped to none", "used up"])
def test_zero_batches_are_an_error(observes, batches):
    module, used_up = tiny_attention(), iter(token_batches(1))
    next(used_up)
    given = {"none": ([], None), "capped to none": (token_batches(1), 0), "used up": (used_up, 4)}[batches]
    with pytest.raises(ValueError, match="no batches"):
        run(module, given[0], observes=observes, num_batches=given[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_activations_name_layer_batch_and_timesteps(poison):
    module, batches = tiny_attention(), token_batches(3)

    model = nn.Sequential(module.up, nn.GELU(), module.down)

    def loss(batch: Tensor) -> Tensor:
        hidden = model[1](model[0](batch))
        return model[2](torch.full_like(hidden, poison) if batch is batches[1] else hidden).mean()

    with pytest.raises(ValueError, match=re.escape("'2' in batch 1 (timesteps [3, 7])")):
        run(model, batches, loss, describe_step=lambda: "timesteps [3, 7]")


def test_messages_call_a_batch_what_the_caller_calls_it():
    module = nn.Sequential(nn.Linear(16, 4))
    with pytest.raises(ValueError, match=r"got no reference batches.*at least one reference batch"):
        run(module, [], batch_name="reference batch")
    with pytest.raises(ValueError, match="'0' in reference batch 1"):
        run(
            module,
            [token_batches(1)[0], torch.full((2, 16), float("nan"))],
            lambda batch: module(batch).mean(),
            batch_name="reference batch",
        )


def test_non_finite_gradients_name_layer_and_batch():
    module, batches = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4)), token_batches(2)

    def loss(batch: Tensor) -> Tensor:
        output = module[1](module[0](batch)) if batch is batches[0] else module[1](module[0](batch).detach())
        return output.mean() * (float("inf") if batch is batches[1] else 1.0)

    with pytest.raises(ValueError, match=r"gradient at layer '1' in batch 1"):
        run(module, batches, loss, observes="gradients")


@pytest.mark.parametrize("observes", MAKE_STATISTIC)
def test_a_layer_that_the_loss_never_reaches_is_named(observes):
    module = TwoLayers(lambda x: x)
    with pytest.raises(ValueError, match="never reached layer 'second'"):
        run(module, token_batches(2), lambda batch: module.first(batch).mean(), observes=observes)


def test_a_loss_without_gradient_is_an_error():
    module = tiny_attention()

    def loss(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return module(batch).mean()

    with pytest.raises(ValueError, match="no_grad"):
        run(module, token_batches(1), loss, observes="gradients")


@pytest.mark.parametrize("observes", MAKE_STATISTIC)
@pytest.mark.parametrize("cap", [1, 3])
def test_the_cap_is_respected_and_the_iterator_not_drawn_further(observes, cap):
    module, drawn = tiny_attention(), []

    def endless():
        for index in itertools.count():
            drawn.append(index)
            yield token_batches(1, seed=index)[0]

    collection = run(module, endless(), observes=observes, num_batches=cap)
    assert collection.num_passes == cap
    assert drawn == list(range(cap))


# --- nothing is left behind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("observes", MAKE_STATISTIC)
@pytest.mark.parametrize("failure", ["none", "in the loss", "in a layer", "in the batches", "in the statistic"])
def test_the_model_leaves_the_pass_as_it_entered_it(observes, failure):
    module = tiny_attention().train()
    module.dropout.eval()
    module.to_k.requires_grad_(False)
    module.to_v.weight.grad = torch.ones_like(module.to_v.weight)
    module.up.bias.grad = torch.ones_like(module.up.bias)
    torch.manual_seed(3)
    before = snapshot(module)
    calls = itertools.count()

    def loss(batch: Tensor) -> Tensor:
        noisy = batch + torch.randn_like(batch)  # draws from the global generator
        if failure == "in a layer" and next(calls) == 1:
            noisy = noisy[..., :7]  # to_q raises in the middle of the second forward
        output = squared_loss(module)(noisy)
        if failure == "in the loss" and next(calls) == 1:
            raise RuntimeError("CUDA out of memory, say")
        return output

    def batches():
        yield token_batches(1)[0]
        if failure == "in the batches":
            raise RuntimeError("corrupt image")
        yield token_batches(1)[0]

    def broken_statistic(name: str, layer: nn.Linear) -> Any:
        raise RuntimeError("out of memory")

    kwargs = {"make_statistic": broken_statistic} if failure == "in the statistic" else {}
    if failure == "none":
        run(module, batches(), loss, observes=observes)
    else:
        with pytest.raises((RuntimeError, ValueError)):
            run(module, batches(), loss, observes=observes, **kwargs)
    assert snapshot(module) == before


def test_the_gradient_pass_touches_no_gradient_outside_the_target_layers():
    """The user's loss may run modules that were not handed over, a trainable head or an embedding, say."""
    module, other = tiny_attention(), nn.Linear(16, 16)
    other.weight.grad = torch.ones(16, 16)
    collection = run(
        module,
        token_batches(2),
        lambda batch: squared_loss(module)(other(batch)),
        observes="gradients",
        layers={"to_q": module.to_q},
    )
    assert torch.equal(other.weight.grad, torch.ones(16, 16))
    assert other.bias.grad is None
    assert all(parameter.grad is None for parameter in module.parameters())
    assert collection.statistics["to_q"].num_rows == 2


def test_a_loader_over_a_stream_has_no_known_length():
    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    assert known_length(torch.utils.data.DataLoader(Stream())) is None
    assert known_length(iter(range(3))) is None
    assert known_length(range(3)) == 3


# --- two real processes ---------------------------------------------------------------------------------------------


def _collect_in_process(process: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=process, world_size=2, timeout=timedelta(seconds=90)
    )
    try:
        module, batches = tiny_attention(), token_batches(5)
        own = batches[:2] if process == 0 else batches[2:]  # unequal shares
        inputs = run(module, own).statistics
        gradients = run(module, own, observes="gradients").statistics
        both = run(module, own, observes="inputs and gradients").statistics
        result = {f"{name}.covariance": inputs[name].covariance() for name in ATTENTION_LAYERS}
        result |= {f"{name}.num_rows": torch.tensor(inputs[name].num_rows) for name in ATTENTION_LAYERS}
        result |= {f"{name}.gradient": gradients[name].mean() for name in ATTENTION_LAYERS}
        result |= {f"{name}.both.inputs": both[name].inputs.covariance() for name in ATTENTION_LAYERS}
        result |= {f"{name}.both.gradient": both[name].gradient.mean() for name in ATTENTION_LAYERS}
        # Only one of them is short of memory; the widest layer (24) is sketched on both.
        budget = MemoryBudget(1e9 if process == 0 else 16_000, num_columns=12)
        sketched = run(module, own, budget=budget).statistics
        assert budget.num_bytes == 16_000
        assert {name for name in ATTENTION_LAYERS if hasattr(sketched[name], "num_columns")} == {"down"}
        result["sketch"] = sketched["down"].state_dict()["sketch"]
        save_file(result, f"{folder}/{process}.safetensors")
    finally:
        torch.distributed.destroy_process_group()


def _second_process(_: int, folder: str) -> None:
    torch.set_num_threads(1)
    _collect_in_process(1, folder)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_two_processes_end_with_the_statistics_of_all_batches(tmp_path: Path):
    child = torch.multiprocessing.spawn(_second_process, args=(str(tmp_path),), nprocs=1, join=False)
    _collect_in_process(0, str(tmp_path))  # this process is the other one: a second import of torch saved
    while not child.join():
        pass
    module, batches = tiny_attention(), token_batches(5)
    inputs = run(module, batches).statistics
    gradients = run(module, batches, observes="gradients").statistics
    first, second = (load_file(tmp_path / f"{process}.safetensors") for process in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key  # every process would initialise alike, bit for bit
    assert relative_error(first["sketch"], inputs["down"].sketched(12).state_dict()["sketch"]) < 1e-5
    for name in ATTENTION_LAYERS:
        assert int(first[f"{name}.num_rows"]) == 5 * 80
        assert relative_error(first[f"{name}.covariance"], inputs[name].covariance()) < 1e-5
        assert relative_error(first[f"{name}.gradient"], gradients[name].mean()) < 1e-5
        assert relative_error(first[f"{name}.both.inputs"], inputs[name].covariance()) < 1e-5
        assert relative_error(first[f"{name}.both.gradient"], gradients[name].mean()) < 1e-5


def test_fields_one_by_one_are_those_of_the_step_and_the_options():
    module, batches = tiny_attention(), token_batches(3)
    args = ({"module": module}, linear_layers(module), batches)
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[:, :7] = True
    step = TrainingStep(squared_loss(module), token_mask=lambda _: mask)
    grouped = collect(*args, step, second_moment, PassOptions("inputs", num_batches=2, progress=False))
    options = {"token_mask": lambda _: mask, "num_batches": 2, "observes": "inputs", "progress": False}
    single = collect(*args, squared_loss(module), second_moment, **options)
    changed = PassOptions("inputs", progress=False)
    replaced = collect(*args, step, second_moment, changed, num_batches=2)
    assert grouped.num_passes == single.num_passes == replaced.num_passes == 2
    for name, statistic in grouped.statistics.items():
        assert statistic.num_rows == 2 * 4 * 7
        for other in (single, replaced):
            for key, value in statistic.state_dict().items():
                assert torch.equal(other.statistics[name].state_dict()[key], value)
    with pytest.raises(TypeError, match="share_input"):
        collect(*args, step, second_moment, observes="inputs", share_input=False)
