"""The console command `lorainit`: trainings, comparisons, and questions about methods and files.

    lorainit train sd --init cntlora ...     train a LoRA: sd, sdxl, dit, classifier or vlm
    lorainit init sd --init cntlora ...      collect, write the initialised LoRA and its report, and stop
    lorainit compare --inits gaussian eva    the same data, seeds and budget for every initialisation
    lorainit run --init eva -- script.py ... start a stock script from the data
    lorainit methods [NAME]                  the initialisations: options, defaults, what they observe, cost, source
    lorainit inspect FILE                    what a LoRA file holds: format, layers, ranks, alphas, how it was made

`lorainit train sd --help` lists the options of a training. On several processes, start the same function with
`accelerate launch -m lorainit_diffusers.training.sd ...`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from lorainit_diffusers.training.cli import run_script
from lorainit_diffusers.training.options.spelling import unknown_name

# Kinds of bases, each a module of `training` with a function `main(argv)`.
KINDS = ("sd", "sdxl", "dit", "classifier", "vlm")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends it with one line `error: ...` and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        run_script(lambda: _dispatch(words))
    except BrokenPipeError:  # who reads the output has enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: list[str]) -> object:
    if not words or words[0] in ("-h", "--help", "help"):
        print(__doc__)
        return None
    name, *rest = words
    if name not in COMMANDS:
        raise ValueError(unknown_name("command", name, COMMANDS))
    return COMMANDS[name](rest)


def _train(words: list[str]) -> object:
    kind, rest = _kind("train", words)
    return importlib.import_module(f"lorainit_diffusers.training.{kind}").main(rest)


def _init(words: list[str]) -> object:
    kind, rest = _kind("init", words)
    only = [] if {"-h", "--help"} & set(rest) else ["--init_only"]
    return importlib.import_module(f"lorainit_diffusers.training.{kind}").main([*rest, *only])


def _kind(command: str, words: list[str]) -> tuple[str, list[str]]:
    """The kind of base that a command is about, and what follows it."""
    if not words or words[0] in ("-h", "--help"):
        raise ValueError(f"lorainit {command} needs a kind of base: {', '.join(KINDS)}; such as lorainit {command} sd")
    if words[0] not in KINDS:
        raise ValueError(f"lorainit {command}: {unknown_name('kind of base', words[0], KINDS)}")
    return words[0], words[1:]


def _compare(words: list[str]) -> object:
    return importlib.import_module("lorainit_diffusers.comparison.compare").main(words)


def _run(words: list[str]) -> object:
    return importlib.import_module("lorainit_diffusers.run").main(words)


def _methods(words: list[str]) -> None:
    from lorainit_diffusers.methods.describe import describe_method, describe_methods
    from lorainit_diffusers.training.choices import init_names

    if unknown := [word for word in words if word not in init_names()]:
        raise ValueError(f"lorainit methods: {unknown_name('init', unknown[0], init_names())}")
    described = [describe_method(word) for word in words] or describe_methods()
    rows = [("init", "observes", "step 0", "options and their defaults", "source")]
    for method in described:
        options = " ".join(f"{option.key}={option.default}" for option in method.options) or "none"
        rows.append((method.name, method.observes, method.step_zero or "by options", options, method.source))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]))
    if not words:
        print("\nlorainit methods NAME says what a method and each of its options does, and what it costs.")
        return
    for method in described:
        print(f"\n{method.name}: {method.summary}")
        print(f"  needs           {', '.join(method.needs) or 'nothing more'}")
        print(f"  variable ranks  {'yes' if method.gives_scores else 'no, it gives no scores'}")
        print(f"  cost            {method.cost}")
        for option in method.options:
            print(f"  --init_option {option.key}={option.default}: {option.values}. {option.meaning}")


def _inspect(words: list[str]) -> None:
    from lorainit_diffusers.export.inspect import inspect_lora

    if len(words) != 1 or words[0].startswith("-"):
        raise ValueError(
            "lorainit inspect takes one LoRA file, or a folder with one: lorainit inspect my_lora.safetensors"
        )
    found = inspect_lora(words[0])
    ranks = Counter(layer.rank for layer in found.layers)
    scales = sorted({layer.alpha / layer.rank for layer in found.layers})
    parameters = sum(layer.rank * (layer.in_features + layer.out_features) for layer in found.layers)
    folded = {
        True: "yes: the offset of the initialisation is in the file, and ranks are twice those of the training",
        False: "no: the factors are as they were trained",
        None: "not known: the file does not say how it was made",
    }
    facts = {
        "file": str(found.path),
        "format": found.format,
        "layers": f"{len(found.layers)} ({', '.join(f'{name}: {count}' for name, count in found.components.items())})",
        "ranks": ", ".join(f"{rank} ({count} layers)" for rank, count in sorted(ranks.items())),
        "scale": ", ".join(f"{scale:g}" for scale in scales) + " (alpha / rank)",
        "size": f"{parameters:,d} parameters, {found.num_bytes:,d} bytes, {', '.join(sorted(found.dtypes))}",
        "folded": folded[found.folded],
    }
    init = found.provenance.get("init")
    if isinstance(init, dict):
        facts["made by"] = ", ".join(f"{name} {value}" for name, value in init.items())
    for part in ("seeds", "versions"):
        if isinstance(found.provenance.get(part), dict):
            facts[part] = ", ".join(f"{name} {value}" for name, value in found.provenance[part].items())
    if found.other:
        facts["beside"] = f"{len(found.other)} tensors that belong to no layer, such as {found.other[0]}"
    for name, text in facts.items():
        print(f"{name:9s} {text}")
    print(f"\n{'layer':80s} {'rank':>5s} {'alpha':>8s} {'in':>6s} {'out':>6s}")
    for layer in found.layers:
        print(f"{layer.name:80s} {layer.rank:5d} {layer.alpha:8g} {layer.in_features:6d} {layer.out_features:6d}")


COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "train": _train,
    "init": _init,
    "compare": _compare,
    "run": _run,
    "methods": _methods,
    "inspect": _inspect,
}

if __name__ == "__main__":
    main()
