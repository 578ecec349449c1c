"""Checkpoints of a loop that is attached to: the adapters exactly, and never a start computed anew.

`save_state` gets one more file. `load_state` reads it twice: before the script's own hooks, whose files have the shapes
of the run that wrote them, offset included, and after them, because this file has the last word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from lorainit_diffusers.export.checkpoint_hooks import ADAPTER_STATE_NAME, read_adapters, write_adapters
from lorainit_diffusers.in_loop.still import replaced
from lorainit_diffusers.in_loop.written import WrittenFiles


class Checkpoints:
    """What `save_state` and `load_state` of an accelerator do, until `stop`.

    Args:
        accelerator: Of the loop.
        adapter_name: PEFT's name of the adapters.
        files: Which are told that they are written inside a checkpoint.
        initialised: Component -> module; nothing while they have no initialisation.
        modules: The same, at any time.
        loaded: Called with the checkpoint, or with `None` for one without the file.
        may_reshape: Whether the ranks may still change.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        adapter_name: str,
        files: WrittenFiles,
        *,
        initialised: Callable[[], Mapping[str, nn.Module]],
        modules: Callable[[], Mapping[str, nn.Module]],
        loaded: Callable[[Path | None], None],
        may_reshape: Callable[[], bool],
    ) -> None:
        self._accelerator = accelerator
        self._adapter_name = adapter_name
        self._modules = modules
        self._loaded = loaded
        self._may_reshape = may_reshape
        self._scope = ExitStack()
        load_state, save_state = accelerator.load_state, accelerator.save_state

        def write(models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
            if initialised():
                write_adapters(accelerator, initialised(), output_dir, adapter_name)

        def save(*args: Any, **kwargs: Any) -> Any:
            with files.checkpoint():
                return save_state(*args, **kwargs)

        self._scope.callback(accelerator.register_save_state_pre_hook(write).remove)
        self._scope.enter_context(replaced(accelerator, "save_state", save))
        self._scope.enter_context(
            replaced(accelerator, "load_state", lambda *args, **kwargs: self._load(load_state, *args, **kwargs))
        )

    def stop(self) -> None:
        """Leave the accelerator as it was."""
        self._scope.close()

    def _load(self, load_state: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        folders: list[Path] = []
        same_ranks = not self._may_reshape()

        def read(folder: str | Path) -> None:
            read_adapters(self._modules(), folder, self._adapter_name, same_ranks=same_ranks)

        def read_first(models: list[nn.Module], input_dir: str) -> None:
            if (Path(input_dir) / ADAPTER_STATE_NAME).is_file():
                folders.append(Path(input_dir))
                read(input_dir)

        handle = self._accelerator.register_load_state_pre_hook(read_first)
        hooks: Any = getattr(self._accelerator, "_load_model_state_pre_hook")  # noqa: B009
        hooks.move_to_end(handle.id, last=False)
        try:
            result = load_state(*args, **kwargs)
        finally:
            handle.remove()
        for folder in folders:
            read(folder)
        self._loaded(folders[0] if folders else None)
        return result
