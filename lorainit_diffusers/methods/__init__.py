"""The initialisations, by the name that the command line knows them by.

A new one is one file here, with a frozen dataclass that fulfils `Initializer`,
and one line in `METHODS`.
"""

from __future__ import annotations

from lorainit_diffusers.methods.base import Initializer, LoraFactors, Observes, Solution, StepZero
from lorainit_diffusers.methods.cntlora import CNTLoRA
from lorainit_diffusers.methods.corda import CorDA
from lorainit_diffusers.methods.eva import EVA
from lorainit_diffusers.methods.gaussian import Gaussian
from lorainit_diffusers.methods.gradient_step import GradientStep, GradientWhitened
from lorainit_diffusers.methods.kaiming import Kaiming
from lorainit_diffusers.methods.lora_ga import LoraGA
from lorainit_diffusers.methods.milora import MiLoRA
from lorainit_diffusers.methods.olora import OLoRA
from lorainit_diffusers.methods.orthogonal import Orthogonal
from lorainit_diffusers.methods.orthonormal import Orthonormal
from lorainit_diffusers.methods.pissa import PiSSA

METHODS: dict[str, type[Initializer]] = {
    "cntlora": CNTLoRA,
    "eva": EVA,
    "lora_ga": LoraGA,
    "gradient_step": GradientStep,
    "gradient_whitened": GradientWhitened,
    "corda": CorDA,
    "pissa": PiSSA,
    "olora": OLoRA,
    "milora": MiLoRA,
    "orthonormal": Orthonormal,
    "orthogonal": Orthogonal,
    "gaussian": Gaussian,
    "kaiming": Kaiming,
}

__all__ = ["METHODS", "Initializer", "LoraFactors", "Observes", "Solution", "StepZero"]
