"""The command line of a script: a mistake in it is answered in one sentence, before anything heavy is imported."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from lorainit_diffusers.training.ranges import check_options, describe_ranges, numeric_options

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
# Similarity (difflib's ratio) of two names that one is taken for a misspelling of the other.
_CUTOFF = 0.6


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one was meant for, as far as its spelling tells."""
    names = list(known)
    folded = {candidate.lower().replace("-", "_"): candidate for candidate in reversed(names)}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=_CUTOFF)
    return folded[found[0]] if found else None


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """A sentence on a name that does not exist: what there is, and what was meant."""
    names = list(known)
    meant = closest(name, names)
    question = f"; did you mean {meant}?" if meant is not None else ""
    return f"unknown {what} {name!r}; known: {', '.join(names)}{question}"


class ScriptParser(argparse.ArgumentParser):
    """An `ArgumentParser` that prints its module's docstring as it is, takes no abbreviations and answers briefly.

    A mistake ends the script with one line `error: ...` and exit code 2, as those do that are found later.

    Args:
        description: shown by `--help`.
        more_options: flags that are read elsewhere (`--name`), to be offered for a misspelling, too.
    """

    def __init__(self, description: str | None = None, *, more_options: Sequence[str] = (), **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, allow_abbrev=False, **options)
        self.more_options = tuple(more_options)

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
            ValueError: naming the first option that is out of its range, its value and the remedy.
        """
        describe_ranges(self)
        found, rest = super().parse_known_args(args, namespace)
        check_options(vars(found), numeric_options(self))
        return found, rest

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


def run_script(main: Callable[[], object]) -> None:
    """Run a script's main; a user's mistake ends it with one line `error: ...` and exit code 2.

    Set the environment variable `LORAINIT_TRACEBACK=1` to see where the error came from.
    """
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("LORAINIT_TRACEBACK") == "1":
            raise
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
