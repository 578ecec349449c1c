"""The initialisations and their options in words: the answer of a command line, and the tables of docs/methods.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from lorainit_diffusers.methods.describe import describe_methods, method_options


def describe_options(name: str) -> str:
    """All options of an initialisation in one line."""
    options = [f"{option.key} ({option.values}; default {option.default})" for option in method_options(name)]
    return f"init {name} has the options {', '.join(options)}" if options else f"init {name} has no options"


def options_table(name: str) -> str:
    """The options of an initialisation as a table in Markdown."""
    rows = [
        f"| `{option.key}` | {option.values} | `{option.default}` | {option.meaning} |"
        for option in method_options(name)
    ]
    return _table(["key", "values", "default", "meaning"], rows) if rows else "No options."


def methods_table() -> str:
    """All initialisations, what they look at, need and cost, and where they come from, as a table in Markdown."""
    rows: list[str] = []
    for method in describe_methods():
        zero = " ".join(f"{key}={value}" for key, value in method.zero_delta.items())
        step_zero = f"`{method.step_zero}`" + (f" (`equal` with `{zero}`)" if zero else "")
        needs = "; ".join(method.needs) or "nothing"
        ranks = "yes" if method.gives_scores else "no"
        cells = [f"`{method.name}`", method.summary, method.observes, needs, step_zero, ranks, method.cost]
        rows.append(f"| {' | '.join([*cells, method.source])} |")
    head = ["init", "what it does", "observes", "needs", "step 0", "variable ranks", "cost", "source"]
    return _table(head, rows)


def document(page: str) -> str:
    """A page with its tables as they are now.

    They stand between `<!-- initialisations -->` or `<!-- options of NAME -->` and `<!-- end -->`.
    """

    def renewed(make_table: Callable[[str], str]) -> Callable[[re.Match[str]], str]:
        return lambda match: f"<!-- {match[1]} -->\n\n{make_table(match[2] or '')}\n\n<!-- end -->"

    page = re.sub(r"<!-- (initialisations()) -->.*?<!-- end -->", renewed(lambda _: methods_table()), page, flags=re.S)
    return re.sub(r"<!-- (options of (\w+)) -->.*?<!-- end -->", renewed(options_table), page, flags=re.S)


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])
