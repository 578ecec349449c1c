"""What a run is judged by: curves and sample grids (metrics and the comparison report build on the same files)."""

from lorainit_diffusers.evaluation.plots import plot_loss, sample_grid, smooth
from lorainit_diffusers.evaluation.validation import fixed_noise_loss

__all__ = ["fixed_noise_loss", "plot_loss", "sample_grid", "smooth"]
