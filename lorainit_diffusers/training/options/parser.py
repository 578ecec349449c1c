"""The command line of a script: a mistake in it is answered in one sentence, before anything heavy is imported.

The only file in which options are an `argparse.Namespace`: `parse_options` makes a frozen dataclass of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from transformers.hf_argparser import HfArgumentParser, string_to_bool

from lorainit_diffusers.ranges import Range
from lorainit_diffusers.training.defaults import RunDefaults, defaults_of, describe_defaults
from lorainit_diffusers.training.messages import remember_flags
from lorainit_diffusers.training.options.config import ConfigFile, read_config
from lorainit_diffusers.training.options.fields import Facts, Options, concerns, option_facts
from lorainit_diffusers.training.options.init_from import check_given, decided_options
from lorainit_diffusers.training.options.spelling import closest
from lorainit_diffusers.training.ranges import OPTION_RANGES, check_options, describe_ranges, numeric_options

SomeOptions = TypeVar("SomeOptions", bound=Options)

# What other trainers call an option, where the spelling does not lead to ours.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "unet_lr": "learning_rate",
    "epochs": "num_train_epochs",
    "max_train_epochs": "num_train_epochs",
    "steps": "max_train_steps",
    "iterations": "max_train_steps",
    "bs": "train_batch_size",
    "batch_size": "train_batch_size",
    "model": "pretrained_model_name_or_path",
    "base_model": "pretrained_model_name_or_path",
    "network_dim": "rank",
    "dim": "rank",
    "lora_rank": "rank",
    "lora_r": "rank",
    "network_alpha": "lora_alpha",
    "data": "train_data_dir",
    "data_dir": "train_data_dir",
    "output": "output_dir",
    "init_method": "init",
    "init_lora_weights": "init",
    "resume": "resume_from_checkpoint",
    "prompt": "validation_prompt",
    "ema": "use_ema",
    "dora": "use_dora",
}
_KINDS = {"int": "a whole number", "float": "a number"}
# From here on a list of choices is too long to be read in an error.
_MAX_CHOICES = 12


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows a switch without the value that it may be given."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return action.option_strings[0] if action.type is string_to_bool else super()._format_action_invocation(action)


class ScriptParser(HfArgumentParser):
    """An `HfArgumentParser` that takes no abbreviations and answers a mistake in one line `error: ...`, exit code 2.

    Args:
        description: Shown by `--help` as it is.
        options: The dataclass whose fields are the options; left out for a parser with `add_argument` alone.
        more_options: Flags that are read elsewhere (`--name`), to be offered for a misspelling, too.
        more: Arguments of `argparse.ArgumentParser`.
    """

    def __init__(
        self,
        description: str | None = None,
        options: type[Options] | None = None,
        *,
        more_options: Sequence[str] = (),
        **more: Any,
    ) -> None:
        more.setdefault("formatter_class", _Help)
        more.setdefault("usage", "%(prog)s [options]")
        kinds: list[Any] = [] if options is None else list(concerns(options))
        super().__init__(kinds, description=description, allow_abbrev=False, **more)
        self.more_options = tuple(more_options)
        self.facts: Mapping[str, Facts] = {} if options is None else option_facts(options)
        for action in self._actions:
            self._keep_names(action)
            fact = self.facts.get(action.dest)
            if fact is not None and fact.num_values is not None:
                action.nargs = fact.num_values

    @property
    def ranges(self) -> dict[str, Range]:
        """The ranges of the numbers by the names of their options."""
        return OPTION_RANGES | {name: fact.range for name, fact in self.facts.items() if fact.range is not None}

    @property
    def flags(self) -> list[str]:
        """All that may be given, without the opposites `--no-...`."""
        own = [flag for flag in self._option_string_actions if flag.startswith("--") and not flag.startswith("--no-")]
        return [*own, *self.more_options]

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The options; a misspelt one is named before a required one that is missing, which it may be."""
        texts = list(sys.argv[1:] if args is None else args)
        unknown = [text for text in texts[: _separator(texts)] if self._is_unknown(text)]
        if unknown and not {"-h", "--help"} & set(texts):
            self.error(" ".join(self._unknown_flag(text) for text in unknown))
        found, rest = self.parse_known_args(texts, namespace)
        if rest:
            dashed = [self._unknown_flag(text) for text in rest if _is_dashed(text)]
            self.error(" ".join(dashed or [_unused(rest[0])]))  # what follows an unknown option is its value
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As in `ArgumentParser`, every number within its range.

        Raises:
            ValueError: Naming the first option that is out of its range, its value and the remedy.
        """
        describe_ranges(self, self.ranges)
        remember_flags(self)
        found, rest = super().parse_known_args(args, namespace)
        check_options({name: vars(found).get(name) for name in numeric_options(self)}, self.ranges)
        return found, rest

    def _keep_names(self, action: argparse.Action) -> None:
        """One spelling of an option, and `--no-...` for its opposite, where `HfArgumentParser` has several."""
        if action.dest not in self.facts:
            return
        opposite = action.option_strings[0] != f"--{action.dest}"
        name = f"--no-{action.dest}" if opposite else f"--{action.dest}"
        for other in action.option_strings:
            del self._option_string_actions[other]
        action.option_strings = [name]
        self._option_string_actions[name] = action

    def error(self, message: str) -> NoReturn:
        """Print what is wrong in one line, and end the script with exit code 2."""
        print("error: " + " ".join(self._reworded(message).split()), file=sys.stderr)
        raise SystemExit(2)

    def _is_unknown(self, text: str) -> bool:
        """Whether argparse would take this for an option, and has none of this name."""
        if not text.startswith("--") or " " in text or len(text) == 2:
            return False
        return text.partition("=")[0] not in self._option_string_actions

    def _unknown_flag(self, text: str) -> str:
        flag = text.partition("=")[0]
        name = re.sub(r"^[\W_]+", "", flag)
        known = {known.removeprefix("--"): known for known in self.flags}
        other = _OTHER_NAMES.get(name.lower().replace("-", "_"), "")
        negated = name.lower().replace("_", "-").startswith("no-")
        meant = known.get(other) or known.get(closest(name, known) or "") or _containing(name, known)
        if negated and (positive := closest(name[3:], known)) is not None:
            opposite = f"--no-{positive}"
            meant = opposite if opposite in self._option_string_actions else f"leaving out --{positive}"
        if meant is None:
            return f"unknown option {flag}; --help lists all options."
        return f"unknown option {flag}; did you mean {meant}?"

    def _reworded(self, message: str) -> str:
        """Argparse's message, with the flag first and a remedy."""
        match = re.match(r"argument (--?[\w-]+)\S*: (.*)", message, re.DOTALL)
        if match is None:
            missing = re.match(r"the following arguments are required: (.*)", message)
            return f"{missing[1]} {'are' if ',' in missing[1] else 'is'} missing." if missing else message
        flag, problem = match.groups()
        action = self._option_string_actions.get(flag)
        choices = [str(choice) for choice in action.choices] if action is not None and action.choices else []
        if (wrong := re.match(r"invalid choice: '?(.*?)'? \(", problem)) and choices:
            return self._wrong_choice(flag, wrong[1], choices)
        if wrong := re.match(r"Truthy value expected: got (.*) but expected", problem):
            return f"{flag} {wrong[1]!r}: give true or false, or {flag} alone."
        if wrong := re.match(r"invalid (\w+) value: (.*)", problem):
            return f"{flag} {wrong[2]}: give {_KINDS.get(wrong[1], f'a value of kind {wrong[1]}')}."
        if problem.startswith("ignored explicit argument"):
            return f"{flag} takes no value; give it alone, or leave it out."
        if wrong := re.match(r"expected (.*) arguments?$", problem):
            count = {"one": "a value", "at least one": "at least one value"}.get(wrong[1], f"{wrong[1]} values")
            one_of = f" of {', '.join(choices)}" if choices and len(choices) <= _MAX_CHOICES else ""
            return f"{flag} needs {count}{one_of}."
        return f"{flag}: {problem}"

    def _wrong_choice(self, flag: str, value: str, choices: Sequence[str]) -> str:
        meant = closest(value, choices)
        listed = f"choose from {', '.join(choices)}." if len(choices) <= _MAX_CHOICES or meant is None else ""
        if meant is None:
            return f"{flag} {value!r} is unknown; {listed}"
        return f"{flag} {value!r} is unknown; did you mean {meant}? {listed[:1].upper() + listed[1:]}"


