"""What the main function of every command is run by."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from lorainit_diffusers.training.messages import in_flags


def run_script(main: Callable[[], object]) -> None:
    """Run a script's main; a user's mistake ends it with one line `error: ...` and exit code 2.

    Parameters of the library that the error names are flags in that line (see `messages`). Set the environment variable
    `LORAINIT_TRACEBACK=1` to see where the error came from.
    """
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("LORAINIT_TRACEBACK") == "1":
            raise
        print("error: " + " ".join(in_flags(str(error)).split()), file=sys.stderr)
        raise SystemExit(2) from None
