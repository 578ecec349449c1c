from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lorainit_diffusers.training import checkpoints
from lorainit_diffusers.training.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    load_training_state,
    prune_checkpoints,
    recover_checkpoints,
    save_training_state,
)


def make_run(lr: float = 1e-2) -> tuple[nn.Linear, torch.optim.Optimizer, LambdaLR]:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    groups = [{"params": [model.weight], "lr": lr}, {"params": [model.bias], "lr": lr / 3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    return model, optimizer, LambdaLR(optimizer, lambda step: 1.0 / (step + 1))


def train(model: nn.Linear, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()


def save(directory: Path, step: int = 3) -> None:
    model, optimizer, scheduler = make_run()
    train(model, optimizer, scheduler, range(step))
    save_training_state(
        directory,
        tensors=model.state_dict(),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        step=step,
        extra={"init": "cntlora", "loss": 0.1},
    )


def test_restored_run_continues_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer, scheduler = make_run()
    train(model, optimizer, scheduler, range(7))

    save(tmp_path / "checkpoint-3")
    state = load_training_state(tmp_path / "checkpoint-3")
    assert (state.step, state.extra) == (3, {"init": "cntlora", "loss": 0.1})
    resumed, resumed_optimizer, resumed_scheduler = make_run(lr=123.0)
    resumed.load_state_dict(state.tensors)
    state.restore(resumed_optimizer, resumed_scheduler)
    assert resumed_optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    train(resumed, resumed_optimizer, resumed_scheduler, range(3, 7))

    assert torch.equal(model.weight, resumed.weight)
    assert torch.equal(model.bias, resumed.bias)
    assert scheduler.get_last_lr() == resumed_scheduler.get_last_lr()


def test_files_are_safetensors_and_json_only(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-3")
    names = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert names == {"adapters.safetensors", "optimizer.safetensors", "state.json", "checksums.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    save(tmp_path / "checkpoint-3", step=4)
    assert load_training_state(tmp_path / "checkpoint-3").step == 4


def test_before_the_first_step_there_is_no_optimizer_state(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-0", step=0)
    assert load_training_state(tmp_path / "checkpoint-0").optimizer_state["state"] == {}


def test_prune_keeps_the_newest_by_number(tmp_path: Path) -> None:
    for step in (900, 1000, 50):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-50", "checkpoint-900", "checkpoint-1000"]
    assert [path.name for path in prune_checkpoints(tmp_path, 1)] == ["checkpoint-50", "checkpoint-900"]
    assert prune_checkpoints(tmp_path, 1) == []
    assert (tmp_path / "checkpoint-best").is_dir()
    with pytest.raises(ValueError, match="at least 1"):
        prune_checkpoints(tmp_path, -1)


def test_find_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        find_checkpoint(tmp_path, "latest")
    for step in (9, 10):
        save(tmp_path / f"checkpoint-{step}", step=1)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-9").name == "checkpoint-9"
    assert find_checkpoint(tmp_path / "elsewhere", str(tmp_path / "checkpoint-9")).name == "checkpoint-9"
    with pytest.raises(FileNotFoundError, match=r"checkpoint-7: no such checkpoint; .*checkpoint-9, checkpoint-10"):
        find_checkpoint(tmp_path, "checkpoint-7")


def save_with_best(directory: Path, step: int) -> None:
    """A checkpoint whose folder has a copy of `best/`."""
    model, optimizer, scheduler = make_run()

    def write_more(folder: Path) -> None:
        (folder / "best").mkdir()
        (folder / "best" / "best.json").write_text('{"step": 1, "value": 0.5}', encoding="utf-8")

    save_training_state(
        directory,
        tensors=model.state_dict(),
        optimizer=optimizer,
        lr_scheduler=scheduler,
        step=step,
        write_more=write_more,
    )


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit(path: Path) -> None:
    """Of the last value of a safetensors file, or of the text: the length stays, and both formats still read."""
    data = bytearray(path.read_bytes())
    data[-2 if path.suffix == ".json" else -1] ^= 1
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_text("{}" if path.suffix == ".json" else "", encoding="utf-8")


FILES = ("adapters.safetensors", "optimizer.safetensors", "state.json", "best/best.json")
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (cut_off, r"{} has \d+ bytes, but \d+ were written"),
    (flip_a_bit, "{} has other bytes than were written"),
    (empty, r"{} has \d+ bytes, but \d+ were written"),
    (Path.unlink, "it has no {}"),
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_latest_and_refused_by_name(
    tmp_path: Path, name: str, damage: Callable[[Path], object], said: str
) -> None:
    for step in (1, 2, 3):
        save_with_best(tmp_path / f"checkpoint-{step}", step)
    damage(tmp_path / "checkpoint-3" / name)
    lines: list[str] = []
    assert find_checkpoint(tmp_path, "latest", say=lines.append).name == "checkpoint-2"
    assert len(lines) == 1
    assert re.search(rf"checkpoint-3 in .* is damaged \({said.format(name)}\)", lines[0])
    named = find_checkpoint(tmp_path, "checkpoint-3")
    with pytest.raises((ValueError, FileNotFoundError), match=rf"checkpoint-3.*{said.format(name)}; restore it"):
        load_training_state(named)


def test_where_every_checkpoint_is_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path / f"checkpoint-{step}", step)
        cut_off(tmp_path / f"checkpoint-{step}" / "adapters.safetensors")
    with pytest.raises(ValueError, match=r"no checkpoint .* is whole \(checkpoint-2: adapters.*checkpoint-1: adapters"):
        find_checkpoint(tmp_path, "latest")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut_off, empty, Path.unlink])
def test_a_checkpoint_without_checksums_is_resumed_unless_its_formats_say_no(
    tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    for step in (1, 2):
        save_with_best(tmp_path / f"checkpoint-{step}", step)
        (tmp_path / f"checkpoint-{step}" / "checksums.json").unlink()
    assert load_training_state(find_checkpoint(tmp_path, "latest")).step == 2
    damage(tmp_path / "checkpoint-2" / name)
    if (damage, name) != (Path.unlink, "best/best.json"):  # nothing says that it was there
        assert load_training_state(find_checkpoint(tmp_path, "latest")).step == 1


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"state.json": 3}', '{"state.json": {"bytes": "x", "sha256": ""}}'])
def test_damaged_checksums_are_damage(tmp_path: Path, text: str) -> None:
    save(tmp_path / "checkpoint-1", step=1)
    (tmp_path / "checkpoint-1" / "checksums.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"checksums\.json cannot be read"):
        load_training_state(tmp_path / "checkpoint-1")


def test_checkpoints_beyond_the_step_make_room_first(tmp_path: Path) -> None:
    """They are damaged, or the run was sent back behind them."""
    for step in (2, 3, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in prune_checkpoints(tmp_path, 1, step=3)] == ["checkpoint-9", "checkpoint-2"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_another_parameter_layout_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-1", step=1)
    other = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match=r"groups of \[1, 1\] tensors, this run's has \[2\]"):
        load_training_state(tmp_path / "checkpoint-1").restore(other)


def test_values_that_json_cannot_hold_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    model, optimizer, scheduler = make_run()
    with pytest.raises(ValueError, match="JSON"):
        save_training_state(
            tmp_path / "checkpoint-0",
            tensors=model.state_dict(),
            optimizer=optimizer,
            lr_scheduler=scheduler,
            step=0,
            extra={"path": tmp_path},
        )
    assert list(tmp_path.iterdir()) == []


def test_floats_survive_exactly(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-3")
    document = json.loads((tmp_path / "checkpoint-3" / "state.json").read_text(encoding="utf-8"))
    assert document["optimizer"]["param_groups"][1]["initial_lr"] == 1e-2 / 3


class Killed(BaseException):
    """As if the process ended at this file operation."""


OPERATIONS = [("os", "replace"), ("shutil", "rmtree"), ("pathlib.Path", "rename"), ("pathlib.Path", "unlink")]


def operations(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> list[int]:
    """Call `act` with the number of every file operation before it is done; the list has their count."""
    count = [0]

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            count[0] += 1
            act(count[0])
            return original(*args, **options)

        return operation

    for place, name in OPERATIONS:
        target = f"{place}.{name}"
        module, _, attribute = place.partition(".")
        owner: Any = importlib.import_module(module)
        owner = getattr(owner, attribute) if attribute else owner
        monkeypatch.setattr(target, wrap(getattr(owner, name)))
    return count


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_and_pruning_leave_no_moment_without_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """A kill before any of the file operations: what is resumed from is whole, and one of the steps it may be."""
    if not exchange:
        monkeypatch.setattr(checkpoints, "_exchange", lambda *names: False)
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        save(folder / "checkpoint-2", step=2)
        save(folder / "checkpoint-3", step=3)

        def kill(count: int, at: int = number) -> None:
            if count == at:
                raise Killed

        with monkeypatch.context() as patch:
            count = operations(patch, kill)
            try:
                save(folder / "checkpoint-3", step=3)
                prune_checkpoints(folder, 1)
            except Killed:
                pass
        recover_checkpoints(folder)
        assert load_training_state(find_checkpoint(folder, "latest")).step == 3
        assert not list(folder.glob(".*"))
        if count[0] < number:
            break
    assert number > 4
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]


def test_an_exchange_has_a_checkpoint_of_the_name_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint-3"
    save(path)
    if not checkpoints._exchange(path, path):
        pytest.skip("this system cannot exchange two names")
    with monkeypatch.context() as patch:
        count = operations(patch, lambda number: load_training_state(path))
        save(path, step=4)
    assert count[0]
    assert load_training_state(path).step == 4


def test_latest_passes_over_a_checkpoint_that_lacks_files(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-9").mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-3"


def test_recovering_leaves_folders_of_others(tmp_path: Path) -> None:
    for name in (".checkpoint-5.tmp", ".checkpoint-best.tmp", ".checkpoints", ".checkpoint-5.deleted.tmp"):
        (tmp_path / name).mkdir()
    recover_checkpoints(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".checkpoint-best.tmp", ".checkpoints"}


class NestedMomentum(torch.optim.SGD):
    """Momentum kept as bitsandbytes keeps its state: tensors in a dictionary within, beside plain numbers."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                inner = state.setdefault("quant_state", {"velocity": torch.zeros_like(parameter), "block": 64})
                state["count"] = state.get("count", 0) + 1
                inner["velocity"].mul_(0.9).add_(parameter.grad)
                parameter.data.sub_(group["lr"] * inner["velocity"] / state["count"])


def eight_bit_adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(parameters, lr=lr)


@pytest.mark.parametrize("make", [NestedMomentum, eight_bit_adam])
def test_nested_optimizer_state_is_restored_exactly(tmp_path: Path, make: Any) -> None:
    def advance(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        (parameter @ parameter).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = nn.Parameter(torch.randn(128, 128))
    optimizer = make([first], lr=1e-2)
    advance(first, optimizer)
    save_training_state(tmp_path / "checkpoint-1", tensors={}, optimizer=optimizer, lr_scheduler=None, step=1)
    second = nn.Parameter(first.detach().clone())
    restored = make([second], lr=1e-2)
    load_training_state(tmp_path / "checkpoint-1").restore(restored)
    for parameter, one in ((first, optimizer), (second, restored)):
        advance(parameter, one)
        advance(parameter, one)
    assert torch.equal(first, second)
