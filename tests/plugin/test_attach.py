"""`attach`: an initialisation inside a loop that knows nothing of it, which leaves no trace but another start."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from loops import WIDTH, Loop, TinyTransformer2DModel, make_model, reset_accelerate
from torch import Tensor, nn

from lorainit_diffusers import adapter_state_dict, attach, initialize
from lorainit_diffusers.in_loop.components import component_names

PASS = 3


@pytest.fixture(autouse=True)
def _forget_accelerators() -> Generator[None]:
    yield
    reset_accelerate()


def attached_loop(method: str, loop: Loop, **options: Any) -> tuple[Loop, Any]:
    """Run the loop with one line added after `prepare`; what that line returned."""
    made: list[Any] = []
    before = loop.before

    def add_the_line(loop: Loop) -> None:
        made.append(attach(loop.accelerator, method, **{"init_batches": PASS, "progress": False, **options}))
        if before is not None:
            before(loop)

    loop.before = add_the_line
    loop.run()
    made[0].close()
    return loop, made[0]


def state_of(loop: Loop) -> dict[str, Tensor]:
    return adapter_state_dict({"transformer": loop.model})


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, atol=0, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("method", ["cntlora", "eva", "lora_ga", "gradient_step", "corda"])
def test_the_factors_are_those_of_initialize(method: str) -> None:
    """On the inputs that the loop's first losses had."""
    seen: list[dict[str, Tensor]] = []

    def look(loop: Loop) -> None:
        if len(loop.inputs) == PASS:
            seen.append({key: value.clone() for key, value in state_of(loop).items()})

    loop, attached = attached_loop(method, Loop(steps=1, during=look))
    model = make_model()
    report = initialize(
        {"transformer": model},
        method,
        list(zip(loop.inputs[:PASS], loop.targets[:PASS], strict=True)),
        lambda pair: (model(pair[0]) - pair[1]).square().mean(),
        progress=False,
    )
    assert_equal(state_of(Loop(model=model)), seen[0])
    assert attached.report.layers == report.layers
    assert attached.stage == "over"
    assert "3 losses" in attached.outcome


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("init_batches", [1, 3, 13])
@pytest.mark.parametrize("prepare_scheduler", [True, False])
def test_training_is_the_loops_own(accumulation: int, init_batches: int, prepare_scheduler: bool) -> None:
    """Same batches in the same order, same noise, same number of steps, same learning rates; also after 2.6 epochs."""
    options: dict[str, Any] = {"accumulation": accumulation, "prepare_scheduler": prepare_scheduler}
    stock = Loop(**options).run()
    loop, _ = attached_loop("eva", Loop(**options), init_batches=init_batches)
    assert len(loop.losses) == init_batches + len(stock.losses)
    torch.testing.assert_close(loop.inputs[init_batches:], stock.inputs, atol=0, rtol=0)
    assert loop.rates[init_batches:] == stock.rates
    assert loop.synced[:init_batches] == [False] * init_batches
    assert loop.synced[init_batches:] == stock.synced
    # B is zero until the first optimiser step, so the first losses are the base's
    assert loop.losses[init_batches] == stock.losses[0]


@pytest.mark.parametrize("method", ["cntlora", "lora_ga", "pissa"])
def test_step_zero_is_the_base(method: str) -> None:
    stock = Loop(steps=1).run()
    loop, attached = attached_loop(method, Loop(steps=1))
    assert loop.losses[attached.num_losses] == pytest.approx(stock.losses[0], abs=1e-6)
    assert any(key.endswith("offset_A") for key in state_of(loop))


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
@pytest.mark.parametrize("use_accumulate", [True, False])
def test_everything_stands_still_in_the_pass(method: str, use_accumulate: bool) -> None:
    states: list[tuple[Any, ...]] = []

    def look(loop: Loop) -> None:
        if len(loop.losses) <= PASS:
            gradients = [p.grad for p in loop.model.parameters() if p.requires_grad]
            adapters = [value for key, value in state_of(loop).items() if key.endswith("lora_B")]
            states.append((gradients, loop.optimizer.state_dict()["state"], loop.scheduler.get_last_lr(), adapters))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attached_loop(method, Loop(steps=4, during=look, use_accumulate=use_accumulate, prepare_scheduler=False))
    for gradients, optimizer, rates, adapters in states[:-1]:
        assert all(gradient is None for gradient in gradients)
        assert not optimizer
        assert rates == [0.05]
        assert not any(bool(value.any()) for value in adapters)


