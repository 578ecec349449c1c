"""Seeds: every random draw of a run is a function of the run's seed and of what is drawn."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that is a function of all its parts, for example `derive_seed(seed, "noise", step, process)`.

    Every random draw of a run gets its generator from such a seed, so a resumed run needs the step number only.
    """
    text = "/".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))
