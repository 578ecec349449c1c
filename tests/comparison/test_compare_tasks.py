"""The comparison on tasks whose answers are right or wrong: what it writes, heads, going on, options of a family."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import compare_inits
import pytest
import torch
import torch.nn.functional as F
import train_classifier_lora
import train_vlm_lora
from classifier_fixtures import write_class_folder, write_classifier
from safetensors.torch import load_file
from script_fixtures import run_main
from sd_fixtures import ROOT
from torch import Tensor, nn
from vlm_fixtures import write_base, write_questions

from lorainit_diffusers.comparison import Comparison, run, training
from lorainit_diffusers.comparison.options import TASKS, HeadRatioOptions, TaskComparisonOptions, TaskKind
from lorainit_diffusers.families import StepRecord
from lorainit_diffusers.families.base import evaluating
from lorainit_diffusers.training import loop
from lorainit_diffusers.training.data.order import DataOrder
from lorainit_diffusers.training.options.fields import Options, option
from lorainit_diffusers.training.start import lora_targets

Compare = Callable[..., Path]
NUM_CLASSES, NUM_FEATURES = 3, 8
FAST: dict[str, Any] = {
    **{"family": "points", "pretrained_model_name_or_path": "a-base", "inits": ["gaussian", "cntlora"]},
    **{"learning_rates": [1e-2], "seeds": [0], "rank": 2, "max_train_steps": 6, "train_batch_size": 6},
    **{"init_num_batches": 2, "eval_steps": [0, 2, 4, 6], "num_workers": 1},
}


class PointFamily:
    """Points and their classes, through a body with adapters and a head that trains in full."""

    def __init__(self) -> None:
        self.step = StepRecord()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            body = nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
            self.model = nn.ModuleDict({"body": body, "classifier": nn.Linear(16, NUM_CLASSES)})
        self.model.requires_grad_(False)

    @property
    def adapted(self) -> Mapping[str, nn.Module]:
        return {"model": self.model}

    @property
    def heads(self) -> Mapping[str, nn.Module]:
        return {"model.classifier": self.model["classifier"]}

    def default_targets(self, component: str) -> list[str]:
        assert component == "model"
        return ["body.0", "body.2"]

    def logits(self, points: Tensor) -> Tensor:
        return self.model["classifier"](self.model["body"](points))

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        points = batch["points"]
        return F.cross_entropy(
            self.logits(points + 0.1 * torch.randn(points.shape, generator=generator)), batch["labels"]
        )

    def stratified_timesteps(self, num_samples: int, generator: torch.Generator) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True, kw_only=True)
class PointOptions(Options):
    """The points."""

    _argument_group_name = "data"

    train_data_dir: str | None = option(None, "filled in by default")
    spread: float = option(0.5, "of the points of a class")
    data_seed: int = option(0, "of the points")


@dataclass(frozen=True, kw_only=True)
class PointComparison(TaskComparisonOptions, HeadRatioOptions, PointOptions):
    """As those of the families of the library."""


def resolve_points(options: PointComparison) -> PointComparison:
    return replace(options, train_data_dir=options.train_data_dir or "outputs/clouds")


class PointTask:
    """As the tasks of the training scripts: made from options, a device and a dtype."""

    primary_metric = "accuracy"

    def __init__(self, options: PointComparison, device: torch.device, dtype: torch.dtype) -> None:
        if options.spread <= 0:
            raise ValueError(f"--spread {options.spread}: must be positive")
        generator = torch.Generator().manual_seed(options.data_seed)
        centres = torch.randn(NUM_CLASSES, NUM_FEATURES, generator=generator)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            labels = torch.arange(count) % NUM_CLASSES
            return centres[labels] + options.spread * torch.randn(count, NUM_FEATURES, generator=generator), labels

        self.train_set, self.validation_set = draw(12), draw(30)
        self.num_train, self.num_validation = 12, 30
        self.family = PointFamily()
        self.targets = lora_targets(options, self.family, "model")

    def batches(self, seed: int, batch_size: int, numbers: range) -> Iterator[dict[str, Tensor]]:
        points, labels = self.train_set
        for keys in DataOrder(self.num_train, batch_size, seed, numbers):
            rows = [row for row, _ in keys]
            yield {"points": points[rows], "labels": labels[rows]}

    def validate(self) -> dict[str, float]:
        points, labels = self.validation_set
        with evaluating(self.family):
            logits = self.family.logits(points)
        right = int((logits.argmax(1) == labels).sum())
        # the order of the report is not that of the task
        return {"validation_loss": float(F.cross_entropy(logits, labels)), "accuracy": right / len(labels)}


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Run the comparison of a family of points with tiny settings."""
    kind = TaskKind(
        options=f"{__name__}:PointComparison",
        check=f"{__name__}:resolve_points",
        task=f"{__name__}:PointTask",
        examples="points",
        defaults={"learning_rates": [0.01, 0.02], "max_train_steps": 7, "train_batch_size": 5},
    )
    monkeypatch.setitem(TASKS, "points", kind)

    def call(**changed: Any) -> Path:
        return run_main(compare_inits, {"output_dir": tmp_path / "out", **FAST, **changed})

    return call


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and tables take most of a tiny comparison's time; tests of numbers do without."""
    monkeypatch.setattr(run, "write_report", lambda directory: [])


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "results.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def snapshot(directory: Path, run: str, step: int) -> dict[str, Tensor]:
    return load_file(directory / "runs" / run / "snapshots" / f"step-{step:06d}.safetensors")


