"""How the LoRA starts, and what gets one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from lorainit_diffusers.ranges import COUNT, POSITIVE, SEED, SHARE_BELOW_ONE
from lorainit_diffusers.training.choices import init_names
from lorainit_diffusers.training.options.fields import DefaultOf, MayChange, Options, Place, option
from lorainit_diffusers.training.ranges import LEARNING_RATE, RANK


@dataclass(frozen=True, kw_only=True)
class InitOptions(Options):
    """How the LoRA starts."""

    _argument_group_name = "initialisation"

    init: str = option("cntlora", f"one of {', '.join(init_names())} (default cntlora)")
    init_num_batches: Annotated[int, COUNT] = option(64, "batches that the collection pass sees (default 64)")
    init_batch_size: Annotated[int, COUNT, DefaultOf("train_batch_size")] = option(
        None, "their size (default: train_batch_size)"
    )
    init_seed: Annotated[int, SEED, DefaultOf("seed")] = option(
        None, "seed of the collection pass and of random initialisations (default: seed)"
    )
    init_option: list[str] = option(
        [], "of the method; `help` lists them; give one a flag", metavar="KEY=VALUE", action="extend"
    )
    init_mask_padding: bool = option(
        True, "leave the padding tokens of the text encoders out of the statistics (default: on)"
    )
    init_memory_budget_gb: Annotated[float | None, replace(POSITIVE, remedy="leave it out for auto")] = option(
        None, "of the statistics; wide layers are sketched beyond it (default: auto)"
    )
    init_statistics_device: str | None = option(
        None, "keep the statistics there (default: where the layers are)", choices=("cpu",)
    )
    init_only: bool = option(False, "write the initialised LoRA, its report and an init file, and stop")
    init_from: Annotated[str | None, Place("init file")] = option(
        None, "start from this init file (of --init_only) instead of collecting; it decides init, rank and the like"
    )
    variable_rank: bool = option(False, "give each layer a rank by its scores, under the budget")
    rank_budget: Annotated[int | None, COUNT] = option(
        None, "sum of the ranks with --variable_rank (default: rank x layers)"
    )
    max_rank: Annotated[int | None, RANK] = option(
        None, "largest rank of a layer with --variable_rank (default: twice the rank)"
    )
    dry_run: Annotated[bool, MayChange("trains nothing")] = option(
        False, "print layers, ranks, parameters and memory, and stop; trains nothing"
    )

    @property
    def trains(self) -> bool:
        """Whether the run goes on after the initialisation."""
        return not (self.init_only or self.dry_run)


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """The adapters."""

    _argument_group_name = "LoRA"

    rank: Annotated[int, RANK] = option(8, "rank of every layer, or on average with --variable_rank (default 8)")
    lora_alpha: Annotated[
        float, replace(POSITIVE, remedy="leave it out for the rank, which is the scale 1"), DefaultOf("rank", float)
    ] = option(None, "numerator of the scale alpha / rank (default: the rank, so that the scale is 1)")
    lora_dropout: Annotated[float, SHARE_BELOW_ONE] = option(0.0, "dropout before the adapters (default 0)")
    use_rslora: bool = option(False, "scale by alpha / sqrt(rank)")
    lora_layers: str | None = option(None, "comma-separated names or name endings of the layers (default: attention)")

    @property
    def layer_names(self) -> list[str] | None:
        """The names in `--lora_layers`; `None` where it is not given."""
        return None if self.lora_layers is None else self.lora_layers.replace(",", " ").split()


@dataclass(frozen=True, kw_only=True)
class TextEncoderOptions(Options):
    """Adapters on the text encoders of a text-to-image base."""

    _argument_group_name = "text encoders"

    train_text_encoder: bool = option(False, "LoRA on the text encoders' attention, too")


@dataclass(frozen=True, kw_only=True)
class TextEncoderRateOptions(Options):
    """How fast the adapters of the text encoders are trained."""

    _argument_group_name = "text encoders, training"

    text_encoder_lr: Annotated[float, LEARNING_RATE, DefaultOf("learning_rate")] = option(
        None, "learning rate of the text encoders (default: learning_rate); 0 freezes"
    )


@dataclass(frozen=True, kw_only=True)
class HeadOptions(Options):
    """Modules that are trained in full."""

    _argument_group_name = "head"

    head_lr: Annotated[float, LEARNING_RATE, DefaultOf("learning_rate")] = option(
        None, "learning rate of what is trained in full (default: learning_rate); 0 freezes"
    )
