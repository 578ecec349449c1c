"""What a script writes with diffusers' `save_lora_weights`, seen to while it writes it.

An adapter with initial factors is, to everything that reads a state dict, a LoRA of rank 2r whose halves nearly cancel.
Such a file is right in float32, with its alphas. Three things that scripts do, or leave out, would make it wrong in
silence, and are mended here: tensors that the script has rounded to 16 bits, in which what was trained is lost;
metadata left out where alpha is not the rank; and a file of kohya's names left out, without which ComfyUI passes over
layers of Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor, nn

from lorainit_diffusers import adapters
from lorainit_diffusers.export import (
    DIFFUSERS_WEIGHT_NAME,
    KOHYA_WEIGHT_NAME,
    save_diffusers_lora,
    save_kohya_lora,
)


class WrittenFiles:
    """Mends the LoRA files that diffusers writes for these modules, until `stop`.

    Args:
        modules: Gives component -> module; nothing while they have no initialisation.
        adapter_name: PEFT's name of the adapter.
        say: Prints a line.
    """

    def __init__(
        self, modules: Callable[[], Mapping[str, nn.Module]], adapter_name: str, say: Callable[[str], None]
    ) -> None:
        self._modules = modules
        self._adapter_name = adapter_name
        self._say = say
        self._in_checkpoint = False
        self._original: Any = vars(LoraBaseMixin)["write_lora_layers"]
        LoraBaseMixin.write_lora_layers = staticmethod(self._write)  # type: ignore[method-assign]
        self._own: Any = vars(LoraBaseMixin)["write_lora_layers"]

    def stop(self) -> None:
        """Let diffusers write as before."""
        if vars(LoraBaseMixin)["write_lora_layers"] is self._own:
            LoraBaseMixin.write_lora_layers = self._original  # type: ignore[method-assign]

    @contextmanager
    def checkpoint(self) -> Generator[None, None, None]:
        """What is written inside the block is part of a checkpoint: no further formats."""
        self._in_checkpoint = True
        try:
            yield
        finally:
            self._in_checkpoint = False

    def _write(
        self,
        state_dict: dict[str, Tensor],
        save_directory: Any,
        is_main_process: bool,
        weight_name: str | None,
        save_function: Any,
        safe_serialization: bool,
        lora_adapter_metadata: dict[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        written = {key.partition(".")[0] for key in state_dict}
        modules = {name: module for name, module in self._modules().items() if name in written}
        own = {name: adapters.adapter_weights(module, self._adapter_name) for name, module in modules.items()}
        scaled = any(weights.scaling != 1 for layers in own.values() for weights in layers.values())
        if modules and safe_serialization and not lora_adapter_metadata and save_function is None and scaled:
            lora_adapter_metadata = {
                f"{component}.{key}": value
                for component, module in modules.items()
                for key, value in _config(module, self._adapter_name).items()
            }
            self._say("alpha is not the rank, and the script writes no metadata: added, so that readers know the alpha")
        offset = {name for name, layers in own.items() if any(w.offset is not None for w in layers.values())}
        rounded = next(
            (key for key, value in state_dict.items() if _narrow(value) and key.partition(".")[0] in offset), ""
        )
        folder = Path(save_directory)
        if rounded:
            self._write_exactly(rounded, str(state_dict[rounded].dtype), written, modules, folder, weight_name)
            result = None
        else:
            result = self._original.__func__(
                state_dict=state_dict,
                save_directory=save_directory,
                is_main_process=is_main_process,
                weight_name=weight_name,
                save_function=save_function,
                safe_serialization=safe_serialization,
                lora_adapter_metadata=lora_adapter_metadata,
                **others,
            )
        if modules and not self._in_checkpoint and set(modules) == written:
            self._write_kohya(modules, folder)
        return result

    def _write_exactly(
        self,
        key: str,
        dtype: str,
        written: set[str],
        modules: Mapping[str, nn.Module],
        folder: Path,
        weight_name: str | None,
    ) -> None:
        """The file from the live adapters, in place of rounded tensors."""
        dtype = dtype.removeprefix("torch.")
        if set(modules) != written:
            raise ValueError(
                f"{key!r} was rounded to {dtype} before it was saved, in which what was trained on top of the initial "
                f"factors is lost, and {', '.join(sorted(written - modules.keys()))} beside it is not known here: "
                "save in float32"
            )
        name = weight_name or DIFFUSERS_WEIGHT_NAME
        (folder / name).unlink(missing_ok=True)
        save_diffusers_lora(modules, folder, weight_name=name, adapter_name=self._adapter_name)
        self._say(
            f"the script rounds its LoRA to {dtype}, in which what was trained on top of the initial factors would be "
            f"lost: {folder / name} holds the float32 factors instead"
        )

    def _write_kohya(self, modules: Mapping[str, nn.Module], folder: Path) -> None:
        unet = modules.get("unet")
        config = getattr(adapters.unwrap(unet), "config", None) if unet is not None else None
        # Stable Diffusion 1 and 2, and XL: other models have no kohya names, or others than ours
        if config is None or getattr(config, "addition_embed_type", "") not in (None, "text_time"):
            return
        path = folder / KOHYA_WEIGHT_NAME
        try:
            save_kohya_lora(modules, path, adapter_name=self._adapter_name)
        except ValueError as error:
            self._say(f"no file of kohya's names: {error}")
        else:
            self._say(f"{path} is the same LoRA for ComfyUI, A1111 and sd-scripts")


def _narrow(value: Tensor) -> bool:
    return value.is_floating_point() and value.itemsize < 4


def _config(module: nn.Module, adapter_name: str) -> dict[str, Any]:
    config = adapters.config_of(module, adapter_name)
    assert config is not None
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
