"""What a comparison needs beside what training needs."""

from __future__ import annotations

import importlib.util


def require_pandas() -> None:
    """See that the tables of a comparison can be read and written.

    Raises:
        ValueError: Naming the extra that pandas comes with.
    """
    if importlib.util.find_spec("pandas") is None:
        raise ValueError(
            "a comparison needs the package pandas for its tables, which is not installed; "
            'pip install "lorainit-diffusers[eval]"'
        )