def head_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.startswith("head.")}


def test_everything_is_written_and_nothing_speaks_of_pictures(compare):
    out = compare(learning_rates=[1e-2, 2e-2], seeds=[0, 1])
    table = rows(out)
    keys = ["run", "init", "learning_rate", "seed", "rank", "num_parameters", "num_head_parameters", "step"]
    assert list(table[0]) == [*keys, "accuracy", "validation_loss"]
    assert len(table) == 2 * 2 * 2 * 4
    assert {row["num_head_parameters"] for row in table} == {str(16 * NUM_CLASSES + NUM_CLASSES)}
    assert {row["num_parameters"] for row in table} == {str(2 * (NUM_FEATURES + 16) + 2 * (16 + 16))}
    # both start from the base
    starts = {(row["accuracy"], round(float(row["validation_loss"]), 4)) for row in table if row["step"] == "0"}
    assert len(starts) == 1
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (config["num_train"], config["num_validation"], config["examples"]) == (12, 30, "points")
    assert (config["primary_metric"], config["dataset"]) == ("accuracy", "outputs/clouds")

    comparison = Comparison.load(out)
    assert comparison.best_learning_rates().keys() == {"gaussian", "cntlora"}
    last = [run.curves["accuracy"] for run in comparison.runs]
    assert all(curve[6] > curve[0] for curve in last)
    for name in ("timings.csv", "curves.png", "lr_sweep.png", "ranks.png", "report.html"):
        assert (out / name).stat().st_size > 0, name
    assert not (out / "grid.png").exists()
    assert not (out / "prompts.json").exists()
    text = (out / "summary.md").read_text(encoding="utf-8").replace("\\", "")
    for sentence in (
        "# LoRA initialisations on clouds",
        "Accuracy, higher is better, at step 6",
        "Every run trains on the same 12 points and is scored on 30 held-out ones.",
        "and those of the head, which trains in full: 51.",
        "The accuracy counts 30 held-out points, the same in every run: one of them is 0.0333.",
        "| initialisation | accuracy ↑ | validation loss ↓ |",
        "| difference to gaussian | accuracy ↑ | validation loss ↓ |",
        "before training (step 0 of gaussian)",
        "the medians of three evaluations",
        "| data | outputs/clouds (12 points, 30 held out) |",
    ):
        assert sentence in text, sentence
    for word in ("image", "prompt", "sample", "encoder", "picture", "caption"):
        assert word not in text.lower().replace("resamples", ""), word