def test_nothing_is_left_of_it() -> None:
    def traces(loop: Loop) -> tuple[Any, ...]:
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in loop.model.modules()]
        patched = {"backward", "accumulate", "clip_grad_norm_", "prepare_model", "prepare_data_loader"}
        return type(loop.loader), sum(hooks), patched & set(vars(loop.accelerator)), loop.accelerator.step

    found: list[tuple[Any, ...]] = []
    loop = Loop(steps=3, during=lambda loop: found.append(traces(loop)))
    attached_loop("cntlora", loop)
    stock = Loop(steps=3)
    clean: list[tuple[Any, ...]] = []
    stock.during = lambda loop: clean.append(traces(loop))
    stock.run()
    assert found[PASS:] == clean
    assert found[0] != clean[0]


@pytest.mark.parametrize("method", ["eva", "lora_ga", "gradient_step"])
def test_rows_count_once_under_gradient_checkpointing(method: str) -> None:
    reports: list[Any] = []
    for checkpointing in (False, True):
        model = make_model()
        model.base_model.model.checkpointing = checkpointing
        reports.append(attached_loop(method, Loop(steps=1, model=model))[1].report)
    assert reports[0].layers == reports[1].layers
    assert all(layer.num_rows == PASS for layer in reports[0].layers.values())


def test_forwards_without_gradients_are_no_losses() -> None:
    """Validation before training, and encoding under no_grad."""

    def validate(loop: Loop) -> None:
        with torch.no_grad():
            for _ in range(4):
                loop.model(torch.full((1, WIDTH), 1e3))

    plain = attached_loop("eva", Loop(steps=1))[1].report
    validated = attached_loop("eva", Loop(steps=1, before=validate))[1].report
    assert plain.layers == validated.layers


@pytest.mark.parametrize("prepare_loader", [True, False])
def test_a_loop_that_asks_no_accumulate_is_told(prepare_loader: bool) -> None:
    with pytest.warns(UserWarning, match=r"does not use accelerator.accumulate.* counted the 3 losses"):
        loop, attached = attached_loop("eva", Loop(steps=6, use_accumulate=False, prepare_loader=prepare_loader))
    assert attached.stage == "over"
    assert len(loop.losses) == 6
    assert len(loop.optimizer.state_dict()["state"]) == 4


def test_a_loader_that_was_not_prepared_gives_its_batches() -> None:
    stock = Loop(prepare_loader=False).run()
    loop, attached = attached_loop("eva", Loop(prepare_loader=False))
    assert attached.stage == "over"
    assert len(loop.losses) == len(stock.losses) + PASS


def test_resume_is_exact_and_never_anew(tmp_path: Path) -> None:
    save_at = {5: str(tmp_path / "checkpoint-5")}  # where an epoch ends: no loop of this kind goes on in the middle
    whole, _ = attached_loop("cntlora", Loop(steps=8, save_at=save_at))
    resumed, attached = attached_loop("cntlora", Loop(steps=8, resume_from=save_at[5]), seed=5)
    assert_equal(state_of(whole), state_of(resumed))
    assert attached.report is None
    assert "resumed from" in attached.outcome
    assert len(resumed.losses) == 3


def test_resume_of_a_run_that_was_started_without_goes_on_as_it_is(tmp_path: Path) -> None:
    stock = Loop(steps=8, save_at={5: str(tmp_path / "checkpoint-5")}).run()
    resumed, attached = attached_loop("cntlora", Loop(steps=8, resume_from=str(tmp_path / "checkpoint-5")))
    assert_equal(state_of(stock), state_of(resumed))
    assert "ordinary LoRA" in attached.outcome


def test_resume_without_it_is_refused_or_right(tmp_path: Path) -> None:
    """An offset has another shape, which torch names; a start with B = 0 is an ordinary LoRA."""
    for method in ("cntlora", "eva"):
        folder = str(tmp_path / method / "checkpoint-5")
        whole, _ = attached_loop(method, Loop(steps=8, save_at={5: folder}))
        if method == "cntlora":
            with pytest.raises(RuntimeError, match="size mismatch"):
                Loop(steps=8, resume_from=folder).run()
        else:
            assert_equal(state_of(whole), state_of(Loop(steps=8, resume_from=folder).run()))


def test_ranks_by_score_and_their_checkpoint(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint-5")
    options: dict[str, Any] = {"variable_rank": True, "rank_budget": 3}
    whole, attached = attached_loop("eva", Loop(steps=8, save_at={5: folder}), **options)
    assert sorted(layer.rank for layer in attached.report.layers.values()) == [1, 2]
    resumed, _ = attached_loop("eva", Loop(steps=8, resume_from=folder), **options)
    assert_equal(state_of(whole), state_of(resumed))


def test_adapters_that_come_trained_go_on() -> None:
    model = make_model()
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight.fill_(0.1)
    loop, attached = attached_loop("cntlora", Loop(steps=2, model=model))
    assert "come trained" in attached.outcome
    assert len(loop.losses) == 2
    assert not any(key.endswith("offset_A") for key in state_of(loop))


def test_a_random_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"transformer.first starts from a random B .*init_lora_weights=False"):
        attached_loop("cntlora", Loop(model=make_model(init_lora_weights=False)))


