"""What an option is when nobody gives it, for options that an older checkpoint does not know."""

from __future__ import annotations

import argparse
from typing import Any


class OptionDefaults:
    """The defaults of a parser's options, those that are added later included."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._parser = parser

    def __call__(self, name: str) -> Any:
        """The default of an option; None where there is no such option."""
        return self._parser.get_default(name)

    def __contains__(self, name: object) -> bool:
        return any(action.dest == name for action in self._parser._actions)