@pytest.mark.usefixtures("no_report")
def test_every_run_starts_from_the_head_of_the_base(compare, tmp_path):
    labels = ["gaussian", "cntlora", "lora_ga"]
    out = compare(inits=labels, learning_rates=[1e-2, 5e-2])
    base = head_of(
        {f"head.model.classifier.{key}": t for key, t in PointFamily().heads["model.classifier"].state_dict().items()}
    )
    assert base
    for label in labels:
        for rate in ("0.01", "0.05"):
            first, last = (head_of(snapshot(out, f"{label}-lr{rate}-seed0", step)) for step in (0, 6))
            assert first.keys() == last.keys() == base.keys()
            assert all(torch.equal(first[name], base[name]) for name in base)
            assert not torch.equal(first["head.model.classifier.weight"], last["head.model.classifier.weight"])
    # the last run is what it is when it is the only one
    alone = compare(output_dir=tmp_path / "alone", inits=["lora_ga"], learning_rates=[5e-2])
    assert rows(alone) == [row for row in rows(out) if row["run"] == "lora_ga-lr0.05-seed0"]


@pytest.mark.usefixtures("no_report")
def test_the_heads_learning_rate_is_a_multiple_of_the_adapters(compare):
    out = compare(inits=["gaussian"], head_lr_ratio=0.0, snapshot_steps=[4])
    states = [snapshot(out, "gaussian-lr0.01-seed0", step) for step in (0, 4, 6)]
    for name, value in states[0].items():
        assert torch.equal(value, states[2][name]) == (name.startswith("head.") or name.endswith("scaling")), name


