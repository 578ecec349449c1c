"""The command lines: one line on a mistake, at once, with what was meant."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers.optimization import SchedulerType
from sd_fixtures import ROOT

import lorainit_diffusers
from lorainit_diffusers import methods
from lorainit_diffusers.families import TEXT_TO_IMAGE_FAMILIES
from lorainit_diffusers.families.classifier import HEADS
from lorainit_diffusers.families.flow_matching import WEIGHTING_SCHEMES
from lorainit_diffusers.families.vlm import PARTS, ROWS
from lorainit_diffusers.training import choices
from lorainit_diffusers.training.options.parser import ScriptParser
from lorainit_diffusers.training.options.spelling import closest, unknown_name

SCRIPTS = ROOT / "train_scripts"
PROGRAMS = sorted(
    path.name for path in SCRIPTS.glob("*.py") if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


def make_parser() -> ScriptParser:
    parser = ScriptParser("What it does.")
    add = parser.add_argument
    add("--learning_rate", type=float, default=1e-3)
    add("--train_batch_size", type=int, default=8)
    add("--sample_batch_size", type=int, default=8)
    add("--rank", type=int, default=8)
    add("--optimizer", choices=("adamw", "sgd", "prodigy"), default="adamw")
    add("--pretrained_model_name_or_path")
    add("--validation_prompt", nargs="+")
    add("--crop_scale", nargs=2, type=float)
    add("--cache_latents", action="store_true")
    add("--random_flip", action=argparse.BooleanOptionalAction, default=True)
    return parser


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("--learning_rat 1e-4", "unknown option --learning_rat; did you mean --learning_rate?"),
        ("--learning-rate 1e-4", "unknown option --learning-rate; did you mean --learning_rate?"),
        ("--Learning_Rate=1e-4", "unknown option --Learning_Rate; did you mean --learning_rate?"),
        ("--learning 1e-4", "unknown option --learning; did you mean --learning_rate?"),  # no abbreviations
        ("--lr 1e-4", "unknown option --lr; did you mean --learning_rate?"),
        ("--batch_size 4", "unknown option --batch_size; did you mean --train_batch_size?"),
        ("--network_dim 4", "unknown option --network_dim; did you mean --rank?"),
        ("-rank 4", "unknown option -rank; did you mean --rank?"),
        ("\u2014rank 4", "unknown option \u2014rank; did you mean --rank?"),  # a text editor's dash
        ("--model x", "unknown option --model; did you mean --pretrained_model_name_or_path?"),
        ("--zzz", "unknown option --zzz; --help lists all options."),
        ("--no-cache_latents", "unknown option --no-cache_latents; did you mean leaving out --cache_latents?"),
        ("--no-random-flip", "unknown option --no-random-flip; did you mean --no-random_flip?"),
        ("--rank eight", "--rank 'eight': give a whole number."),
        ("--rank 8.5", "--rank '8.5': give a whole number."),
        ("--learning_rate fast", "--learning_rate 'fast': give a number."),
        ("--rank", "--rank needs a value."),
        ("--validation_prompt", "--validation_prompt needs at least one value."),
        ("--crop_scale 1", "--crop_scale needs 2 values."),
        ("--optimizer", "--optimizer needs a value of adamw, sgd, prodigy."),
        ("--optimizer adam", "--optimizer 'adam' is unknown; did you mean adamw? Choose from adamw, sgd, prodigy."),
        ("--optimizer lion", "--optimizer 'lion' is unknown; choose from adamw, sgd, prodigy."),
        ("--cache_latents=yes", "--cache_latents takes no value; give it alone, or leave it out."),
        ("cntlora", "'cntlora' belongs to no option: options begin with --, and values with spaces need quotes."),
    ],
)
def test_a_mistake_is_answered_in_one_line(line, answer, capsys):
    with pytest.raises(SystemExit) as end:
        make_parser().parse_args(line.split())
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {answer}\n"


def test_several_misspelt_options_are_all_named(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--rnk", "4", "--optimiser", "sgd"])
    assert capsys.readouterr().err.count("did you mean") == 2


def test_a_misspelt_option_is_named_before_the_required_one_that_it_is(capsys):
    parser = ScriptParser()
    parser.add_argument("--vtab_dir", required=True)
    with pytest.raises(SystemExit):
        parser.parse_args(["--vtab_dr", "x"])
    assert capsys.readouterr().err == "error: unknown option --vtab_dr; did you mean --vtab_dir?\n"
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert capsys.readouterr().err == "error: --vtab_dir is missing.\n"


def test_right_options_are_read_as_argparse_reads_them():
    args = make_parser().parse_args(
        ["--learning_rate=1e-3", "--validation_prompt", "a cat", "--not a flag", "--no-random_flip", "--rank", "4"]
    )
    assert (args.learning_rate, args.rank, args.random_flip) == (1e-3, 4, False)
    assert args.validation_prompt == ["a cat", "--not a flag"]


def test_nearest_names():
    assert closest("cntlra", methods.METHODS) == "cntlora"
    assert closest("CNTLoRA", methods.METHODS) == "cntlora"
    assert closest("qqq", methods.METHODS) is None
    assert unknown_name("init", "evva", ["eva", "pissa"]) == "unknown init 'evva'; known: eva, pissa; did you mean eva?"


def test_what_is_read_from_sources_is_what_the_library_has(monkeypatch):
    assert choices.names_in("methods/__init__.py", "METHODS") == tuple(methods.METHODS)
    assert choices.names_in("families/__init__.py", "TEXT_TO_IMAGE_FAMILIES") == tuple(TEXT_TO_IMAGE_FAMILIES)
    assert choices.names_in("families/flow_matching.py", "WEIGHTING_SCHEMES") == WEIGHTING_SCHEMES
    assert choices.names_in("families/classifier.py", "HEADS") == HEADS
    assert choices.names_in("families/vlm.py", "PARTS") == PARTS
    assert choices.names_in("families/vlm.py", "ROWS") == ROWS
    assert set(choices.LR_SCHEDULERS) <= {name.value for name in SchedulerType}
    for name, method in methods.METHODS.items():
        fields = tuple(field.name for field in dataclasses.fields(method) if field.init)
        assert choices.init_option_names(name) == fields
    with pytest.raises(ValueError, match="names no class for 'mine'"):
        choices.init_option_names("mine")
    with pytest.raises(ValueError, match="assigns no names to NOTHING"):
        choices.names_in("methods/__init__.py", "NOTHING")
    monkeypatch.setitem(methods.METHODS, "mine", methods.METHODS["eva"])
    assert "mine" in choices.init_names()


# ------------------------------------------------------------------------------------------------------------ scripts


def answer_of(script: str, *arguments: str) -> tuple[int, str, float]:
    """Exit code, what is printed, and the seconds of the processor, which a busy machine does not stretch."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments], capture_output=True, text=True, timeout=60
    )
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return done.returncode, done.stderr + done.stdout, seconds


