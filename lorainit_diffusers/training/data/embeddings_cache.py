"""Embeddings of captions that are kept on disk, so that a large text encoder runs once for all runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lorainit_diffusers.families.text_to_image import TextToImageFamily
from lorainit_diffusers.files import save_tensors


class EmbeddingsCache:
    """`embed_captions` of a family, which encodes only what the folder does not hold.

    A file holds one caption. Its name is a digest of the base, the dtype and the caption's tokens, which have the
    family's template and length in them: another base, template, length or precision finds none of these files.

    Args:
        folder: Made where it does not exist.
        family: With its text encoders.
        base: What the base is, as `base_identity` has it.
    """

    def __init__(self, folder: str | Path, family: TextToImageFamily, base: Mapping[str, Any]) -> None:
        self._folder, self._family = Path(folder), family
        self._base = json.dumps([family.NAME, str(family.weight_dtype), base], sort_keys=True).encode()

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`EMBEDS` of all captions, on the CPU in the weight dtype.

        Raises:
            ValueError: When a file holds something else than the embeddings of a caption.
        """
        files = self._files(captions)
        missing = [place for place, file in enumerate(files) if not file.is_file()]
        if missing:
            made = self._family.embed_captions([captions[place] for place in missing])
            self._folder.mkdir(parents=True, exist_ok=True)
            for row, place in enumerate(missing):
                # a copy: a row of all of them would be saved with the rest
                save_tensors({name: values[row : row + 1].clone() for name, values in made.items()}, files[place])
        rows = [self._load(file) for file in files]
        return {name: torch.cat([row[name] for row in rows]) for name in self._family.EMBEDS}

    def _files(self, captions: Sequence[str]) -> list[Path]:
        columns = self._family.caption_inputs(captions)
        found: list[Path] = []
        for row in range(len(captions)):
            digest = hashlib.sha256(self._base)
            for name in sorted(columns):
                values = columns[name][row].contiguous()
                digest.update(f"{name} {tuple(values.shape)}".encode())
                digest.update(values.numpy().tobytes())
            found.append(self._folder / f"{digest.hexdigest()[:32]}.safetensors")
        return found

    def _load(self, file: Path) -> dict[str, Tensor]:
        try:
            row = load_file(file)
        except Exception as error:  # safetensors has no class of its own for what it cannot read
            raise ValueError(f"cannot read the embeddings {str(file)!r}: {error}; delete the file") from error
        if row.keys() != set(self._family.EMBEDS):
            raise ValueError(f"{str(file)!r} holds {', '.join(row)}, no embeddings of a caption; delete the file")
        return row