@pytest.mark.usefixtures("no_report")
def test_stopped_at_any_moment_it_ends_with_the_same_results(compare, monkeypatch, tmp_path):
    expected = (compare(output_dir=tmp_path / "whole", seeds=[0, 1]) / "results.csv").read_bytes()
    train, calls = training.train, 0

    def stop(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", stop)
        with pytest.raises(KeyboardInterrupt):
            compare(seeds=[0, 1])
    assert (compare(seeds=[0, 1]) / "results.csv").read_bytes() == expected


def test_a_run_that_diverges_is_the_worst_in_every_metric(compare):
    steep = {"learning_rates": [1e-2, 1e38], "optimizer": "sgd", "max_grad_norm": 1e30}
    out = compare(inits=["gaussian", "orthonormal"], **steep)
    last = {row["run"]: row for row in rows(out) if row["step"] == "6"}
    bad = last["gaussian-lr1e+38-seed0"]
    assert (float(bad["accuracy"]), float(bad["validation_loss"])) == (-float("inf"), float("inf"))
    assert 0 <= float(last["gaussian-lr0.01-seed0"]["accuracy"]) <= 1
    assert Comparison.load(out).best_learning_rates()["gaussian"] == 0.01
    assert "2 of 4 runs diverged" in (out / "summary.md").read_text(encoding="utf-8")


def help_of(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> str:
    with pytest.raises(SystemExit) as end:
        compare_inits.parse_args([*argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.usefixtures("compare")
def test_help_has_the_options_of_the_family_alone(capsys):
    text = help_of(capsys, ["--family", "points"])
    for name in ("--spread", "--head_lr_ratio", "--snapshot_steps", "--lora_layers", "--cache_dir"):
        assert name in text
    for name in ("--drift_prompts", "--image_steps", "--snr_gamma", "--train_text_encoder", "--variant"):
        assert name not in text
    text = help_of(capsys, [])
    assert "--drift_prompts" in text
    assert "--snapshot_steps" not in text
    with pytest.raises(SystemExit):
        compare_inits.parse_args(["--spread", "1"])
    with pytest.raises(SystemExit):
        compare_inits.parse_args(["--family=points", "--image_metrics", "none"])


@pytest.mark.usefixtures("compare")
def test_defaults_are_the_familys():
    for family, name in (("classifier", "tiny-vit"), ("vlm", "tiny-vlm")):
        args = compare_inits.parse_args(["--family", family])
        assert args.pretrained_model_name_or_path == str(ROOT / "assets" / "models" / name)
        assert args.inits == ["gaussian", "orthonormal", "cntlora", "gradient_step"]
    args = compare_inits.parse_args(["--family=points", "--pretrained_model_name_or_path", "a-base"])
    assert (args.learning_rates, args.max_train_steps, args.train_batch_size) == ([0.01, 0.02], 7, 5)
    assert (args.snapshot_steps, args.eval_steps[:2], args.seeds) == ([0, 7], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="--family points has no bundled base"):
        compare_inits.parse_args(["--family", "points"])
    args = compare_inits.parse_args([])
    assert (args.learning_rates, args.max_train_steps, args.train_batch_size) == ([1e-3, 2e-3], 100, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"spread": -1.0}, r"--spread -1.0: must be positive"),
        ({"head_lr_ratio": -1.0}, r"--head_lr_ratio -1.0: must not be negative"),
        ({"snapshot_steps": [8]}, r"--snapshot_steps \[0, 6, 8\]: steps go from 0 to --max_train_steps 6"),
        ({"rank": 0}, "--rank 0"),
        ({"lora_layers": ","}, "--lora_layers is empty"),
    ],
)
def test_bad_input_is_refused_before_any_run(compare, changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(num_workers=2, **changed)  # in the first process, not in a worker
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.usefixtures("no_report")
def test_another_comparison_in_the_same_directory_is_refused(compare):
    compare(inits=["gaussian"])
    for changed, message in (
        ({"spread": 0.7}, "--spread is 0.7, but --output_dir .* holds runs with 0.5"),
        ({"head_lr_ratio": 0.5}, "--head_lr_ratio is 0.5, but --output_dir .* holds runs with 1.0"),
        ({"rank": 3}, "--rank is 3, but"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(inits=["gaussian"], **changed)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for a random Llava and questions about colours."""
    folder = tmp_path_factory.mktemp("vlm")
    base, data = write_base(folder / "random-llava", "llava"), write_questions(folder / "colours")
    return {
        **FAST,
        **{"family": "vlm", "pretrained_model_name_or_path": base, "train_data_file": data / "train.jsonl"},
        **{"max_train_steps": 2, "eval_steps": [0, 1, 2], "train_batch_size": 2},
    }


def test_a_vision_language_model_is_compared(questions, tmp_path):
    out = run_main(
        compare_inits, {**questions, "output_dir": tmp_path / "out", "inits": ["gaussian", "cntlora", "eva"]}
    )
    table = rows(out)
    keys = ["run", "init", "learning_rate", "seed", "rank", "num_parameters", "step"]
    assert list(table[0]) == [*keys, "exact_match", "validation_loss"]
    assert len(table) == 3 * 3
    losses = [float(row["validation_loss"]) for row in table if row["step"] == "0"]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)
    assert len({row["validation_loss"] for row in table if row["step"] == "2"}) == 3
    text = (out / "summary.md").read_text(encoding="utf-8").replace("\\", "")
    for sentence in (
        "# LoRA initialisations on colours",
        "Exact match, higher is better",
        "same 12 questions and is scored on 6 held-out ones",
    ):
        assert sentence in text
    # a second call finds the same comparison, finished
    before = (out / "results.csv").read_bytes()
    run_main(compare_inits, {**questions, "output_dir": out, "inits": ["gaussian", "cntlora", "eva"]})
    assert (out / "results.csv").read_bytes() == before
    with pytest.raises(ValueError, match=r"--adapt is \['vision'\], but .* holds runs with \['language'\]"):
        run_main(compare_inits, {**questions, "output_dir": out, "adapt": ["vision"]})


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options for a random ViT and a folder of images of three classes."""
    folder = tmp_path_factory.mktemp("classifier")
    base, data = write_classifier(folder / "random-vit"), write_class_folder(folder / "colours")
    return {
        **FAST,
        **{"family": "classifier", "pretrained_model_name_or_path": base, "train_data_dir": data},
    }


def test_a_classifier_is_compared(classes, tmp_path):
    labels = ["gaussian", "cntlora:variable_rank=true", "lora_ga"]
    out = run_main(compare_inits, {**classes, "output_dir": tmp_path / "out", "inits": labels, "head": "new"})
    table = rows(out)
    keys = ["run", "init", "learning_rate", "seed", "rank", "num_parameters", "num_head_parameters", "step"]
    assert list(table[0]) == [*keys, "accuracy", "validation_loss"]
    starts = [float(row["validation_loss"]) for row in table if row["step"] == "0"]
    assert starts == pytest.approx([starts[0]] * 3, rel=1e-4)
    ends = [float(row["validation_loss"]) for row in table if row["step"] == "6"]
    assert max(ends) < starts[0]
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert "same 18 images and is scored on 12 held-out ones" in text
    # a second call finds the same comparison, finished
    before = (out / "results.csv").read_bytes()
    run_main(compare_inits, {**classes, "output_dir": out, "inits": labels, "head": "new"})
    assert (out / "results.csv").read_bytes() == before
    with pytest.raises(ValueError, match=r"--head is 'auto', but --output_dir .* holds runs with 'new'"):
        run_main(compare_inits, {**classes, "output_dir": out, "inits": labels})


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("family", ["classifier", "vlm"])
def test_a_run_is_the_one_that_the_training_script_makes(classes, questions, tmp_path, family, monkeypatch):
    """Bit for bit: otherwise the comparison would say nothing of what users train."""
    found: list[loop.StepOutcome] = []
    take = loop.take_step
    for module in (loop, training):
        monkeypatch.setattr(module, "take_step", lambda *a: found.append(take(*a)) or found[-1])
    options = {**(classes if family == "classifier" else questions), "lora_dropout": 0.1}
    out = run_main(compare_inits, {**options, "inits": ["cntlora"], "seeds": [3], "output_dir": tmp_path / "out"})
    steps = options["max_train_steps"]
    state = snapshot(out, "cntlora-lr0.01-seed3", steps)
    same = (
        *("pretrained_model_name_or_path", "train_data_dir", "train_data_file", "rank", "max_train_steps"),
        *("train_batch_size", "init_num_batches", "lora_dropout"),
    )
    script_options = {
        **{name: options[name] for name in same if name in options},
        **{"init": "cntlora", "seed": 3, "learning_rate": 1e-2, "checkpointing_steps": steps, "validation_steps": 2},
        **{"output_dir": tmp_path / "single"},
    }
    trained = run_main(train_classifier_lora if family == "classifier" else train_vlm_lora, script_options)
    (checkpoint,) = (trained / f"checkpoint-{steps}").glob("adapters*.safetensors")
    single = load_file(checkpoint)
    assert single.keys() == state.keys()
    assert any(name.startswith("head.") for name in state) == (family == "classifier")
    assert not [name for name, value in single.items() if not torch.equal(value, state[name])]
    assert len(found) == 2 * steps
    assert found[:steps] == found[steps:]  # loss, norm of the gradients, learning rate
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    validated = {str(line["step"]): line["validation_loss"] for line in lines if "validation_loss" in line}
    compared = {row["step"]: float(row["validation_loss"]) for row in rows(out)}
    assert {step: compared[step] for step in validated} == validated


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("family", ["classifier", "vlm"])
def test_two_workers_do_what_one_does(classes, questions, tmp_path, family):
    options = classes if family == "classifier" else questions
    one, two = (
        rows(run_main(compare_inits, {**options, "output_dir": tmp_path / str(count), "num_workers": count}))
        for count in (1, 2)
    )
    for a, b in zip(one, two, strict=True):
        assert float(a.pop("validation_loss")) == pytest.approx(float(b.pop("validation_loss")), rel=1e-4)
        assert a == b


def test_data_that_cannot_be_read_is_refused_in_the_first_process(classes, questions, tmp_path):
    with pytest.raises(FileNotFoundError, match="--train_data_dir 'nowhere'"):
        run_main(
            compare_inits, {**classes, "output_dir": tmp_path / "out", "train_data_dir": "nowhere", "num_workers": 2}
        )
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "What?"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"^.*bad\.jsonl, line 1"):
        run_main(
            compare_inits,
            {**questions, "output_dir": tmp_path / "out", "train_data_file": path, "num_workers": 2},
        )