def test_there_are_the_scripts_that_we_know():
    assert {"train_sd_lora.py", "train_dit_lora.py", "compare_inits.py", "vtab_protocol.py"} <= set(PROGRAMS)


@pytest.mark.parametrize("script", PROGRAMS)
def test_every_script_answers_a_typo_at_once(script):
    code, printed, seconds = answer_of(script, "--output_dri", "x")
    assert (code, printed) == (2, "error: unknown option --output_dri; did you mean --output_dir?\n")
    assert seconds < 2


@pytest.mark.parametrize("script", PROGRAMS)
def test_every_script_helps_at_once(script):
    code, printed, seconds = answer_of(script, "--help")
    assert code == 0
    assert "--output_dir" in printed
    assert seconds < 2


@pytest.mark.parametrize(
    ("script", "arguments", "answer"),
    [
        ("train_sd_lora.py", "--init cntlra", "did you mean cntlora?"),
        ("train_dit_lora.py", "--family sd4", "did you mean sd3?"),
        ("train_classifier_lora.py", "--rank 0", "--rank 0"),
        ("train_vlm_lora.py", "--adapt visoin", "did you mean vision?"),
        ("train_sdxl_lora.py", "--lr_scheduler cosin", "did you mean cosine?"),
        ("train_sd_lora.py", "--init eva --init_option centred=true", "did you mean centered=true?"),
        ("compare_inits.py", "--inits eva pisa", "did you mean pissa?"),
        ("compare_inits.py", "--inits eva cntlora:guage=whitened", "did you mean gauge=whitened?"),
        ("vtab_protocol.py", "--vtab_dir x --inits eva:scal=matched", "did you mean scale=matched?"),
        ("compare_inits.py", "--family vlm --image_metrics none", "unknown option --image_metrics"),
        ("vtab_protocol.py", "--vtab_dir x --inits gausian", "did you mean gaussian?"),
    ],
)
def test_invalid_values_are_answered_at_once(script, arguments, answer):
    code, printed, seconds = answer_of(script, *arguments.split())
    assert code == 2
    assert printed.startswith("error: ")
    assert answer in printed
    assert printed.count("\n") == 1
    assert seconds < 2


def test_a_command_line_is_read_without_torch():
    code = (
        f"import sys; sys.path[:0] = [{str(SCRIPTS)!r}, {str(ROOT)!r}]\n"
        "from lorainit_diffusers.training import classifier, dit, sd, sdxl, vlm\n"
        "sd.parse_args([]), dit.parse_args([])\n"
        "print(sorted({'torch', 'diffusers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------------------------------ names of the package


def run_python(code: str, path: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there_and_initialize_stays_a_function():
    for name in lorainit_diffusers.__all__:
        assert getattr(lorainit_diffusers, name) is not None
    assert set(lorainit_diffusers.__all__) <= set(dir(lorainit_diffusers))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lorainit_diffusers.nothing
    printed = run_python(
        "import lorainit_diffusers.families.sd, lorainit_diffusers.initialize\n"
        "from lorainit_diffusers import initialize\n"
        "import lorainit_diffusers as package\n"
        "print(callable(initialize), callable(package.initialize), package.export.__name__)"
    )
    assert printed == "True True lorainit_diffusers.export\n"
