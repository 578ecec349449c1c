"""What is known of the data behind prepared loaders: enough to tell that another run has other data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch

from lorainit_diffusers.in_loop.rewind import RandomState

# Examples that are looked at: the first, the middle one and the last.
PLACES = (0.0, 0.5, 1.0)


def data_key(loaders: Iterable[Any]) -> dict[str, Any]:
    """Number of examples and a fingerprint of three of them, of the largest data set; empty where it is a stream.

    Random crops and captions are drawn from a fixed seed, and the caller's random state is left as it is.
    """
    datasets = [dataset for loader in loaders if (dataset := getattr(loader, "dataset", None)) is not None]
    lengths = [_length(dataset) for dataset in datasets]
    if not any(lengths):
        return {}
    dataset, count = max(zip(datasets, lengths, strict=True), key=lambda pair: pair[1])
    state = RandomState([])
    digest = hashlib.sha256()
    try:
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        for place in PLACES:
            _feed(digest, dataset[round(place * (count - 1))])
    except Exception:  # a data set that cannot be indexed, or whose examples are read elsewhere
        return {"number_of_examples": count}
    finally:
        state.restore()
    return {"number_of_examples": count, "fingerprint": digest.hexdigest()[:16]}


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        return 0


def _feed(digest: Any, value: Any) -> None:
    """Add a nested example to a digest; what is neither data nor text counts by its type only."""
    if isinstance(value, torch.Tensor):
        digest.update(str(tuple(value.shape)).encode())
        digest.update(value.detach().cpu().to(torch.float64).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, item in sorted(cast("Mapping[Any, Any]", value).items(), key=lambda pair: str(pair[0])):
            digest.update(str(key).encode())
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        for item in cast("list[Any]", value):
            _feed(digest, item)
    elif hasattr(value, "tobytes") and hasattr(value, "size"):  # PIL's images
        digest.update(value.tobytes())
    elif isinstance(value, (str, int, float, bool, bytes, type(None))):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__name__.encode())