def test_an_error_in_the_pass_ends_the_loop_and_leaves_no_hooks() -> None:
    loop = Loop()

    def break_it(loop: Loop) -> None:
        if len(loop.losses) == 1:
            loop.model.base_model.model.second.base_layer.weight.data.fill_(float("nan"))

    loop.during = break_it
    with pytest.raises(ValueError, match=r"NaN|non-finite|not finite"):
        attached_loop("lora_ga", loop)
    assert not any(module._forward_pre_hooks for module in loop.model.modules())
    assert "backward" not in vars(loop.accelerator)
    assert loop.accelerator.sync_gradients


def test_an_error_of_the_loop_itself_leaves_no_hooks_after_close() -> None:
    made: list[Any] = []

    def stop(loop: Loop) -> None:
        raise KeyboardInterrupt

    loop = Loop(during=stop)
    loop.before = lambda loop: made.append(attach(loop.accelerator, "lora_ga", init_batches=PASS, progress=False))
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    made[0].close()
    assert not any(module._forward_pre_hooks for module in loop.model.modules())
    assert [p.requires_grad for n, p in loop.model.named_parameters() if "lora_" in n] == [True] * 4
    assert "the collection pass has failed" in made[0].missing()


def test_what_is_missing_is_said() -> None:
    accelerator = Accelerator(cpu=True)
    attached = attach(accelerator, "eva")
    assert "no model with a PEFT adapter" in str(attached.missing())
    with pytest.raises(ValueError, match="no model with a PEFT adapter went through"):
        accelerator.backward(torch.zeros((), requires_grad=True))
    accelerator.prepare(make_model())
    assert "no adapted model computed a loss" in str(attached.missing())
    attached.close()
    loop, attached = Loop(), None
    made: list[Any] = []
    loop.before = lambda loop: made.append(attach(loop.accelerator, "eva", init_batches=100, progress=False))
    loop.during = lambda loop: (_ for _ in ()).throw(StopIteration) if len(loop.losses) == 7 else None
    with pytest.raises((RuntimeError, StopIteration)):
        loop.run()
    assert "only 7 of 100 losses" in made[0].missing()
    made[0].close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_batches": 0}, "init_batches"),
        ({"method": "nonsense"}, "unknown init 'nonsense'"),
        ({"rank": 4}, "attach has no option 'rank'"),
        ({"seed": -1}, "seed"),
        ({"variable_rank": True, "max_rank": -3}, "max_rank"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(Accelerator(cpu=True), **options)


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="needs whole parameters, which FSDP does not keep"):
        attach(accelerator, "cntlora")


def test_several_models_and_their_names() -> None:
    kinds = {name: type(name, (nn.Module,), {}) for name in ("UNet2DConditionModel", "FluxTransformer2DModel", "MyNet")}
    encoders = [type("CLIPTextModel", (nn.Module,), {"__module__": "transformers.clip"})() for _ in range(2)]
    models = [kinds["UNet2DConditionModel"](), *encoders, kinds["FluxTransformer2DModel"](), kinds["MyNet"]()]
    assert list(component_names(models)) == ["unet", "text_encoder", "text_encoder_2", "transformer", "my_net"]


def test_a_layer_that_the_loss_never_reaches_starts_as_usual() -> None:
    class WithSpare(TinyTransformer2DModel):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(WIDTH, WIDTH)

    for method in ("eva", "lora_ga"):
        from peft import LoraConfig, get_peft_model

        model: Any = get_peft_model(WithSpare(), LoraConfig(r=2, target_modules=["first", "second", "spare"]))
        _, attached = attached_loop(method, Loop(steps=1, model=model))
        assert "never reaches it" in attached.report.layers["with_spare.spare"].fallback
        assert attached.report.layers["with_spare.first"].fallback is None


def test_a_compiled_model_is_run_as_it_was_written() -> None:
    """The graph is made after the pass, of the adapter with its offset."""
    calls: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return module.forward

    loop = Loop(steps=2)
    made: list[Any] = []

    def compile_and_attach(loop: Loop) -> None:
        loop.model.compile(backend=backend)
        made.append(attach(loop.accelerator, "cntlora", init_batches=PASS, progress=False))

    loop.before = compile_and_attach
    loop.during = lambda loop: made.append(len(calls)) if len(loop.losses) == PASS else None
    loop.run()
    made[0].close()
    assert made[1] == 0
    assert calls
    torch._dynamo.reset()
