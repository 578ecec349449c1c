"""What the main function of every command is run by."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from lorainit_diffusers.training.messages import in_flags

# How long a process that is not the main one waits before it speaks, in seconds: a launcher that sees another one end
# stops it first, so that one mistake that all have made is told once.
_MAIN_FIRST_S, _OTHERS_FIRST_S = 2.0, 4.0
# What an exchange between processes fails with when one of them is gone.
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")


def run_script(main: Callable[[], object]) -> None:
    """Run a script's main; a user's mistake ends it with one line `error: ...` and exit code 2.

    Parameters of the library that the error names are flags in that line (see `messages`). Set the environment variable
    `LORAINIT_TRACEBACK=1` to see where the error came from.

    Of several processes, one that fails ends at once, whatever its error, so that no other one waits for it.
    """
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("LORAINIT_TRACEBACK") == "1":
            raise
        line = "error: " + " ".join(in_flags(str(error)).split())
        if _num_processes() > 1:
            _end_process(line, code=2)
        print(line, file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if _num_processes() == 1:
            raise
        process = f"process {os.environ.get('RANK', '0')} of {_num_processes()}"
        if any(text in str(error).lower() for text in _LOST):
            time.sleep(_OTHERS_FIRST_S)
            _end_process(f"error: {process} has lost another one, whose own message says why it ended", code=1)
        told = "".join(traceback.format_exception(error))
        _end_process(f"{told}error: {process}: {type(error).__name__}: {' '.join(str(error).split())}", code=1)


def _num_processes() -> int:
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdigit() else 1


def _end_process(text: str, code: int) -> NoReturn:
    """Say why, and end without what Python does at an exit, which may wait for the other processes."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_MAIN_FIRST_S)
    sys.stdout.flush()
    sys.stderr.flush()
    # in one piece, and not behind the progress bar of another process
    os.write(2, f"\n{text}\n".encode(errors="replace"))
    os._exit(code)