def _separator(texts: Sequence[str]) -> int:
    """Place of `--`, after which nothing is an option."""
    return texts.index("--") if "--" in texts else len(texts)


def _is_dashed(text: str) -> bool:
    """Whether a text was meant as an option: one dash, two, or what a text editor makes of them."""
    return re.match(r"[-\u2010-\u2015\u2212]+[^\W\d]", text) is not None


def _unused(text: str) -> str:
    return f"{text!r} belongs to no option: options begin with --, and values with spaces need quotes."


def _containing(name: str, known: dict[str, str]) -> str | None:
    """The shortest flag that has all words of this name in it, such as --train_batch_size for --batch_size."""
    words = set(re.split(r"[-_]", name.lower()))
    found = [candidate for candidate in known if words <= set(candidate.split("_"))]
    return known[min(found, key=len)] if found else None


def parse_options(
    options: type[SomeOptions],
    argv: Sequence[str] | None,
    description: str | None,
    *,
    family: Callable[[Mapping[str, Any]], str] | None = None,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> SomeOptions:
    """The command line as one frozen object; what is not given is what suits the base, or what `--config` says.

    Args:
        options: The class of the object.
        argv: The texts of the command line; the process's own when left out.
        description: Shown by `--help`.
        family: Finds the base's family among the values; the class's first when left out.
        defaults: Of options, by what has been given; those that suit the base when left out.

    Raises:
        ValueError: Naming the option, its value and the remedy.
    """
    parser = make_parser(options, description)
    texts = list(sys.argv[1:] if argv is None else argv)
    config = _config_of(parser, texts)
    if config is not None:
        parser.set_defaults(**config)
        for action in parser._actions:
            action.required = action.required and action.dest not in config
    first = vars(parser.parse_args(texts))  # the base and its family decide what the others are
    if defaults is not None:
        parser.set_defaults(**defaults(first))
    elif options.FAMILIES:
        name = options.FAMILIES[0] if family is None else family(first)
        usual = dataclasses.asdict(defaults_of(name, first["pretrained_model_name_or_path"]))
        parser.set_defaults(**{name: value for name, value in usual.items() if name in parser.facts})
    init_file: str | None = first.get("init_from")
    decided = {} if init_file is None else decided_options(init_file, parser.facts)
    # argparse would add to a default list
    parser.set_defaults(**{name: value for name, value in decided.items() if name != "init_option"})
    if config is not None:
        parser.set_defaults(**config)
    found = vars(parser.parse_args(texts))
    if decided and not found["init_option"]:
        found["init_option"] = decided["init_option"]
    made = options(**{name: found[name] for name in option_facts(options)})
    if init_file is not None:
        check_given(made, decided, init_file)
    return made


def make_parser(options: type[Options], description: str | None) -> ScriptParser:
    """The parser of a script's options, with `--config`."""
    parser = ScriptParser(description, options)
    about = "YAML or JSON file with options by name, such as a run's own run.yaml; the command line overrides it"
    parser.add_argument("--config", metavar="FILE", help=about)
    usual = {field.name for field in dataclasses.fields(RunDefaults)} if options.FAMILIES else set[str]()
    for action in parser._actions:
        if action.dest in usual:
            action.help = f"{action.help} ({describe_defaults(action.dest, options.FAMILIES)})"
    return parser


def _config_of(parser: ScriptParser, texts: Sequence[str]) -> dict[str, Any] | None:
    """What the file that `--config` names says, in the types of the options; `None` where none is named."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?")
    known, _ = finder.parse_known_args(list(texts[: _separator(texts)]))
    if known.config is None:
        return None
    file = read_config(known.config)
    own = (action for action in parser._actions if action.const is not False)  # the opposite, --no-..., takes no value
    actions = {action.dest: action for action in own if action.dest in parser.facts}
    for name in file.values:
        if name not in actions:
            meant = closest(name, actions)
            question = f"did you mean {meant}?" if meant is not None else "--help lists all options."
            raise ValueError(f"--config {file.path}: unknown option {name!r}; {question}")
    return {name: _converted(file, name, value, actions[name]) for name, value in file.values.items()}


def _converted(file: ConfigFile, name: str, value: Any, action: argparse.Action) -> Any:
    """A value of a file in the type that the option has.

    Raises:
        ValueError: When it is none of this type, or no choice.
    """
    if value is None:
        return None
    if action.nargs not in (None, "?"):
        values: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
        return [_converted_one(file, name, one, action) for one in values]
    return _converted_one(file, name, value, action)


def _converted_one(file: ConfigFile, name: str, value: Any, action: argparse.Action) -> Any:
    kind: Any = action.type or str
    where = f"--config {file.path}: {name} {value!r}"
    if kind is string_to_bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: give true or false.")
        return value
    if isinstance(value, (bool, list, dict)) or (kind is int and isinstance(value, float)):
        raise ValueError(f"{where}: give {_KINDS.get(getattr(kind, '__name__', ''), 'one text')}.")
    try:
        found = value if kind is str and isinstance(value, str) else kind(value)
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        raise ValueError(f"{where}: give {_KINDS.get(kind.__name__, f'a value of kind {kind.__name__}')}.") from None
    if action.choices is not None and found not in action.choices:
        raise ValueError(f"{where} is unknown; choose from {', '.join(map(str, action.choices))}.")
    return found
