"""Names of the first version, for programs that import them; what they name is in `lorainit_diffusers.training`."""

from lorainit_diffusers.training.loop import backward_step, train_steps
from lorainit_diffusers.training.optimization import Optimization, WeightAverage

__all__ = ["Optimization", "WeightAverage", "backward_step", "train_steps"]
